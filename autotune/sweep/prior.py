"""The first trials of a study: what a simulation of it finds best, instead of random points."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autotune import objective
from autotune.result import Result
from autotune.schema import Config
from autotune.space import Space
from autotune.sweep.estimate import Estimate, search_best, simulation

Found = TypeVar("Found", Estimate, Result)
APART = 0.1  # of a parameter's range, in which two configurations differ to be distinct


@dataclass(frozen=True)
class Expected:
    """What the simulation says of a configuration."""

    params: dict[str, Any]
    values: list[float]
    feasible: bool


def best(config: Config, space: Space) -> list[Expected]:
    """The `prior.keep` best distinct configurations of `prior.trials` simulated ones, the best first."""
    simulated = simulation(config, config.prior.backend)
    sign = objective.sign(config.objective)
    ranked = sorted(
        (found for found in search_best(simulated, space, config.prior.trials) if found.result.complete),
        key=lambda estimate: (estimate.result.feasible, -_over(estimate), sign * estimate.result.values[0]),
        reverse=True,
    )
    return [
        Expected(estimate.params, estimate.result.values, estimate.result.feasible)
        for estimate in distinct(ranked, space, config.prior.keep)
    ]


def _over(estimate: Estimate) -> float:
    return sum(max(0.0, value) for value in estimate.result.constraints.values())


def distinct(ranked: Iterable[Found], space: Space, count: int) -> list[Found]:
    """The first `count` of which none is nearly the same as an earlier one."""
    kept: list[Found] = []
    for one in ranked:
        if all(_apart(one.params, other.params, space.parameters) for other in kept):
            kept.append(one)
        if len(kept) == count:
            break
    return kept


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], parameters: Mapping[str, BaseDistribution]) -> bool:
    if one.keys() != other.keys():
        return True
    return any(_distance(one[name], other[name], parameters[name]) >= APART for name in one)


def _distance(one: Any, other: Any, distribution: BaseDistribution) -> float:
    """How far two values lie apart, as a share of the range; 1 for two choices."""
    if isinstance(distribution, CategoricalDistribution):
        return float(one != other)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.0
    if distribution.log:
        return float(abs(math.log(one / other)) / math.log(high / low))
    return float(abs(one - other) / (high - low))
