"""Figures from per-request timings."""

from collections.abc import Sequence

import numpy as np

from autotune.backend import RequestTiming

PERCENTILES = (50, 90, 95, 97, 99, 99.9)


def summary(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of `seconds` in ms, as `<name>_mean_ms`, `<name>_p99_ms`, …"""
    values = np.asarray(seconds) * 1e3
    found = {f"{name}_mean_ms": float(values.mean())}
    # The smallest value that at least p % of the requests do not exceed, as LoadGen takes it.
    for percentile, value in zip(PERCENTILES, np.percentile(values, PERCENTILES, method="higher"), strict=True):
        found[f"{name}_p{percentile:g}_ms"] = float(value)
    return found


def from_requests(
    requests: Sequence[RequestTiming], ttft_limit: float | None, tpot_limit: float | None
) -> dict[str, float]:
    """Latencies and rates as the client saw them; limits in seconds decide goodput.

    Rates are over the time from the first issue to the last token.
    """
    duration = max(r.last_token for r in requests) - min(r.issued for r in requests)
    good = sum(
        (ttft_limit is None or r.ttft <= ttft_limit) and (tpot_limit is None or r.tpot <= tpot_limit) for r in requests
    )
    return {
        "duration_s": duration,
        "requests": len(requests),
        "output_tokens": sum(r.output_tokens for r in requests),
        "tokens_per_s": sum(r.output_tokens for r in requests) / duration,
        "samples_per_s": len(requests) / duration,
        "goodput_per_s": good / duration,
        **summary("ttft", [r.ttft for r in requests]),
        **summary("tpot", [r.tpot for r in requests]),
        **summary("latency", [r.latency for r in requests]),
    }
