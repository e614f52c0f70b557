"""LoadGen's detail log: its verdict, the reasons for it, its figures."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = ":::MLLOG "

# LoadGen's key → ours, and the factor to our unit. Server, Offline and SingleStream have different names for rates.
FIGURES = {
    "result_completed_tokens_per_second": ("tokens_per_s", 1.0),
    "result_tokens_per_second": ("tokens_per_s", 1.0),
    "result_completed_samples_per_sec": ("samples_per_s", 1.0),
    "result_samples_per_second": ("samples_per_s", 1.0),
    "result_qps_with_loadgen_overhead": ("samples_per_s", 1.0),
    "result_scheduled_samples_per_sec": ("scheduled_samples_per_s", 1.0),
    "result_first_token_mean_latency_ns": ("ttft_mean_ms", 1e-6),
    "result_time_to_output_token_mean": ("tpot_mean_ms", 1e-6),
    "result_mean_latency_ns": ("latency_mean_ms", 1e-6),
}
PERCENTILES = {
    re.compile(r"result_first_token_([\d.]+)_percentile_latency_ns"): "ttft",
    re.compile(r"result_time_per_output_token_([\d.]+)_percentile_ns"): "tpot",
    re.compile(r"result_([\d.]+)_percentile_latency_ns"): "latency",
}
CHECKS = {
    "result_perf_constraints_met": "p99 of TTFT or TPOT is over its limit",
    "result_min_duration_met": "shorter than min_duration",
    "result_min_queries_met": "fewer queries than min_query_count",
    "early_stopping_met": "early stopping: too few queries for p99, or too many over the limit",
}


@dataclass(frozen=True)
class LoadGenResult:
    """LoadGen's own result of a run."""

    verdict: str  # VALID or INVALID
    reasons: list[str]  # why it is not VALID
    figures: dict[str, float]  # named as in result.json


def values(detail_log: Path) -> dict[str, Any]:
    """The last value of each key in a detail log. Raises OSError."""
    lines = (line for line in detail_log.read_text().splitlines() if line.startswith(PREFIX))
    entries = (json.loads(line.removeprefix(PREFIX)) for line in lines)
    return {entry["key"]: entry["value"] for entry in entries}


def read(detail_log: Path) -> LoadGenResult:
    """Parse mlperf_log_detail.txt. Raises KeyError or OSError if LoadGen has not finished."""
    entries = values(detail_log)
    if entries.get("effective_test_mode") == "AccuracyOnly":  # it has neither figures nor a verdict
        return LoadGenResult("VALID", [], {})
    figures = {}
    for key, value in entries.items():
        if key in FIGURES:
            name, scale = FIGURES[key]
            figures[name] = value * scale
        for pattern, name in PERCENTILES.items():
            if match := pattern.fullmatch(key):
                figures[f"{name}_p{float(match[1]):g}_ms"] = value * 1e-6
    reasons = [why for check, why in CHECKS.items() if entries.get(check) is False]
    if entries["num_errors"]:
        reasons.append(f"LoadGen logged {entries['num_errors']} errors; see {detail_log}")
    return LoadGenResult(entries["result_validity"], reasons, figures)
