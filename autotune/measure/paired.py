"""The difference between two configurations that were measured in the same blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr  # scipy.stats takes a second to import

from autotune.measure.metrics import mean_and_interval


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, in the metric's unit, positive where it is more than the baseline."""

    mean: float
    low: float  # of the confidence interval
    high: float
    p: float  # two-sided, that there is none; corrected as the interval is


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], confidence: float, comparisons: int = 1
) -> Difference:
    """Student's paired t over blocks; `values` and `baseline` hold one value for each, in the same order.

    What a block has in common (the arrivals, the machine's state) cancels, and the two may vary differently, as
    a server near saturation does. Over `comparisons` such differences all intervals hold together with probability
    `confidence` (Bonferroni), so that the best of them may be picked afterwards. An interval leaves out 0 exactly
    where p < 1 - confidence, and the smallest p is Holm's, too. Raises ValueError for fewer than two blocks.
    """
    if len(values) < 2:
        raise ValueError("two blocks at least")
    differences = np.subtract(values, baseline).tolist()
    mean, interval = mean_and_interval(differences, 1 - (1 - confidence) / comparisons)
    if np.allclose(differences, mean, rtol=1e-12, atol=0):  # no variance: t is undefined
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    error = np.std(differences, ddof=1) / len(differences) ** 0.5
    p = 2 * float(stdtr(len(differences) - 1, -abs(mean) / error))
    low, high = interval or (mean, mean)
    return Difference(mean, low, high, min(1.0, comparisons * p))
