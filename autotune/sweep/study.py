"""One study: ask for parameters, run the trials, tell Optuna what they measured.

Trials never wait for each other: up to the launcher's n_jobs are in flight; as each ends, its result is told and the
next one is asked. Trials report through files in their folders, so a job can outlive this process.
"""

import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from autotune.config.bounds import seconds
from autotune.config.overrides import as_override, typed, with_values
from autotune.config.schema import BudgetOf, Config, Duplicates
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure import progress
from autotune.measure.accuracy import SAME
from autotune.measure.objective import searches
from autotune.measure.prepare import Prepared, prepare, prepare_samples, prepare_texts
from autotune.measure.result import Result, State
from autotune.results import beside, summary, tracking
from autotune.results.study import (
    BASELINE,
    CANARY,
    FINALISTS,
    FRESH,
    ON_SHARED,
    SPACE,
    TRIAL,
    canaries_in,
    certified,
    reference_params,
    result_in,
    results_in,
)
from autotune.results.study import Study as FinishedStudy
from autotune.search import prior
from autotune.search.checks import check_space
from autotune.search.pruners import make_pruner
from autotune.search.samplers import chosen, make_sampler
from autotune.search.space import default_of, parse, shared_start, swept_flags, value_of
from autotune.sweep import storage
from autotune.sweep.checks import (
    OF_DATA,
    REFUSALS_IN_A_ROW,
    check_configuration,
    check_new,
    check_secrets,
    check_together,
    check_trials,
    other_facts,
)
from autotune.sweep.display import Display
from autotune.sweep.gate import Gate, decided
from autotune.sweep.launchers import Job, Launcher, begin, make_launcher
from autotune.sweep.lookup import Lookup
from autotune.sweep.record import AGAIN, Record
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from autotune.system.files import LOCK, LOG, log_to, unless_refused, write_whole
from autotune.text import count, mostly, one_line, shorten

log = logging.getLogger(__name__)

POLL_S = 0.05
DUPLICATES_IN_A_ROW = 50  # then the sampler has nothing new
ENDING_S = 10.0  # for which a study that was stopped waits for the ends of its jobs; the next one settles the others
NODE_FAILURES = 3  # in a row, then a node is set aside
# Enough to compare nodes by.
CANARY_RUN: dict[str, Any] = {"scenario.min_duration_s": 10.0, "scenario.min_queries": 32, "accuracy.check": "none"}


@dataclass(frozen=True)
class PendingTrial:
    """A trial to be run, or in flight; the baseline and canaries are none of Optuna's."""

    name: str  # of its folder
    params: dict[str, Any]
    trial: optuna.Trial | None
    node: str = ""  # of a canary


@dataclass
class Running:
    """A trial in flight."""

    pending: PendingTrial
    job: Job
    progress: progress.Reader
    phase: str = "queued"
    since: float = field(default_factory=time.monotonic)
    pruned: bool = False


def run(sweeper: dict[str, Any], job: DictConfig, config_loader: ConfigLoader, arguments: list[str]) -> None:
    """Run the study that the command line `arguments` and the sweeper's configuration describe.

    Raises InputError before the first trial; exits with 1 if no trial completed.
    """
    if not str(sweeper["study_name"] or "").strip():
        raise InputError("hydra.sweeper.study_name=: write the study's name in Optuna's storage, or leave it out")
    space, fixed = parse(sweeper["params"] or {}, arguments, job.conditions, job.only_if)
    composed = config_loader.load_sweep_config(job, fixed)
    config = typed(composed)
    check_secrets(space)
    prepared = prepare(config)
    samples = prepare_samples(config, prepared)
    defaults = prepared.dry_run()
    space = check_space(space, config, prepared.backend, defaults.resolved)
    check_together(space, config, prepared)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    launcher, pruner = make_launcher(config), make_pruner(config)
    sampler, composed.sampler = chosen(sweeper["sampler"], job.hydra.runtime.choices, config, space)
    tracking.check(config.tracking)
    folder = Path(job.hydra.sweep.dir)
    config = replace(config, sampler=composed.sampler, accuracy=decided(config, space, prepared, folder))
    composed.accuracy = config.accuracy
    texts = prepare_texts(config, prepared, samples)
    check_new(config, folder, space, prepared, defaults)
    with storage.disk_errors(folder), opened(folder):
        results = results_in(folder)
        facts = {} if any(name.startswith(OF_DATA) for name in space.parameters) else prepared.facts(samples)
        check_configuration(folder, results, config, space.parameters, prepared.backend.facts | facts)
        first = [] if results else prior.first(config, space)
        url = str(sweeper["storage"] or f"sqlite:///{folder}/study.db")
        with storage.opened(url, sweeper["study_name"]) as trials:
            record = Record(trials, sweeper["study_name"], space, config.objective)
            begun = len(record.trials) or len(results)
            record.use(make_sampler(sampler, space, config, results, folder, begun), pruner)
            if results and not record.trials:
                record.rebuild(results)
            check_trials(record.trials, folder, results)
            for params, noted in [] if record.trials else first:
                record.enqueue(params, **noted)
            written = {name: json.loads(distribution_to_json(one)) for name, one in space.parameters.items()}
            write_whole(folder / SPACE, json.dumps(written, indent=1))
            # Each trial is composed from this study, and must not make up a name of its own.
            overrides = [*fixed, f"study={config.study}"]
            judge = Gate(config, prepared, texts, folder)
            known = defaults.resolved
            sweep = Sweep(record, config, composed, overrides, prepared, known, facts, launcher, folder, judge, results)
            study = sweep.run()
    if not study.complete:
        sys.exit(f"autotune: no trial of {config.study} completed; reasons above")


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Make a study's folder if it is missing, and keep it for this process alone, with a log of the block in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        storage.lock(folder / LOCK, str(folder)),
        unless_refused(folder),
        log_to(folder / LOG, "%(asctime)s %(message)s"),
    ):
        yield


@dataclass
class Sweep:
    """The trials of one study, from the first question to the summary."""

    record: Record
    config: Config
    composed: DictConfig
    overrides: list[str]
    prepared: Prepared
    known: Mapping[str, Any]  # vLLM's flags without a sweep, resolved
    facts: Mapping[str, str]  # of the files that decide what a trial measures
    launcher: Launcher
    folder: Path
    gate: Gate
    results: dict[str, Result]  # of what has ended, by folder
    running: list[Running] = field(default_factory=list)
    # Trials that have ended, which the gate can't judge before the baseline ends; with their nodes.
    ended: list[tuple[PendingTrial, Result, str]] = field(default_factory=list)
    wanted: list[PendingTrial] = field(default_factory=list)  # references that are still to be run
    # Trials from when they are asked until they have ended, with those that repeat them.
    in_flight: dict[str, list[PendingTrial]] = field(default_factory=dict)
    exhausted: bool = False  # the sampler has nothing new
    failed: list[str] = field(default_factory=list)  # reasons of the last trials, as long as they fail
    failed_on: Counter[str] = field(default_factory=Counter)  # the same by node

    def __post_init__(self) -> None:
        space = self.record.space
        self.canaries = canaries_in(self.folder)  # by node
        self.began = time.monotonic()
        self.budget_s = seconds(self.config.budget) if self.config.budget else math.inf
        shares = self.prepared.backend.shares and self.launcher.shares
        self.start_with = shared_start(space, self.known) if shares else None
        self.lookup = Lookup(self.prepared, space, self.known)
        self.defaults = {name: default_of(name, self.known) for name in space.parameters}
        self.references = reference_params(self.config)
        self.n_trials = space.grid_size if self.record.is_grid else self.config.n_trials
        if self.record.is_grid:
            log.info("grid: %d points, each once: it does not heed n_trials", self.n_trials)

    def run(self) -> FinishedStudy:
        """Go on from the results of an earlier process, if any, to the end; returns what was measured."""
        with (
            beside.study(self.config.tracking, self.config.study, self.folder) as self.tracker,
            interrupt.deferred(),  # neither the storage nor a job's start is cut off midway, nor what is written last
        ):
            try:
                self._resume()
                with Display(self.n_trials) as self.display:
                    self._run_trials()
                    self._certify()
            except (KeyboardInterrupt, SystemExit):
                log.info("stopped; results are kept, and the same command continues the study")
                raise
            finally:
                study = self._end()
        return study

    def _end(self) -> FinishedStudy:
        """Leave nothing running, and write what was measured; the storage or the disk may be what ended the study."""
        for one in self.running:
            self._attempt(f"{one.pending.name} may still run", one.job.cancel)
        self._attempt("a server that trials shared may still run", self.launcher.close)
        self._check_folder()
        self._attempt("the last trials were not recorded", self._abandon)
        study = FinishedStudy(self.folder, self.config, results_in(self.folder), canaries_in(self.folder))
        self._attempt("no summary", lambda: log.info("\n%s", summary.render(study)))
        self._attempt("no summary.txt", summary.write, study)
        self._attempt(f"no report, `autotune report study={self.config.study}` writes it", self._write_report, study)
        return study

    def _check_folder(self) -> None:
        """Raise InputError if the study's folder is gone: what is written there now would look like a study."""
        if not (self.folder / LOCK).exists():
            raise InputError(
                f"{self.folder} was moved or deleted while its study ran; delete what is there now, move it back, "
                "and the same command continues the study"
            )

    def _attempt(self, otherwise: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do what must not end a study when it fails."""
        try:
            work(*arguments)
        except Exception as error:
            log.warning("%s: %s: %s", otherwise, type(error).__name__, one_line(error))

    def _write_report(self, study: FinishedStudy) -> None:
        from autotune.results import report  # plotly takes a second to import
        from autotune.search import account

        self._attempt("the report leaves out the steps", account.write, study)
        log.info("Report: %s", report.write(study))

    def _run_trials(self) -> None:
        """Keep the launcher's n_jobs trials in flight until n_trials were run or the budget is spent."""
        self._start(self._not_begun(self._canaries()))
        while True:
            if any(one.pending.node for one in self.running):  # nothing else runs before the nodes are known
                self._end_some()
                continue
            pending: list[PendingTrial] = []
            while len(self.running) + len(pending) < self.launcher.n_jobs and (next_one := self._ask()):
                pending.append(next_one)
                if next_one.trial is None:  # the baseline need not wait for a sampler that takes seconds to begin
                    self._start([pending.pop()])
            self._start(pending)
            if not self.running:
                return
            self._end_some()

    def _certify(self) -> None:
        """Measure the best trial on a server of its own if it shared one; where another is best then, that one, too."""
        for _ in range(FINALISTS):
            if not (name := self._so_far().uncertified()):
                return
            log.info("%s is the best; it shared a server, and is measured again on one of its own", name)
            shared = self.results[name]
            self._measure_fresh(name)
            if self.results[name].state is State.failed:  # perhaps by an accident, which must not cost the best trial
                log.info("%s failed on a server of its own; once more", name)
                self.results[name] = shared
                self._measure_fresh(name)

    def _measure_fresh(self, name: str) -> None:
        self._start(self._not_begun([PendingTrial(f"{FRESH}{name}", self.results[name].params, None)]))
        while self.running:
            self._end_some()

    def _end_some(self) -> None:
        """Finish the trials that have ended; wait a moment if none has."""
        interrupt.check()
        self._check_folder()
        ended = [one for one in self.running if one.job.done()]
        for one in ended:
            self.running.remove(one)
            if not one.job.lost or not self._again(one.pending):
                self.ended.append((one.pending, self._result_of(one), one.job.node))
        runs = {one.pending.name for one in self.running}
        awaiting = [one for one in self.ended if self.gate.awaits(one[1], self.results, runs)]
        ready, self.ended = [one for one in self.ended if one not in awaiting], awaiting
        for pending, result, node in ready:
            self._finish(pending, result, node)
        for one in self.running:
            self._watch(one)
        self.display.show(self.running, self._so_far(), self.asked)
        if not ended:
            self.running[0].job.wait(POLL_S)

    def _again(self, pending: PendingTrial) -> bool:
        """Finish a trial that ended with what had started it, or queue it again, once; False if that was done."""
        if pending.trial is None or AGAIN in pending.trial.user_attrs:
            return False
        self.lookup.remove(pending.name)
        for one in [pending, *self.in_flight.pop(pending.name, [])]:
            self._settle(one)
        return True

    def _result_of(self, one: Running) -> Result:
        """The result that a trial left in its folder, or the reason why it left none."""
        result = result_in(self.folder / one.pending.name) or Result(reason=one.job.reason())
        if one.pruned and not result.complete:
            result.state, result.reason = State.pruned, "ended early by the pruner"
        elif result.complete and (others := other_facts(self.facts, result.facts)):  # a file was replaced
            result.state, result.reason = State.failed, f"not this study's: {', '.join(others)}"
        elif result.state is State.interrupted:  # by a time limit of the cluster, say, and not by the study
            why = one.job.reason()
            result.state, result.reason = State.failed, why if result.reason in why else f"{result.reason}; {why}"
        return result

    # Asking

    def _canaries(self) -> list[PendingTrial]:
        """A short baseline for each node that has not shown yet what it can."""
        nodes = [node for node in self.launcher.nodes() if node not in self.canaries]
        return [PendingTrial(f"{CANARY}{node}", {}, None, node) for node in nodes]

    def _ask(self) -> PendingTrial | None:
        """The baseline, then what the sampler suggests and vLLM accepts; None if nothing more is to be run now."""
        if self.wanted:
            self.prepared.backend.prepare_dry_runs()  # while the baseline starts, not once it has ended
            return self._claimed(self.wanted.pop(0))
        found: PendingTrial | None = None
        refusals: list[str] = []  # in a row
        repeats: list[str] = []  # in a row
        while not found and not self.exhausted and self.asked < self.n_trials and not self._spent():
            if sum(map(len, self.in_flight.values())) >= DUPLICATES_IN_A_ROW:  # wait for what they repeat
                break
            trial, params = self.record.ask(self.known)
            pending = PendingTrial(f"{TRIAL}{trial.number}", params, trial)
            refusal, point = self.lookup.check(params)
            interrupt.check()
            if (earlier := None if refusal else self.lookup.names.get(point)) and self._repeat(pending, earlier):
                repeats.append(f"{pending.name} repeats {earlier}{', which runs' if earlier in self.in_flight else ''}")
                self.exhausted = len(repeats) == DUPLICATES_IN_A_ROW and not self.record.is_grid
            elif refusal := refusal or self.gate.refusal(params):
                self._refuse(pending, refusal)
                refusals.append(refusal)
                self.exhausted = len(refusals) == REFUSALS_IN_A_ROW and not self.record.is_grid
            else:
                found = pending
        if len(repeats) >= DUPLICATES_IN_A_ROW and self.exhausted:
            log.info("stopping: %d proposals in a row were already measured", len(repeats))
        elif repeats:
            log.info("%s%s", repeats[0], f"; {len(repeats) - 1} more repeat earlier trials" if repeats[1:] else "")
        if refusals:
            told = f"{count(len(refusals), 'combination')} can't be run: {mostly(refusals)}"
            if self.exhausted and not self.asked:
                raise InputError(f"{told}; narrow the space")
            log.info("%s%s", "stopping: " if self.exhausted else "", told)
        if not found:
            return None
        log.info("%s (%d of %d): %s", found.name, self.asked, self.n_trials, shorten(found.params))
        return self._claimed(found)

    @property
    def asked(self) -> int:
        """Trials of the n_trials, in flight or ended; one that waits for what it repeats is none."""
        repeats = 0 if self.record.is_grid else sum(map(len, self.in_flight.values()))
        return sum(map(self.record.counts, self.record.trials)) - repeats

    def _claimed(self, pending: PendingTrial) -> PendingTrial:
        """`pending`, whose configuration no other trial runs until it has ended."""
        answers = pending.trial or pending.name in self.references  # a canary is too short, and a trial measured before
        if answers and self.config.duplicates is Duplicates.lookup:
            self.in_flight[pending.name] = []
            self.lookup.add(pending.name, pending.params)
        return pending

    def _spent(self) -> bool:
        """True once the budget is spent: running trials may end, and no new one begins."""
        if self.config.budget_of is BudgetOf.engine:
            return counted_s([*self.results.values(), *self.canaries.values()]) >= self.budget_s
        return time.monotonic() - self.began >= self.budget_s

    def _repeat(self, pending: PendingTrial, earlier: str) -> bool:
        """Answer with what `earlier` measures, now or once it has; False if its result is gone."""
        if earlier in self.in_flight:
            self.in_flight[earlier].append(pending)
        elif result := result_in(self.folder / earlier):
            self._answer(pending, earlier, result)
        else:
            self.lookup.remove(earlier)
            return False
        return True

    def _answer(self, pending: PendingTrial, earlier: str, result: Result) -> None:
        """Finish a trial with the `result` of `earlier`: it takes no engine time and is none of the n_trials."""
        now = time.time()
        facts = {**result.facts, "duplicate_of": earlier}
        known = replace(result, phases={}, runs=[], duplicate_of=earlier, expected={}, facts=facts)
        self._finish(pending, replace(known, started_at=now, ended_at=now))

    def _refuse(self, pending: PendingTrial, reason: str) -> None:
        """Record a combination that took no GPU: infeasible to the sampler, and none of the study's n_trials."""
        now = time.time()
        result = Result(State.refused, reason, params=pending.params, started_at=now, ended_at=now)
        assert pending.trial
        self.record.tell(pending.trial, result)
        result.save(self.folder / pending.name)

    # Running

    def _start(self, pending: list[PendingTrial]) -> None:
        specs = []
        for one in pending:
            changed = {name: value_of(value) for name, value in one.params.items() if not name.startswith(FLAG)}
            flags = swept_flags(one.params, self.prepared.args)
            changed |= {f"{FLAG}{flag}": value for flag, value in flags.items()}
            if one.node:
                changed = CANARY_RUN
            elif one.name.startswith(FRESH):
                if searches(self.config.objective):
                    changed["scenario.search.start_qps"] = self._best()
            elif one.trial is None and self.config.baseline_gpu is not None:
                changed["gpus"] = [self.config.baseline_gpu]
            elif one.trial and self.start_with is not None:
                changed["backend.bounds"] = self.start_with
                if searches(self.config.objective) and (best := self._best()):
                    changed["scenario.search.best"] = best
            overrides = [*self.overrides, *(f"{key}={as_override(value)}" for key, value in changed.items())]
            config = with_values(self.composed, changed, self.config)
            specs.append(TrialSpec(config, overrides, self.folder / one.name, one.node))
        for one, job in zip(pending, begin(self.launcher, specs), strict=True):
            self.running.append(Running(one, job, progress.Reader(self.folder / one.name)))

    def _best(self) -> float | None:
        """The value of the best trial so far, the baseline among them; None if none is feasible."""
        served = self._so_far().served
        return self.results[served].values[0] if served else None

    def _so_far(self) -> FinishedStudy:
        return FinishedStudy(self.folder, self.config, self.results)

    def _watch(self, one: Running) -> None:
        """Read a trial's progress; stop the trial if the pruner has seen enough."""
        name, trial = self.record.watched, one.pending.trial
        for entry in one.progress.new():
            one.phase = entry.get("phase", one.phase)
            if trial is None or one.pruned or name not in entry.get("values", {}):
                continue
            trial.report(entry["values"][name], entry["step"])
            if trial.should_prune():
                one.pruned = True
                progress.stop(self.folder / one.pending.name)
                log.info("%s: the pruner ends it at %s %.4g", one.pending.name, name, entry["values"][name])

    # Telling

    def _finish(self, pending: PendingTrial, result: Result, node: str = "") -> None:
        """Keep the result of a trial that has ended, and tell Optuna and MLflow."""
        folder = self.folder / pending.name
        result.params = pending.params
        if pending.name == BASELINE:
            result.defaults = self.defaults
        elif pending.trial and not result.duplicate_of:
            result.expected = pending.trial.user_attrs.get(prior.EXPECTED, {})
        if pending.node:
            self.canaries[pending.node] = result
        elif pending.name.startswith(FRESH):
            trial = pending.name.removeprefix(FRESH)
            self.results[trial] = certified(self.results[trial], result)
        else:
            self.results[pending.name] = result
        result.save(folder)
        self._judge()
        if result.state is State.pruned:
            log.info("%s: %s", pending.name, result.reason)
        elif not result.duplicate_of:
            estimated = " (estimated)" if result.estimated else ""
            log.info("%s: %s%s", pending.name, summary.outcome(result, self.config), estimated)
        if pending.name == BASELINE and (warning := summary.unloaded(self._so_far())):
            log.warning("%s", warning)
        if pending.node:
            if not result.complete:
                log.warning("%s: its canary failed: %s", pending.node, result.reason)
                self.launcher.set_aside(pending.node)
            return
        if pending.trial:
            self.record.tell(pending.trial, result)
        elif pending.name in self.references:
            self.record.tell_reference(pending.name, result)
        if not result.complete:
            self.lookup.remove(pending.name)
        for repeat in self.in_flight.pop(pending.name, []):
            self._answer(repeat, pending.name, result)
        if not result.duplicate_of:
            self._count_failures(result, result.facts.get("node", node))
        if not self.gate.waits(result):  # else MLflow gets it at the study's end
            self.tracker.log_trial(folder)

    def _judge(self, anew: bool = False) -> None:
        """Have the gate judge what has ended: the baseline's end may decide on what has ended before."""
        for name in self.gate.judge(self.results, anew):
            result = self.results[name]
            if result.accuracy != SAME:
                log.info("%s: accuracy: %s", name, result.accuracy or "not checked")
            result.save(self.folder / (f"{FRESH}{name}" if ON_SHARED in result.facts else name))

    def _count_failures(self, result: Result, node: str) -> None:
        """Count failures in a row; sets aside a node on which nothing works. Raises InputError after max_failures."""
        if result.state in (State.complete, State.pruned):
            self.failed.clear()
            self.failed_on.pop(node, None)
            return
        self.failed.append(result.reason)
        self.failed_on[node] += 1
        if node and self.failed_on[node] == NODE_FAILURES:
            log.warning("%s: %d trials failed on it in a row", node, NODE_FAILURES)
            self.launcher.set_aside(node)
        if len(self.failed) >= self.config.max_failures:
            reasons = "; ".join(dict.fromkeys(self.failed))
            raise InputError(f"max_failures={self.config.max_failures} trials failed in a row: {reasons}")

    # Going on after an earlier process

    def _resume(self) -> None:
        """Finish what ended meanwhile, watch what still runs, queue again what was interrupted."""
        self._judge(anew=True)
        for name, result in self.results.items():
            if result.complete and not result.duplicate_of and self.config.duplicates is Duplicates.lookup:
                self.lookup.add(name, result.params)
        for pending in self._begun():
            self._take_up(pending)
        references = [PendingTrial(name, params, None) for name, params in self.references.items()]
        self.wanted = self._not_begun([one for one in references if not self.record.has_reference(one.name)])

    def _not_begun(self, pending: Iterable[PendingTrial]) -> list[PendingTrial]:
        """The trials of `pending` that no earlier process has begun, or that are lost."""
        return [one for one in pending if not self._take_up(one)]

    def _begun(self) -> Iterator[PendingTrial]:
        """Yield the trials that Optuna has asked for and was not told of."""
        for trial in self.record.trials:
            if trial.state is TrialState.RUNNING:
                again = self.record.reopen(trial.number)
                yield PendingTrial(f"{TRIAL}{trial.number}", dict(trial.params), again)

    def _take_up(self, pending: PendingTrial) -> bool:
        """Watch or finish a trial of an earlier process; False if it is lost."""
        job = self.launcher.attach(self.folder / pending.name)
        if not job:
            return self._settle(pending)
        log.info("%s still runs; watching it again", pending.name)
        self.running.append(Running(self._claimed(pending), job, progress.Reader(self.folder / pending.name)))
        return True

    def _settle(self, pending: PendingTrial) -> bool:
        """Finish a trial that nothing runs any more if it has completed, or queue it again; True if it has.

        It is queued once, and counts for nothing as it is.
        """
        result = result_in(self.folder / pending.name)
        if result and result.complete:
            self._finish(pending, result)
            return True
        if pending.trial:
            self.record.queue_again(pending.trial.number)
        if pending.trial and pending.params:  # without any it was interrupted while the sampler chose them
            result = result or Result(reason="the process that ran it ended")
            result.state, result.params = State.interrupted, pending.params
            result.save(self.folder / pending.name)
            log.info("%s was interrupted; queued again", pending.name)
        return False

    def _abandon(self) -> None:
        """Keep what has completed of the trials that ran, queue the rest again; a cluster's jobs end a little later."""
        deadline = time.monotonic() + ENDING_S
        left = {one.pending.name: one.job for one in self.running}
        while left and time.monotonic() < deadline:
            left = {name: job for name, job in left.items() if not job.done()}
            for job in left.values():
                job.wait(POLL_S)
        for pending in self._begun():
            if pending.name not in left:
                self._settle(pending)


def counted_s(results: Iterable[Result]) -> float:
    """Engine seconds of `results` that a budget counts: all but the first start, which compiles for those after it."""
    ran = sorted((result for result in results if result.phases), key=lambda result: result.started_at)
    return sum(result.engine_s for result in ran) - sum(result.phases.get("start", 0.0) for result in ran[:1])
