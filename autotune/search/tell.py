"""Telling Optuna of a trial, in a real study as in a simulated one."""

import warnings

import optuna
from optuna.trial import TrialState

from autotune.config.schema import ObjectiveConfig
from autotune.measure import objective
from autotune.measure.result import Result


def tell_measured(study: optuna.Study, trial: optuna.Trial, config: ObjectiveConfig, result: Result) -> None:
    """Tell Optuna the values and constraints of a trial that completed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process that was killed may have got as far as this
        for name, value in result.constraints.items():
            trial.set_constraint(name, value)
    study.tell(trial, objective.values_for_sampler(study.sampler, config, result))


def tell_infeasible(study: optuna.Study, trial: optuna.Trial, broken: str) -> None:
    """Tell Optuna that a combination can't run: it breaks the constraint of this name.

    Samplers never see a failed trial, and would ask for it again; one that is pruned teaches them.
    """
    trial.set_constraint(broken, 1.0)
    study.tell(trial, state=TrialState.PRUNED)
