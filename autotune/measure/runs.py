"""The runs of LoadGen that a trial makes on its server: one, several repeats, or a search for the highest load."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune.config.schema import Answers, Config, Kind, ScenarioConfig, Stop
from autotune.data.samples import Samples
from autotune.errors import BehindError
from autotune.measure import bottleneck, early_stopping, max_qps, metrics, objective, progress, series, traffic
from autotune.measure.backend import Engine, Measurement
from autotune.measure.bottleneck import ServerState
from autotune.measure.limits import limits_of
from autotune.measure.result import Result, RunRecord
from autotune.system.files import write_rows

log = logging.getLogger(__name__)

AT_ONCE = 1e9  # scale of a trace whose requests are all sent at once
ROUNDED = 1 + 1e-6  # a load that the search's steps lead back to
AT_MOST = "load_at_most"  # metric of a trial that was left, as it does not hold the study's best load
CLIENT = "client"  # first word of a reason that says that the load generator itself was too slow


@dataclass(frozen=True)
class RunResult:
    """One run of LoadGen, scored."""

    measured: Measurement
    metrics: dict[str, float]
    constraints: dict[str, float]
    bound: str  # the server's bottleneck, CLIENT, or the limit that a higher load breaks

    def record(self, folder: Path, role: str, load: float) -> RunRecord:
        run = self.measured
        return RunRecord(folder.name, role, load, run.verdict, run.reasons, run.stopped_early, self.metrics)


def one(scenario: ScenarioConfig, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> RunResult:
    """Make one run of `scenario`, and add its seconds to `result`; `flags` are vLLM's, resolved."""
    folder.mkdir(exist_ok=True)
    measured = engine.run(scenario, folder)
    for phase, seconds in measured.phases.items():
        result.phases[phase] = result.phases.get(phase, 0.0) + seconds
    if measured.server:
        write_rows(folder / series.SERVER, ServerState, measured.server)
    held = limits_of(scenario)
    figures = metrics.from_requests(measured.requests, held, measured.total)
    if scenario.answers is not Answers.none:
        figures |= metrics.of_sessions(measured.requests, engine.samples)
        _tell_of_sessions(figures | measured.figures, engine.samples)
    figures |= {**measured.loadgen, **bottleneck.figures(measured.server), **measured.figures}
    figures["failed_requests"] = measured.failed
    if (looked_for := figures.get("prefix_query_tokens", 0)) > 0:
        hits, block = figures["prefix_hit_tokens"], flags.get("block_size") or metrics.BLOCK
        again = metrics.begun_before(measured.requests, engine.samples, block)
        figures["prefix_hit_share"] = hits / looked_for
        figures["prefix_lost_share"] = max(0.0, again - hits) / looked_for
    if any(reason.startswith(CLIENT) for reason in measured.reasons):
        bound = CLIENT
    elif scenario.kind is Kind.SingleStream:
        bound = "arrival"
    else:
        bound = bottleneck.bottleneck(measured.server, flags, figures.get("prefix_lost_share", 0.0))
    constraints = objective.constraints(held, figures, measured.failed)
    if bound == CLIENT:  # LoadGen's INVALID alone does not keep a trial from being the best
        constraints[CLIENT] = 1.0
    return RunResult(measured, figures, constraints, bound)


def _tell_of_sessions(figures: Mapping[str, float], samples: Samples) -> None:
    begun, found = int(figures["sessions"]), int(np.sum(samples.turns == 0))
    if begun > found:
        log.warning("%d conversations, and the data set has %d: some came again, known to vLLM's cache", begun, found)
    if cut := figures.get("sessions_cut"):
        log.warning("%d of %d conversations ended before a turn that does not fit max_model_len", cut, begun)


def repeated(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> RunResult:
    """Make `scenario.repeats` runs, each with the next seed.

    Returns the last one, with the means of the metrics, the worst constraints and the verdict of one that is INVALID.
    """
    scenario, done = config.scenario, []
    for number in range(scenario.repeats):
        run_folder = folder / f"run-{number + 1}"
        done.append(one(replace(scenario, seed=scenario.seed + number), engine, flags, run_folder, result))
        result.runs.append(done[-1].record(run_folder, "repeat", scenario.load))
    means = {}
    for name in done[-1].metrics:
        values = [run.metrics[name] for run in done if name in run.metrics]
        means[name], interval = metrics.mean_and_interval(values)
        if interval:
            result.intervals[name] = interval
    names = {name for run in done for name in run.constraints}
    worst = {name: max(run.constraints.get(name, 0.0) for run in done) for name in sorted(names)}
    judged = [run for run in done if run.measured.verdict != "VALID"] or done
    return replace(done[-1], measured=judged[-1].measured, metrics=means, constraints=worst)


def highest_load(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> RunResult:
    """Search for the highest load that keeps the limits.

    Returns the run that certifies it, with `max_qps` and `failing_qps` among its metrics, or `max_concurrency` and
    `failing_concurrency`. If no load keeps them, it returns the run at the lowest load that was tried, with a highest
    load of 0. A search that begins with a burst adds the burst's p99 TPOT: that of a request which generates while
    others queue. Raises BehindError for a trial that does not hold the best load of its study.
    """
    scenario, settings = config.scenario, config.scenario.search
    name = objective.LOADED[scenario.kind]
    recorded = traffic.window(scenario.with_load(1.0), engine.samples)[0] if scenario.kind is Kind.Trace else None
    done: dict[float, RunResult] = {}  # by load

    def run(role: str, load: ScenarioConfig) -> RunResult:
        run_folder = folder / f"run-{len(result.runs) + 1}"
        progress.phase(folder, role if role == "burst" else f"{role} {load.load:.4g} {load.load_unit}")
        ended = one(load, engine, flags, run_folder, result)
        result.runs.append(ended.record(run_folder, role, load.load))
        return ended

    def keeps_limits(offered: float, seconds: float, full: bool) -> bool:
        load = certifying(scenario, offered)
        if not full:  # the share of queries that may exceed a limit is that of the certifying run
            queries = (not load.by_loadgen and traffic.source(load, engine.samples).total) or traffic.planned(load)
            share = early_stopping.allowed(queries) / queries
            load = replace(load, stop=Stop.decided, over_share=share, **shortened(load, seconds))
        ended = run("certify" if full else "probe", load)
        if full or offered not in done:
            done[offered] = ended
        valid = ended.measured.verdict == "VALID"
        if not valid:
            progress.publish(folder, len(result.runs), {progress.FAILING: offered})
            if settings.best and offered <= settings.best * ROUNDED and (full or len(result.runs) == 1):
                raise behind(ended, load, result)
        return valid

    most, queued = 0.0, {}
    if settings.best:
        most = settings.best / max_qps.START
    elif settings.start_qps is None:
        queueing = run("burst", burst(scenario)).metrics
        most, queued = most_of(scenario, queueing, recorded), {"queued_tpot_p99_ms": queueing["tpot_p99_ms"]}
    full_s = scenario.min_duration_s if recorded is None else float(recorded[-1])
    highest = max_qps.search(keeps_limits, most, full_s, settings, whole=scenario.kind is Kind.ClosedLoop)
    best = done[min(done) if highest.certified is None else highest.certified]
    best.metrics.update({**queued, name: highest.certified or 0.0})
    if highest.failing is None:
        return best
    best.metrics[name.replace("max", "failing")] = highest.failing
    return replace(best, bound=broken_limit(done[highest.failing]))


def most_of(scenario: ScenarioConfig, queueing: Mapping[str, float], recorded: traffic.Floats | None) -> float:
    """Roughly the most that a server can take which served a burst with these figures; `recorded`: times of a trace."""
    rate = queueing["samples_per_s"]
    if scenario.kind is Kind.ClosedLoop:  # Little's law
        return rate * (longest_s(scenario, queueing) + scenario.think_s)
    if scenario.answers is not Answers.none:
        return queueing["sessions_per_s"]
    return rate if recorded is None else rate * float(recorded[-1]) / len(recorded)


def longest_s(scenario: ScenarioConfig, queueing: Mapping[str, float]) -> float:
    """About the longest latency that the limits allow; what they leave open is that of a burst with these figures."""
    allowed = {limit.name: limit.loosest for limit in limits_of(scenario)}
    ttft, tpot = (allowed.get(name, queueing[f"{name}_mean_ms"] / 1e3) for name in ("ttft", "tpot"))
    tokens = queueing["output_tokens"] / queueing["requests"]
    return min(allowed.get("latency", math.inf), ttft + tpot * tokens, queueing["latency_p99_ms"] / 1e3)


def behind(run: RunResult, scenario: ScenarioConfig, result: Result) -> BehindError:
    """Say that the study's best load is more than a trial holds, as `run` shows, and fill its `result`."""
    over = max(run.constraints.values())
    # An estimate, so that a sampler can tell the trials which do not hold it apart.
    result.metrics = {progress.FAILING: scenario.load, AT_MOST: scenario.load / (1 + max(0.0, over))}
    return BehindError(f"does not hold {scenario.search.best:.4g} {scenario.load_unit}, the best load so far")


def broken_limit(run: RunResult) -> str:
    """The limit that `run` exceeds by most: ttft, tpot or latency; CLIENT if its client was too slow."""
    over = {name.removesuffix("_p99"): share for name, share in run.constraints.items() if name.endswith("_p99")}
    return CLIENT if run.bound == CLIENT else max(over, key=lambda name: over[name])


def burst(scenario: ScenarioConfig) -> ScenarioConfig:
    count = scenario.search.burst
    if scenario.kind is Kind.Trace:
        return replace(scenario, scale=AT_ONCE, max_queries=min(count, scenario.max_queries or count))
    changed = replace(scenario, kind=Kind.Offline, min_queries=count, min_duration_s=0.0, qps=1.0)
    return replace(changed, equal_issue=False)


def shortened(scenario: ScenarioConfig, seconds: float) -> dict[str, Any]:
    """The fields of a run of `scenario` that takes so many seconds."""
    if scenario.kind is Kind.Trace:
        return {"max_duration_s": min(seconds, scenario.max_duration_s or seconds)}
    return {"min_duration_s": seconds, "min_queries": 1, "equal_issue": False}


def certifying(scenario: ScenarioConfig, load: float) -> ScenarioConfig:
    """A run at `load` that shows whether the limits hold: of a trace, all of its window."""
    if scenario.kind is Kind.Trace:
        return scenario.with_load(load)
    return replace(scenario.with_load(load), min_queries=max(scenario.min_queries, scenario.search.certify_queries))


def whole(scenario: ScenarioConfig, result: Result) -> list[tuple[str, ScenarioConfig, dict[str, float]]]:
    """Name, scenario and metrics of each run of `result` that went to its end under `scenario`'s own rules."""
    if not result.runs:
        return [("", scenario, result.metrics)]
    complete = []
    for number, run in enumerate(result.runs):
        if not run.stopped_early:
            if run.role == "burst":
                complete.append((run.role, burst(scenario), run.metrics))
            elif run.role == "certify":
                name = f"{run.role} {run.qps:.4g} {scenario.load_unit}"
                complete.append((name, certifying(scenario, run.qps), run.metrics))
            elif run.role == "repeat":
                seeded = replace(scenario, seed=scenario.seed + number)
                complete.append((f"{run.role} {number + 1}", seeded, run.metrics))
    return complete
