"""The objective: its values, constraints, direction and gain."""

from collections.abc import Iterable, Mapping, Sequence

from autotune.config.schema import Config, Kind, ObjectiveConfig, ScenarioConfig
from autotune.errors import InputError
from autotune.measure.limits import LatencyLimit
from autotune.measure.result import Result

# The metric of a trial's highest load, by kind of load.
LOADED = {Kind.Server: "max_qps", Kind.ClosedLoop: "max_concurrency", Kind.Trace: "max_scale"}
OFFERED_BY = {"max_qps": "load=rate", "max_concurrency": "load=concurrency", "max_scale": "scenario=trace"}
HIGHEST = frozenset(LOADED.values())


def check(objective: ObjectiveConfig) -> None:
    """Raise InputError unless there are metrics, each of them once and with its direction."""
    if not objective.metrics or len(set(objective.metrics)) < len(objective.metrics):
        raise InputError(f"objective.metrics=[{','.join(objective.metrics)}]: write one metric or more, each once")
    wrong = [direction for direction in objective.directions if direction not in ("minimize", "maximize")]
    if wrong:
        raise InputError(f"objective.directions: {wrong[0]} is neither minimize nor maximize")
    if len(objective.metrics) != len(objective.directions):
        raise InputError(
            f"objective: {len(objective.metrics)} metrics and {len(objective.directions)} directions; "
            f"write one of objective.directions for each of objective.metrics"
        )


def searches(objective: ObjectiveConfig) -> bool:
    """True if each trial searches for its highest load."""
    return not HIGHEST.isdisjoint(objective.metrics)


def highest(metrics: Mapping[str, float]) -> float | None:
    """The highest load that a trial with these metrics has found, in queries/s or users; None without a search."""
    return next((metrics[name] for name in HIGHEST & metrics.keys()), None)


def offered_load(objective: ObjectiveConfig, scenario: ScenarioConfig) -> str:
    """The load on a server, in words; empty if the scenario's name says it all."""
    if searches(objective):
        return "the highest load within the limits"
    return f"{scenario.load:g} {scenario.load_unit}" if scenario.kind in LOADED else ""


def way_out(config: Config) -> str:
    """Words on what to change where nothing holds the limits."""
    found = "" if searches(config.objective) else LOADED.get(config.scenario.kind, "")
    search = f", or find the load that holds them: objective={found}" if found else ""
    return f"loosen the limits, lower the load or widen the space{search}"


def values(objective: ObjectiveConfig, metrics: Mapping[str, float]) -> list[float]:
    """The metrics that the sampler optimizes. Raises InputError for a name that `metrics` lacks."""
    missing = [name for name in objective.metrics if name not in metrics]
    if missing:
        raise InputError(f"objective.metrics: no metric {missing[0]}; a trial has {', '.join(sorted(metrics))}")
    return [metrics[name] for name in objective.metrics]


def penalised(objective: ObjectiveConfig, values: Sequence[float], broken: Mapping[str, float]) -> list[float]:
    """`values` made worse where limits are broken, for a sampler without constraints (CMA-ES).

    A throughput is divided by 1 + the sum of the shares over a limit, a latency multiplied by it.
    """
    factor = 1 + excess(broken)
    pairs = zip(values, objective.directions, strict=True)
    return [value / factor if direction == "maximize" else value * factor for value, direction in pairs]


def excess(constraints: Mapping[str, float]) -> float:
    """The shares by which limits are broken, summed."""
    return sum(max(0.0, over) for over in constraints.values())


def sign(objective: ObjectiveConfig, metric: int = 0) -> int:
    """1 if a higher value of the objective's metric with this index is better, else -1."""
    return 1 if objective.directions[metric] == "maximize" else -1


def gain(objective: ObjectiveConfig, value: float, baseline: float, metric: int = 0) -> float | None:
    """The share of `baseline` by which `value` is better; None if `baseline` is 0."""
    return sign(objective, metric) * (value / baseline - 1) if baseline else None


def values_for_sampler(sampler: object, objective: ObjectiveConfig, result: Result) -> list[float]:
    """The values of `result`, penalised if `sampler` takes no constraints."""
    if type(sampler).__name__ == "CmaEsSampler":
        return penalised(objective, result.values, result.constraints)
    return result.values


def constraints(limits: Iterable[LatencyLimit], metrics: Mapping[str, float], failed: int) -> dict[str, float]:
    """Optuna's constraints: a trial is feasible if all are at most 0.

    A limit's constraint is how far p99 exceeds it, as a share of it; where there are enough requests, p99's upper bound
    in LoadGen's test is taken instead. A single one of `failed` requests makes a trial infeasible.
    """
    over = {f"{limit.name}_p99": metrics[f"{limit.name}_limit_share"] - 1 for limit in limits}
    return {"failed_requests": float(failed), **over}
