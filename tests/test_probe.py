"""probe.py on the installed vLLM: it uses names that vLLM may change, and these tests say which of them broke."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.config.command_line import compose
from autotune.config.vllm_flags import Flag, command_line, recorded
from autotune.data.models import build_shape
from autotune.live.installed_vllm import PROBE, Probe, open_probe

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def probe() -> Probe:
    return open_probe(sys.executable, (("VLLM_CPU_KVCACHE_SPACE", "1"),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_shape(folder, vocab_size=512, num_attention_heads=4, num_key_value_heads=2, **SIZES)
    return folder


def dry_run(probe: Probe, model: Path, *words: str) -> dict[str, Any]:
    return probe.ask(["--model", str(model), *words])


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("max_num_seqs", {"kind": "int", "negatable": False, "bounds": {"ge": 1}}),
        ("enable_prefix_caching", {"kind": "switch", "negatable": True}),
        ("no_enable_prefix_caching", None),
        ("disable_log_stats", {"kind": "switch", "negatable": False}),
        ("gpu_memory_utilization", {"kind": "float", "bounds": {"gt": 0, "le": 1}}),
        ("max_model_len", {"kind": "human_readable_int_or_auto"}),
        ("speculative_config", {"kind": "loads", "optional": True}),
        ("compilation_config", {"kind": "parse_dataclass"}),
        ("cudagraph_capture_sizes", {"kind": "int", "many": True}),
    ],
)
def test_flags_are_read_from_vllms_parser(probe: Probe, name: str, flag: dict[str, Any] | None):
    flags = probe.ask("flags")["flags"]
    assert len(flags) > 100, "probe.flags: vLLM's parser (make_arg_parser) does not list its flags in _actions any more"
    if flag is None:
        assert name not in flags, f"probe.flags: {name} is the negation of a flag, and is taken for one of its own"
    else:
        found = {key: flags[name][key] for key in flag}
        assert found == flag, f"probe.flags: argparse's action for --{name} has other attributes than the probe reads"


def test_choices_of_a_flag_are_read_from_vllms_parser(probe: Probe):
    choices = probe.ask("flags")["flags"]["kv_cache_dtype"]["choices"]
    assert choices and "fp8" in choices, "probe.flags: argparse's action for --kv-cache-dtype has no choices any more"


def test_configuration_is_built_and_resolved(probe: Probe, model: Path):
    outcome = dry_run(probe, model, "--max-num-seqs", "8")
    assert outcome["refusal"] == "", (
        "probe.dry_run or probe.check_start: AsyncEngineArgs, create_engine_config or get_attn_backend changed"
    )
    resolved = outcome["resolved"]
    assert resolved["max_num_seqs"] == 8, "probe.resolved: vLLM's configuration lost a flag that was given"
    for name in ("max_num_batched_tokens", "block_size", "max_model_len"):
        assert isinstance(resolved.get(name), int), f"probe.resolved: no part of vLLM's configuration holds {name}"


@pytest.mark.parametrize(
    ("words", "refusal", "function"),
    [
        (("--max-num-seqs", "64", "--max-num-batched-tokens", "32"), "max_num_batched_tokens (32)", "one_line"),
        (("--tensor-parallel-size", "64"), "64", "check_start"),
        (("--block-size", "16"), "block_size 16: CPU_ATTN takes", "check_block_size"),
        (("--max-num-seqs", "many"), "--max-num-seqs", "make_parser"),
        (("--quantization", "mxfp8"), "vLLM on a CPU has no quantization=mxfp8", "check_start"),
        (("--attention-backend", "FLASH_ATTN"), "vLLM on a CPU has no attention_backend=FLASH_ATTN", "check_start"),
        (("--moe-backend", "triton"), "vLLM on a CPU has no moe_backend=triton", "check_start"),
        (("--kv-offloading-size", "8"), "vLLM on a CPU has no kv_offloading_size=8.0", "check_start"),
        (("--api-server-count", "2"), "the server of vllm-cpu is one process: api_server_count is 1", "check_start"),
    ],
)
def test_what_vllm_would_refuse_is_refused(
    probe: Probe, model: Path, words: tuple[str, ...], refusal: str, function: str
):
    answer = dry_run(probe, model, *words)["refusal"]
    assert refusal in answer and "\n" not in answer, f"probe.{function}: {' '.join(words)} gives {answer!r}"


def test_size_of_graphs_means_nothing_where_there_are_none(probe: Probe, model: Path):
    start, wanted = (["--model", str(model), *words] for words in (["--max-cudagraph-capture-size", "64"], []))
    plan = probe.ask({"start": start, "wanted": wanted})
    assert plan["refusal"] == "" and plan["changes"] == {}, "probe.described: a CPU has no CUDA graphs"
    assert dry_run(probe, model, *start[2:])["resolved"] == dry_run(probe, model)["resolved"], "probe.resolved"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"cudagraph_mode": "SIDEWAYS"}', "SIDEWAYS"),
        ('{"cudagraph_mod": "FULL"}', "cudagraph_mod: Unexpected keyword"),
    ],
)
def test_value_that_no_other_flag_makes_right_is_told_from_a_combination(
    probe: Probe, model: Path, value: str, said: str
):
    answer = dry_run(probe, model, "--compilation-config", value)
    assert not answer["readable"] and said in answer["refusal"], f"probe.dry_run or probe.one_line: {answer}"
    assert dry_run(probe, model, "--max-num-seqs", "64", "--max-num-batched-tokens", "32")["readable"]


@pytest.mark.parametrize(
    ("words", "anew"),
    [
        (("--max-num-active-seqs", "8"), False),
        (("--stream-interval", "4"), False),
        (("--long-prefill-token-threshold", "256"), False),
        (("--max-num-batched-tokens", "1024"), True),
        (("--max-num-seqs", "64"), True),
        (("--optimization-level", "1"), True),
    ],
)
def test_what_is_compiled_anew_is_told_by_vllms_own_hash(probe: Probe, model: Path, words: tuple[str, ...], anew: bool):
    dry_run(probe, model, "--enable-expert-parallel", "--enable-eplb")  # refused, and it changes vLLM's own defaults
    before, after = (dry_run(probe, model, *more)["compiled"] for more in ((), words))
    assert (before != after) == anew, f"probe.dry_run: compute_hash says {before} and {after} for {' '.join(words)}"


@pytest.mark.parametrize(
    "name", ["gpt_oss_20b", "gpt_oss_120b", "gpt_oss_20b_dummy", "llama70b", "deepseek_r1", "tiny_moe"]
)
def test_shape_and_recipe_of_a_model_are_what_vllm_takes(probe: Probe, name: str, tmp_path: Path):
    model = compose([f"model={name}"])[0].model
    build_shape(tmp_path, **{key: value for key, value in (model.shape or model.build).items() if key != "_target_"})
    for more in ({}, model.recipe.args):
        args = {"load_format": "dummy", **model.args, "tensor_parallel_size": None, **more}
        answer = dry_run(probe, tmp_path, *command_line(args, recorded()))
        assert not answer["refusal"], f"conf/model/{name}.yaml: {answer['refusal']}"


def test_variables_are_read_from_vllm(probe: Probe):
    variables = probe.ask("flags")["variables"]
    assert "VLLM_CPU_KVCACHE_SPACE" in variables and "VLLM_ATTENTION_BACKEND" not in variables


def test_versions_are_read_without_an_import(tmp_path: Path):
    done = subprocess.run([sys.executable, str(PROBE), "versions"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"probe.versions: {done.stderr}"
    for key in ("vllm", "torch", "serve"):
        assert f'"{key}"' in done.stdout, f"probe.versions: no {key} in {done.stdout}"


def test_recorded_flags_are_those_of_the_installed_vllm(probe: Probe):
    found = {name: Flag(**flag) for name, flag in probe.ask("flags")["flags"].items()}
    found["mm_processor_device"] = replace(found["mm_processor_device"], choices=None)  # they differ by platform
    differ = sorted(name for name in found.keys() | recorded().keys() if found.get(name) != recorded().get(name))
    assert not differ, f"renew autotune/config/vllm_flags.json from probe.py's answer to `flags`: {differ}"
