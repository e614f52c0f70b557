"""Where a trial ran: hardware, driver and revision, for tags and reports."""

import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path


@functools.cache
def hardware() -> dict[str, str]:
    """`gpu`, `gpus` and `driver` where there is an NVIDIA GPU, else `cpu`; always `node`."""
    facts = {"node": platform.node(), "cpu": _cpu()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            lines = done.stdout.strip().splitlines()
            name, driver = (part.strip() for part in lines[0].split(","))
            facts |= {"gpu": name, "gpus": str(len(lines)), "driver": driver}
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()} × {os.cpu_count()}"


@functools.cache
@functools.cache
def git_revision() -> str:
    """Revision of autotune itself, with `+changes` where the working tree has some; empty outside git."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return ""
    done = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty=+changes"], capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""
