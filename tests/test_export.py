"""What is exported serves what was measured: each format is read back by what reads it where it is deployed."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import validate
from omegaconf import OmegaConf

from autotune.commands import export, verify
from autotune.commands.export import Export, Format
from autotune.commands.verify import Verify
from autotune.config import vllm_flags
from autotune.config.command_line import compose
from autotune.config.overrides import check_trusted
from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure.result import Result
from autotune.results.study import load
from tests.conftest import Main

WORDS = [
    *("--no-enable-prefix-caching", "--kv-cache-dtype", "fp8", "--max-num-seqs", "256", "--enforce-eager"),
    *("--compilation-config", '{"mode": 3, "custom": "$x"}', "--cudagraph-capture-sizes", "1", "2", "4"),
    *("--tensor-parallel-size", "2", "--data-parallel-size", "2", "--gpu-memory-utilization", "0.9"),
]
ENV = {"VLLM_ATTENTION_BACKEND": "FLASH INFER", "VLLM_CPU_KVCACHE_SPACE": "1", "MY_API_KEY": "***"}


@pytest.fixture(scope="module")
def configuration() -> str:
    """What a trial leaves in config.yaml."""
    config, _, _ = compose(["study=s", "model.path=meta-llama/L", "model.revision=abc"])
    config.backend["env"] = ENV
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@pytest.fixture
def study(tmp_path: Path, configuration: str) -> Path:
    """Two trials and a baseline on GPUs, of which trial-1 is best."""
    for name, value in (("baseline", 10.0), ("trial-0", 9.0), ("trial-1", 12.0)):
        folder = tmp_path / "s" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(configuration)
        Result(
            "complete",
            values=[value],
            params={} if name == "baseline" else {"engine.args.max_num_seqs": int(value)},
            args={"tensor_parallel_size": 2, "data_parallel_size": 2},
            command=["vllm", "serve", "meta-llama/L", "--revision", "abc", *WORDS],
            phases={"start": 400.0},
            facts={"vllm": "0.32.0", "gpu": "NVIDIA H100"},
        ).save(folder)
    return tmp_path / "s"


def exported(study: Path, name: Format, **options: Any) -> str:
    return export.text(Export(str(study), name, **options))


def loaded(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def as_vllm_reads(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A configuration file's flags as vLLM turns them into a command line (its `load_config_file`)."""
    words: list[str] = []
    for name, value in config.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return vllm_flags.groups(words)


LISTEN = [("host", ["127.0.0.1"]), ("port", ["8000"])]


def test_command_is_the_measured_one_and_says_where_it_listens(study: Path):
    line = exported(study, Format.command).splitlines()[-1]
    words = shlex.split(line)
    assert words[:3] == ["env", "VLLM_ATTENTION_BACKEND=FLASH INFER", "vllm"]
    assert words[3:5] == ["serve", "meta-llama/L"]
    assert vllm_flags.groups(words[5:]) == [*vllm_flags.groups(["--revision", "abc", *WORDS]), *LISTEN]


def test_vllm_config_says_the_same_as_the_command(study: Path):
    (config,) = loaded(exported(study, Format.vllm))
    assert config.pop("model") == "meta-llama/L"
    assert as_vllm_reads(config) == [*vllm_flags.groups(["--revision", "abc", *WORDS]), *LISTEN]


def test_compose_file_is_valid_and_serves_the_same(study: Path):
    (body,) = loaded(exported(study, Format.compose))
    validate(body, get_builtin_schema("vendor.compose-spec"))
    (service,) = body["services"].values()
    assert service["image"] == "vllm/vllm-openai:v0.32.0"
    assert service["command"][0] == "meta-llama/L" and '{"mode": 3, "custom": "$$x"}' in service["command"]
    said = [word.replace("$$", "$") for word in service["command"][1:]]
    assert said == ["--revision", "abc", *WORDS, "--host", "0.0.0.0", "--port", "8000"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 4
    assert service["environment"] == {
        "VLLM_ATTENTION_BACKEND": "FLASH INFER", "MY_API_KEY": "${MY_API_KEY:?}", "HF_TOKEN": "${HF_TOKEN:-}"
    }  # fmt: skip


def test_kubernetes_manifests_are_valid_and_serve_the_same(study: Path):
    deployed, service = loaded(exported(study, Format.kubernetes, port=9000))
    for document in (deployed, service):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    pod = deployed["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["args"] == ["meta-llama/L", "--revision", "abc", *WORDS, "--host", "0.0.0.0", "--port", "9000"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    startup = container["startupProbe"]
    assert startup["httpGet"]["path"] == "/health"
    assert startup["failureThreshold"] * startup["periodSeconds"] == 1200  # three times the measured start
    secrets = {
        one["name"]: one["valueFrom"]["secretKeyRef"]["optional"] for one in container["env"] if "valueFrom" in one
    }
    assert secrets == {"MY_API_KEY": False, "HF_TOKEN": True}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["spec"]["volumes"]


@pytest.mark.parametrize("name", [Format.command, Format.vllm, Format.compose, Format.kubernetes])
def test_names_of_secrets_are_not_hidden_in_what_the_command_writes(study: Path, name: Format, main: Main):
    """`HF_TOKEN: '***'` would send three stars to the Hub."""
    text = exported(study, name)
    assert main("export", f"study={study}", f"format={name.value}").stdout == text
    assert main("export", f"study={study}", f"format={name.value}", f"output={study}/out").returncode == 0
    assert (study / "out").read_text() == text


MISREAD = {
    "A": "yes",
    "B": "012",
    "C": "null",
    "D": "~",
    "E": "",
    "F": "two\nlines",
    "G": "a: b # c",
    "H": "$X $(Y)",
    "ON": "1",
}


def test_values_that_yaml_could_misread_stay_text(study: Path):
    config = OmegaConf.load(study / "trial-1/config.yaml")
    config.backend.env = MISREAD
    OmegaConf.save(config, study / "trial-1/config.yaml")
    (service,) = loaded(exported(study, Format.compose))[0]["services"].values()
    assert service["environment"] == {**MISREAD, "H": "$$X $$(Y)", "HF_TOKEN": "${HF_TOKEN:-}"}
    deployed, _ = loaded(exported(study, Format.kubernetes))
    (container,) = deployed["spec"]["template"]["spec"]["containers"]
    written = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    assert written == {**MISREAD, "H": "$X $$(Y)"}


@pytest.mark.parametrize("name", [Format.command, Format.vllm, Format.compose, Format.kubernetes])
def test_hidden_values_are_asked_for_and_never_written(study: Path, name: Format):
    text = exported(study, name)
    assert "***" not in text and "MY_API_KEY" in text


def test_local_model_is_mounted_where_the_command_looks_for_it(study: Path, tmp_path: Path):
    result = Result.load(study / "trial-1")
    result.command[2:5] = [str(tmp_path)]
    result.facts = {"cpu": "x", "vllm": "0.32.0+cpu"}
    result.save(study / "trial-1")
    (body,) = loaded(exported(study, Format.compose))
    (service,) = body["services"].values()
    assert service["volumes"] == [f"{tmp_path}:{tmp_path}:ro"] and service["command"][0] == str(tmp_path)
    assert "deploy" not in service and service["image"].endswith("vllm-cpu-release-repo:v0.32.0")
    assert service["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1" and "HF_TOKEN" not in service["environment"]


def test_best_trial_is_taken_unless_another_is_named(study: Path):
    assert "trial-1" in exported(study, Format.command).splitlines()[0]
    assert "baseline" in exported(study, Format.command, trial="baseline").splitlines()[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"trial": "trial-9"}, "trial=trial-9: s has no such trial; it has baseline, trial-0, trial-1"),
        ({"study": "multirun/nothing"}, "study=multirun/nothing: no such folder"),
    ],
)
def test_what_does_not_exist_is_said(study: Path, changed: dict[str, str], words: str):
    with pytest.raises(InputError, match=words):
        export.text(Export(**{"study": str(study), "format": Format.command, **changed}))


def test_study_is_known_by_a_trial_that_left_its_configuration(study: Path):
    (study / "baseline/config.yaml").unlink()  # its job never began
    found = load(str(study))
    assert (found.name, found.config.study, found.objective.metrics) == ("s", "s", ["tokens_per_s"])


def test_front_has_to_be_chosen_from(study: Path):
    for name, latency in (("baseline", 1.0), ("trial-0", 1.0), ("trial-1", 2.0)):
        result, config = Result.load(study / name), OmegaConf.load(study / name / "config.yaml")
        result.values.append(latency)
        result.save(study / name)
        config.objective.metrics, config.objective.directions = ["tokens_per_s", "x"], ["maximize", "minimize"]
        OmegaConf.save(config, study / name / "config.yaml")
    with pytest.raises(InputError, match=r"has a Pareto front; choose from it: trial=trial-1 \| trial-0"):
        load(str(study)).chosen(None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study=s"], "format= is missing; see --help"),
        (
            ["study=s", "format=helm"],
            "format=helm: write one of command, vllm, compose, kubernetes, diff; see --help",
        ),
        (["study=s", "frmat=vllm"], "frmat: there is no such field; did you mean format?"),
        (["s"], "s: write key=value, or --help"),
        (["study=s", "format=vllm", "port=x"], "port=x: write a whole number from 1 to 65535"),
        (["study=s", "format=vllm", "port=70000"], "port=70000: write a number from 1 to 65535"),
        (["study=s", "format=vllm"], "study=s: no such folder below multirun/"),
    ],
)
def test_wrong_words_are_one_line(main: Main, arguments: list[str], words: str):
    done = main("export", *arguments)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("output", "why"), [(".", "Is a directory"), ("no/such/file", "No such file or directory")])
def test_output_that_can_not_be_written_is_one_line(main: Main, study: Path, output: str, why: str):
    done = main("export", f"study={study}", "format=vllm", f"output={output}")
    assert (done.returncode, done.stderr) == (1, f"autotune: output={output}: {why}; write a file's path\n")


def test_diff_starts_nothing_that_the_studys_folder_names(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    made: list[Config] = []
    monkeypatch.setattr(export, "prepare", lambda config: made.append(config) or pytest.fail("as far as it may come"))
    for file in study.glob("*/config.yaml"):
        text = file.read_text().replace("python: null", f"python: {program}")
        file.write_text(text.replace("prefix: []", f"prefix: [{program}]"))
    with pytest.raises(pytest.fail.Exception):
        exported(study, Format.diff)
    assert not {"python", "prefix", "env"} & made[0].backend.keys() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("group", ["backend", "launcher", "pruner"])
def test_class_that_is_not_autotunes_own_is_not_even_imported(group: str, study: Path):
    for file in study.glob("*/config.yaml"):
        body = OmegaConf.load(file)
        OmegaConf.update(body, f"{group}._target_", "antigravity.Backend")
        OmegaConf.save(body, file)
    with pytest.raises(InputError, match=rf"trial-1: {group}._target_=antigravity.Backend is not autotune's own; add"):
        exported(study, Format.diff)
    words = ["backend.env.MY_API_KEY=x"]
    with pytest.raises(InputError, match="not autotune's own"):
        verify.configurations(load(str(study)), Verify("s"), words)
    assert "antigravity" not in sys.modules
    check_trusted(load(str(study)).config, [f"{group}._target_=antigravity.Backend"], study)


def test_what_looks_like_an_interpolation_in_a_folder_is_text(study: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRIVATE", "4711")
    for file in study.glob("*/config.yaml"):
        file.write_text(file.read_text().replace("path: meta-llama/L", "path: ${oc.env:PRIVATE}"))
    assert load(str(study)).config.model.path == "${oc.env:PRIVATE}"
