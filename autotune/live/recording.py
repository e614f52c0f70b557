"""The steps that recorder.py writes in vLLM's processes, and their way back into the trial."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autotune.live import plugins
from autotune.live.recorder import FOLDER, ROW
from autotune.measure.backend import Recording

RECORDER = Path(__file__).with_name("recorder.py")
PLUGIN = "autotune_steps"
LAYOUT = np.dtype([("times", "<f8", 4), ("counts", "<i8", 7)])  # of ROW
assert LAYOUT.itemsize == ROW.size


def installed(scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Have vLLM load the recorder from `scratch`; returns what the server's environment `env` lacks."""
    folder = steps_folder(scratch)
    folder.mkdir()
    return {FOLDER: str(folder)} | plugins.installed(PLUGIN, RECORDER, scratch, env)


def steps_folder(scratch: Path) -> Path:
    return scratch / "steps"


def forget(scratch: Path) -> None:
    """Drop the steps of an idle server that were recorded by now."""
    for file in steps_folder(scratch).glob("*.rows"):
        os.truncate(file, 0)


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
