"""The highest load that holds the limits: a bracket that closes while its runs grow longer, then is made certain."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from autotune.config.schema import LoadSearch

START = 0.7  # of the rate at which a burst was served; latency limits seldom allow more
WIDEN = 1.3  # from one load to the next until one holds and one breaks the limits
LEAST = 0.02 / START  # of the first load, 0.02 of a burst's rate: a server that can't hold this has no such load


@dataclass(frozen=True)
class Found:
    """Loads in queries/s; None where there is none."""

    certified: float | None  # highest that held the limits in a run of full length
    failing: float | None  # lowest above it that broke them


def search(holds: Callable[[float, float, bool], bool], burst_qps: float, full_s: float, settings: LoadSearch) -> Found:
    """Look for the highest load; `holds(qps, seconds, full)` makes a run and says whether it held the limits.

    `burst_qps` is about what the server can take at most. A short run may be wrong either way; so both ends of the
    bracket are run once more in full length `full_s`, and the bracket moves to where they say. From
    `settings.start_qps`, where the load is known already, the search takes runs of full length and small steps only.
    """
    seconds = min(settings.first_s, full_s)
    certified = failing = None  # in full length
    low: float | None = None
    high: float | None = None
    low_s = 0.0  # length of the run that `low` held
    closing = settings.start_qps is not None
    qps = settings.start_qps or START * burst_qps
    step, least = 1 + settings.precision if closing else WIDEN, LEAST * qps
    for _ in range(settings.max_runs):
        if qps < least:
            break
        full = closing or seconds >= full_s
        if holds(qps, full_s if full else seconds, full):
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
            # An overload takes a while to show: a load that held for a moment is tried again before more follows.
            qps = low if low_s * settings.growth**2 < seconds else math.sqrt(low * high)
        elif certified != low or failing != high:
            qps, step, closing = (low if certified != low else high), 1 + settings.precision, True
        else:
            break
    return Found(certified, failing)
