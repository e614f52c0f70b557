import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.config.schema import LiveConfig
from autotune.config.vllm_flags import MANAGED, Flag
from autotune.errors import InputError
from autotune.live import installed_vllm
from autotune.live.backend import LiveBackend
from autotune.live.installed_vllm import InstalledVllm, find_vllm, open_probe
from autotune.measure.backend import DryRunOutcome

VLLM = InstalledVllm(
    python="python",
    version="1.0",
    torch="2.0",
    serve=["serve"],
    flags={
        "max_num_seqs": Flag("int"),
        "enable_prefix_caching": Flag("switch", negatable=True),
        "disable_log_stats": Flag("switch"),
        "kv_cache_dtype": Flag(choices=["auto", "fp8"]),
        "compilation_config": Flag("parse_dataclass"),
    },
)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_num_seqs": 8}, ["--max-num-seqs", "8"]),
        ({"max-num-seqs": 8}, ["--max-num-seqs", "8"]),
        ({"max_num_seqs": None}, []),
        ({"disable_log_stats": True}, ["--disable-log-stats"]),
        ({"enable_prefix_caching": True}, ["--enable-prefix-caching"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"disable_log_stats": False}, []),
        ({"cudagraph_capture_sizes": [1, 2]}, ["--cudagraph-capture-sizes", "1", "2"]),
        ({"compilation_config": {"mode": 3}}, ["--compilation-config", '{"mode": 3}']),
    ],
)
def test_values_become_the_command_line_that_vllm_reads(args: dict[str, Any], words: list[str]):
    assert VLLM.command_line(args) == words


def test_variable_that_vllm_does_not_read_is_named_with_the_closest_one():
    vllm = replace(VLLM, variables=frozenset({"VLLM_USE_RUST_FRONTEND", "VLLM_CPU_KVCACHE_SPACE"}))
    for name in ("VLLM_USE_RUST_FRONTEND", "OMP_NUM_THREADS", "NCCL_DEBUG"):
        vllm.check_variable(name)
    said = (
        r"backend\.env\.VLLM_USE_RUST_FRONTED: vLLM 1\.0 reads no such variable; did you mean VLLM_USE_RUST_FRONTEND\?"
    )
    with pytest.raises(InputError, match=said):
        vllm.check_variable("VLLM_USE_RUST_FRONTED")
    with pytest.raises(InputError, match="VLLM_API_KEY: autotune's servers have a key of their own; leave it out"):
        vllm.check_variable("VLLM_API_KEY")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_seq": 8}, r"engine.args.max_num_seq: vLLM 1.0 has no such flag; did you mean max_num_seqs\?"),
        ({"kv_cache_dtype": "fp9"}, "engine.args.kv_cache_dtype=fp9: vLLM 1.0 accepts auto, fp8"),
        ({"port": 8000}, "engine.args.port: set by autotune itself; write backend.port instead"),
    ],
)
def test_flag_that_vllm_would_not_take_is_named(args: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        VLLM.read(args)


@pytest.mark.parametrize("name", ["max-num-seqs", "max_num_seqs"])
def test_flag_is_known_with_hyphens_and_underscores(name: str):
    VLLM.read({name: 8, "kv_cache_dtype": None, "enable-prefix-caching": False})


@pytest.mark.parametrize("name", MANAGED)
def test_flag_that_autotune_sets_is_refused(name: str):
    with pytest.raises(InputError, match=f"engine.args.{name}: set by autotune itself; write .+ instead"):
        VLLM.read({name: "x"})


def test_installed_vllm_is_read_once_and_then_cached():
    cache = Path.home() / ".cache/autotune"
    vllm = find_vllm(sys.executable, (), cache)
    assert vllm is find_vllm(sys.executable, (), cache)
    assert vllm.flags["enable_prefix_caching"].negatable
    assert "fp8" in (vllm.flags["kv_cache_dtype"].choices or [])


def test_configuration_of_which_vllm_dies_is_refused_and_the_next_one_is_not(tmp_path: Path):
    python = tmp_path / "python"
    script = """read question; echo $question | grep -q fp8 || echo '{"refusal": "", "resolved": {}}'"""
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    vllm = replace(VLLM, python=str(python), cache_dir=tmp_path)
    for _ in range(2):
        assert vllm.dry_run(tmp_path, {"kv_cache_dtype": "fp8"}).refusal.startswith("vLLM does not answer; see")
    assert vllm.dry_run(tmp_path, {}) == DryRunOutcome("", {})


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/usr/bin/python3", "vllm is not installed"),
        ("/bin/true", "it prints nothing"),
        ("/bin/false", "it prints nothing"),
        ("/bin/echo", ".*probe.py versions"),
        ("/no/such/python", ".*No such file or directory"),
        ("/tmp", ".*Permission denied"),
        ("hangs", "no answer in 0.5 s"),
    ],
)
def test_interpreter_without_vllm_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, reason: str
):
    if python == "hangs":
        monkeypatch.setattr(installed_vllm, "VERSIONS_S", 0.5)
        python = str(tmp_path / "hangs")
        Path(python).write_text("#!/bin/sh\nsleep 60\n")
        Path(python).chmod(0o755)
    with pytest.raises(InputError, match=rf"no usable vLLM for {python} \({reason}\); run `make"):
        find_vllm(python, (), tmp_path)


def test_interpreter_for_dry_runs_opens_without_waiting_for_its_import():
    env = {"AUTOTUNE_TEST": "1"}  # no other test has this one open
    backend = LiveBackend(LiveConfig(env=env), Path.home() / ".cache/autotune")
    began = time.monotonic()
    backend.prepare_dry_runs()
    assert time.monotonic() - began < 2
    opened = open_probe.cache_info().misses
    open_probe(backend.vllm.python, tuple(env.items()))
    assert open_probe.cache_info().misses == opened
