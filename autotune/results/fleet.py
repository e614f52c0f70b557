"""The question after which configuration: how many GPUs serve a load within the limits, and at what price."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autotune.config.schema import Config, Kind
from autotune.config.vllm_flags import FLAG, PARALLEL, gpus
from autotune.measure import metrics, objective
from autotune.measure.result import Result
from autotune.text import aligned, rounded, shorten

WORDS = {"tensor_parallel_size": "TP", "pipeline_parallel_size": "PP", "data_parallel_size": "DP"}
COST = next(iter(metrics.PER_MILLION))


@dataclass(frozen=True)
class Fleet:
    """Servers of one configuration that carry a load together."""

    name: str  # of the trial
    parallelism: str
    each: float  # load that one server holds, queries/s or users
    servers: int
    gpus: int
    per_hour: float | None  # price of all
    per_million: float | None  # output tokens
    params: dict[str, Any]  # of the trial, without those of its parallelism


def holds(result: Result, config: Config) -> float:
    """The load that a server holds within the limits, as far as its trial shows, in the unit of the scenario's load."""
    searched = objective.highest(result.metrics)
    if searched is not None:
        return searched
    scenario = config.scenario
    if scenario.kind in (Kind.ClosedLoop, Kind.Trace):
        swept = result.params.get(f"scenario.{scenario.load_field}")
        return float(swept) if isinstance(swept, (int, float)) else scenario.load
    return result.metrics.get("sessions_per_s", result.metrics.get("samples_per_s", 0.0))


def cost(result: Result, per_gpu_hour: float) -> float | None:
    """The cost of a million output tokens."""
    return metrics.per_million(result.metrics, gpus(result.args), per_gpu_hour).get(COST)


def fleets(results: Iterable[tuple[str, Result]], config: Config, load: float) -> list[Fleet]:
    """Fleets that carry `load`: the feasible trial of each parallelism that takes the fewest GPUs, the cheapest first.

    Load is spread evenly, and a server's share is what it held in its trial.
    """
    best: dict[str, Fleet] = {}
    for name, result in results:
        if result.feasible and (each := holds(result, config)) > 0:
            servers = math.ceil(load / each)
            count = servers * gpus(result.args)
            per_gpu_hour = config.price_per_gpu_hour
            per_hour = count * per_gpu_hour if per_gpu_hour else None
            per_million = cost(result, per_gpu_hour) if per_gpu_hour else None
            words = parallelism(result.args)
            others = {key: value for key, value in result.params.items() if key.removeprefix(FLAG) not in WORDS}
            one = Fleet(name, words, each, servers, count, per_hour, per_million, others)
            if words not in best or (one.gpus, -one.each) < (best[words].gpus, -best[words].each):
                best[words] = one
    return sorted(best.values(), key=lambda fleet: (fleet.gpus, -fleet.each))


def parallelism(args: dict[str, Any]) -> str:
    """The parallelism of a server with vLLM's flags `args`: `TP 2, DP 4`."""
    sizes = {WORDS[flag]: int(args.get(flag) or 1) for flag in PARALLEL}
    return ", ".join(f"{word} {size}" for word, size in sizes.items() if size > 1) or "one GPU"


def rows(found: list[Fleet], unit: str) -> list[list[str]]:
    """A table of `found`, its headings first."""
    priced = any(fleet.per_hour is not None for fleet in found)
    costs = ["cost per hour", "per million tokens out"] if priced else []
    table = [["GPUs", "servers", "parallelism", f"{unit} each", *costs, "trial", "configuration"]]
    for fleet in found:
        prices = [f"{fleet.per_hour:,.2f}", f"{fleet.per_million:,.3f}" if fleet.per_million else ""] if priced else []
        cells = [str(fleet.gpus), str(fleet.servers), fleet.parallelism, rounded(fleet.each), *prices]
        table.append([*cells, fleet.name, shorten(fleet.params) or "vLLM's defaults"])
    return table


def render(found: list[Fleet], config: Config, load: float) -> list[str]:
    """Lines on what carries `load`, for a terminal."""
    unit = config.scenario.load_unit
    if not found:
        return [f"Nothing that was tried serves {load:g} {unit} within the limits."]
    return [f"{caption(config, load)}:", *(f"  {line}" for line in aligned(rows(found, unit), left=True))]


def caption(config: Config, load: float) -> str:
    """Words on the table, and on how far it can be relied on."""
    words = f"To serve {load:g} {config.scenario.load_unit} within the limits"
    if objective.searches(config.objective):
        return words
    return f"{words}, at least (a server was tried at one load; objective=max_qps finds the most that it holds)"
