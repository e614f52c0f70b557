"""Simulated trials, in milliseconds each: for `autotune plan` and for `prior=sim`."""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import optuna

from autotune.config.overrides import with_fields
from autotune.config.schema import Config, Endpoint
from autotune.config.vllm_flags import FLAG
from autotune.data.samples import Samples
from autotune.errors import StartError
from autotune.measure.backend import Engine
from autotune.measure.prepare import Prepared, prepare, prepare_samples
from autotune.measure.result import Result, State
from autotune.measure.runs import RunResult
from autotune.measure.slot import Slot
from autotune.measure.trial import measure
from autotune.search.space import Space, swept_flags, value_of
from autotune.search.tell import tell_infeasible, tell_measured
from autotune.sim.backend import SimBackend
from autotune.sim.shape import Shape
from autotune.system import interrupt

if TYPE_CHECKING:
    from autotune.sim.twin import Twin  # SciPy takes a while to import, and few studies fit a twin

Observe = Callable[[Engine, RunResult], None]


@dataclass(frozen=True)
class Simulation:
    """A study's configuration with a simulated backend, prepared."""

    config: Config
    prepared: Prepared
    samples: Samples
    known: dict[str, Any]  # value of each flag without a sweep

    @property
    def backend(self) -> SimBackend:
        assert isinstance(self.prepared.backend, SimBackend)
        return self.prepared.backend

    @property
    def shape(self) -> Shape:
        return Shape.of(self.prepared.model.config)


def simulation(config: Config, backend: dict[str, Any]) -> Simulation:
    """`config` on `backend`, its conversations as token ids. Raises InputError."""
    config = replace(config, backend=backend, scenario=replace(config.scenario, endpoint=Endpoint.completions))
    prepared = prepare(config)
    known = prepared.dry_run().resolved
    return Simulation(config, prepared, prepare_samples(config, prepared), known)


def twin_of(simulation: Simulation, sigma: float, host_sigma: float) -> "Twin":
    """The twin of the steps that the backend is given; without any, of the simulated device as its YAML has it."""
    from autotune.sim.twin import unfitted

    backend, shape = simulation.backend, simulation.shape
    return backend.twin_of(shape) or unfitted(backend.config.device, shape, sigma, host_sigma)


def on_twin(simulation: Simulation, twin: "Twin") -> Simulation:
    """`simulation` of the server that `twin` was fitted to."""
    backend: Any = copy(simulation.backend)
    backend.twin = twin
    return replace(simulation, prepared=replace(simulation.prepared, backend=backend))


def estimate(simulation: Simulation, params: Mapping[str, Any], observe: Observe = lambda *_: None) -> Result:
    """The result of a trial with these parameters, by configuration key; without any it is the baseline's.

    `observe` is given the server, and the run that the result tells of.
    """
    interrupt.check()
    prepared = simulation.prepared
    fields = {key: value_of(value) for key, value in params.items() if not key.startswith((FLAG, "backend."))}
    flags = swept_flags(params, prepared.args)
    config, args = with_fields(simulation.config, fields), prepared.args | flags
    result = Result(args=args, params=dict(params), estimated=True)
    outcome = prepared.dry_run(flags)
    if outcome.refusal:
        return replace(result, state=State.refused, reason=outcome.refusal)
    try:
        with (
            TemporaryDirectory(prefix="autotune-") as folder,
            prepared.backend.start(prepared.model, args, simulation.samples, Path(folder), Slot()) as engine,
        ):
            observe(engine, measure(config, engine, outcome.resolved, Path(folder), result))
    except StartError as error:
        return replace(result, reason=str(error), phases={"start": error.after_s})
    result.state = State.complete
    return result


def checked(
    simulation: Simulation, space: Space, params: Mapping[str, Any], observe: Observe = lambda *_: None
) -> Result:
    """The result of a trial of `space`: refused without a simulation if it breaks one of its conditions."""
    if broken := space.violated(params, simulation.known):
        return Result(State.refused, broken, params=dict(params), estimated=True)
    return estimate(simulation, params, observe)


def ask(
    study: optuna.Study, simulation: Simulation, space: Space, simulate: Callable[[Mapping[str, Any]], Result]
) -> Result:
    """Make the next trial of a simulated `study`, and tell it the result as a real one does."""
    trial = study.ask()
    result = simulate(space.suggest(trial, simulation.known))
    if result.complete:
        tell_measured(study, trial, simulation.config.objective, result)
    else:
        tell_infeasible(study, trial, "refused" if result.state is State.refused else "starts")
    return result


def key(params: Mapping[str, Any]) -> str:
    """A configuration as text."""
    return json.dumps(params, sort_keys=True)


def new_study(config: Config, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """A study in memory with the objective of `config`."""
    directions: Any = config.objective.directions
    return optuna.create_study(sampler=sampler, directions=directions)


def search(simulation: Simulation, space: Space, sampler: optuna.samplers.BaseSampler, count: int) -> Iterator[Result]:
    """Yield `count` trials that `sampler` asks for, refused and failed ones among them."""
    study = new_study(simulation.config, sampler)
    at = cache(lambda point: checked(simulation, space, json.loads(point)))  # samplers repeat themselves
    for _ in range(count):
        yield ask(study, simulation, space, lambda params: at(key(params)))


def search_best(simulation: Simulation, space: Space, count: int) -> Iterator[Result]:
    """Simulate a study of `count` trials: a quarter at random, then TPE's."""
    sampler = optuna.samplers.TPESampler(seed=simulation.config.seed, n_startup_trials=count // 4)
    return search(simulation, space, sampler, count)
