"""mlperf_log_detail.txt in the shape LoadGen 6 writes it; tests/test_loadgen.py reads whole ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.measure import loadgen_log

FINISHED = {"loadgen_version": "6.0.17 @ unknown", "result_validity": "VALID", "num_errors": 0}


def log(folder: Path, **entries: Any) -> Path:
    file = folder / "mlperf_log_detail.txt"
    common = {"time_ms": 1.5, "namespace": "mlperf::logging", "metadata": {"is_error": False, "file": "results.cc"}}
    lines = [f":::MLLOG {json.dumps({'key': key, 'value': value, **common})}" for key, value in entries.items()]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    ("key", "value", "figure"),
    [
        ("result_first_token_99.00_percentile_latency_ns", 2_500_000, ("ttft_p99_ms", 2.5)),
        ("result_first_token_99.90_percentile_latency_ns", 2_500_000, ("ttft_p99.9_ms", 2.5)),
        ("result_time_per_output_token_50.00_percentile_ns", 1_000_000, ("tpot_p50_ms", 1.0)),
        ("result_90.00_percentile_latency_ns", 3_000_000, ("latency_p90_ms", 3.0)),
        ("result_completed_tokens_per_second", 12.5, ("tokens_per_s", 12.5)),
        ("result_tokens_per_second", 12.5, ("tokens_per_s", 12.5)),
        ("result_samples_per_second", 2.5, ("samples_per_s", 2.5)),
    ],
)
def test_figure_has_our_name_and_unit(tmp_path: Path, key: str, value: float, figure: tuple[str, float]):
    assert loadgen_log.read(log(tmp_path, **FINISHED, **{key: value})).figures == {figure[0]: pytest.approx(figure[1])}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"result_perf_constraints_met": False}, "p99 of TTFT or TPOT is over its limit"),
        ({"result_min_duration_met": False}, "shorter than min_duration"),
        ({"result_min_queries_met": False}, "fewer queries than min_query_count"),
        ({"early_stopping_met": False}, "early stopping: too few queries"),
        ({"num_errors": 2}, "LoadGen logged 2 errors"),
    ],
)
def test_each_broken_rule_is_a_reason(tmp_path: Path, entry: dict[str, Any], reason: str):
    found = loadgen_log.read(log(tmp_path, **FINISHED | {"result_validity": "INVALID"} | entry))
    assert found.verdict == "INVALID"
    assert len(found.reasons) == 1 and found.reasons[0].startswith(reason)


def test_log_of_a_run_that_did_not_finish_is_no_result(tmp_path: Path):
    with pytest.raises(KeyError):
        loadgen_log.read(log(tmp_path, loadgen_version="6.0.17"))
