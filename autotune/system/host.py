"""The machine that a trial runs on: its hardware, its load, and the revision of autotune on it."""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil

from autotune.system.threads import beside

MB = 1e6


@functools.cache
def hardware() -> dict[str, str]:
    """`node` and `cpu`; where there is an NVIDIA GPU also `gpu`, `gpus` and `driver`."""
    environment = {"node": platform.node(), "cpu": _cpu()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            lines = done.stdout.strip().splitlines()
            name, driver = (part.strip() for part in lines[0].split(","))
            environment |= {"gpu": name, "gpus": str(len(lines)), "driver": driver}
    return environment


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()} × {os.cpu_count()}"


@functools.cache
def git_revision() -> str:
    """Revision of autotune, with `+changes` if its working tree has some; empty outside git."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return ""
    done = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty=+changes"], capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def recorded(path: Path, every_s: float) -> AbstractContextManager[None]:
    """Write `time` and `load` as a line of JSON to `path` every `every_s` seconds of the block; 0 writes none."""

    def record(ended: threading.Event) -> None:
        before = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call has nothing to compare with
        with path.open("w", buffering=1) as file:
            while not ended.wait(every_s):
                file.write(json.dumps({"time": time.time(), **load(before)}) + "\n")

    return beside(record) if every_s else nullcontext()


def load(before: psutil._ntuples.snetio) -> dict[str, float]:
    """The machine's load now, by MLflow's names of system metrics; network traffic since `before`."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MB,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / MB,
        "disk_available_megabytes": disk.free / MB,
        "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / MB,
        "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / MB,
    }
