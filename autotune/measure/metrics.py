"""Figures from per-request timings, and what they cost."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # scipy.stats would make each trial start a second later

from autotune.data.prompts import MadeUp
from autotune.data.samples import Samples
from autotune.measure import early_stopping
from autotune.measure.backend import RequestTiming
from autotune.measure.limits import LatencyLimit, within

Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 97, 99, 99.9)
BY_TURN = ("p50", "p99", "p99.9")  # of those, for each turn of conversations
BLOCK = 16  # tokens; vLLM's usual size
MOST_TURNS = 10  # that have figures of their own; the last one's are those of all later turns, too

# Metrics of a cost, and the rate of tokens that are taken to pay for all of it.
PER_MILLION = {
    "cost_per_million_output_tokens": "tokens_per_s",
    "cost_per_million_input_tokens": "prompt_tokens_per_s",
}


def p99(values: Floats) -> float:
    return float(np.percentile(values, 99, method="higher"))


def summary(name: str, seconds: Sequence[float] | Floats) -> dict[str, float]:
    """Mean and percentiles of `seconds` in ms, as `<name>_mean_ms`, `<name>_p99_ms`, …"""
    values = np.asarray(seconds) * 1e3
    figures = {f"{name}_mean_ms": float(values.mean())}
    # The smallest of the values that at least p % of the requests do not exceed: LoadGen's definition.
    for percentile, value in zip(PERCENTILES, np.percentile(values, PERCENTILES, method="higher"), strict=True):
        figures[f"{name}_p{percentile:g}_ms"] = float(value)
    return figures


def from_requests(
    requests: Sequence[RequestTiming], limits: Sequence[LatencyLimit], total: int | None = None
) -> dict[str, float]:
    """Latencies and rates as the client saw them; `limits` decide goodput.

    Rates are over the time from the first issue to the last token. With 99 % confidence p99 is below
    `<name>_p99_upper_ms`: the bound that LoadGen's test of a run of `total` queries uses, which needs 459 of them.
    `<name>_limit_share` is that bound, or p99 where there are fewer, as a share of the limit on this latency.
    """
    total = total or len(requests)
    duration = max(r.last_token for r in requests) - min(r.issued for r in requests)
    latencies = {name: np.array([getattr(r, name) for r in requests]) for name in ("ttft", "tpot", "latency")}
    figures = {
        "duration_s": duration,
        "requests": len(requests),
        "output_tokens": sum(r.output_tokens for r in requests),
        "tokens_per_s": sum(r.output_tokens for r in requests) / duration,
        "samples_per_s": len(requests) / duration,
        "goodput_per_s": sum(within(r, limits) for r in requests) / duration,
    }
    if prompt_tokens := sum(r.prompt_tokens for r in requests):
        figures["prompt_tokens_per_s"] = prompt_tokens / duration
    for name, values in latencies.items():
        figures |= summary(name, values)
        if (upper := early_stopping.upper_bound(values, total)) is not None:
            figures[f"{name}_p99_upper_ms"] = upper * 1e3
    for limit in limits:
        shares = np.array([limit.share(r) for r in requests])
        upper = early_stopping.upper_bound(shares, total, design_effect(requests, shares))
        figures[f"{limit.name}_limit_share"] = p99(shares) if upper is None else upper
    return figures


def of_sessions(requests: Sequence[RequestTiming], samples: Samples) -> dict[str, float]:
    """Figures of conversations, and latencies by turn, from 1; those of the MOST_TURNS-th are of later ones, too."""
    assert samples.turns is not None
    completed = sum(not samples.continues[r.sample] for r in requests)
    duration = max(r.last_token for r in requests) - min(r.issued for r in requests)
    figures = {
        "sessions": float(len({r.session for r in requests})),
        "sessions_completed": float(completed),
        "sessions_per_s": completed / duration,
    }
    by_turn: dict[int, list[RequestTiming]] = {}
    for request in requests:
        by_turn.setdefault(min(int(samples.turns[request.sample]) + 1, MOST_TURNS), []).append(request)
    for turn, some in sorted(by_turn.items()):
        for name in ("ttft", "tpot", "latency"):
            found = summary(name, [getattr(r, name) for r in some])
            figures |= {f"turn{turn}_{name}_{which}_ms": found[f"{name}_{which}_ms"] for which in BY_TURN}
    return figures


def design_effect(requests: Sequence[RequestTiming], shares: Floats) -> float:
    """The design effect of conversations among `requests`, of which `shares` above 1 exceed a limit."""
    turns: dict[int, list[bool]] = {}
    for request, share in zip(requests, shares, strict=True):
        if request.session >= 0:
            turns.setdefault(request.session, []).append(share > 1)
    return early_stopping.design_effect([sum(over) for over in turns.values()], [len(over) for over in turns.values()])


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, list[float] | None]:
    """The mean of repeated measurements and its confidence interval (Student's t); None for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, [mean - half, mean + half]


def begun_before(requests: Iterable[RequestTiming], samples: Samples, block_size: int = BLOCK) -> int:
    """The prompt tokens, in whole blocks, with which an earlier prompt of these requests began: at least so many.

    It is known of traces with ids of their pieces, and of a conversation's earlier turns.
    """
    sent = sorted(requests, key=lambda request: request.issued)
    if isinstance(samples.prompts, MadeUp) and len(samples.prompts.ids):
        common = samples.prompts.begun_before(np.array([request.sample for request in sent]))
    else:
        last: dict[int, int] = {}  # the prompt of each conversation's last turn
        common = np.zeros(len(sent), dtype=np.int64)
        for number, request in enumerate(sent):
            if request.session >= 0:
                common[number] = last.get(request.session, 0)
                last[request.session] = request.prompt_tokens
    most = np.array([request.prompt_tokens - 1 for request in sent])  # a prompt's last token is always computed
    return int((np.minimum(common, most) // block_size * block_size).sum())


def per_million(metrics: Mapping[str, float], gpus: int, per_gpu_hour: float) -> dict[str, float]:
    """Costs of a million tokens on a server with these `metrics` on so many `gpus`, in the price's currency.

    Each is the whole cost: that of a million output tokens includes the prompts that they took.
    """
    rates = {name: metrics.get(rate, 0.0) for name, rate in PER_MILLION.items()}
    return {name: gpus * per_gpu_hour / 3600 / rate * 1e6 for name, rate in rates.items() if rate}
