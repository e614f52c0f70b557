import pytest

from autotune.config.schema import Kind, ObjectiveConfig, ScenarioConfig
from autotune.errors import InputError
from autotune.measure import metrics, objective
from autotune.measure.backend import RequestTiming
from autotune.measure.limits import LatencyLimit, limits_of


def test_tpot_excludes_first_token():
    timing = RequestTiming(sample=0, issued=0.0, first_token=0.5, last_token=1.5, output_tokens=11)
    assert timing.tpot == pytest.approx(0.1)
    assert (timing.ttft, timing.latency) == (0.5, 1.5)


def test_one_token_has_no_time_per_token():
    assert RequestTiming(sample=0, issued=0.0, first_token=0.5, last_token=0.5, output_tokens=1).tpot == 0


def test_percentile_is_a_value_that_was_seen():
    found = metrics.summary("ttft", [i / 1000 for i in range(1, 101)])
    assert found["ttft_p50_ms"] == 51 and found["ttft_p99_ms"] == 100 and found["ttft_mean_ms"] == 50.5


def test_rates_do_not_depend_on_when_the_clock_began():
    for began in (0.0, 900.0):
        requests = [RequestTiming(0, began + at, began + at + 0.1, began + at + 2, 8) for at in (0, 1)]
        assert metrics.from_requests(requests, ())["samples_per_s"] == pytest.approx(2 / 3)


def test_goodput_counts_requests_within_every_limit():
    requests = [
        RequestTiming(0, 0.0, 0.1, 1.0, 11),  # TTFT 0.1 s, TPOT 0.09 s
        RequestTiming(1, 0.0, 0.5, 1.0, 11),  # TTFT over
        RequestTiming(2, 0.0, 0.1, 2.0, 11),  # TPOT over
    ]
    found = metrics.from_requests(requests, [LatencyLimit("ttft", 0.2), LatencyLimit("tpot", 0.1)])
    assert found["goodput_per_s"] == pytest.approx(1 / 2)
    assert found["samples_per_s"] == pytest.approx(3 / 2) and found["tokens_per_s"] == pytest.approx(33 / 2)


def test_constraint_is_the_share_over_the_limit():
    """One request in 10 has a long prompt, and a limit of its own."""
    requests = [RequestTiming(n, 0.0, 0.25 if n else 0.6, 1.5, 11, 100 if n else 4000) for n in range(10)]
    scenario = ScenarioConfig(name="s", kind=Kind.Server, ttft_ms=600, latency_ms=1000, ttft_by_prompt=[[1000, 200]])
    limits = limits_of(scenario)
    found = objective.constraints(limits, metrics.from_requests(requests, limits), failed=2)
    assert found == pytest.approx({"failed_requests": 2, "ttft_p99": 0.25, "latency_p99": 0.5})


def test_objective_takes_its_metrics_in_order():
    config = ObjectiveConfig("o", ["b", "a"], ["maximize", "minimize"])
    assert objective.values(config, {"a": 1.0, "b": 2.0, "c": 3.0}) == [2.0, 1.0]


def test_unknown_objective_names_the_metrics_there_are():
    with pytest.raises(InputError, match="no metric speed; a trial has tokens_per_s"):
        objective.values(ObjectiveConfig("o", ["speed"], ["maximize"]), {"tokens_per_s": 1.0})
