"""What repeats say of the difference between two configurations that were measured in the same blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, in the metric's unit, positive where it is more than the baseline."""

    mean: float
    low: float  # of the confidence interval
    high: float
    p: float  # two-sided, that there is none; corrected as the interval is


def difference(values: Sequence[float], baseline: Sequence[float], confidence: float, comparisons: int) -> Difference:
    """Student's paired t over blocks; `values` and `baseline` hold one value for each, in the same order.

    What a block has in common (the arrivals, the machine's state) cancels, and the two may vary differently, as
    a server near saturation does. Over `comparisons` such differences all intervals hold together with probability
    `confidence` (Bonferroni), so that the best of them may be picked afterwards. An interval leaves out 0 exactly
    where p < 1 - confidence, and the smallest p is Holm's, too. Raises ValueError for fewer than two blocks.
    """
    found = np.asarray(values, float) - np.asarray(baseline, float)
    if len(found) < 2:
        raise ValueError("two blocks at least")
    mean, error = float(found.mean()), float(stats.sem(found))
    if error == 0:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    freedom = len(found) - 1
    reach = float(stats.t.ppf(1 - (1 - confidence) / comparisons / 2, freedom)) * error
    p = min(1.0, comparisons * 2 * float(stats.t.sf(abs(mean) / error, freedom)))
    return Difference(mean, mean - reach, mean + reach, p)
