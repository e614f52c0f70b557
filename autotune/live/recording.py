"""The way of recorder.py into vLLM, and of the steps back into the trial.

vLLM loads plugins by entry point, in every process that it starts, however it starts it. A folder on PYTHONPATH with
a `.dist-info` has entry points like an installed package.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autotune.live.recorder import FOLDER, ROW
from autotune.measure.backend import Recording

RECORDER = Path(__file__).with_name("recorder.py")
PLUGIN = "autotune_steps"
ALLOWED = "VLLM_PLUGINS"  # vLLM's: the names of the plugins that it may load; all, if it is not set
ENTRY_POINT = f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:install\n"
LAYOUT = np.dtype([("times", "<f8", 4), ("counts", "<i8", 7)])  # of ROW
assert LAYOUT.itemsize == ROW.size


def installed(scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Put the recorder into `scratch`, which is on PYTHONPATH; returns what the server's environment `env` lacks."""
    shutil.copyfile(RECORDER, scratch / f"{PLUGIN}.py")
    package = scratch / f"{PLUGIN}-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINT)
    folder = steps_folder(scratch)
    folder.mkdir()
    allowed = env.get(ALLOWED, os.environ.get(ALLOWED))
    return {FOLDER: str(folder)} | ({} if allowed is None else {ALLOWED: f"{allowed},{PLUGIN}".strip(",")})


def steps_folder(scratch: Path) -> Path:
    return scratch / "steps"


def read(scratch: Path, kv_tokens: int | None) -> Recording:
    """Read the steps recorded by now; of several engines (data parallelism) those of the one that made most.

    A file holds the steps of one engine, one after another; the others do the same with their share of the requests.
    """
    folder = steps_folder(scratch)
    files = sorted(folder.glob("*.rows"), key=lambda file: file.stat().st_size)
    raw = files[-1].read_bytes() if files else b""
    rows = np.frombuffer(raw, LAYOUT, len(raw) // LAYOUT.itemsize)  # of one that is being written, what is whole
    reasons = sorted({file.read_text() for file in folder.glob("*.reason")})
    if not files and not reasons:
        reasons = ["vLLM loaded no plugin"]
    return Recording(np.hstack([rows["times"], rows["counts"]]), kv_tokens, "; ".join(reasons))
