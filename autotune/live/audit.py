"""Was it vLLM that was measured, or our own client? What a run says of its client, and the limits on it."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from autotune.config.schema import Kind, LiveConfig
from autotune.live.client import Report
from autotune.live.messages import Run
from autotune.measure.arrivals import server_times
from autotune.system.host import hardware

TTFT_SHARE = 0.05  # of MLPerf's limits: 22 to 300 ms


def lateness(run: Run, issued: Sequence[float], sent: Sequence[float]) -> list[float]:
    """Seconds from when LoadGen's schedule has each request to when its last byte was written; 0 in `sent` is never.

    LoadGen doesn't say when its schedule began: the query that it issued most promptly is taken as issued in time.
    Other scenarios than Server have no schedule, but issue at once.
    """
    due = np.array(issued)
    if run.kind == Kind.Server.value:
        schedule = np.fromiter(islice(server_times(run.qps, run.seed), len(issued)), float)
        due = schedule + (due - schedule).min()
    written = np.array(sent)
    return list((written - due)[written > 0])


def figures(reports: Sequence[Report], own_cpu_s: float, run_s: float, late: Sequence[float]) -> dict[str, float]:
    """What the client saw of itself in a run of `run_s`, as in result.json."""
    found = {
        "client_cpu": max(own_cpu_s, *(report.cpu_s for report in reports)) / run_s,  # of a core, busiest process
        "client_lag_p99_ms": max(report.lag_p99_ms for report in reports),
        "client_unsent_bytes": float(sum(report.unsent_bytes for report in reports)),
    }
    if late:
        found["client_lateness_p99_ms"] = float(np.percentile(late, 99, method="higher")) * 1e3
    return found


def ttft_share(config: LiveConfig) -> float | None:
    """The share of the TTFT limit that the client may add, or None if that is not judged."""
    if config.client_ttft_share is not None:
        return config.client_ttft_share
    return TTFT_SHARE if "gpu" in hardware() else None


def reasons(run: Run, figures: dict[str, float]) -> list[str]:
    """Why the client may have decided the verdict: each figure that is over its limit."""
    limits = {"client_cpu": ("the busiest client process's share of a core", run.client_cpu_limit, "client_cpu_limit")}
    # Offline sends all at once and has no limit on TTFT: how late each was says nothing.
    if run.ttft_ms and run.client_ttft_share and run.kind != Kind.Offline.value:
        limit = run.ttft_ms * run.client_ttft_share
        where = f"client_ttft_share={run.client_ttft_share:g} of the TTFT limit"
        limits |= {
            "client_lateness_p99_ms": ("p99 from LoadGen's schedule to a request's last byte sent, ms", limit, where),
            "client_lag_p99_ms": ("p99 of its event loop's lag, ms", limit, where),
            "client_ttft_added_mean_ms": ("mean TTFT at LoadGen beyond vLLM's own, ms", limit, where),
        }
    return [
        f"client: {name}={figures[name]:.3g} is over {limit:.3g} (backend.{where}): {what}"
        for name, (what, limit, where) in limits.items()
        if figures.get(name, 0.0) > limit
    ]
