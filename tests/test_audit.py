"""A run that measured its own client says so."""

from pathlib import Path
from typing import Any

import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.live import audit
from autotune.live.load_generator import RunSpec
from autotune.measure.arrivals import server_times

FINE = {"client_cpu": 0.3, "client_lag_p99_ms": 1.0, "client_lateness_p99_ms": 2.0, "client_ttft_added_mean_ms": 3.0}


def spec(client_ttft_share: float | None = 0.05, **scenario: Any) -> RunSpec:
    common = {"name": "s", "kind": Kind.Server, "qps": 100.0, "ttft_ms": 500.0, "tpot_ms": 30.0, "seed": 3}
    return RunSpec(
        folder=Path(),
        url="",
        model="m",
        scenario=ScenarioConfig(**common | scenario),
        request_timeout_s=1.0,
        client_ttft_share=client_ttft_share,
    )


def test_lateness_is_against_loadgens_schedule():
    due = [1000 + time for time, _ in zip(server_times(spec(qps=100.0, seed=3).scenario), range(50), strict=False)]
    issued = [time + 0.002 for time in due]  # LoadGen's thread wakes late, but never by less than this
    issued[20] += 0.04
    sent = [time + 0.001 for time in issued]
    sent[30] = 0.0  # it failed before it was sent
    late = audit.lateness(spec(), issued, sent)
    assert len(late) == 49
    assert late[20] == pytest.approx(0.041) and late[21] == pytest.approx(0.001)


@pytest.mark.parametrize("kind", [Kind.Offline, Kind.SingleStream])
def test_lateness_without_a_schedule_is_from_the_issue(kind: Kind):
    assert audit.lateness(spec(kind=kind), [5.0, 5.0], [5.25, 5.5]) == [0.25, 0.5]


def test_client_within_its_limits_is_no_reason():
    assert audit.reasons(spec(), FINE) == []


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("client_cpu", 0.95, "client: client_cpu=0.95 is over 0.9 (backend.client_cpu_limit)"),
        (
            "client_lateness_p99_ms",
            26.0,
            "client: client_lateness_p99_ms=26 is over 25 (backend.client_ttft_share=0.05",
        ),
        ("client_lag_p99_ms", 26.0, "client: client_lag_p99_ms=26 is over 25"),
        ("client_ttft_added_mean_ms", 26.0, "client: client_ttft_added_mean_ms=26 is over 25"),
    ],
)
def test_each_limit_is_a_reason_with_figure_and_limit(figure: str, value: float, words: str):
    (reason,) = audit.reasons(spec(), FINE | {figure: value})
    assert reason.startswith(words)


@pytest.mark.parametrize("settings", [{"kind": Kind.Offline}, {"ttft_ms": None}, {"client_ttft_share": None}])
def test_delays_are_recorded_where_no_limit_on_ttft_is_judged(settings: dict[str, Any]):
    late = dict.fromkeys(FINE, 900.0) | {"client_cpu": 0.3}
    assert audit.reasons(spec(**settings), late) == []
    assert audit.reasons(spec(**settings), late | {"client_cpu": 0.95})
