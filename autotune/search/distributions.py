"""Values of a parameter: what Optuna's distributions lack."""

import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from autotune.errors import InputError

Range = IntDistribution | FloatDistribution
Distribution = CategoricalDistribution | Range


def suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> Any:
    """Ask for a value of the parameter `name`."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    number: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return number(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def grid_values(name: str, distribution: Distribution) -> Sequence[Any]:
    """Every value of the parameter `name`. Raises InputError for one without steps."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if distribution.step is None:
        raise InputError(f"sampler=grid: {name} has no steps; write {name}=range(low,high,step=…) or choice(…)")
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    count = round((distribution.high - distribution.low) / distribution.step)
    return [float(f"{distribution.low + number * distribution.step:.12g}") for number in range(count + 1)]


def contains(distribution: Distribution, value: Any) -> bool:
    """Tell whether `distribution` could suggest `value`."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8


def scaled(value: Any, distribution: Range) -> float:
    """The place of a number in its range, from 0 to 1; the middle if there is none, or no range."""
    low, high = distribution.low, distribution.high
    if value is None or low == high:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def describe(distribution: Distribution) -> str:
    """`16…1024, log`; `2048 | 4096`."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(str(choice) for choice in distribution.choices)
    step = f", step {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g}…{distribution.high:g}{', log' if distribution.log else step}"


def ends(distribution: Distribution) -> Sequence[Any]:
    """Values that are in their field's bounds only if all of `distribution` is: each choice, or a range's ends.

    Of a range without steps also one that is no whole number.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    low, high = distribution.low, distribution.high
    return [low, high] if distribution.step else [low, high, low + 0.3819 * (high - low)]
