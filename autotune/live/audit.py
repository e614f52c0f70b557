"""Was it vLLM that was measured, or our own client? A client's figures of itself, and the limits on them."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from autotune.config.schema import Kind, LiveConfig
from autotune.live.client import ProcessReport
from autotune.live.load_generator import RunSpec
from autotune.measure.arrivals import server_times
from autotune.measure.limits import limits_of
from autotune.system.host import hardware

TTFT_SHARE = 0.05  # of MLPerf's limits on TTFT: 22 to 300 ms


def lateness(spec: RunSpec, issued: Sequence[float], sent: Sequence[float]) -> list[float]:
    """Seconds from each request's time in LoadGen's schedule to its last byte's, without those that were never sent.

    `issued` and `sent` hold a time for each request, in order, on one clock; 0 in `sent` is never. LoadGen doesn't say
    when its schedule began: the query that it issued most promptly is taken as issued on time. Scenarios other than
    Server have no schedule: their requests are due when they are issued.
    """
    due, scenario = np.array(issued), spec.scenario
    if scenario.kind is Kind.Server and scenario.by_loadgen:
        schedule = np.fromiter(islice(server_times(scenario), len(issued)), float)
        due = schedule + (due - schedule).min()
    written = np.array(sent)
    return list((written - due)[written > 0])


def figures(
    reports: Sequence[ProcessReport], own_cpu_s: float, run_s: float, late: Sequence[float]
) -> dict[str, float]:
    """The client's figures of itself in a run, named as in result.json; `late` is the requests' lateness, s."""
    values = {
        "client_cpu": max(own_cpu_s, *(report.cpu_s for report in reports)) / run_s,  # of a core, busiest process
        "client_lag_p99_ms": max(report.lag_p99_ms for report in reports),
        "client_unsent_bytes": float(sum(report.unsent_bytes for report in reports)),
        "client_waiting": float(sum(report.waiting for report in reports)),
    }
    if late:
        values["client_lateness_p99_ms"] = float(np.percentile(late, 99, method="higher")) * 1e3
    return values


def ttft_share(config: LiveConfig) -> float | None:
    """The share of the TTFT limit that the client may add; None if that is not judged."""
    if config.client_ttft_share is not None:
        return config.client_ttft_share
    return TTFT_SHARE if "gpu" in hardware() else None


def reasons(spec: RunSpec, figures: dict[str, float]) -> list[str]:
    """Reasons why the client may have decided the verdict: one for each figure that is over its limit."""
    most = {"client_cpu": ("the busiest client process's share of a core", spec.client_cpu_limit, "client_cpu_limit")}
    # Offline sends all requests at once and has no limit on TTFT: lateness says nothing there. Nor does it where
    # requests waited for a connection: then more were under way than a server runs and queues.
    ttft = next((limit for limit in limits_of(spec.scenario) if limit.name == "ttft"), None)
    judged = spec.scenario.kind is not Kind.Offline and not figures.get("client_waiting")
    if ttft and spec.client_ttft_share and judged:
        limit = ttft.tightest * 1e3 * spec.client_ttft_share
        where = f"client_ttft_share={spec.client_ttft_share:g} of the TTFT limit"
        most |= {
            "client_lateness_p99_ms": ("p99 from when a request is due to its last byte sent, ms", limit, where),
            "client_lag_p99_ms": ("p99 of its event loop's lag, ms", limit, where),
            "client_ttft_added_mean_ms": ("mean TTFT but for the wait on the server, ms", limit, where),
        }
    return [
        f"client: {name}={figures[name]:.3g} is over {limit:.3g} (backend.{where}): {what}"
        for name, (what, limit, where) in most.items()
        if figures.get(name, 0.0) > limit
    ]
