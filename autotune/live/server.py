"""One `vllm serve` process: started, checked to be ours and healthy, and stopped with everything that it started."""

import getpass
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autotune.config.redact import redact
from autotune.config.schema import LiveConfig
from autotune.data.models import Model
from autotune.errors import MeasureError, StartError
from autotune.live import key, plugins, recording, vllm_log
from autotune.live.installed_vllm import InstalledVllm
from autotune.system.files import last_line, write_whole
from autotune.system.guard import SCRATCH
from autotune.system.leases import Lease
from autotune.system.process import GuardedProcess

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
HOT = Path(__file__).with_name("hot_engine.py")
POLL_S = 0.1
DYING_S = 10.0  # that a vLLM takes to end once it has failed

ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # for POST /reset_prefix_cache
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_API_KEY": "",  # the user's own would lock our client out
    # It would take over the KV cache of a start with another gpu_memory_utilization or cudagraph_mode (0.32).
    "VLLM_ENABLE_STARTUP_PLAN": "0",
    "PYTHONUNBUFFERED": "1",  # so that the log is complete when vLLM dies
    "PYTHONDONTWRITEBYTECODE": "",  # else each of vLLM's three processes would compile all of it
}
# Beginnings of the names of variables that decide how vLLM runs; it gets all others of the user's, too.
DECIDING = (
    *("VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_"),
    *("PYTHON", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "OMP_", "MKL_", "KMP_", "LD_"),
)


def inherited(config: LiveConfig) -> dict[str, str]:
    """The user's variables that decide how vLLM runs: those that neither autotune nor backend.env sets."""
    chosen = {**ENV, **config.env}
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(DECIDING) and name not in chosen
    }


@dataclass(frozen=True)
class Server:
    """A healthy vLLM server that this trial has started."""

    url: str
    model: str  # the name that it serves, which no other server has
    process: GuardedProcess
    command: list[str]
    log: Path
    scratch: Path  # folder of its own, which ends with it
    start: dict[str, float]  # seconds that the trial waited for it, by part
    kv_tokens: int | None  # that its KV cache holds; None if vLLM has not said
    told: str = "fresh"  # what a result's facts say of it

    def check_alive(self) -> None:
        """Raise MeasureError if the server has ended."""
        code = self.process.exit_code()
        if code is not None:
            raise MeasureError(f"vLLM ended while it was measured ({_ending(code)}): {vllm_log.reason(self.log)}")


@contextmanager
def serve(
    config: LiveConfig,
    vllm: InstalledVllm,
    model: Model,
    args: Mapping[str, Any],
    log: Path,
    lease: Lease | None = None,
    changeable: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Server]:
    """Start vLLM with the flags `args`, and stop it after the block; its command is written beside its `log`.

    Only who knows the trial's key is answered. A `changeable` one has hot_engine.py in its processes. An error of
    `check`, which is called again and again, ends the start.

    Raises StartError if it ends, is not healthy in time, or another server answers in its place.
    """
    port = _free_port() if config.port is None else config.port
    if config.port is not None and _answers(port):
        raise StartError(f"backend.port={port}: in use by another process; choose another, or null for a free one")
    url, name = f"http://{HOST}:{port}", f"autotune-{secrets.token_hex(8)}"
    command = [
        *config.prefix,
        config.python or sys.executable,
        *vllm.serve,
        *model.words,
        *("--host", HOST, "--port", str(port), "--served-model-name", name),
        *vllm.command_line(args),
        *key.FLAGS,
    ]
    (log.parent / "command.json").write_text(
        json.dumps(redact({"command": command, "env": config.env, "inherited": inherited(config)}), indent=1)
    )
    logger.info("starting vLLM for %s; its log: %s", model.path, log)
    log.touch(mode=0o600)  # vLLM writes its flags there
    started = time.monotonic()
    keep = lease.files if lease else ()
    with TemporaryDirectory(prefix="autotune-") as scratch:  # vLLM leaves sockets in it
        env = _environment(config, url, Path(scratch), lease, changeable)
        try:
            with GuardedProcess(command, log, env, config.stop_timeout_s, keep) as process:
                _await_healthy(url, name, process, log, config.start_timeout_s, check)
                taken_s = time.monotonic() - started
                parts = vllm_log.parts(log, datetime.now(), taken_s)
                yield Server(url, name, process, command, log, Path(scratch), parts, vllm_log.kv_tokens(log))
        finally:
            write_whole(log, redact(log.read_text(errors="replace")))


def _environment(config: LiveConfig, url: str, scratch: Path, lease: Lease | None, changeable: bool) -> dict[str, str]:
    """Variables of the server's environment beside ours; what vLLM is to find there is put into `scratch`."""
    devices = {"CUDA_VISIBLE_DEVICES": lease.visible} if lease else {}
    env = {**ENV, "TMPDIR": str(scratch), SCRATCH: str(scratch), **devices, **config.env}
    _share_inductor(scratch)
    env |= key.gated(url, scratch, config.env.get("PYTHONPATH", os.environ.get("PYTHONPATH", "")))
    if config.steps:
        env |= recording.installed(scratch, config.env)
    if changeable:
        env |= plugins.installed("autotune_hot", HOT, scratch, env)
    return env


def _share_inductor(scratch: Path) -> None:
    """Let vLLM's torch find in its `scratch` what it keeps in the user's temporary folder for all of its processes.

    On a CPU that is a header of 150 MB, which takes a compiler; older versions of vLLM have their kernels there, too.
    """
    with suppress(KeyError, OSError):  # the user has no name, or another one owns the folder
        name = f"torchinductor_{getpass.getuser()}"
        shared = Path(tempfile.gettempdir(), name)
        shared.mkdir(mode=0o700, exist_ok=True)
        if shared.owner() == getpass.getuser():
            (scratch / name).symlink_to(shared)


def _await_healthy(
    url: str, name: str, process: GuardedProcess, log: Path, timeout_s: float, check: Callable[[], None]
) -> None:
    deadline = time.monotonic() + timeout_s
    while _get(url, "/health") is None:
        code = process.wait(POLL_S)
        check()
        if code is not None:
            raise StartError(f"vLLM did not start ({_ending(code)}): {vllm_log.reason(log)}")
        if time.monotonic() > deadline:
            raise StartError(
                f"vLLM was not healthy after {timeout_s:.0f} s (backend.start_timeout_s); last line of {log}: "
                f"{last_line(log, '(empty)')}"
            )
    if name.encode() not in (_get(url, "/v1/models") or b"") or process.exit_code() is not None:
        raise StartError(f"another server answers at {url}; set backend.port=null, or end that server")


def _get(server: str, path: str) -> bytes | None:
    """The body of a 200 answer; None for any other, or for none."""
    try:
        return key.asked(server, path, timeout_s=5)
    except OSError:
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _ending(code: int) -> str:
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"
