"""Every option of every group composes, is well typed, and names only what exists."""

import re
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import hydra
import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from autotune.config import command_line, schema
from autotune.config.overrides import typed
from autotune.errors import InputError, TrackingError
from autotune.measure import trial
from autotune.measure.prepare import configured_flags
from autotune.results import tracking
from autotune.sim.shape import Shape
from autotune.text import one_line
from tests.conftest import Main
from tests.studies import configured

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in command_line.CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"
}


def together() -> list[list[str]]:
    """Each option of each group once, the first of all groups together, then the second: composing takes a while."""
    rows = []
    for row in zip_longest(*GROUPS.values()):
        chosen = {group: option for group, option in zip(GROUPS, row, strict=True) if option}
        words = [f"{group}=[{option}]" if group == "space" else f"{group}={option}" for group, option in chosen.items()]
        words += ["scenario.ttft_ms=500", "scenario.tpot_ms=30"]  # of which MLPerf has none for most models
        rows.append([*words, *(["model=tiny"] if "model" not in chosen else [])])
    return rows


@pytest.fixture(scope="module", autouse=True)
def registered():
    command_line.register()


def composed(*overrides: str) -> schema.Config:
    with hydra.initialize_config_dir(str(command_line.CONF)):
        return typed(hydra.compose("config", overrides=list(overrides), return_hydra_config=True))


@pytest.mark.parametrize("options", together())
def test_options_compose_and_their_targets_exist(options: list[str]):
    config = composed(*options)
    for node in (config.model.build, config.dataset.records, config.backend, config.launcher):
        if node:
            assert callable(get_method(node["_target_"]))


@pytest.mark.parametrize(
    ("group", "option", "fields"),
    [
        ("backend", "live", {"start_timeout_s": 5.0, "env.X": "1"}),
        ("backend", "sim", {"device.link_gbs": 30.0}),
        ("launcher", "gpus", {"n_jobs": 2}),
        ("launcher", "slurm", {"n_jobs": 2, "parameters.slurm_partition": "gpu", "parameters.slurm_qos": "mine"}),
        ("prior", "sim", {"keep": 3, "backend.pace": 2.0}),
        ("tracking", "mlflow", {"system_metrics_s": 0.0}),
    ],
)
def test_field_is_set_without_a_plus(group: str, option: str, fields: dict[str, object]):
    config = composed("model=tiny", f"{group}={option}", *(f"{group}.{key}={value}" for key, value in fields.items()))
    made = OmegaConf.structured(config)
    assert {key: OmegaConf.select(made, f"{group}.{key}") for key in fields} == fields


def test_options_take_in_the_schemas_defaults():
    live, slurm = composed("model=tiny").backend, composed("model=tiny", "launcher=slurm").launcher
    defaults = {"_target_": live["_target_"], "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    assert live == asdict(schema.LiveConfig(**defaults))
    assert slurm == asdict(schema.ClusterConfig(slurm["_target_"], parameters=slurm["parameters"]))


@pytest.mark.parametrize(
    ("model", "server", "interactive"),
    [
        ("llama8b", (2000, 100), (500, 30)),
        ("llama8b_dummy", (2000, 100), (500, 30)),
        ("llama2_70b", (2000, 200), (450, 40)),
        ("llama405b", (6000, 175), (4500, 80)),
        ("deepseek_r1", (2000, 80), (1500, 15)),
        ("gpt_oss_120b", (3000, 80), (2000, 15)),
    ],
)
def test_limits_follow_the_model(model: str, server: tuple[float, float], interactive: tuple[float, float]):
    for name, limits in (("server", server), ("interactive", interactive)):
        made = composed(f"model={model}", f"scenario={name}").scenario
        assert (made.ttft_ms, made.tpot_ms) == limits
    assert composed(f"model={model}", "scenario=server", "scenario.ttft_ms=9").scenario.ttft_ms == 9


@pytest.mark.parametrize("model", ["smollm2", "gpt_oss_20b", "qwen3_30b_a3b", "llama70b", "custom"])
@pytest.mark.parametrize("scenario", ["server", "interactive"])
def test_model_that_mlperf_does_not_list_asks_for_limits(model: str, scenario: str):
    words = [f"model={model}", "model.path=org/custom", f"scenario={scenario}"]
    with pytest.raises(OmegaConfBaseException) as told:
        composed(*words)
    name = "custom" if model == "custom" else model
    assert one_line(told.value) == (
        f"scenario.ttft_ms: MLPerf has no limits for {name}; write scenario.ttft_ms=<ms> scenario.tpot_ms=<ms> "
        "(null for none), or a workload (workload=chat)"
    )
    made = composed(*words, "scenario.ttft_ms=300", "scenario.tpot_ms=null").scenario
    assert (made.ttft_ms, made.tpot_ms) == (300, None)


@pytest.mark.parametrize("model", GROUPS["model"])
def test_model_says_whence_its_recipe_is(model: str):
    recipe = composed(f"model={model}").model.recipe
    said = recipe.source.startswith("github.com/") and re.fullmatch(r"\d{4}-\d\d-\d\d", recipe.date)
    assert said or not recipe.args


@pytest.mark.parametrize("model", [name for name in GROUPS["model"] if name not in ("custom", "smollm2")])
def test_model_is_simulated_or_refused_in_one_line(model: str):
    config = composed(f"model={model}").model
    body = config.shape or config.build
    try:
        assert Shape.of({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **body}).layers > 0
    except InputError as error:
        assert model in ("gemma", "qwen3_6_35b_a3b") and "backend=sim knows decoders" in str(error)
    else:
        assert model not in ("gemma", "qwen3_6_35b_a3b")


def test_workload_is_a_data_set_a_scenario_and_an_objective_of_which_each_can_be_changed():
    chat = composed("model=llama8b", "workload=chat")
    assert (chat.dataset.name, chat.scenario.ttft_ms, chat.objective.metrics) == ("chat", 1000, ["max_qps"])
    assert "enable_prefix_caching" not in configured_flags(chat) and configured_flags(chat)["max_model_len"] == 8192
    other = composed("model=llama8b", "workload=chat", "dataset=cnn_small", "scenario.tpot_ms=20", "objective=goodput")
    assert (other.dataset.name, other.scenario.tpot_ms, other.objective.name) == ("cnn_small", 20, "goodput")
    assert composed("model=llama8b", "workload=rag", "scenario=interactive").scenario.ttft_by_prompt == []


def test_only_mlperfs_rules_switch_prefix_caching_off():
    assert configured_flags(composed("model=llama8b", "workload=mlperf"))["enable_prefix_caching"] is False


def test_any_vllm_flag_is_a_field():
    config = composed("model=tiny", "engine.args.kv_cache_dtype=fp8", "engine.args.compilation_config.mode=3")
    assert config.engine.args == {"kv_cache_dtype": "fp8", "compilation_config": {"mode": 3}}


def test_spaces_combine():
    _, params, _ = command_line.compose(["model=tiny", "space=[memory,quantization]"])
    assert {"engine.args.block_size", "engine.args.kv_cache_dtype"} <= set(params)


def test_help_shows_groups_and_examples(main: Main):
    shown = main("--help").stdout
    for group in GROUPS:
        assert f"\n{group}: " in shown
    assert re.search(r"^scenario.search.precision +a load that is higher than the certified one", shown, re.MULTILINE)
    assert re.search(
        r"^backend.hot +backend=live: auto \\| same \\| never: whether trials share a server", shown, re.MULTILINE
    )
    assert re.search(r"^scenario.min_queries", shown, re.MULTILINE) and "_target_  " not in shown
    assert all(f"\n{example}: " in shown for example in ("One trial", "A study", "Your own"))


def test_cfg_job_shows_the_composed_trial(main: Main):
    assert "max_num_seqs: 7" in main("model=tiny", "engine.args.max_num_seqs=7", "--cfg", "job").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=tinyy"], "model=tinyy: there is no such option; did you mean tiny? model has custom, deepseek_r1"),
        (["space=[scheduler,memry]"], "space=memry: there is no such option; did you mean memory? space has all"),
        (["backend=sim", "backend/device=h10"], "backend/device=h10: there is no such option; did you mean h100? "),
        (["backend/device=h100"], "backend/device: write backend=sim, too"),
        (["backend/device@prior.backend.device=h100"], "backend/device@prior.backend.device: write prior=sim, too"),
        (["space@foo=all"], "space@foo: nothing that is chosen has options of that name; see --help"),
        (["device=h200"], "device: a group; write backend/device=<one of a100, cpu, h100, h200, l40s>"),
        (["backend.device=h200"], "backend.device: a group; write backend/device=<one of a100, cpu"),
        (["backend=sim", "backend.device=h200"], "backend.device: a group; write backend/device=<one of a100, cpu"),
        (
            ["prior=sim", "prior.backend.device=h200"],
            "prior.backend.device: a group; write backend/device@prior.backend.device=<one of a100, cpu",
        ),
        (["backend=sim", "~backend/device"], "backend.device.name: no value; write backend/device=<one of a100, cpu"),
        (
            ["prior=sim", "~backend/device@prior.backend.device"],
            "prior.backend.device.name: no value; write backend/device@prior.backend.device=<one of a100, cpu",
        ),
        (["study=???"], "study: no value; write study=<value>"),
        (["model.name=???"], "model.name: no value; write model.name=<value>"),
        (["hydra.run.dir=null"], "hydra.run.dir=null: write a folder, or leave it out"),
        (["load.users=3"], "load: a group; write load=<one of concurrency, rate>"),
        (["scenario.load=rate"], "scenario.load: a group; write load=<one of concurrency, rate>"),
        (["sampler.name=tpe"], "sampler: a group; write sampler=<one of auto, botorch, "),
        (["model/path=x"], "model/path: there is no such field; did you mean model.path?"),
        (["model/foo=x"], "model/foo: there is no such field; only a group has a slash; see --help"),
        (["engine.foo=1"], "engine.foo: there is no such field; it has args"),
        (["n_trials=abc"], "n_trials=abc: write a whole number from 1 to 10000000"),
        (["scenario.qps=null"], "scenario.qps=null: write a number above 0, at most 1000000"),
        (["scenario.ttft_ms=[1]"], "scenario.ttft_ms=[1]: write a number above 0, at most 2147483647, or null"),
        (["budget={a:1}"], "budget={'a': 1}: write a duration such as 30m or 2h, at most 1000d, or null"),
        (["resume=maybe"], "resume=maybe: write true or false"),
        (["model.revision=[a]"], "model.revision=['a']: write a text, or null"),
        (["budget_of=hours"], "budget_of=hours: write one of engine, wall"),
        (["secrets=foo"], "secrets=foo: write a list: secrets=[…]"),
        (["scenario.seeds=[1,b,3]"], "scenario.seeds[1]=b: write a whole number from 0 to 2147483647"),
        (["scenario.ttft_by_prompt={a:1}"], "scenario.ttft_by_prompt: write a list: scenario.ttft_by_prompt=[…]"),
        (["engine.args=[1]"], "engine.args: write its fields: engine.args.<name>=<value>"),
        (["model.recipe=3"], "model.recipe=3: write its fields: model.recipe.args=…, model.recipe.source=…"),
        (["scenario.qps.x=1"], "scenario.qps={}: write a number above 0"),
        (["~scenario.qps"], "~scenario.qps: a field is always there; write scenario.qps=<value>"),
        (["n_trial=3"], "n_trial: there is no such field; did you mean n_trials?"),
        (
            ["dataset.records.think_s=1"],
            "dataset.records.think_s: there is no such field; did you mean scenario.think_s?",
        ),
        (
            ["engine.max_num_seqs=8"],
            "engine.max_num_seqs: there is no such field; did you mean engine.args.max_num_seqs?",
        ),
        (["+scenario.foo=1"], "scenario.foo: there is no such field; it has name, kind, "),
        (
            ["backend=sim", "backend.device.link=1"],
            "backend.device.link: there is no such field; did you mean link_s?",
        ),
        (["--cfg", "foo"], "argument --cfg/-c: invalid choice: 'foo'"),
        (["--foo"], "unrecognized arguments: --foo; see "),
        (["model=custom"], "no model: write model=smollm2"),
        (["study=a/b"], "study=a/b: write at most 200 letters, digits and"),
        (["scenario.qps=${foo}"], "scenario.qps: Interpolation key 'foo' not found"),
    ],
)
def test_wrong_configuration_is_one_line(main: Main, arguments: list[str], words: str):
    done = main(*arguments, *([] if arguments[0].startswith("model=") else ["model=tiny"]))
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.startswith("autotune: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["backend.prot=1"], "backend.prot: there is no such field; did you mean port"),
        (
            ["backend=sim", "backend.port=1"],
            "backend.port: there is no such field; another option of backend has it, ",
        ),
        (["backend._target_=none.None"], "backend._target_=none.None: there is no such class; write backend=…"),
        (["backend._target_=autotune.config.schema.SimConfig"], "schema.SimConfig: there is no such class; write"),
        (["launcher.n_jobs=2"], "launcher.n_jobs: there is no such field; another option"),
        (["launcher=slurm", "launcher.canry=1"], "there is no such field; did you mean canary"),
        (["launcher=slurm", "launcher.n_jobs=0"], "launcher.n_jobs=0: write a number from 1 to 100000"),
        (["max_failures=0"], "max_failures=0: write a number from 1 to 10000000"),
        (["secrets=[[a]]"], "secrets=['a']: write one value, no list and no object"),
        (["backend.prefix=[[a]]"], "backend.prefix=['a']: write one value, no list and no object"),
    ],
)
def test_wrong_field_or_value_is_refused(arguments: list[str], words: str):
    with pytest.raises(InputError, match=re.escape(words)):
        configured("model=tiny", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["engine.args.max_num_seq=1"], "no such flag; did you mean max_num_seqs"),
        (["engine.args.kv_cache_dtype=fp9"], "accepts auto, "),
        (["model.args.max_num_seq=1"], "model.args.max_num_seq: vLLM"),
        (["scenario.args.max_num_seqs=a"], "scenario.args.max_num_seqs=a: vLLM"),
        (["dataset.records.seed=a"], "dataset.records.seed=a: write a whole number"),
        (["dataset.records.seed=-1"], "dataset.records.seed=-1: write a whole number from 0"),
        (["dataset.records._target_=os.system"], "dataset.records._target_=os.system: write a function of autotune's"),
        (["engine.args.port=1"], "set by autotune itself; write backend.port instead"),
        (["dataset.path=none.json"], "dataset.path=none.json: No such file"),
        (["dataset.path=broken.jsonl"], "broken.jsonl, record 2: not JSON"),
        (["dataset.path=empty.jsonl"], "dataset empty.jsonl: no records"),
        (["dataset.path=long.jsonl"], "record 1: 5000 prompt + 2 output tokens exceed max_model_len=4096"),
        (["model.path=no/such/model"], "neither a local folder nor a Hub id"),
        (["model.path=./nothing"], "no model there; a model's folder holds a config.json"),
    ],
)
def test_bad_input_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text('{"input": "' + "a" * 5000 + '", "output": "b"}\n')
    config = configured("model=tiny", "dataset=cnn_small", "tracking=none", *arguments)
    with pytest.raises(InputError, match=re.escape(words)):
        trial.run(config, [], tmp_path / "trial")
    assert not (tmp_path / "trial/server.log").exists()


@pytest.mark.parametrize(
    "words",
    [["gpus=foo"], ["model.path=/none"], ["dataset.path=/none"], ["++foo=3"], ["-m", "hydra.sweeper.storage=foo://x"]],
)
def test_what_is_refused_leaves_no_folder(main: Main, tmp_path: Path, words: list[str]):
    done = main(*words, "model=llama8b", "backend=sim", "tracking=none", "study=s")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("**/s"))


@pytest.mark.parametrize("words", [["n_trials=3", "sampler=tpe"], ["space=memory"], ["launcher=gpus", "study=s"], []])
def test_single_trial_tells_what_only_a_study_heeds(main: Main, words: list[str]):
    done = main(*words, "model=tiny", "dataset=cnn_small", "backend=sim", "tracking=none", "scenario.min_queries=8")
    heeded = ", ".join(word for word in words if not word.startswith("study="))
    assert (f"does not heed {heeded}: add -m for a study" in done.stdout) == bool(heeded), done.stdout + done.stderr


def test_tracking_server_that_does_not_answer_is_refused():
    config = configured("model=tiny", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="no MLflow server answers"):
        tracking.check(config.tracking)


@pytest.mark.parametrize("shows", [["--cfg", "job"], ["-c", "hydra"], ["--info"], ["--help"]])
def test_what_only_shows_leaves_out_the_sweep(shows: list[str], capsys: pytest.CaptureFixture[str]):
    study = ["-m", "model=tiny", "engine.args.block_size=choice(16,32)"]
    assert command_line.without_sweep(study) == study
    assert command_line.without_sweep([*study, *shows]) == ["model=tiny", *shows]
    assert "without what is swept: engine.args.block_size=choice(16,32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "choices"),
    [("autotune model=smol", "model=smollm2"), ("autotune plan model=smol", "model=smollm2"), (None, "model=")],
)
def test_shell_completes_words_of_a_study_and_of_a_command(main: Main, line: str | None, choices: str):
    done = main("-sc", "query=bash", **({"COMP_LINE": line} if line else {}))
    assert (done.returncode, done.stderr) == (0, "") and choices in done.stdout.split()


def test_composed_trial_of_a_study_is_shown(main: Main):
    done = main("-m", "model=tiny", "engine.args.block_size=choice(16,32)", "--cfg", "job")
    assert done.returncode == 0 and done.stdout.startswith("study: ")


def test_mlflows_own_variables_are_taken(monkeypatch: pytest.MonkeyPatch):
    assert composed("model=tiny").tracking.uri == "sqlite:///multirun/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    tracking = composed("model=tiny").tracking
    assert (tracking.uri, tracking.experiment) == ("http://host:5000", "ours")
