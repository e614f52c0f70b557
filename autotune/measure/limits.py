"""Limits on latencies at p99: those that a scenario has, and how far a request is from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autotune.config.schema import Mode, ScenarioConfig
from autotune.measure.backend import RequestTiming


@dataclass(frozen=True)
class LatencyLimit:
    """The limit on one latency; a request whose prompt is short enough has the first of `by_prompt` that fits it."""

    name: str  # ttft, tpot or latency: RequestTiming has it under this name
    seconds: float = math.inf
    by_prompt: Sequence[tuple[float, float]] = field(default=())  # most prompt tokens and seconds, the fewest first

    def share(self, request: RequestTiming) -> float:
        """The latency of `request`, as a share of its limit: above 1 it is broken."""
        seconds: float = getattr(request, self.name)
        if not self.by_prompt:
            return seconds / self.seconds
        fits = (limit for tokens, limit in self.by_prompt if request.prompt_tokens <= tokens)
        return seconds / next(fits, self.seconds)

    @property
    def tightest(self) -> float:
        return min([self.seconds, *(seconds for _, seconds in self.by_prompt)])

    @property
    def loosest(self) -> float:
        return max([self.seconds, *(seconds for _, seconds in self.by_prompt)])

    def __str__(self) -> str:
        words = [f"{seconds * 1e3:,g} ms to {tokens:,.0f} prompt tokens" for tokens, seconds in self.by_prompt]
        words += [f"{self.seconds * 1e3:,g} ms{' beyond' if words else ''}"] if self.seconds < math.inf else []
        return f"{heading(self.name)} {', '.join(words)}"


def limits_of(scenario: ScenarioConfig) -> list[LatencyLimit]:
    """The limits that a run of `scenario` is judged by: none where it is made for its answers."""
    return [] if scenario.mode is Mode.accuracy or scenario.audit else latency_limits(scenario)


def latency_limits(scenario: ScenarioConfig) -> list[LatencyLimit]:
    """The limits of `scenario`, in the order in which a request meets them."""
    by_prompt = [(tokens, ms / 1e3) for tokens, ms in sorted(scenario.ttft_by_prompt or [])]
    found = []
    for name in ("ttft", "tpot", "latency"):
        limit_ms, own = getattr(scenario, f"{name}_ms"), by_prompt if name == "ttft" else []
        if own or limit_ms is not None:
            found.append(LatencyLimit(name, math.inf if limit_ms is None else limit_ms / 1e3, own))
    return found


def known_to_loadgen(limit: LatencyLimit) -> bool:
    """True if LoadGen tests it: one limit on the TTFT of all requests, or on their TPOT."""
    return limit.name != "latency" and not limit.by_prompt


def within(request: RequestTiming, limits: Sequence[LatencyLimit]) -> bool:
    """True if `request` keeps all of `limits`."""
    return all(limit.share(request) <= 1 for limit in limits)


def heading(name: str) -> str:
    return name if name == "latency" else name.upper()
