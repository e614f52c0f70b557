"""LoadGen's early-stopping test: with 99 % confidence, 99 % of queries keep a limit.

The arithmetic of loadgen/early_stopping.cc and results.cc (EarlyStopping, Server; 6.0.17): a run of n queries, t of
them over the limit, passes if the probability of t or fewer is below 1 % when the true share over the limit is 1 %.
TTFT and TPOT are tested separately.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from scipy.special import bdtr

from autotune.config.schema import ScenarioConfig, Stop
from autotune.measure.backend import RequestTiming

PERCENTILE = 0.99
CONFIDENCE = 0.99


def chance(over: int, queries: int) -> float:
    """Probability that `over` or fewer of `queries` exceed the limit when the true share is 1 - PERCENTILE."""
    return float(bdtr(over, queries, 1 - PERCENTILE))


def queries_needed(over: int) -> int:
    """Fewest queries that pass with `over` of them over the limit: 459 with none, 662 with 1, 838 with 2."""
    most = 1000 * (over + 1)
    return bisect_left(range(most), CONFIDENCE - 1, lo=over + 1, key=lambda queries: -chance(over, queries))


def allowed(queries: int) -> int:
    """Most of `queries` that may exceed the limit; -1 if they are too few to pass at all."""
    return bisect_left(range(queries + 1), 1 - CONFIDENCE, key=lambda over: chance(over, queries)) - 1


def upper_bound(latencies: Sequence[float], total: int) -> float | None:
    """The lowest limit that a run of `total` queries passes: with 99 % confidence, p99 is below it.

    If the run was stopped and `latencies` are those of the queries that ended, it can't pass any lower limit than this.
    None if `total` is too few for the test, or too few have ended.
    """
    over = allowed(total)
    return sorted(latencies)[-1 - over] if 0 <= over < len(latencies) else None


class Watch:
    """LoadGen's verdict on a Server run of `total` queries, foreseen while its requests end one by one.

    `limits` are of TTFT and TPOT, in seconds; None is no limit. With `share`, that share of the queries may exceed a
    limit: a run that is too short for LoadGen's test can still show how a longer one would end.
    """

    def __init__(self, total: int, limits: tuple[float | None, float | None], share: float | None = None) -> None:
        self.allowed = allowed(total) if share is None else round(share * total)
        self.over = [0, 0]
        self.seen = 0
        self._total, self._limits = total, limits

    def add(self, ttft: float, tpot: float) -> None:
        """Count a request that has ended."""
        self.seen += 1
        for number, latency in enumerate((ttft, tpot)):
            limit = self._limits[number]
            self.over[number] += limit is not None and latency > limit

    @property
    def decided(self) -> bool | None:
        """True if the run passes, False if it fails, whatever is still to come; None while that is open.

        A run that is too short for the test is never decided: it is made for other reasons.
        """
        if self.allowed < 0:
            return None
        if max(self.over) > self.allowed:
            return False
        return True if max(self.over) + self._total - self.seen <= self.allowed else None

    def ends_run(self, stop: Stop) -> bool:
        """True if the run may end now."""
        if stop is Stop.never or self.decided is None:
            return False
        return stop is Stop.decided or not self.decided

    def reasons(self) -> list[str]:
        """Reasons why the run is not VALID so far; empty if it passes should all further requests keep the limits."""
        # results.cc (PerfConstraintsMet) looks at the latency of rank int(0.99 n), whatever n is.
        most = self.allowed if self.allowed >= 0 else self._total - int(PERCENTILE * self._total) - 1
        reasons = [
            f"{name} over its limit in {over} of {self.seen} queries, {most} of {self._total} may be"
            for name, over in zip(("TTFT", "TPOT"), self.over, strict=True)
            if over > most
        ]
        if self.allowed < 0:
            reasons.append(f"{self._total} queries are too few for LoadGen's early-stopping test, which takes 459")
        return reasons


def watched(requests: Iterable[RequestTiming], total: int, scenario: ScenarioConfig, stop: Stop = Stop.never) -> Watch:
    """A Watch to which `requests` were added in order, until `stop` ended the run."""
    watch = Watch(total, scenario.limits_s(), scenario.over_share)
    for request in requests:
        watch.add(request.ttft, request.tpot)
        if watch.ends_run(stop):
            break
    return watch
