"""One study: ask Optuna for parameters, run the trials, tell Optuna what they measured."""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from optuna.distributions import CategoricalDistribution
from optuna.samplers import GridSampler
from optuna.trial import TrialState

from autotune import objective, report, tracking
from autotune.errors import InputError, TrackingError
from autotune.result import Result
from autotune.schema import typed, with_values
from autotune.space import DEFAULT, FLAG, Space, check_flags, flags, parse
from autotune.sweep import prior
from autotune.sweep.launchers import Job, Launcher, Trial
from autotune.trial import Prepared, prepare, prepare_samples

log = logging.getLogger(__name__)

POLL_S = 0.1
REFUSALS_IN_A_ROW = 100  # then the space is at fault


@dataclass
class Running:
    """A trial in flight; the baseline has no Optuna trial yet."""

    name: str
    params: dict[str, Any]
    trial: optuna.Trial | None
    job: Job


class Grid(GridSampler):
    """Optuna's grid, which otherwise stops a study that it did not start."""

    def after_trial(self, *_: Any) -> None:
        pass


def make_sampler(config: Any, space: Space) -> optuna.samplers.BaseSampler:
    """The sampler of a `sampler` group; a grid covers `space`. Raises InputError for a missing extra."""
    try:
        made = instantiate(config, _execution_whitelist_=("optuna.*", "optuna_integration.*", "hydra_plugins.*"))
    except (InstantiationException, ImportError) as error:
        if "optuna_integration" in str(error) or "botorch" in str(error):
            raise InputError("sampler=botorch needs the extra `botorch`: uv pip install -e '.[botorch]'") from None
        raise
    sampler: optuna.samplers.BaseSampler = Grid(space.grid, **made.keywords) if isinstance(made, partial) else made
    return sampler


class Study:
    def __init__(self, sweeper: dict[str, Any], job: DictConfig, config_loader: ConfigLoader) -> None:
        self._sweeper = sweeper
        self._job = job
        self._config_loader = config_loader
        self._folder = Path(job.hydra.sweep.dir)

    def run(self, arguments: list[str]) -> None:
        """Run the study that the command line `arguments` and the sweeper's configuration describe.

        Raises InputError before the first trial; exits with 1 if no trial completed.
        """
        self._space, self._fixed = parse(
            self._sweeper["params"] or {}, arguments, self._job.conditions, self._job.only_if
        )
        self._composed = self._config_loader.load_sweep_config(self._job, self._fixed)
        self._config = typed(self._composed)
        # Each trial composes again, and must not make up a study name of its own.
        self._fixed = [*self._fixed, f"study={self._config.study}"]
        self._prepared = prepare(self._config)
        prepare_samples(self._config, self._prepared)
        check_flags(self._space, self._prepared.backend)
        defaults = self._prepared.backend.dry_run(self._prepared.model, self._prepared.args)
        if defaults.refusal:
            log.warning("vLLM refuses the configuration before anything is swept: %s", defaults.refusal)
        self._known = self._prepared.args | defaults.resolved
        self._launcher = self._make_launcher()
        tracking.check(self._config.tracking)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._study = self._open()
        with tracking.study(self._config.tracking, self._config.study, self._folder) as self._tracker:
            running: list[Running] = []
            try:
                self._run_trials(running)
            except (KeyboardInterrupt, SystemExit):
                log.info("stopped; what was measured is kept")
                raise
            finally:
                for one in running:
                    self._abandon(one)
                summary = report.summary(self._study, self._folder, self._config)
                (self._folder / "summary.txt").write_text(summary)
                log.info("\n%s", summary)
                self._tracker.summarise(self._folder, report.headline(self._study, self._folder, self._config))
        if not any(trial.state is TrialState.COMPLETE for trial in self._study.trials):
            sys.exit(f"autotune: no trial of {self._config.study} completed; reasons above")

    def _make_launcher(self) -> Launcher:
        settings = {name: value for name, value in self._config.launcher.items() if name not in ("_target_", "name")}
        launcher: Launcher = get_class(self._config.launcher["_target_"])(self._job, self._config.gpus, **settings)
        return launcher

    def _open(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = make_sampler(self._sweeper["sampler"], self._space)
        self._n_trials = self._config.n_trials
        if isinstance(sampler, Grid):
            self._n_trials = self._space.grid_size
            log.info("grid: %d points", self._n_trials)
        study = optuna.create_study(
            study_name=self._sweeper["study_name"],
            storage=self._sweeper["storage"],
            sampler=sampler,
            directions=list(self._sweeper["direction"]),
            load_if_exists=True,
        )
        self._check_continues(study)
        if self._config.prior.backend and not study.trials and not isinstance(sampler, Grid):
            self._enqueue_prior(study)
        return study

    def _enqueue_prior(self, study: optuna.Study) -> None:
        """Ask first for what a simulation of this study found best."""
        expected = prior.best(self._config, self._space)
        for one in expected:
            attributes = {report.EXPECTED: {"values": one.values, "feasible": one.feasible}}
            study.enqueue_trial(one.params, user_attrs=attributes)
        log.info(
            "prior: the first %d trials are the best of %d simulated ones", len(expected), self._config.prior.trials
        )

    def _check_continues(self, study: optuna.Study) -> None:
        """Raise InputError if `study` has trials that this space and objective can't go on from."""
        other = "write another study=…, or what it was started with"
        if [direction.name.lower() for direction in study.directions] != list(self._sweeper["direction"]):
            raise InputError(f"study={study.study_name} exists with another objective; {other}")
        for trial in study.trials:
            for name, distribution in trial.distributions.items():
                wanted = self._space.parameters.get(name, distribution)
                if isinstance(wanted, CategoricalDistribution) and wanted != distribution:
                    raise InputError(f"study={study.study_name} exists with other choices for {name}; {other}")

    def _run_trials(self, running: list[Running]) -> None:
        """Keep the launcher's `n_jobs` trials in flight until `n_trials` were run; `running` holds those that are."""
        if self._config.baseline and report.BASELINE not in self._study.user_attrs:
            running.append(self._start_baseline())
        while True:
            while len(running) < self._launcher.n_jobs and (one := self._start_next()):
                running.append(one)
            if not running:
                return
            ended = [one for one in running if one.job.done()]
            for one in ended:
                running.remove(one)
                self._finish(one)
            if not ended:
                time.sleep(POLL_S)

    def _start_baseline(self) -> Running:
        log.info("baseline: the configuration without swept parameters")
        gpu = self._config.baseline_gpu
        return self._start(report.BASELINE, {}, None, {} if gpu is None else {"gpus": [gpu]})

    def _start_next(self) -> Running | None:
        """Ask for parameters that vLLM accepts and start them; None if the study has all its trials."""
        for _ in range(REFUSALS_IN_A_ROW):
            number = sum(self._counts(trial) for trial in self._study.trials)
            if number >= self._n_trials:
                return None
            trial = self._study.ask()
            params = self._space.suggest(trial, self._known)
            if refusal := self._refusal(params):
                self._refuse(trial, refusal)
                continue
            log.info("trial-%d (%d of %d): %s", trial.number, number + 1, self._n_trials, report.shorten(params))
            changed = {name: None if value == DEFAULT else value for name, value in params.items()}
            return self._start(f"trial-{trial.number}", params, trial, changed)
        raise InputError(
            f"{REFUSALS_IN_A_ROW} combinations in a row can't be run; the last: {refusal}; narrow the space"
        )

    def _counts(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether `trial` is one of n_trials; a refused one is only where each point is asked for once."""
        free = "refused" in trial.user_attrs and not isinstance(self._study.sampler, Grid)
        free = free or trial.state is TrialState.WAITING
        return not free and report.BASELINE not in trial.user_attrs

    def _refusal(self, params: Mapping[str, Any]) -> str:
        """Why this combination can't be run, by the space's own conditions or by vLLM; empty if it can."""
        if broken := self._space.violated(params, self._known):
            return broken
        prepared: Prepared = self._prepared
        return prepared.backend.dry_run(prepared.model, prepared.args | flags(params)).refusal

    def _refuse(self, trial: optuna.Trial, reason: str) -> None:
        """Record a combination that took no GPU: infeasible to the sampler, and none of the study's n_trials."""
        trial.set_user_attr("refused", reason)
        trial.set_constraint("refused", 1.0)
        self._study.tell(trial, state=TrialState.PRUNED)
        log.info("trial-%d refused: %s (%s)", trial.number, reason, report.shorten(trial.params))

    def _start(
        self, name: str, params: dict[str, Any], trial: optuna.Trial | None, changed: Mapping[str, Any]
    ) -> Running:
        folder = self._folder / name
        (folder / "result.json").unlink(missing_ok=True)
        overrides = [*self._fixed, *(f"{key}={_written(value)}" for key, value in changed.items())]
        try:
            job = self._launcher.submit(Trial(with_values(self._composed, changed), overrides, folder))
            return Running(name, params, trial, job)
        except BaseException:
            if trial:
                self._fail(trial, "interrupted")
            raise

    def _finish(self, one: Running) -> None:
        folder = self._folder / one.name
        try:
            result = Result.load(folder)
        except FileNotFoundError:
            result = Result(reason=one.job.reason())
            folder.mkdir(parents=True, exist_ok=True)
        result.params = one.params
        result.save(folder)
        estimated = " (estimated)" if result.estimated else ""
        log.info("%s: %s%s", one.name, report.outcome(result, self._config.objective.metrics), estimated)
        if one.trial is None:
            self._record_baseline(result)
        elif result.complete:
            self._tell(one.trial, result)
        else:
            self._fail(one.trial, result.reason)
        try:
            self._tracker.log_trial(folder, one.name, result)
        except TrackingError as error:
            log.warning("%s", error)

    def _record_baseline(self, result: Result) -> None:
        """Note the baseline; where vLLM's defaults lie within the space, the sampler learns from it, too."""
        self._study.set_user_attr(report.BASELINE, {"values": result.values, "reason": result.reason})
        defaults = {name: self._known.get(name.removeprefix(FLAG)) for name in self._space.parameters}
        if result.complete and all(_contains(d, defaults[name]) for name, d in self._space.parameters.items()):
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=defaults,
                    distributions=self._space.parameters,
                    values=result.values,
                    user_attrs={report.BASELINE: True, "metrics": result.metrics},
                    constraints=result.constraints,
                )
            )

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        trial.set_user_attr("metrics", result.metrics)
        trial.set_user_attr("verdict", result.verdict)
        for name, value in result.constraints.items():
            trial.set_constraint(name, value)
        self._study.tell(trial, objective.told(self._study.sampler, self._config.objective, result))

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def _abandon(self, one: Running) -> None:
        one.job.cancel()
        if one.trial:
            self._fail(one.trial, "interrupted")


def _contains(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return value in distribution.choices
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and distribution._contains(distribution.to_internal_repr(value))


def _written(value: Any) -> str:
    """A parameter's value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
