"""Measurement → objective values and constraints."""

from collections.abc import Mapping, Sequence

from autotune.config.schema import Kind, ObjectiveConfig, ScenarioConfig
from autotune.errors import InputError
from autotune.measure.result import Result


def check(objective: ObjectiveConfig) -> None:
    """Raise InputError unless each metric has its direction."""
    wrong = [direction for direction in objective.directions if direction not in ("minimize", "maximize")]
    if wrong:
        raise InputError(f"objective.directions: {wrong[0]} is neither minimize nor maximize")
    if len(objective.metrics) != len(objective.directions):
        raise InputError(
            f"objective: {len(objective.metrics)} metrics and {len(objective.directions)} directions; "
            f"write one of objective.directions for each of objective.metrics"
        )


def searches(objective: ObjectiveConfig) -> bool:
    """Whether a trial looks for its highest load itself."""
    return "max_qps" in objective.metrics


def offered_load(objective: ObjectiveConfig, scenario: ScenarioConfig) -> str:
    """What is offered to a server, in words; empty where the scenario's name says it all."""
    if searches(objective):
        return "the highest load within the limits"
    return f"{scenario.qps:g} queries/s" if scenario.kind is Kind.Server else ""


def values(objective: ObjectiveConfig, metrics: Mapping[str, float]) -> list[float]:
    """The metrics that the sampler optimises. Raises InputError for a name that no trial has."""
    missing = [name for name in objective.metrics if name not in metrics]
    if missing:
        raise InputError(f"objective.metrics: no metric {missing[0]}; a trial has {', '.join(sorted(metrics))}")
    return [metrics[name] for name in objective.metrics]


def penalised(objective: ObjectiveConfig, values: Sequence[float], broken: Mapping[str, float]) -> list[float]:
    """`values` made worse by the sum of what is over a limit, for a sampler without constraints (CMA-ES).

    A throughput is divided by 1 + that sum, a latency multiplied with it.
    """
    factor = 1 + sum(max(0.0, over) for over in broken.values())
    pairs = zip(values, objective.directions, strict=True)
    return [value / factor if direction == "maximize" else value * factor for value, direction in pairs]


def sign(objective: ObjectiveConfig, metric: int = 0) -> int:
    """1 where more of the objective's metric with this index is better, else -1."""
    return 1 if objective.directions[metric] == "maximize" else -1


def gain(objective: ObjectiveConfig, value: float, baseline: float, metric: int = 0) -> float | None:
    """The share of `baseline` by which `value` is better than it; None if that is 0."""
    return sign(objective, metric) * (value / baseline - 1) if baseline else None


def values_for_sampler(sampler: object, objective: ObjectiveConfig, result: Result) -> list[float]:
    """The values of `result`, penalised if `sampler` takes no constraints."""
    if type(sampler).__name__ == "CmaEsSampler":
        return penalised(objective, result.values, result.constraints)
    return result.values


def constraints(scenario: ScenarioConfig, metrics: Mapping[str, float], failed: int) -> dict[str, float]:
    """What must be at most 0 for a trial to be feasible (Optuna's convention).

    For a limit: how far p99 is over it, as a share of it; the bound that LoadGen's test goes by where there are enough
    requests for one. `failed` requests allow none.
    """
    found = {"failed_requests": float(failed)}
    for name, limit in (("ttft", scenario.ttft_ms), ("tpot", scenario.tpot_ms)):
        if limit is not None:
            found[f"{name}_p99"] = metrics.get(f"{name}_p99_upper_ms", metrics[f"{name}_p99_ms"]) / limit - 1
    return found
