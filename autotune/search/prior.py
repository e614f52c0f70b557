"""The first trials of a study: the best of a simulation of it, or of another study, instead of random ones."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from autotune.config.schema import FITTED, HOST, Config
from autotune.errors import InputError
from autotune.measure import objective
from autotune.measure.result import Result
from autotune.results.study import load
from autotune.search.distributions import Distribution, contains, describe, scaled
from autotune.search.simulate import Simulation, estimate, on_twin, search_best, simulation, twin_of
from autotune.search.space import Space

log = logging.getLogger(__name__)

EXPECTED = "expected"  # user attribute of a trial in Optuna's storage: what a simulation said of it
APART = 0.1  # of a parameter's range, in which two configurations differ to be distinct
CANDIDATES = 30  # distinct configurations that are simulated on other devices


def first(config: Config, space: Space) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters that a new study asks first, with what is noted of them: the best of another study, of a simulation.

    Raises InputError.
    """
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if name := config.warm_start:
        found += [(one.params, {"warm_start": name}) for one in warm_start(name, space, config.prior.keep)]
        log.info("warm_start: the first %d trials are the best of study %s", len(found), name)
    if config.prior.backend and config.prior.keep:
        simulated = best(config, space)
        found += [(one.params, {EXPECTED: {"values": one.values, "feasible": one.feasible}}) for one in simulated]
        message = "prior: the first %d trials are the best of %d simulated ones"
        log.info(message, len(simulated), config.prior.trials)
    return found


def best(config: Config, space: Space) -> list[Result]:
    """The `prior.keep` configurations, of `prior.trials` simulated ones, of which one is most likely to be good.

    The best of a simulated study are simulated again on devices whose constants are off. Each one that is taken is the
    one that adds most to the best score of those taken before, on average over the devices: where the device is not
    known well, the choice is spread from bold to safe.
    """
    settings = config.prior
    simulated = simulation(config, settings.backend)
    sign = objective.sign(config.objective)
    ranked = sorted(
        (found for found in search_best(simulated, space, settings.trials) if found.complete),
        key=lambda found: (found.feasible, -objective.excess(found.constraints), sign * found.values[0]),
        reverse=True,
    )
    candidates = distinct(ranked, space, CANDIDATES)
    found = [candidates, *([estimate(other, one.params) for one in candidates] for other in others(config, simulated))]
    scores = np.array([_scores(on_device, sign) for on_device in found])
    return [candidates[number] for number in _complementary(scores, settings.keep)]


def others(config: Config, simulated: Simulation) -> list[Simulation]:
    """Simulations of devices whose constants are off, or on draws from the posterior of a twin of recorded servers."""
    settings = config.prior
    sigmas = (settings.sigma, settings.host_sigma)
    if settings.backend.get("twin"):
        twin = twin_of(simulated, *sigmas)
        return [on_twin(simulated, twin.draw(seed)) for seed in range(settings.devices)]
    device = settings.backend["device"]
    devices = [perturbed(device, *sigmas, seed) for seed in range(settings.devices)]
    return [simulation(config, {**settings.backend, "device": device}) for device in devices]


def perturbed(device: Mapping[str, Any], sigma: float, host_sigma: float, seed: int) -> dict[str, Any]:
    """`device`, each fitted constant off by a lognormal factor of its own, and the host's by one that they share."""
    random = np.random.default_rng(seed)
    factors = dict(zip(FITTED, random.lognormal(0, sigma, len(FITTED)), strict=True))
    slower = random.lognormal(0, host_sigma)
    for name in HOST:
        factors[name] *= slower
    return {
        name: value * float(factors[name]) if name in factors and value is not None else value
        for name, value in device.items()
    }


def _scores(results: Sequence[Result], sign: int) -> list[float]:
    """Score results on one device: 1 for the best, at least 0.1 for a feasible one, 0 for the rest."""
    values = [sign * found.values[0] if found.feasible else None for found in results]
    feasible = [value for value in values if value is not None]
    if not feasible:
        return [0.0] * len(values)
    worst, spread = min(feasible), max(feasible) - min(feasible)
    return [0.0 if value is None else 0.1 + 0.9 * ((value - worst) / spread if spread else 1.0) for value in values]


def _complementary(scores: NDArray[np.float64], count: int) -> list[int]:
    """`count` columns of `scores` (devices × candidates), each the one that raises the mean of the rows' maxima most.

    Of equals, and once nothing raises it any more, the first.
    """
    chosen: list[int] = []
    reached = np.zeros(len(scores))
    while len(chosen) < min(count, scores.shape[1]):
        gains = np.maximum(scores, reached[:, None]).mean(axis=0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        reached = np.maximum(reached, scores[:, chosen[-1]])
    return chosen


def warm_start(name: str, space: Space, count: int) -> list[Result]:
    """The `count` best distinct trials of study `name` that fit, their parameters cut to those of `space`.

    What does not fit is told in one line. Raises InputError if there is no such study, or nothing of it fits.
    """
    study = load(name, "warm_start")
    left_out: dict[str, None] = {}
    fitting: list[Result] = []
    for trial in study.ranked:
        result = study.results[trial]
        shared = {key: value for key, value in result.params.items() if key in space.parameters}
        wrong = [key for key, value in shared.items() if not contains(space.parameters[key], value)]
        for key, value in result.params.items():
            if key not in shared:
                left_out[f"{key} is not swept here"] = None
            elif key in wrong:
                left_out[f"{trial}'s {key}={value} is outside {describe(space.parameters[key])}"] = None
        if shared and not wrong:
            result.params = shared
            fitting.append(result)
    why = "; ".join(left_out)
    if not fitting:
        none = f"none of its {len(study.ranked)} feasible trials lies within this space{why and f' ({why})'}"
        raise InputError(f"warm_start={name}: {none}; write another study, a space that holds them, or leave it out")
    if why:
        log.info("warm_start=%s: %s", name, why)
    return distinct(fitting, space, count)


def distinct(ranked: Iterable[Result], space: Space, count: int) -> list[Result]:
    """The first `count` of which none is nearly the same as an earlier one."""
    kept: list[Result] = []
    for one in ranked:
        if len(kept) == count:
            break
        if all(_apart(one.params, other.params, space.parameters) for other in kept):
            kept.append(one)
    return kept


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], parameters: Mapping[str, Distribution]) -> bool:
    def differ(name: str) -> bool:
        here, there, distribution = one[name], other[name], parameters[name]
        if isinstance(distribution, CategoricalDistribution):
            return bool(here != there)
        return abs(scaled(here, distribution) - scaled(there, distribution)) >= APART

    return one.keys() != other.keys() or any(map(differ, one))
