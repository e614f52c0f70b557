"""The channel between a running trial and its study: two files in the trial's folder, which both can see.

The trial writes a line to `progress.jsonl` for each phase that it enters and for every few seconds of measurement. The
study makes the file `stop` to ask the trial to end.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.errors import StoppedError

FILE, STOP = "progress.jsonl", "stop"
METRICS = ("tokens_per_s", "samples_per_s", "goodput_per_s")  # can be published before a run ends
FAILING = "failing_load"  # published by a search for the highest load: a load that broke a limit


def begin(folder: Path) -> None:
    """Delete what an earlier run left in `folder`."""
    (folder / FILE).unlink(missing_ok=True)
    (folder / STOP).unlink(missing_ok=True)


def phase(folder: Path, name: str) -> None:
    """Write down that the trial enters this phase: start, run."""
    _append(folder, {"phase": name})


def publish(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Write down metrics of the run so far; `step` counts these calls."""
    _append(folder, {"step": step, "values": dict(values)})


def stop(folder: Path) -> None:
    """Ask the trial in `folder` to end."""
    (folder / STOP).touch()


def check(folder: Path) -> None:
    """Raise StoppedError if the trial was asked to end."""
    if (folder / STOP).exists():
        raise StoppedError("stopped by the study")


def _append(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / FILE).open("a") as file:
        file.write(json.dumps({"time": time.time(), **entry}) + "\n")


def _entry(line: bytes) -> dict[str, Any]:
    """Read a `line` that `phase` or `publish` wrote; nothing if it is neither."""
    try:
        match json.loads(line):
            case {"time": float(at), "phase": str(name)}:
                return {"time": at, "phase": name}
            case {"time": float(at), "step": int(step), "values": dict(values)} if step >= 0:
                return {"time": at, "step": step, "values": {name: float(value) for name, value in values.items()}}
    except (ValueError, TypeError):
        pass
    return {}


class Reader:
    """Reads a trial's progress as it is written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._at = 0

    def new(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        return [entry for line in whole.splitlines() if (entry := _entry(line))]
