"""Optuna's record of a study: what was asked, what it was told, what it is to ask again.

Only the sweeping process touches it. What a trial measured is in its folder; the record holds what samplers learn from.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState

from autotune.config.schema import ObjectiveConfig
from autotune.errors import InputError, StartError
from autotune.measure.result import Result, State
from autotune.measure.runs import AT_MOST
from autotune.results.study import BASELINE, REFERENCES, TRIAL
from autotune.search.distributions import contains
from autotune.search.optuna_private import Grid, SingleWriterStorage
from autotune.search.prior import EXPECTED
from autotune.search.pruners import watched
from autotune.search.space import Space
from autotune.search.tell import tell_infeasible, tell_measured
from autotune.sweep.storage import DELETED

# User attributes of trials in Optuna's storage.
LOST = "lost"  # interrupted, and queued again
AGAIN = "again"  # of a trial that repeats a lost one: its number
DUPLICATE = "duplicate_of"  # the trial that measured the same configuration before


class Record:
    """The trials of one study, in Optuna's `storage`."""

    def __init__(self, storage: Any, name: str, space: Space, objective: ObjectiveConfig) -> None:
        """Open the study `name`, or make it. Raises InputError if it can't go on with this space and objective."""
        self.space = space
        self.objective = objective
        self._storage = storage
        directions: Any = list(objective.directions)
        try:
            self._study = optuna.create_study(
                study_name=name, storage=storage, directions=directions, load_if_exists=True
            )
            self._check_continues()  # it reads all trials
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise InputError(
                f"hydra.sweeper.storage: study={name} can't be read ({error!r}); it is broken or another program's"
                f"{DELETED}"
            ) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental since Optuna 3.2
            self._study.set_metric_names(objective.metrics)  # for whoever looks into the storage

    def use(self, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner) -> None:
        self._study.sampler, self._study.pruner = sampler, pruner

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    @property
    def is_grid(self) -> bool:
        """True if the sampler asks for each point of the space once."""
        return isinstance(self._study.sampler, Grid)

    @property
    def watched(self) -> str | None:
        """The published value of a running trial that the pruner judges by; None for no pruner."""
        return watched(self._study.pruner, self.objective)

    def has_reference(self, name: str) -> bool:
        return name in self._study.user_attrs

    def _check_continues(self) -> None:
        """Raise InputError if trials exist that this space and objective can't go on from."""
        name, other = self._study.study_name, "write another study=…, or what it was started with"
        if [direction.name.lower() for direction in self._study.directions] != list(self.objective.directions):
            raise InputError(f"study={name} exists with another objective; {other}")
        for trial in self.trials:
            for parameter, distribution in trial.distributions.items():
                try:
                    check_distribution_compatibility(self.space.parameters.get(parameter, distribution), distribution)
                except ValueError:
                    raise InputError(f"study={name} exists with other choices for {parameter}; {other}") from None

    # Asking

    def ask(self, known: Mapping[str, Any]) -> tuple[optuna.Trial, dict[str, Any]]:
        """The next trial and its parameters; `known` has the values of flags that are not swept."""
        foresees = getattr(self._study.sampler, "expected", None)
        with nullcontext() if foresees else self._transaction():  # a twin takes seconds, for which no storage is locked
            trial = self._study.ask()
            params = self.space.suggest(trial, known)
        if foresees and (expected := foresees(params)):
            trial.set_user_attr(EXPECTED, expected)
        return trial, params

    def enqueue(self, params: Mapping[str, Any], **attributes: Any) -> None:
        """Ask for `params` before the sampler is asked."""
        self._study.enqueue_trial(dict(params), user_attrs=attributes)

    def reopen(self, number: int) -> optuna.Trial:
        """The trial that an earlier process began under this number."""
        return optuna.Trial(self._study, self._id(number))

    def queue_again(self, number: int) -> None:
        """Fail a trial that was interrupted, so that it counts for nothing, and ask for its parameters once more."""
        frozen = self.trials[number]
        params = {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}  # enqueued ones are fixed first
        if isinstance(self._study.sampler, Grid) and "grid_id" in frozen.system_attrs:
            params = self._study.sampler.point(frozen)
        if params and not any(other.user_attrs.get(AGAIN) == number for other in self.trials):
            self.enqueue(params, **{**frozen.user_attrs, AGAIN: number})
        # Not through optuna.Trial, which would have the sampler choose anew.
        self._storage.set_trial_user_attr(self._id(number), LOST, True)
        self._storage.set_trial_user_attr(self._id(number), "reason", "interrupted: the process that ran it ended")
        self._study.tell(number, state=TrialState.FAIL)

    def rebuild(self, results: Mapping[str, Result]) -> None:
        """Note the trials of `results`, whose storage is gone; none of them if this space could not have asked one."""
        ended = {int(name.removeprefix(TRIAL)): result for name, result in results.items() if name not in REFERENCES}
        known, sampler = self.space.parameters, self._study.sampler
        for result in ended.values():
            if not all(name in known and contains(known[name], value) for name, value in result.params.items()):
                return
        for number in range(max(ended, default=-1) + 1):
            result = ended.get(number, Result(State.interrupted))
            trial = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=result.params,
                distributions={name: known[name] for name in result.params},
                system_attrs=sampler.place(result.params) if isinstance(sampler, Grid) and result.params else {},
            )
            self._study.add_trial(trial)
            if result.state is State.interrupted:
                self.reopen(number).set_user_attr(LOST, True)
            self.tell(self.reopen(number), result)

    # Telling

    def tell(self, trial: optuna.Trial, result: Result) -> None:
        """Tell Optuna how `trial` ended."""
        with self._transaction():
            if result.duplicate_of:
                trial.set_user_attr(DUPLICATE, result.duplicate_of)
            if result.state is State.complete:
                trial.set_user_attr("metrics", result.metrics)
                tell_measured(self._study, trial, self.objective, result)
            elif result.state is State.refused:
                trial.set_user_attr("refused", result.reason)
                tell_infeasible(self._study, trial, "refused")
            elif result.state is State.pruned:
                if (bound := result.metrics.get(AT_MOST)) is not None:
                    trial.report(bound, 0)
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                trial.set_user_attr("reason", result.reason)
                if result.reason.startswith(StartError.__name__):
                    tell_infeasible(self._study, trial, "starts")  # no accident: it would fail again
                else:
                    self._study.tell(trial, state=TrialState.FAIL)

    def tell_reference(self, name: str, result: Result) -> None:
        """Note the baseline or the recipe; where it lies within the space, the sampler learns from it, too."""
        known = self.space.parameters
        defaults = {key: result.params.get(key, result.defaults.get(key)) for key in known}
        within = all(contains(distribution, defaults[key]) for key, distribution in known.items())
        within = within and result.params.keys() <= known.keys()
        with self._transaction():
            self._study.set_user_attr(name, {"values": result.values, "reason": result.reason})
            if result.complete and within:
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=defaults,
                        distributions={**self.space.parameters},
                        values=result.values,
                        user_attrs={BASELINE: True, "metrics": result.metrics},
                        constraints=result.constraints,
                    )
                )

    def counts(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial is one of the study's n_trials, in flight or ended."""
        if trial.state is TrialState.WAITING or {LOST, BASELINE} & trial.user_attrs.keys():
            return False
        return self.is_grid or not {"refused", DUPLICATE} & trial.user_attrs.keys()

    def _id(self, number: int) -> int:
        """The storage's number of the trial that has this `number` in the study."""
        study = self._storage.get_study_id_from_name(self._study.study_name)
        found: int = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        return found

    def _transaction(self) -> AbstractContextManager[None]:
        return self._storage.transaction() if isinstance(self._storage, SingleWriterStorage) else nullcontext()
