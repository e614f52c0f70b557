"""What a simulation expects of trials, in milliseconds each: for `autotune.plan` and for `prior=sim`."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from autotune import objective, vllm_args
from autotune.errors import StartError
from autotune.result import Result
from autotune.samples import Samples
from autotune.schema import Config
from autotune.space import Space, flags
from autotune.trial import Prepared, prepare, prepare_samples, score


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
        return sum(self.result.phases.values())


@dataclass(frozen=True)
class Simulation:
    """What is simulated: a study's configuration with another backend, prepared."""

    config: Config
    prepared: Prepared
    samples: Samples
    known: dict[str, Any]  # value of each flag without a sweep


def simulation(config: Config, backend: dict[str, Any]) -> Simulation:
    """`config` on `backend`. Raises InputError."""
    config = replace(config, backend={**backend, "gpus": None})
    prepared = prepare(config)
    known = prepared.args | prepared.backend.dry_run(prepared.model, prepared.args).resolved
    return Simulation(config, prepared, prepare_samples(config, prepared), known)


def estimate(simulation: Simulation, params: Mapping[str, Any]) -> Estimate:
    """The trial that has these parameters, by configuration key; without any it is the baseline."""
    prepared = simulation.prepared
    config, args = _with(simulation.config, params), prepared.args | flags(params)
    gpus = vllm_args.gpus(args)
    if refused := prepared.backend.dry_run(prepared.model, args).refusal:
        return Estimate(dict(params), refused=refused, gpus=gpus)
    try:
        measured = prepared.backend.measure(prepared.model, args, config.scenario, simulation.samples, Path())
    except StartError as error:
        return Estimate(dict(params), failed=str(error), gpus=gpus)
    result = Result(state="complete", args=args)
    score(config, measured, result)
    return Estimate(dict(params), result=result, gpus=gpus)


def search(
    simulation: Simulation, space: Space, sampler: optuna.samplers.BaseSampler, directions: Any, count: int
) -> Iterator[Estimate]:
    """`count` trials that `sampler` asks for, refused and failed ones among them, told as a study tells them."""
    study = optuna.create_study(sampler=sampler, directions=directions)
    for _ in range(count):
        trial = study.ask()
        params = space.suggest(trial, simulation.known)
        refused = space.violated(params, simulation.known)
        found = Estimate(params, refused=refused) if refused else estimate(simulation, params)
        if found.refused or found.failed:
            trial.set_constraint("refused", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            for name, value in found.result.constraints.items():
                trial.set_constraint(name, value)
            study.tell(trial, objective.told(sampler, simulation.config.objective, found.result))
        yield found


def _with(config: Config, params: Mapping[str, Any]) -> Config:
    """`config` with other values at these keys; vLLM's flags are passed by themselves."""
    keys = [key for key in params if not key.startswith("engine.args.")]
    if not keys:
        return config
    changed = copy.deepcopy(config)
    for key in keys:
        *path, last = key.split(".")
        node: Any = changed
        for part in path:
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        if isinstance(node, dict):
            node[last] = params[key]
        else:
            setattr(node, last, params[key])
    return changed
