"""One study: ask Optuna for parameters, run the trial, tell Optuna what it measured."""

import logging
import sys
from pathlib import Path
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from autotune import report, tracking
from autotune.errors import InputError, TrackingError
from autotune.result import Result
from autotune.schema import Config, typed
from autotune.text import one_line
from autotune.trial import prepare

log = logging.getLogger(__name__)

FLAG = "engine.args."


class Study:
    def __init__(
        self, sweeper: dict[str, Any], job: DictConfig, config_loader: ConfigLoader, launcher: Launcher
    ) -> None:
        self._sweeper = sweeper
        self._job = job
        self._config_loader = config_loader
        self._launcher = launcher
        self._folder = Path(job.hydra.sweep.dir)

    def run(self, arguments: list[str]) -> None:
        """Run the study that the command line `arguments` and the sweeper's configuration describe.

        Raises InputError before the first trial; exits with 1 if no trial completed, 130 after Ctrl-C.
        """
        space, fixed = self._space(arguments)
        config = typed(self._config_loader.load_sweep_config(self._job, fixed))
        self._check(config, space)
        tracking.check(config.tracking)
        self._folder.mkdir(parents=True, exist_ok=True)
        study = self._open()
        with tracking.study(config.tracking, config.study, self._folder) as tracker:
            try:
                self._run_trials(study, config, space, fixed, tracker)
            except (KeyboardInterrupt, SystemExit):
                log.info("stopped; what was measured is kept")
                raise
            finally:
                summary = report.summary(study, self._folder, config)
                (self._folder / "summary.txt").write_text(summary)
                log.info("\n%s", summary)
                tracker.summarise(self._folder, report.headline(study, self._folder, config))
        if not any(trial.state is TrialState.COMPLETE for trial in study.trials):
            sys.exit(f"autotune: no trial of {config.study} completed; reasons above")

    def _space(self, arguments: list[str]) -> tuple[dict[str, BaseDistribution], list[str]]:
        """What is swept, by parameter, and the overrides that hold for every trial."""
        params = [f"{name}={value}" for name, value in (self._sweeper["params"] or {}).items()]
        space: dict[str, BaseDistribution] = {}
        fixed: dict[str, str] = {}
        for override in OverridesParser.create().parse_overrides(params + arguments):
            name = override.get_key_element()
            if override.is_sweep_override():
                space[name] = create_optuna_distribution_from_override(override)
                fixed.pop(name, None)
            else:
                assert override.input_line is not None
                fixed[name] = override.input_line
                space.pop(name, None)  # a value on the command line wins over the space
        if not space:
            raise InputError("nothing to tune: choose space=scheduler or sweep a flag, 'engine.args.x=choice(1,2)'")
        return space, list(fixed.values())

    def _check(self, config: Config, space: dict[str, BaseDistribution]) -> None:
        backend = prepare(config).backend
        for name, distribution in space.items():
            if name.startswith(FLAG):
                values = list(distribution.choices) if isinstance(distribution, CategoricalDistribution) else None
                backend.check({name.removeprefix(FLAG): values})

    def _open(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = instantiate(self._sweeper["sampler"], _execution_whitelist_=("optuna.*", "hydra_plugins.*"))
        return optuna.create_study(
            study_name=self._sweeper["study_name"],
            storage=self._sweeper["storage"],
            sampler=sampler,
            directions=list(self._sweeper["direction"]),
            load_if_exists=True,
        )

    def _run_trials(
        self,
        study: optuna.Study,
        config: Config,
        space: dict[str, BaseDistribution],
        fixed: list[str],
        tracker: tracking.Tracker,
    ) -> None:
        if config.baseline and report.BASELINE not in study.user_attrs:
            log.info("baseline: vLLM's defaults")
            result = self._launch(0, [*fixed, f"hydra.sweep.subdir={report.BASELINE}"], self._folder / "baseline")
            study.set_user_attr(report.BASELINE, {"values": result.values, "reason": result.reason})
            self._log(tracker, report.BASELINE, result, config)
        while len(study.trials) < config.n_trials:
            trial = study.ask(space)
            folder = self._folder / f"trial-{trial.number}"
            log.info("trial %d of %d: %s", trial.number + 1, config.n_trials, report.shorten(trial.params))
            try:
                overrides = [f"{name}={value}" for name, value in trial.params.items()]
                result = self._launch(trial.number, [*fixed, *overrides], folder)
            except BaseException:
                trial.set_user_attr("reason", "interrupted")
                study.tell(trial, state=TrialState.FAIL)
                raise
            _tell(study, trial, result)
            result.params = trial.params
            result.save(folder)
            self._log(tracker, folder.name, result, config)

    def _launch(self, number: int, overrides: list[str], folder: Path) -> Result:
        """Run one trial; its result, also when it failed before it could write one."""
        (folder / "result.json").unlink(missing_ok=True)
        try:
            job = self._launcher.launch([overrides], initial_job_idx=number)[0]
            return Result.load(folder)
        except FileNotFoundError:
            error = job._return_value
        except (HydraException, OmegaConfBaseException) as refused:
            error = refused
        result = Result(overrides=overrides, reason=f"{type(error).__name__}: {one_line(error)}")
        folder.mkdir(parents=True, exist_ok=True)
        result.save(folder)
        return result

    def _log(self, tracker: tracking.Tracker, name: str, result: Result, config: Config) -> None:
        log.info("  %s", report.outcome(result, config.objective.metrics))
        try:
            tracker.log_trial(self._folder / name, name, result)
        except TrackingError as error:
            log.warning("  %s", error)


def _tell(study: optuna.Study, trial: optuna.Trial, result: Result) -> None:
    for name, value in result.metrics.items():
        trial.set_user_attr(name, value)
    if not result.complete:
        trial.set_user_attr("reason", result.reason)
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("verdict", result.verdict)
    for name, value in result.constraints.items():
        trial.set_constraint(name, value)
    study.tell(trial, result.values)
