"""A trial's metrics over time, from the files in its folder."""

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.measure import progress

log = logging.getLogger(__name__)

SYSTEM = "system.jsonl"  # a line for each sample of the machine, with its `time`
SERVER, GPU = "server.csv", "gpu.csv"  # columns as in vLLM's /metrics and in nvidia-smi, `time_s` since the run began
STEPS = "steps.parquet"  # the engine's steps: measure/steps.py
MOST = 300  # points of each metric


@dataclass(frozen=True)
class Point:
    metric: str  # run/tokens_per_s, server/running, gpu/power_w, system/cpu_utilization_percentage
    value: float
    time: float  # seconds since the epoch
    second: int  # since the run began; negative while the server starts


def read(folder: Path, started_at: float) -> list[Point]:
    """At most MOST points of each metric; `started_at` counts as the run's beginning if no file tells it."""
    entries = progress.Reader(folder).new()
    began = next((entry["time"] for entry in entries if entry.get("phase") == "run"), started_at)
    by_metric = defaultdict(list)
    for time, name, value in _values(folder, entries, began):
        by_metric[name].append(Point(name, value, time, round(time - began)))
    return [point for points in by_metric.values() for point in points[:: -(-len(points) // MOST)]]


def _values(folder: Path, entries: list[dict[str, object]], began: float) -> Iterator[tuple[float, str, float]]:
    for entry in entries:
        values = entry.get("values", {})
        assert isinstance(values, dict) and isinstance(entry["time"], float)
        for name, value in values.items():
            yield entry["time"], f"run/{name}", value
    for file, group in ((SERVER, "server"), (GPU, "gpu"), (SYSTEM, "system")):
        try:
            for time, sample in _samples(folder / file, began):
                for name, value in sample.items():
                    if value not in ("", None):
                        yield time, f"{group}/{name}", number(value)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            log.warning(
                "%s: broken (%s: %s); what follows in it is left out", folder / file, type(error).__name__, error
            )


def _samples(path: Path, began: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the time of each row of a CSV file, or of each line of JSON, and the rest of it."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file):
            yield began + float(row.pop("time_s")) if "time_s" in row else float(row.pop("time")), row


def number(text: str | float) -> float:
    """A number or a boolean, as write_rows wrote it."""
    return float(text) if text not in ("True", "False") else float(text == "True")
