"""LoadGen's early-stopping test: with 99 % confidence, 99 % of queries keep a limit.

The arithmetic of loadgen/early_stopping.cc and results.cc (EarlyStopping, Server; 6.0.17): a run of n queries, t of
them over the limit, passes if the probability of t or fewer is below 1 % when the true share over the limit is 1 %.
TTFT and TPOT are tested separately, and so are the limits that LoadGen lacks: on latency, and on TTFT by length.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from autotune.config.schema import ScenarioConfig, Stop
from autotune.measure.backend import RequestTiming
from autotune.measure.limits import LatencyLimit, heading, limits_of

PERCENTILE = 0.99
CONFIDENCE = 0.99
FEWEST = 459  # queries that pass, with none of them over the limit; 662 with 1, 838 with 2


def chance(over: int, queries: int) -> float:
    """Probability that `over` or fewer of `queries` exceed the limit when the true share is 1 - PERCENTILE."""
    return float(bdtr(over, queries, 1 - PERCENTILE))


def allowed(queries: int, effect: float = 1.0) -> int:
    """Most of `queries` with this design effect that may exceed the limit; -1 if they are too few to pass at all."""
    worth = int(queries / effect)
    most = bisect_left(range(worth + 1), 1 - CONFIDENCE, key=lambda over: chance(over, worth)) - 1
    return int(most * effect) if most >= 0 else -1


def design_effect(over: Sequence[int], sizes: Sequence[int]) -> float:
    """The factor by which queries in clusters tell less than independent ones; `over` of `sizes` exceed a limit.

    It is the variance of their share over the limit, a ratio estimate, by that of as many independent queries (Kish,
    Survey Sampling, 1965): n of them are worth n / effect, of which over / effect exceed it (Rao and Scott, Biometrics
    48, 1992). At least 1; also 1 where none or all exceed it, so that nothing shows how alike those of a cluster are.
    """
    y, m, clusters = np.asarray(over, float), np.asarray(sizes, float), len(sizes)
    n = m.sum()
    share = y.sum() / n if n else 0.0
    if clusters < 2 or not 0 < share < 1:
        return 1.0
    variance = clusters / (clusters - 1) * ((y - share * m) ** 2).sum() / n**2
    return max(1.0, float(variance * n / (share * (1 - share))))


def upper_bound(latencies: Sequence[float] | NDArray[np.float64], total: int, effect: float = 1.0) -> float | None:
    """The lowest limit that a run of `total` queries passes: with 99 % confidence, p99 is below it.

    If the run was stopped and `latencies` are those of the queries that ended, it can't pass any lower limit than this.
    None if `total` is too few for the test, or too few have ended.
    """
    over = allowed(total, effect)
    return float(np.sort(latencies)[-1 - over]) if 0 <= over < len(latencies) else None


class Watch:
    """LoadGen's verdict on a Server run of `total` queries, foreseen while its requests end one by one.

    Each of `limits` is tested by itself. With `share`, that share of the queries may exceed a limit: a run that is too
    short for LoadGen's test can still show how a longer one would end. Turns of a conversation are alike: the verdict
    is then on as many queries as they are worth (design_effect), and that a run passes is not known before its end.
    """

    def __init__(self, total: int, limits: Sequence[LatencyLimit], share: float | None = None) -> None:
        self.allowed = allowed(total) if share is None else round(share * total)
        self.over = [0] * len(limits)
        self.seen = 0
        self._total, self._limits, self._share = total, limits, share
        self._sessions: dict[int, list[int]] = {}  # the turns of each conversation, and how many exceed each limit

    def add(self, request: RequestTiming) -> None:
        """Count a request that has ended."""
        self.seen += 1
        exceeds = [limit.share(request) > 1 for limit in self._limits]
        self.over = [count + one for count, one in zip(self.over, exceeds, strict=True)]
        if request.session >= 0 and self._share is None:
            counts = self._sessions.get(request.session, [0] * (1 + len(exceeds)))
            self._sessions[request.session] = [n + one for n, one in zip(counts, [1, *exceeds], strict=True)]

    @property
    def decided(self) -> bool | None:
        """True if the run passes, False if it fails, whatever is still to come; None while that is open.

        A run that is too short for the test is never decided: it is made for other reasons.
        """
        if self.allowed < 0:
            return None
        most = max(self.over, default=0)
        if most > self.allowed:
            return False
        return True if not self._sessions and most + self._total - self.seen <= self.allowed else None

    def ends_run(self, stop: Stop) -> bool:
        """True if the run may end now."""
        if stop is Stop.never or self.decided is None:
            return False
        return stop is Stop.decided or not self.decided

    def reasons(self) -> list[str]:
        """Reasons why the run is not VALID so far; empty if it passes should all further requests keep the limits."""
        found = [self._reason(number) for number in range(len(self._limits))]
        if self._limits and self.allowed < 0:
            found.append(f"{self._total} queries are too few for the test of a limit at p99, which takes {FEWEST}")
        return [reason for reason in found if reason]

    def _reason(self, number: int) -> str:
        """The reason why a limit does not hold; empty if it does."""
        over, turns = self.over[number], list(self._sessions.values())
        effect = design_effect([counts[1 + number] for counts in turns], [counts[0] for counts in turns])
        most = self.allowed if effect == 1 else allowed(self._total, effect)
        if most < 0:  # results.cc (PerfConstraintsMet) looks at the latency of rank int(0.99 n), whatever n is
            most = self._total - int(PERCENTILE * self._total) - 1 if effect == 1 else 0
        if over <= most:
            return ""
        worth = (
            f" (as conversations go, they are worth {self._total / effect:.0f} independent ones)" if effect > 1 else ""
        )
        ended = self.seen < self._total
        queries, all_ = (f"the first {self.seen}", f" of all {self._total}") if ended else (f"{self.seen}", "")
        words = f"over its limit in {over} of {queries} queries, {most}{all_} may be{worth}"
        return f"{heading(self._limits[number].name)} {words}"


def watched(requests: Iterable[RequestTiming], total: int, scenario: ScenarioConfig, stop: Stop = Stop.never) -> Watch:
    """A Watch to which `requests` were added in order, until `stop` ended the run."""
    watch = Watch(total, limits_of(scenario), scenario.over_share)
    for request in requests:
        watch.add(request)
        if watch.ends_run(stop):
            break
    return watch
