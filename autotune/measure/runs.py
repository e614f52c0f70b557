"""The LoadGen runs of one trial on its server: one, several repeats, or a search for the highest load."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.config.schema import Config, Kind, ScenarioConfig, Stop
from autotune.errors import InputError
from autotune.measure import bottleneck, early_stopping, max_qps, metrics, objective, progress
from autotune.measure.backend import Engine, Measurement
from autotune.measure.result import LoadRun, Result

CLIENT = "client"  # what a reason begins with where the load generator itself was too slow


@dataclass(frozen=True)
class Run:
    """One run and what it comes to."""

    measured: Measurement
    metrics: dict[str, float]
    constraints: dict[str, float]
    bound: str  # what kept the server from more: bottleneck.bottleneck, or the limit that a higher load breaks

    def summary(self, folder: Path, role: str, qps: float) -> LoadRun:
        measured = self.measured
        return LoadRun(folder.name, role, qps, measured.verdict, measured.reasons, measured.stopped_early, self.metrics)


def one(scenario: ScenarioConfig, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> Run:
    """A run of `scenario`, whose seconds are added to `result`; `flags` are vLLM's, resolved."""
    folder.mkdir(exist_ok=True)
    measured = engine.run(scenario, folder)
    for phase, seconds in measured.phases.items():
        result.phases[phase] = result.phases.get(phase, 0.0) + seconds
    if measured.server:
        bottleneck.write(measured.server, folder)
    found = metrics.from_requests(measured.requests, scenario.limits_s(), measured.total)
    found |= {**measured.loadgen, **bottleneck.figures(measured.server), **measured.figures}
    found["failed_requests"] = measured.failed
    if any(reason.startswith(CLIENT) for reason in measured.reasons):
        bound = CLIENT
    elif scenario.kind is Kind.SingleStream:
        bound = "arrival"
    else:
        bound = bottleneck.bottleneck(measured.server, flags)
    broken = objective.constraints(scenario, found, measured.failed)
    if bound == CLIENT:  # LoadGen's INVALID alone does not keep a trial from being the best
        broken[CLIENT] = 1.0
    return Run(measured, found, broken, bound)


def repeated(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> Run:
    """`scenario.repeats` runs, each with the next seed: the last one, with means for metrics, the worst constraints."""
    scenario, done = config.scenario, []
    for number in range(scenario.repeats):
        below = folder / f"run-{number + 1}"
        done.append(one(replace(scenario, seed=scenario.seed + number), engine, flags, below, result))
        result.runs.append(done[-1].summary(below, "repeat", scenario.qps))
    means = {}
    for name in done[-1].metrics:
        values = [run.metrics[name] for run in done if name in run.metrics]
        means[name], interval = metrics.mean_and_interval(values)
        if interval:
            result.intervals[name] = interval
    broken = {name for run in done for name in run.constraints}
    worst = {name: max(run.constraints.get(name, 0.0) for run in done) for name in sorted(broken)}
    valid = [run for run in done if run.measured.verdict != "VALID"] or done
    return replace(done[-1], measured=valid[-1].measured, metrics=means, constraints=worst)


def check(config: Config) -> None:
    """Raise InputError for a search of the highest load that could find none."""
    scenario, settings = config.scenario, config.scenario.search
    if not objective.searches(config.objective):
        return
    if scenario.kind is not Kind.Server or not any(scenario.limits_s()):
        raise InputError(
            f"objective.metrics: max_qps is the highest load under limits, and scenario={scenario.name} has no "
            f"{'limits' if scenario.kind is Kind.Server else 'arrival rate'}; write scenario=interactive or server"
        )
    fewest = early_stopping.queries_needed(0)
    if settings.certify_queries < fewest:
        raise InputError(
            f"scenario.search.certify_queries={settings.certify_queries}: LoadGen's test passes no run of so few "
            f"queries; write {fewest} or more"
        )
    if settings.start_qps is not None and settings.start_qps <= 0:
        raise InputError(f"scenario.search.start_qps={settings.start_qps:g}: write queries/s, or null to find out")


def highest_load(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> Run:
    """The certified run at the highest load that holds the limits, with `max_qps` and `failing_qps` in its metrics.

    Where no load does, the run at the lowest one that was tried, with `max_qps` 0. A search that begins with a burst
    adds its p99 TPOT, that of a request which generates while others queue.
    """
    scenario, settings = config.scenario, config.scenario.search
    done: dict[float, Run] = {}

    def run(role: str, asked: ScenarioConfig) -> Run:
        below = folder / f"run-{len(result.runs) + 1}"
        progress.phase(folder, f"{role} {asked.qps:.4g} qps" if asked.kind is Kind.Server else role)
        found = one(asked, engine, flags, below, result)
        result.runs.append(found.summary(below, role, asked.qps))
        return found

    def holds(qps: float, seconds: float, full: bool) -> bool:
        asked = certifying(scenario, qps)
        if not full:  # as large a share may be over a limit as in the run that certifies
            queries = max(asked.min_queries, int(qps * asked.min_duration_s))
            share = early_stopping.allowed(queries) / queries
            asked = replace(asked, min_duration_s=seconds, min_queries=1, stop=Stop.decided, over_share=share)
        found = run("certify" if full else "probe", asked)
        if full or qps not in done:
            done[qps] = found
        held = found.measured.verdict == "VALID"
        if not held:
            progress.publish(folder, len(result.runs), {progress.FAILING: qps})
        return held

    burst_qps, queued = 0.0, {}
    if settings.start_qps is None:
        crowd = run("burst", burst(scenario)).metrics
        burst_qps, queued = crowd["samples_per_s"], {"queued_tpot_p99_ms": crowd["tpot_p99_ms"]}
    found = max_qps.search(holds, burst_qps, scenario.min_duration_s, settings)
    best = done[min(done) if found.certified is None else found.certified]
    best.metrics.update(queued, max_qps=found.certified or 0.0)
    if found.failing is None:
        return best
    best.metrics["failing_qps"] = found.failing
    return replace(best, bound=broken_limit(done[found.failing]))


def broken_limit(run: Run) -> str:
    """The limit that `run` is over by most, ttft or tpot; or that its client was too slow."""
    over = {name.removesuffix("_p99"): share for name, share in run.constraints.items() if name.endswith("_p99")}
    return CLIENT if run.bound == CLIENT else max(over, key=lambda name: over[name])


def burst(scenario: ScenarioConfig) -> ScenarioConfig:
    return replace(scenario, kind=Kind.Offline, min_queries=scenario.search.burst, min_duration_s=0.0, qps=1.0)


def certifying(scenario: ScenarioConfig, qps: float) -> ScenarioConfig:
    return replace(scenario, qps=qps, min_queries=max(scenario.min_queries, scenario.search.certify_queries))


def whole(scenario: ScenarioConfig, result: Result) -> list[tuple[str, ScenarioConfig, dict[str, float]]]:
    """Name, scenario and metrics of each run of `result` that went to its end as `scenario` says."""
    if not result.runs:
        return [("", scenario, result.metrics)]
    found = []
    for number, run in enumerate(result.runs):
        if not run.stopped_early:
            if run.role == "burst":
                found.append((run.role, burst(scenario), run.metrics))
            elif run.role == "certify":
                found.append((f"{run.role} {run.qps:.4g} qps", certifying(scenario, run.qps), run.metrics))
            elif run.role == "repeat":
                found.append((f"{run.role} {number + 1}", replace(scenario, seed=scenario.seed + number), run.metrics))
    return found
