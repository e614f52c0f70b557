"""sampler=twin: asks for what is most likely to win on a twin of the server.

The twin is fitted to the steps that trials have recorded, the baseline's first. A simulated study looks for good
configurations on it; the best of them are simulated on draws from the twin's posterior, too, and the one is asked for
that promises most beyond what has been reached, on average over the draws. What the twin does not model (an attention
backend, say) is learned as a factor on its word. Where the twin expects nothing better, or is wrong, TPE is asked.
"""

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from autotune.config.schema import Config
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure import objective
from autotune.measure.result import Result, State
from autotune.measure.steps import NAME, Steps, read
from autotune.search.device import as_started, device_of, simulated
from autotune.search.distributions import scaled
from autotune.search.prior import distinct
from autotune.search.simulate import Simulation, ask, checked, key, new_study, on_twin, simulation, twin_of
from autotune.search.space import DEFAULT, Space
from autotune.sim.flags import MODELLED
from autotune.sim.twin import Twin, errors, fit
from autotune.system.host import hardware
from autotune.text import one_line

log = logging.getLogger(__name__)

Params = Mapping[str, Any]
Floats = NDArray[np.float64]

RECORDINGS = 4  # to which a twin is fitted in any case: the first ones …
AMISS = 0.05  # … and then one whose steps of some kind it tells worse than this share of their time
SHORTLIST = 4  # distinct configurations that are simulated on draws of the twin
CARRIED_OVER = 8  # best configurations of one twin, which are simulated first on the next
FAR = 1.15  # what holds less load than the best configuration by this factor is not simulated any closer
SEARCHED, DRAWN = 0.7, 0.95  # shares of a proposal's time after which the search, and the draws, have an end
WAITING = 0.1  # most of a proposal's time, as a share of what a trial takes
AT_RANDOM = 10  # first configurations of a simulated study
LEAST = 20  # configurations that it simulates in any case; they take a second or two
REPEATED = 25  # trials in a row that it has seen before; then it ends
LEAST_GAIN = 0.003  # expected, as a share; below it the twin has nothing to say
# Configurations whose values and latencies are within this share of each other do the same: sequences that are never
# reached differ, say. That is finer than the steps of a search for the highest load.
ALIKE, SHOWN = 0.005, ("ttft_p99_ms", "tpot_p99_ms")
OTHERS_TURN = 3  # where the twin expects nothing better, every third trial is TPE's; the others are its next best
INFEASIBLE = 50.0  # by which the score of what breaks a limit is below any that keeps them
FAILED = -1.0  # score, less the twin's, of a trial that failed or broke limits where the twin saw it keep them
CORRECTED = 12  # last trials of which a factor on the twin's word is learned …
TO_CORRECT = 3  # … once there are so many
TO_JUDGE = 4  # trials after which the twin may be called wrong:
WRONG = 0.1  # its scores are off by this standard deviation …
UNEXPLAINED = 0.75  # … and by this share of the trials' own


class Simulated:
    """Configurations simulated on one twin, and on draws from its posterior; and a study that looks for good ones."""

    def __init__(
        self, simulation: Simulation, space: Space, twin: Twin, good: Sequence[Result], draws: int, seed: int
    ) -> None:
        """Simulate on `twin`, first what was `good` on the one before."""
        twins = [twin, *(twin.draw(seed + number) for number in range(draws))]
        self.good = good
        self._simulations = [on_twin(simulation, one) for one in twins]
        self._space = space
        self._before = {key(one.params): one for one in good}
        self._results: dict[tuple[str, int], Result] = {}
        self._rough: dict[str, Result] = {}
        self._study = new_study(simulation.config, TPESampler(seed=seed, n_startup_trials=AT_RANDOM))
        for one in good:
            self._study.enqueue_trial(dict(one.params))

    def result(self, params: Params, draw: int = 0, near: float = 0.0) -> Result:
        """The result expected of `params`; draw 0 is the twin itself. Its search for the highest load starts `near`."""
        point = key(params)
        if (point, draw) not in self._results:
            near = highest_load(self._results.get((point, 0), self._before.get(point))) or near
            self._results[point, draw] = checked(starting_at(self._simulations[draw], near), self._space, params)
        return self._results[point, draw]

    def roughly(self, params: Params) -> Result:
        """The result expected of `params`; of what holds far less load than the best so far, only that it does."""
        point, most = key(params), max(map(highest_load, self.seen), default=0.0)
        if not most or (point, 0) in self._results or point in self._before:
            return self.result(params)
        if point not in self._rough:
            found = checked(starting_at(self._simulations[0], most / FAR, 1), self._space, params)
            if not found.complete or highest_load(found):
                return self.result(params, near=most)
            self._rough[point] = found
        return self._rough[point]

    def search(self, until_s: float) -> None:
        """Go on with the study until this thread has run `until_s`, or it has nothing new.

        On a slow host it goes on until it knows LEAST configurations.
        """
        repeated, known = 0, 0
        while repeated < REPEATED and (time.thread_time() < until_s or known < LEAST):
            ask(self._study, self._simulations[0], self._space, self.roughly)
            repeated = repeated + 1 if known == (known := len(self._results) + len(self._rough)) else 0

    @property
    def seen(self) -> list[Result]:
        """Results on the twin itself, of each configuration that was simulated to the end."""
        return [result for (_, draw), result in self._results.items() if draw == 0]


def highest_load(result: Result | None) -> float:
    """The highest load that a search found; 0 if none was searched or found."""
    return (objective.highest(result.metrics) or 0.0) if result else 0.0


def starting_at(simulation: Simulation, load: float, runs: int | None = None) -> Simulation:
    """`simulation` whose search for the highest load starts at `load`, unless that is 0, and makes at most `runs`."""
    if not load:
        return simulation
    scenario = simulation.config.scenario
    closing = replace(scenario.search, start_qps=load, max_runs=runs or scenario.search.max_runs)
    return replace(simulation, config=replace(simulation.config, scenario=replace(scenario, search=closing)))


class TwinSampler(TPESampler):
    """The sampler of one study, on twins of its server; it is TPE where it chooses nothing."""

    def __init__(
        self,
        config: Config,
        space: Space,
        results: Mapping[str, Result],
        folder: Path | None = None,
        seed: int | None = None,
        proposal_s: float = 4.0,
        draws: int = 4,
        tpe: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Prepare a sampler; `results` grow as the study's trials end, which record their steps below its `folder`.

        A proposal takes `proposal_s` of this thread's time, less where trials are short, and a fit before it about one
        second. Before there are steps, the device of `config.prior.backend` is the twin; without one TPE is asked,
        which `tpe` configures. Raises InputError.
        """
        super().__init__(seed=seed, **{"constant_liar": True, **tpe})  # so that parallel trials differ
        self._config, self._space, self._results, self._folder = config, space, results, folder
        self._proposal_s, self._draws, self._seed = proposal_s, draws, seed or 0
        self._simulation = simulation(config, config.prior.backend or simulated(device_of(config, hardware())[0]))
        self._twin: Twin | None = None
        self._factors: Floats | None = None  # of the last fit
        if config.prior.backend:
            self._use(twin_of(self._simulation, config.prior.sigma, config.prior.host_sigma), [])
        self._fitted: dict[str, Steps] = {}  # to which the twin is fitted, by trial
        self._looked_at: set[str] = set()  # trials whose steps were read, if they have any
        self._residuals: list[tuple[Params, float]] = []  # see _compared
        self._nothing_better = 0  # proposals in a row from which the twin expected nothing
        self._said = ""
        self._broken = False  # by an error

    def _use(self, twin: Twin, good: Sequence[Result]) -> None:
        """Simulate on `twin` from now on, first what was `good` on the one before."""
        self._twin = twin
        self._simulated = Simulated(self._simulation, self._space, twin, good, self._draws, self._seed)

    # Optuna's questions

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if trial.system_attrs.get("fixed_params") else dict(self._space.parameters)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The configuration to run next beside those that run; nothing if TPE is to choose it."""
        if not search_space:
            return {}
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        pending = [one.params for one in running if one.params and one.number != trial.number]
        return self._guarded(lambda: self._chosen(pending))

    def expected(self, params: Params) -> dict[str, Any]:
        """The result that the twin expects of a trial, as `result.expected` holds it; empty if there is no twin."""
        return self._guarded(lambda: self._expected(params)) if self._twin else {}

    def _expected(self, params: Params) -> dict[str, Any]:
        """The middle of the twin and its draws, which have the host's pauses, until a factor on its word is learned."""
        learned = len(self._residuals) >= TO_CORRECT
        found = [self._simulated.result(params, draw) for draw in range(1 if learned else 1 + self._draws)]
        complete = [one for one in found if one.complete]
        if len(complete) <= len(found) // 2:
            return {"values": [], "feasible": False}
        config, factor = self._config.objective, float(self._corrections([params])[0, 0])
        signs = [objective.sign(config, metric) for metric in range(len(config.metrics))]
        middle = np.median([one.values for one in complete], axis=0).tolist()
        values = [value * math.exp(sign * factor) for value, sign in zip(middle, signs, strict=True)]
        return {"values": values, "feasible": sum(one.feasible for one in complete) > len(found) // 2}

    def _guarded(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `work` does; an error leaves the study, which may have run for hours, to TPE."""
        if self._broken:
            return {}
        try:
            return work()
        except Exception as error:
            log.warning("twin: left aside for TPE: %s: %s", type(error).__name__, one_line(error))
            self._broken = True
            return {}

    # The twin

    def _chosen(self, pending: Sequence[Params]) -> dict[str, Any]:
        self._learn()
        if not self._twin:
            return self._to_tpe("waits for the first steps; TPE is asked")
        results = list(self._results.values())
        ran = [one for one in results if one.ran and one.state is not State.pruned]
        self._residuals = self._compared(ran[-CORRECTED:])
        if why := self._why_wrong(ran):
            return self._to_tpe(why)
        return self._propose(results, pending)

    def _learn(self) -> None:
        """Fit the twin to the steps of the trials that have ended meanwhile."""
        ended = {name: one for name, one in self._results.items() if name not in self._looked_at}
        new = {name: steps for name, one in ended.items() if (steps := self._steps_of(name, one))}
        self._looked_at |= ended.keys()
        for name, steps in new.items():
            if (
                not self._twin
                or len(self._fitted) < RECORDINGS
                or any(one.error > AMISS for one in errors(self._twin, steps))
            ):
                self._fitted[name] = steps
        if new.keys() & self._fitted.keys():
            self._fit(new)

    def _steps_of(self, name: str, result: Result) -> Steps | None:
        """The steps of a trial, if they were recorded; a broken file costs the twin that trial only."""
        file = self._folder / name / NAME if self._folder else None
        if not (file and file.exists() and result.complete and not result.duplicate_of):
            return None
        try:
            return read(file, name)
        except InputError as error:
            log.warning("twin: %s", error)
            return None

    def _fit(self, new: Iterable[str]) -> None:
        """Fit the twin; `new` trials' steps have come."""
        chosen = [*self._fitted.values()]
        if not self._twin:  # no device was told: the one that these steps are of
            first = self._results[next(iter(self._fitted))]
            device = device_of(self._config, first.facts)[0]
            self._simulation = simulation(self._config, simulated(as_started(device, chosen[0].args, first.params)))
        device, shape = self._simulation.backend.config.device, self._simulation.shape
        try:
            twin = fit([*chosen[:1], *chosen[1:][-RECORDINGS:]], device, shape, near=self._factors)
            self._factors = twin.factors
            self._use(twin, self._ranked()[:CARRIED_OVER] if self._twin else [])
        except (ValueError, np.linalg.LinAlgError) as error:  # of steps that no constants explain
            log.warning("twin: it can't be fitted to the steps of %s (%s)", ", ".join(new), error)

    def _compared(self, results: Sequence[Result]) -> list[tuple[Params, float]]:
        """Parameters of `results`, and the measured score against the twin's, of those that the twin saw run."""
        found: list[tuple[Params, float]] = []
        for result in results:
            expected = self._simulated.result(result.params)
            if expected.feasible:
                off = score(self._config, result) - score(self._config, expected) if result.feasible else FAILED
                found.append((result.params, off))
        return found

    def _corrections(self, points: Sequence[Params]) -> Floats:
        """Scores to be added to the twin's: a row for the twin, expected, and one for each draw; a column a point."""
        shape = (1 + self._draws, len(points))
        if len(self._residuals) < TO_CORRECT:
            return np.zeros(shape)
        from sklearn.gaussian_process import GaussianProcessRegressor  # takes a second
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        known = np.array([encoded(params, self._space) for params, _ in self._residuals])
        off = np.array([residual for _, residual in self._residuals])
        smooth = Matern(np.ones(known.shape[1]), (0.3, 10.0), nu=2.5)
        kernel = ConstantKernel(0.05**2, (1e-6, 0.5)) * smooth + WhiteKernel(0.02**2, (1e-5, 0.05))
        process = GaussianProcessRegressor(kernel, random_state=self._seed)
        asked = np.array([encoded(params, self._space) for params in points])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant at its bound
            process.fit(known, off - np.median(off))
            drawn = process.sample_y(asked, self._draws, random_state=self._seed).T
            corrections: Floats = np.vstack([process.predict(asked), drawn]) + np.median(off)
        return corrections

    def _why_wrong(self, results: Sequence[Result]) -> str:
        """The reason to ask TPE instead; empty as long as the twin tells good configurations from bad ones."""
        pairs = []
        for result in results:
            foreseen = result.feasible or not result.holds_limits  # it does not foresee answers
            if result.expected.get("feasible") and foreseen:
                expected = replace(result, state=State.complete, values=result.expected["values"], constraints={})
                told = score(self._config, expected)
                pairs.append((score(self._config, result) if result.feasible else told + FAILED, told))
        if len(pairs) < TO_JUDGE:
            return ""
        measured, told = np.array(pairs[-CORRECTED:]).T
        off = float(np.std(measured - told))
        if off < max(WRONG, UNEXPLAINED * float(np.std(measured))):
            return ""
        return f"left aside for TPE, as it was off by {off:.0%} (standard deviation) on {len(measured)} trials"

    def _ranked(self) -> list[Result]:
        """Configurations that are expected to run, the best first."""
        running = [one for one in self._simulated.seen if one.complete]
        return sorted(running, key=lambda one: -score(self._config, one))

    def _allowed_s(self, results: Sequence[Result]) -> float:
        """Seconds for a proposal: less where trials are short, as a GPU may wait for it."""
        took = [one.engine_s for one in results if one.ran]
        return min(self._proposal_s, WAITING * float(np.median(took))) if took else self._proposal_s

    def _propose(self, results: Sequence[Result], pending: Sequence[Params]) -> dict[str, Any]:
        """The configuration that promises most beyond what is measured and what runs; empty if none does."""
        began_s, allowed_s = time.thread_time(), self._allowed_s(results)
        tried = {key(result.params) for result in results} | {key(params) for params in pending}
        good = [one for one in self._simulated.good if key(one.params) not in tried]
        self._simulated.search(began_s + SEARCHED * allowed_s)
        known = [self._simulated.result(params) for params, _ in self._residuals]
        new = (one for one in self._ranked() if key(one.params) not in tried)
        other = [one for one in new if not any(_alike(one, seen) for seen in known)] or good
        points = [one.params for one in distinct(other, self._space, SHORTLIST)]
        if not points:
            return self._to_tpe("knows no other configuration that runs; TPE is asked")
        scores = self._scores([*points, *pending], began_s + DRAWN * allowed_s)
        scores = np.maximum(scores, scores[np.isfinite(scores)].min() + FAILED)
        ended = [score(self._config, one) for one in results if one.complete]
        measured = max(ended, default=scores.min())
        reached = np.maximum(measured, scores[:, len(points) :].max(axis=1, initial=-math.inf))
        gains = np.maximum(0.0, scores[:, : len(points)] - reached[:, None]).mean(axis=0)
        best = int(gains.argmax())
        if gains[best] >= LEAST_GAIN:
            self._nothing_better, self._said = 0, ""
            if ended and measured > -INFEASIBLE:
                log.info("twin: expects %+.1f%% over the best so far", 100 * math.expm1(gains[best]))
            elif ended:
                log.info("twin: nothing keeps the limits so far; asks for what comes closest")
            return self._informative(points[best], [*(one.params for one in results), *pending])
        self._nothing_better += 1
        if not self._nothing_better % OTHERS_TURN:
            return self._to_tpe("expects nothing better; TPE is asked now and then")
        return dict(points[int(np.median(scores[:, : len(points)], axis=0).argmax())])

    def _informative(self, params: Params, tried: Sequence[Params]) -> dict[str, Any]:
        """Return `params`, of flags that the twin does not model with the choices that were `tried` least.

        As soon as factors are learned, their draws choose. The baseline, without the parameter, has the default.
        """
        if len(self._residuals) >= TO_CORRECT:
            return dict(params)
        random, changed = np.random.default_rng((self._seed, len(tried))), dict(params)
        unmodelled = _unmodelled(params)
        for name, distribution in self._space.parameters.items():
            if name in unmodelled and isinstance(distribution, CategoricalDistribution):
                choices = [distribution.choices[at] for at in random.permutation(len(distribution.choices))]
                used = Counter(key({name: one.get(name, DEFAULT)}) for one in tried)
                changed[name] = min(choices, key=lambda choice: used[key({name: choice})])
        return changed if self._simulated.result(changed).complete else dict(params)

    def _scores(self, points: Sequence[Params], until_s: float) -> Floats:
        """Scores of `points`, a column each, on the twin and on its draws; those of the twin where time is short."""
        scores = np.full((1 + self._draws, len(points)), -math.inf)
        for draw in range(1 + self._draws):
            for at, params in enumerate(points):
                on = draw if time.thread_time() < until_s else 0
                scores[draw, at] = score(self._config, self._simulated.result(params, on))
        return scores + self._corrections(points)

    def _to_tpe(self, why: str) -> dict[str, Any]:
        """Log `why` TPE is to choose, unless it was said before."""
        if why != self._said:
            log.info("twin: %s", why)
        self._said = why
        return {}


def _alike(one: Result, other: Result) -> bool:
    """Tell whether two configurations do the same on the twin: a trial of the one says all of the other."""
    if not other.complete or _unmodelled(one.params) != _unmodelled(other.params):
        return False
    here, there = ([*end.values, *(end.metrics.get(name, 0.0) for name in SHOWN)] for end in (one, other))
    return np.allclose(here, there, rtol=ALIKE, atol=0)


def _unmodelled(params: Params) -> dict[str, Any]:
    """The flags among `params` that the twin does not model."""
    flags = {name: value for name, value in params.items() if name.startswith(FLAG)}
    return {name: value for name, value in flags.items() if name.removeprefix(FLAG) not in MODELLED}


def score(config: Config, result: Result) -> float:
    """The logarithm of the objective's values, summed so that more is better; less than any for what breaks a limit.

    -inf for what did not complete.
    """
    if not result.complete:
        return -math.inf
    if not result.feasible:
        return -INFEASIBLE - math.log1p(objective.excess(result.constraints))
    signs = [objective.sign(config.objective, metric) for metric in range(len(result.values))]
    return sum(sign * math.log(max(value, 1e-9)) for sign, value in zip(signs, result.values, strict=True))


def encoded(params: Params, space: Space) -> list[float]:
    """`params` as numbers from 0 to 1: one for each parameter with numbers, and one for each choice of the others."""
    numbers: list[float] = []
    for name, distribution in space.parameters.items():
        value = params.get(name)
        if not isinstance(distribution, CategoricalDistribution):
            numbers.append(scaled(value, distribution))
            continue
        choices: Sequence[Any] = distribution.choices
        if all(isinstance(choice, (int, float)) for choice in choices):
            known = value in choices and len(choices) > 1
            numbers.append(sorted(choices).index(value) / (len(choices) - 1) if known else 0.5)
        else:
            numbers.extend(float(value == choice) for choice in choices)
    return numbers
