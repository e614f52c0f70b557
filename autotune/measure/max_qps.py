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
    """The result of a search, in queries/s or users; None where there is no such load."""

    certified: float | None  # highest load that kept the limits in a run of full length
    failing: float | None  # lowest load above it that broke them


def search(
    keeps_limits: Callable[[float, float, bool], bool],
    most: float,
    full_s: float,
    settings: LoadSearch,
    whole: bool = False,
) -> MaxQps:
    """Search for the highest load; `keeps_limits(load, seconds, full)` makes a run and tells if it kept the limits.

    `most` is roughly the most that the server can take; a load of users is a `whole` number. A short run may be wrong
    either way, so both ends of the bracket are run again at full length `full_s`, and the bracket moves if they
    contradict it. With `settings.start_qps`, where the load is roughly known, all runs have full length and the steps
    are small.
    """
    seconds = min(settings.first_s, full_s)
    certified = failing = None  # at full length
    low: float | None = None
    high: float | None = None
    low_s = 0.0  # length of the run in which `low` kept the limits
    closing = settings.start_qps is not None
    load = settings.start_qps or START * most
    load = max(1.0, round(load)) if whole else load
    step, least = 1 + settings.precision if closing else WIDEN, 1.0 if whole else LEAST * load
    for _ in range(settings.max_runs):
        if load < least:
            break
        full = closing or seconds >= full_s
        if keeps_limits(load, full_s if full else seconds, full):
            low, low_s, certified = load, full_s if full else seconds, load if full else certified
            if high is not None and low >= high:
                high = failing = None
        else:
            high, failing = load, load if full else failing
            if low is not None and low >= high:
                low = certified = None
        if low is None or high is None:
            load = _next(load, step if high is None else 1 / step, whole)
            step = step**2 if closing else step
        elif high / low > 1 + 1.01 * settings.precision and not (whole and high - low <= 1):
            seconds = min(full_s, seconds * settings.growth)
            # An overload takes a while to show, so a load that was tried briefly is tried again before a higher one.
            middle = math.sqrt(low * high)
            load = low if low_s * settings.growth**2 < seconds else round(middle) if whole else middle
        elif certified != low or failing != high:
            load, step, closing = (low if certified != low else high), 1 + settings.precision, True
        else:
            break
    return MaxQps(certified, failing)


def _next(load: float, factor: float, whole: bool) -> float:
    """The load times `factor`; the next whole number at least where it must be one."""
    if not whole:
        return load * factor
    return max(load + 1, round(load * factor)) if factor > 1 else min(load - 1, round(load * factor))
