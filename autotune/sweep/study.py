"""One study: ask Optuna for parameters, run the trials, tell Optuna what they measured.

Trials never wait for each other: up to the launcher's n_jobs are in flight, each that ends is told at once and the
next is asked. Only this process touches Optuna's storage; trials report through files in their folders.
"""

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from autotune.config.overrides import typed, with_values
from autotune.config.schema import Config, Duplicates
from autotune.errors import InputError, StartError, TrackingError
from autotune.measure import progress
from autotune.measure.prepare import Prepared, prepare, prepare_samples
from autotune.measure.result import Result, is_complete
from autotune.results import study as studies
from autotune.results import summary, tracking
from autotune.search import prior, tell, warm_start
from autotune.search.pruners import make_pruner, watched
from autotune.search.samplers import Grid, make_sampler
from autotune.search.space import DEFAULT, FLAG, Space, check_flags, contains, flags, parse
from autotune.sweep import storage
from autotune.sweep.display import Display
from autotune.sweep.launchers import Job, Launcher, make_launcher
from autotune.sweep.worker import Trial
from autotune.system import interrupt
from autotune.system.files import log_to
from autotune.text import shorten

log = logging.getLogger(__name__)

POLL_S = 0.05
REFUSALS_IN_A_ROW = 100  # then the space is at fault
DUPLICATES_IN_A_ROW = 50  # then the sampler has nothing new
NODE_FAILURES = 3  # in a row, then a node is set aside
CANARY: dict[str, Any] = {"scenario.min_duration_s": 10.0, "scenario.min_queries": 32}  # enough to compare nodes by
AGAIN = "again"  # of a trial that repeats a lost one: its number


@dataclass(frozen=True)
class Asked:
    """What is to be run; the baseline and canaries have no Optuna trial."""

    name: str  # of its folder
    params: dict[str, Any]
    trial: optuna.Trial | None
    node: str = ""  # of a canary


@dataclass
class Running:
    """A trial in flight."""

    asked: Asked
    job: Job
    progress: progress.Reader
    phase: str = "queued"
    since: float = field(default_factory=time.monotonic)
    pruned: bool = False


def run(sweeper: dict[str, Any], job: DictConfig, config_loader: ConfigLoader, arguments: list[str]) -> None:
    """Run the study that the command line `arguments` and the sweeper's configuration describe.

    Raises InputError before the first trial; exits with 1 if no trial completed.
    """
    space, fixed = parse(sweeper["params"] or {}, arguments, job.conditions, job.only_if)
    composed = config_loader.load_sweep_config(job, fixed)
    config = typed(composed)
    prepared = prepare(config)
    prepare_samples(config, prepared)
    check_flags(space, prepared.backend)
    launcher = make_launcher(config)
    pruner = make_pruner(config)
    tracking.check(config.tracking)
    folder = Path(job.hydra.sweep.dir)
    if config.resume and not folder.exists():
        raise InputError(f"resume=true: there is no study in {folder}; write study=<its name>")
    if config.warm_start and not folder.exists():
        studies.load(config.warm_start, "warm_start")  # says now that it does not exist
    folder.mkdir(parents=True, exist_ok=True)
    with (
        storage.lock(folder / ".lock", str(folder)),
        log_to(folder / "autotune.log", "%(asctime)s %(message)s"),
        storage.opened(sweeper["storage"] or f"sqlite:///{folder}/study.db", sweeper["study_name"]) as kept,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=sweeper["study_name"],
            storage=kept,
            pruner=pruner,
            directions=list(sweeper["direction"]),
            load_if_exists=True,
        )
        study.sampler = make_sampler(sweeper["sampler"], space, len(study.trials))
        check_continues(study, space, list(sweeper["direction"]), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental since Optuna 3.2
            study.set_metric_names(config.objective.metrics)  # for whoever looks into the storage
        # Each trial is composed from this study, and must not make up a name of its own.
        overrides = [*fixed, f"study={config.study}"]
        Study(study, space, config, composed, overrides, prepared, launcher, folder).run()
        completed_any = any(trial.state is TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
    if not completed_any:
        sys.exit(f"autotune: no trial of {config.study} completed; reasons above")


def check_continues(study: optuna.Study, space: Space, directions: list[str], folder: Path) -> None:
    """Raise InputError if `study` has trials that this space and objective can't go on from."""
    other = "write another study=…, or what it was started with"
    if [direction.name.lower() for direction in study.directions] != directions:
        raise InputError(f"study={study.study_name} exists with another objective; {other}")
    for trial in study.get_trials(deepcopy=False):
        swept = trial.state is TrialState.COMPLETE and summary.BASELINE not in trial.user_attrs
        if swept and not (folder / f"trial-{trial.number}" / "result.json").exists():
            raise InputError(
                f"study={study.study_name} exists in that storage, and the results of its trials are not in {folder}; "
                f"go on where it was started, or write another study=…"
            )
        for name, distribution in trial.distributions.items():
            wanted = space.parameters.get(name, distribution)
            if isinstance(wanted, CategoricalDistribution) and wanted != distribution:
                raise InputError(f"study={study.study_name} exists with other choices for {name}; {other}")


class Study:
    """The trials of one study, from the first question to the summary."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        config: Config,
        composed: DictConfig,
        overrides: list[str],
        prepared: Prepared,
        launcher: Launcher,
        folder: Path,
    ) -> None:
        self._study = study
        self._space = space
        self._config = config
        self._composed = composed
        self._overrides = overrides
        self._prepared = prepared
        self._launcher = launcher
        self._folder = folder
        defaults = prepared.dry_run()
        if defaults.refusal:
            log.warning("vLLM refuses the configuration before anything is swept: %s", defaults.refusal)
        self._known = defaults.resolved
        self._defaults = {name: self._known.get(name.removeprefix(FLAG)) for name in space.parameters}
        self._n_trials = config.n_trials
        if isinstance(study.sampler, Grid):
            self._n_trials = space.grid_size
            log.info("grid: %d points", self._n_trials)
        self._running: list[Running] = []
        self._wants_baseline = False
        self._count = 0  # of n_trials, in flight or ended
        self._engine_s = 0.0  # start and run of the trials that ended
        self._began = time.monotonic()
        self._measured: dict[str, str] = {}  # name of the trial by its point
        self._exhausted = False  # the sampler has nothing new
        self._failed: list[str] = []  # reasons of the last trials, as long as they fail
        self._failed_on: dict[str, int] = {}  # the same by node

    def run(self) -> None:
        config = self._config
        with tracking.study(config.tracking, config.study, self._folder) as self._tracker:
            try:
                with interrupt.held():  # neither the storage nor the start of a job is cut off midway
                    self._resume()
                    with Display(self._n_trials, config.objective) as self._display:
                        self._run_trials()
            except (KeyboardInterrupt, SystemExit):
                log.info("stopped; what was measured is kept, and the same command goes on")
                raise
            finally:
                self._abandon()
                log.info("\n%s", summary.write(self._study, self._folder, config))
                self._write_report()
                self._tracker.summarise(self._folder)

    def _write_report(self) -> None:
        """The report as a page; whatever goes wrong with it is no reason for a study to fail."""
        try:
            from autotune.results import report  # plotly takes a second to import

            log.info("Report: %s", report.write(self._config, self._study, self._folder))
        except Exception as error:
            log.warning(
                "no report: %s: %s; python -m autotune.report study=%s writes it",
                type(error).__name__,
                error,
                self._config.study,
            )

    def _run_trials(self) -> None:
        """Keep the launcher's n_jobs trials in flight until n_trials were run or the budget is spent."""
        self._start(self._canaries())
        while True:
            if any(one.asked.node for one in self._running):  # nothing else runs before the nodes are known
                self._end_some()
                continue
            asked: list[Asked] = []
            while len(self._running) + len(asked) < self._launcher.n_jobs and (next_one := self._ask()):
                asked.append(next_one)
            self._start(asked)
            if not self._running:
                return
            self._end_some()

    def _end_some(self) -> None:
        """Tell of the trials that have ended; wait a moment if none has."""
        interrupt.check()
        ended = [one for one in self._running if one.job.done()]
        for one in ended:
            self._running.remove(one)
            self._finish(one.asked, one.job.reason, one.job.node, one.pruned)
        for one in self._running:
            self._watch(one)
        self._display.show(self._running, self._study, self._count)
        if not ended:
            self._running[0].job.wait(POLL_S)

    # Asking

    def _canaries(self) -> list[Asked]:
        """A short baseline for each node that has not shown yet what it can."""
        known = self._study.user_attrs.get(summary.CANARIES, {})
        return [Asked(f"canary-{node}", {}, None, node) for node in self._launcher.nodes() if node not in known]

    def _ask(self) -> Asked | None:
        """The baseline, then what the sampler suggests and vLLM accepts; None if nothing more is to be run."""
        if self._wants_baseline:
            self._wants_baseline = False
            self._prepared.backend.prepare_dry_runs()  # while the baseline starts, not once it has ended
            return Asked(summary.BASELINE, {}, None)
        refused = looked_up = 0  # in a row
        while not self._exhausted and self._count < self._n_trials and not self._spent():
            with self._transaction():
                trial = self._study.ask()
                params = self._space.suggest(trial, self._known)
            refusal, point = self._dry_run(params)
            interrupt.check()
            earlier = self._measured.get(point)
            if refusal:
                self._refuse(trial, refusal)
                refused += 1
                if refused == REFUSALS_IN_A_ROW:
                    raise InputError(
                        f"{refused} combinations in a row can't be run; the last: {refusal}; narrow the space"
                    )
            elif earlier and (result := Result.find(self._folder / earlier)):
                self._look_up(trial, params, earlier, result)
                looked_up += 1
                self._exhausted = looked_up == DUPLICATES_IN_A_ROW and not isinstance(self._study.sampler, Grid)
                if self._exhausted:
                    log.info("the sampler asked %d times in a row for what is measured: nothing new begins", looked_up)
            else:
                self._count += 1
                log.info("trial-%d (%d of %d): %s", trial.number, self._count, self._n_trials, shorten(params))
                return Asked(f"trial-{trial.number}", params, trial)
        return None

    def _spent(self) -> bool:
        """Whether the budget is: then what runs may end, and nothing new begins."""
        if self._config.budget is None:
            return False
        used_s = self._engine_s if self._config.budget_of == "engine" else time.monotonic() - self._began
        return used_s >= seconds(self._config.budget)

    def _dry_run(self, params: Mapping[str, Any]) -> tuple[str, str]:
        """Why this combination can't be run, by the space's own conditions or by vLLM, empty if it can; its point.

        Two combinations have the same point if vLLM would run the same configuration.
        """
        if broken := self._space.violated(params, self._known):
            return broken, ""
        outcome = self._prepared.dry_run(flags(params))
        others = {name: value for name, value in params.items() if not name.startswith(FLAG)}
        return outcome.refusal, json.dumps([outcome.resolved, others], sort_keys=True, default=str)

    def _note_measured(self, name: str, params: Mapping[str, Any]) -> None:
        if self._config.duplicates is Duplicates.lookup:
            self._measured.setdefault(self._dry_run(params)[1], name)

    def _look_up(self, trial: optuna.Trial, params: dict[str, Any], earlier: str, result: Result) -> None:
        """Tell of `trial` what `earlier` measured; it takes no engine time, and is none of the study's n_trials."""
        trial.set_user_attr(summary.DUPLICATE, earlier)
        self._count += isinstance(self._study.sampler, Grid)  # which asks for each point once
        asked = Asked(f"trial-{trial.number}", params, trial)
        folder = self._folder / asked.name
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        facts = {**result.facts, summary.DUPLICATE: earlier}
        replace(result, phases={}, runs=[], facts=facts, started_at=now, ended_at=now).save(folder)
        log.info("%s is %s again: %s", asked.name, earlier, shorten(params))
        self._finish(asked, lambda: "", "")

    def _refuse(self, trial: optuna.Trial, reason: str) -> None:
        """Record a combination that took no GPU: infeasible to the sampler, and none of the study's n_trials."""
        with self._transaction():
            trial.set_user_attr("refused", reason)
            tell.impossible(self._study, trial, "refused")
        self._count += isinstance(self._study.sampler, Grid)  # which asks for each point once
        log.info("trial-%d refused: %s (%s)", trial.number, reason, shorten(trial.params))

    # Running

    def _start(self, asked: list[Asked]) -> None:
        trials = []
        for one in asked:
            changed = {name: None if value == DEFAULT else value for name, value in one.params.items()}
            if one.node:
                changed = CANARY
            elif one.trial is None and self._config.baseline_gpu is not None:
                changed = {"gpus": [self._config.baseline_gpu]}
            folder = self._folder / one.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").unlink(missing_ok=True)
            progress.begin(folder)
            overrides = [*self._overrides, *(f"{key}={written(value)}" for key, value in changed.items())]
            config = with_values(self._composed, changed, self._config)
            trials.append(Trial(config, overrides, folder, one.node))
        if trials:
            for one, job in zip(asked, self._launcher.submit(trials), strict=True):
                self._running.append(Running(one, job, progress.Reader(self._folder / one.name)))

    def _watch(self, one: Running) -> None:
        """Note what a trial says of itself; stop it if the pruner has seen enough."""
        name = watched(self._study.pruner, self._config.objective)
        for entry in one.progress.new():
            one.phase = entry.get("phase", one.phase)
            if one.asked.trial is None or one.pruned or name not in entry.get("values", {}):
                continue
            one.asked.trial.report(entry["values"][name], entry["step"])
            if one.asked.trial.should_prune():
                one.pruned = True
                progress.stop(self._folder / one.asked.name)
                log.info("%s: pruned at %s %.4g", one.asked.name, name, entry["values"][name])

    # Telling

    def _finish(self, asked: Asked, why: Callable[[], str], node: str, pruned: bool = False) -> None:
        """Tell what became of a trial; `why` says it left no result."""
        folder = self._folder / asked.name
        result = Result.find(folder) or Result(reason=why())
        result.params = asked.params
        if asked.trial is None:
            result.defaults = self._defaults
        result.save(folder)
        self._engine_s += result.engine_s
        if not pruned:
            estimated = " (estimated)" if result.estimated else ""
            log.info("%s: %s%s", asked.name, summary.outcome(result, self._config.objective.metrics), estimated)
        if asked.node:
            known = self._study.user_attrs.get(summary.CANARIES, {})
            value = result.values[0] if result.complete else None
            self._study.set_user_attr(summary.CANARIES, {**known, asked.node: value})
            if value is None:
                log.warning("%s: its canary failed: %s", asked.node, result.reason)
                self._launcher.set_aside(asked.node)
            return
        duplicate = summary.DUPLICATE in result.facts
        if result.complete and not duplicate:
            self._note_measured(asked.name, asked.params)
        with self._transaction():
            if asked.trial is None:
                self._record_baseline(result)
            elif result.complete:
                self._tell(asked.trial, result)
            elif pruned:
                self._study.tell(asked.trial, state=TrialState.PRUNED)
            else:
                self._fail(asked.trial, result.reason)
        if not duplicate:
            self._count_failures(result, pruned, result.facts.get("node", node))
        try:
            self._tracker.log_trial(folder, asked.name, result)
        except TrackingError as error:
            log.warning("%s", error)

    def _transaction(self) -> AbstractContextManager[None]:
        return storage.transaction(self._study._storage)

    def _record_baseline(self, result: Result) -> None:
        """Note the baseline; where vLLM's defaults lie within the space, the sampler learns from it, too."""
        self._study.set_user_attr(summary.BASELINE, {"values": result.values, "reason": result.reason})
        defaults = self._defaults
        if result.complete and all(contains(d, defaults[name]) for name, d in self._space.parameters.items()):
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=defaults,
                    distributions=self._space.parameters,
                    values=result.values,
                    user_attrs={summary.BASELINE: True, "metrics": result.metrics},
                    constraints=result.constraints,
                )
            )

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        trial.set_user_attr("metrics", result.metrics)
        tell.measured(self._study, trial, self._config.objective, result)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("reason", reason)
        if reason.startswith(StartError.__name__):
            tell.impossible(self._study, trial, "starts")  # no accident: it would fail again
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _count_failures(self, result: Result, pruned: bool, node: str) -> None:
        """Set aside a node on which nothing works. Raises InputError after max_failures trials in a row."""
        if result.complete or pruned:
            self._failed.clear()
            self._failed_on.pop(node, None)
            return
        self._failed.append(result.reason)
        self._failed_on[node] = self._failed_on.get(node, 0) + 1
        if node and self._failed_on[node] == NODE_FAILURES:
            log.warning("%s: %d trials failed on it in a row", node, NODE_FAILURES)
            self._launcher.set_aside(node)
        if len(self._failed) >= self._config.max_failures:
            reasons = "; ".join(dict.fromkeys(self._failed))
            raise InputError(f"max_failures={self._config.max_failures} trials failed in a row: {reasons}")

    # Going on after an earlier process

    def _resume(self) -> None:
        """Tell what ended while nobody watched, take up what still runs, ask again for what was lost."""
        for trial in self._study.get_trials(deepcopy=False):
            no_cost = {"refused", summary.DUPLICATE} & trial.user_attrs.keys()
            free = no_cost and not isinstance(self._study.sampler, Grid)
            if trial.state.is_finished():
                if (
                    trial.state is TrialState.COMPLETE
                    and not {summary.DUPLICATE, summary.BASELINE} & trial.user_attrs.keys()
                ):
                    self._note_measured(f"trial-{trial.number}", trial.params)
                gone = free or summary.LOST in trial.user_attrs or summary.BASELINE in trial.user_attrs
                self._count += not gone
            elif trial.state is TrialState.RUNNING:
                self._take_up(trial)
        missing = self._config.baseline and summary.BASELINE not in self._study.user_attrs
        if is_complete(self._folder / summary.BASELINE):
            self._note_measured(summary.BASELINE, {})
        self._wants_baseline = missing and not self._take_up(None)
        results = (Result.load(path.parent) for path in self._folder.glob("*/result.json"))
        self._engine_s = sum(result.engine_s for result in results)
        fresh = not self._study.trials and not isinstance(self._study.sampler, Grid)
        if self._config.warm_start and fresh:
            self._enqueue_warm_start(self._config.warm_start)
        if self._config.prior.backend and fresh:
            self._enqueue_prior()

    def _take_up(self, frozen: FrozenTrial | None) -> bool:
        """Whether a trial (the baseline: None) that an earlier process left still runs, or has completed since."""
        name = f"trial-{frozen.number}" if frozen else summary.BASELINE
        folder = self._folder / name
        job = self._launcher.attach(folder)
        if job or is_complete(folder):
            trial = optuna.Trial(self._study, frozen._trial_id) if frozen else None
            asked = Asked(name, dict(frozen.params) if frozen else {}, trial)
            self._count += trial is not None
            if job:
                log.info("%s still runs, and is watched again", name)
                self._running.append(Running(asked, job, progress.Reader(folder)))
            else:
                self._finish(asked, lambda: "", "")
            return True
        if frozen:
            self._lose(frozen)
            log.info("%s was lost with the process that ran it, and is asked again", name)
        return False

    def _lose(self, frozen: FrozenTrial) -> None:
        """Ask again, once, for what `frozen` was to run, and fail it; it counts for nothing."""
        sampler = self._study.sampler
        params = {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}  # enqueued ones are fixed first
        if isinstance(sampler, Grid) and "grid_id" in frozen.system_attrs:
            params = sampler.point(frozen)
        if params and not any(other.user_attrs.get(AGAIN) == frozen.number for other in self._study.trials):
            self._study.enqueue_trial(params, user_attrs={**frozen.user_attrs, AGAIN: frozen.number})
        # Not through optuna.Trial, which would have the sampler choose anew.
        kept = self._study._storage
        kept.set_trial_user_attr(frozen._trial_id, summary.LOST, True)
        kept.set_trial_user_attr(frozen._trial_id, "reason", "lost: the process that ran it ended")
        self._study.tell(frozen.number, state=TrialState.FAIL)

    def _enqueue_warm_start(self, name: str) -> None:
        """Ask first for what another study found best."""
        found = warm_start.best(name, self._space, self._config.prior.keep)
        for one in found:
            self._study.enqueue_trial(one.params, user_attrs={"warm_start": name})
        log.info("warm_start: the first %d trials are the best of study %s", len(found), name)

    def _enqueue_prior(self) -> None:
        """Ask first for what a simulation of this study found best."""
        expected = prior.best(self._config, self._space)
        for one in expected:
            attributes = {summary.EXPECTED: {"values": one.values, "feasible": one.feasible}}
            self._study.enqueue_trial(one.params, user_attrs=attributes)
        simulated = self._config.prior.trials
        log.info("prior: the first %d trials are the best of %d simulated ones", len(expected), simulated)

    def _abandon(self) -> None:
        """End what still runs; on a cluster, too: a study that is stopped leaves no job behind."""
        for one in self._running:
            one.job.cancel()
        self._running.clear()
        for trial in self._study.get_trials(states=[TrialState.RUNNING]):
            self._lose(trial)


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, `1.5d` in seconds. Raises InputError."""
    found = re.fullmatch(r"([\d.]+)\s*([smhd])", text.strip())
    if not found:
        raise InputError(f"budget={text}: write a duration such as 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def written(value: Any) -> str:
    """A parameter's value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
