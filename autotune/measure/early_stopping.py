"""LoadGen's early-stopping test: with 99 % confidence, 99 % of queries hold a limit.

The arithmetic of loadgen/early_stopping.cc and results.cc (EarlyStopping, Server; 6.0.17): a run of n queries with t
over the limit passes if t or fewer would come with a probability below 1 % where the true share over it is 1 %. It is
made for TTFT and for TPOT by themselves.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from scipy.special import bdtr

from autotune.config.schema import ScenarioConfig, Stop
from autotune.measure.backend import RequestTiming

PERCENTILE = 0.99
CONFIDENCE = 0.99


def chance(over: int, queries: int) -> float:
    """Probability of `over` or fewer of `queries` over the limit where the true share is 1 - PERCENTILE."""
    return float(bdtr(over, queries, 1 - PERCENTILE))


def queries_needed(over: int) -> int:
    """Fewest queries that pass with `over` of them over the limit: 459 with none, 662 with 1, 838 with 2."""
    most = 1000 * (over + 1)
    return bisect_left(range(most), CONFIDENCE - 1, lo=over + 1, key=lambda queries: -chance(over, queries))


def allowed(queries: int) -> int:
    """Most of `queries` that may be over the limit; -1 where they are too few to pass at all."""
    return bisect_left(range(queries + 1), 1 - CONFIDENCE, key=lambda over: chance(over, queries)) - 1


def upper_bound(latencies: Sequence[float], total: int) -> float | None:
    """The least limit that a run of `total` queries passes: 99 % confidence that p99 is below it.

    Of a run that was stopped, with the latencies of those that ended, no limit below this one can pass any more. None
    if `total` is too few for the test, or too few have ended.
    """
    over = allowed(total)
    return sorted(latencies)[-1 - over] if 0 <= over < len(latencies) else None


class Watch:
    """What LoadGen will say of a Server run of `total` queries, while its requests end one by one.

    `limits` are of TTFT and TPOT, in seconds; None where there is none. With `share`, that many of the queries may be
    over a limit instead: a run that is too short for LoadGen's test can still show which way a longer one goes.
    """

    def __init__(self, total: int, limits: tuple[float | None, float | None], share: float | None = None) -> None:
        self.allowed = allowed(total) if share is None else round(share * total)
        self.over = [0, 0]
        self.seen = 0
        self._total, self._limits = total, limits

    def add(self, ttft: float, tpot: float) -> None:
        """A request has ended."""
        self.seen += 1
        for number, latency in enumerate((ttft, tpot)):
            limit = self._limits[number]
            self.over[number] += limit is not None and latency > limit

    @property
    def decided(self) -> bool | None:
        """Whether the run passes, once nothing that is still to come can change it; None before.

        A run that is too short for the test is never decided: it is made for other reasons.
        """
        if self.allowed < 0:
            return None
        if max(self.over) > self.allowed:
            return False
        return True if max(self.over) + self._total - self.seen <= self.allowed else None

    def ends_run(self, stop: Stop) -> bool:
        """Whether there is nothing more to wait for."""
        if stop is Stop.never or self.decided is None:
            return False
        return stop is Stop.decided or not self.decided

    def reasons(self) -> list[str]:
        """Why the run is not VALID, of what has ended; empty if it is, or would be if all the rest held its limits."""
        # results.cc (PerfConstraintsMet) looks at the latency of rank int(0.99 n), whatever n is.
        most = self.allowed if self.allowed >= 0 else self._total - int(PERCENTILE * self._total) - 1
        found = [
            f"{name} over its limit in {over} of {self.seen} queries, {most} of {self._total} may be"
            for name, over in zip(("TTFT", "TPOT"), self.over, strict=True)
            if over > most
        ]
        if self.allowed < 0:
            found.append(f"{self._total} queries are too few for LoadGen's early-stopping test, which takes 459")
        return found


def watched(requests: Iterable[RequestTiming], total: int, scenario: ScenarioConfig, stop: Stop = Stop.never) -> Watch:
    """A watch that has seen `requests` in order, until `stop` ends the run."""
    watch = Watch(total, scenario.limits_s(), scenario.over_share)
    for request in requests:
        watch.add(request.ttft, request.tpot)
        if watch.ends_run(stop):
            break
    return watch
