"""Search for the highest load that keeps the limits: a bracket closes while runs grow longer, and is certified."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from autotune.config.schema import LoadSearch

START = 0.7  # first load, as a share of the rate at which a burst was served; latency limits seldom allow more
WIDEN = 1.3  # factor from one load to the next until one has kept and one has broken the limits
LEAST = 0.02 / START  # share of the first load below which the search gives up: 0.02 of a burst's rate


@dataclass(frozen=True)
class MaxQps:
    """The result of a search, in queries/s; None where there is no such load."""

    certified: float | None  # highest load that kept the limits in a run of full length
    failing: float | None  # lowest load above it that broke them


def search(
    keeps_limits: Callable[[float, float, bool], bool], burst_qps: float, full_s: float, settings: LoadSearch
) -> MaxQps:
    """Search for the highest load; `keeps_limits(qps, seconds, full)` makes a run and tells if it kept the limits.

    `burst_qps` is roughly the most that the server can take. A short run may be wrong either way, so both ends of the
    bracket are run again at full length `full_s`, and the bracket moves if they contradict it. With
    `settings.start_qps`, where the load is roughly known, all runs have full length and the steps are small.
    """
    seconds = min(settings.first_s, full_s)
    certified = failing = None  # at full length
    low: float | None = None
    high: float | None = None
    low_s = 0.0  # length of the run in which `low` kept the limits
    closing = settings.start_qps is not None
    qps = settings.start_qps or START * burst_qps
    step, least = 1 + settings.precision if closing else WIDEN, LEAST * qps
    for _ in range(settings.max_runs):
        if qps < least:
            break
        full = closing or seconds >= full_s
        if keeps_limits(qps, full_s if full else seconds, full):
            low, low_s, certified = qps, full_s if full else seconds, qps if full else certified
            if high is not None and low >= high:
                high = failing = None
        else:
            high, failing = qps, qps if full else failing
            if low is not None and low >= high:
                low = certified = None
        if low is None or high is None:
            qps, step = (qps * step if high is None else qps / step), step**2 if closing else step
        elif high / low > 1 + 1.01 * settings.precision:
            seconds = min(full_s, seconds * settings.growth)
            # An overload takes a while to show, so a load that was tried briefly is tried again before a higher one.
            qps = low if low_s * settings.growth**2 < seconds else math.sqrt(low * high)
        elif certified != low or failing != high:
            qps, step, closing = (low if certified != low else high), 1 + settings.precision, True
        else:
            break
    return MaxQps(certified, failing)
