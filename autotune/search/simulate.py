"""What a simulation expects of trials, in milliseconds each: for `autotune.commands.plan` and for `prior=sim`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna

from autotune.config import vllm_flags
from autotune.config.overrides import with_fields
from autotune.config.schema import Config
from autotune.data.samples import Samples
from autotune.errors import StartError
from autotune.measure.prepare import Prepared, prepare, prepare_samples
from autotune.measure.result import Result
from autotune.measure.runs import Run
from autotune.measure.trial import measure
from autotune.search import tell
from autotune.search.space import FLAG, Space, flags
from autotune.system import interrupt


@dataclass(frozen=True)
class Estimate:
    """One simulated trial."""

    params: dict[str, Any]
    refused: str = ""  # why it can't be run
    failed: str = ""  # why vLLM would not start
    result: Result = field(default_factory=Result)
    gpus: int = 1

    @property
    def engine_s(self) -> float:
        """Seconds of start and run."""
        return self.result.engine_s


@dataclass(frozen=True)
class Simulation:
    """What is simulated: a study's configuration with another backend, prepared."""

    config: Config
    prepared: Prepared
    samples: Samples
    known: dict[str, Any]  # value of each flag without a sweep


def simulation(config: Config, backend: dict[str, Any]) -> Simulation:
    """`config` on `backend`. Raises InputError."""
    config = replace(config, backend=backend)
    prepared = prepare(config)
    known = prepared.dry_run().resolved
    return Simulation(config, prepared, prepare_samples(config, prepared), known)


def estimate(
    simulation: Simulation, params: Mapping[str, Any], observe: Callable[[Run], None] = lambda _: None
) -> Estimate:
    """The trial that has these parameters, by configuration key; without any it is the baseline.

    `observe` is given the run that its result tells of.
    """
    interrupt.check()
    prepared = simulation.prepared
    fields = {key: value for key, value in params.items() if not key.startswith(FLAG)}
    config, args = with_fields(simulation.config, fields), prepared.args | flags(params)
    gpus = vllm_flags.gpus(args)
    outcome = prepared.dry_run(flags(params))
    if outcome.refusal:
        return Estimate(dict(params), refused=outcome.refusal, gpus=gpus)
    result = Result(args=args)
    try:
        with (
            TemporaryDirectory(prefix="autotune-") as folder,
            prepared.backend.start(prepared.model, args, simulation.samples, Path(folder), None) as engine,
        ):
            observe(measure(config, engine, outcome.resolved, Path(folder), result))
    except StartError as error:
        result.phases["start"] = error.after_s
        return Estimate(dict(params), failed=str(error), result=result, gpus=gpus)
    result.state = "complete"
    return Estimate(dict(params), result=result, gpus=gpus)


def search(
    simulation: Simulation, space: Space, sampler: optuna.samplers.BaseSampler, count: int
) -> Iterator[Estimate]:
    """`count` trials that `sampler` asks for, refused and failed ones among them, told as a study tells them."""
    config = simulation.config.objective
    study = optuna.create_study(sampler=sampler, directions=list(config.directions))  # type: ignore[arg-type]
    known: dict[str, Estimate] = {}  # samplers repeat themselves
    for _ in range(count):
        trial = study.ask()
        params = space.suggest(trial, simulation.known)
        point = str(sorted(params.items()))
        if point not in known:
            broken = space.violated(params, simulation.known)
            known[point] = Estimate(params, refused=broken) if broken else estimate(simulation, params)
        found = known[point]
        if found.refused or found.failed:
            tell.impossible(study, trial, "refused" if found.refused else "starts")
        else:
            tell.measured(study, trial, config, found.result)
        yield found


def search_best(simulation: Simulation, space: Space, count: int) -> list[Estimate]:
    """`count` trials of a simulated study: a quarter at random, then TPE's."""
    sampler = optuna.samplers.TPESampler(seed=simulation.config.seed, n_startup_trials=count // 4)
    return list(search(simulation, space, sampler, count))
