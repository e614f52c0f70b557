"""The sections of a study's page: its figures, and what to see in them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import TrialState

from autotune.config.schema import Config
from autotune.measure.limits import heading
from autotune.measure.metrics import MOST_TURNS
from autotune.measure.objective import sign
from autotune.measure.result import Result
from autotune.results import figures, fleet
from autotune.results.figures import label
from autotune.results.study import REFERENCES, TWIN, Study
from autotune.system.files import left_in
from autotune.text import count, rounded

SLICES = 8  # parameters that are drawn one by one, the most important first
# The bottlenecks that a result's `bound` names.
BOUNDS = {
    "kv": "the KV cache was full",
    "cache": "prompts' beginnings were computed again, as the KV cache had no room to keep them",
    "sequences": "max_num_seqs requests were running",
    "tokens": "each step was full of tokens",
    "queue": "requests waited",
    "arrival": "nothing, the server kept up with the load that was offered",
    "client": "the load generator",
    "ttft": "a higher load breaks the limit on TTFT",
    "tpot": "a higher load breaks the limit on TPOT",
    "latency": "a higher load breaks the limit on latency",
}


@dataclass
class Section:
    title: str
    text: str = ""
    draws: InitVar[Sequence[Callable[[], go.Figure]]] = ()
    small: bool = False  # plots that are read side by side
    rows: list[list[str]] = field(default_factory=list)  # of a table, its headings first
    plots: list[go.Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # reasons why a plot is not here

    def __post_init__(self, draws: Sequence[Callable[[], go.Figure]]) -> None:
        for draw in draws:
            made = figures.drawn(draw)
            if isinstance(made, go.Figure):
                self.plots.append(made)
            elif made not in self.missing:
                self.missing.append(made)


def sections(study: Study) -> list[Section]:
    objective, limits = study.config.objective, figures.latency_limits(study.config.scenario)
    directions = zip(objective.metrics, objective.directions, strict=True)
    alone = {metric: figures.optuna_study(study, [metric], [direction]) for metric, direction in directions}
    importance, ranked = importances(alone)
    return [
        history(alone, {name: study.results[name] for name in REFERENCES if name in study.results}),
        importance,
        slices(alone, ranked),
        front(study, limits),
        load(study, limits),
        *turns(study),
        *costs(study),
        bounds(study),
        *caching(study),
        *expectations(study),
        *steps(study),
        phases(study),
    ]


def history(alone: Mapping[str, optuna.Study], references: Mapping[str, Result]) -> Section:
    """`alone` has the study as it is in each of the objective's metrics, here and below."""
    draws = [partial(figures.history, study, metric, references) for metric, study in alone.items()]
    text = "Grey trials broke a limit, or were left at a load that they do not hold."
    return Section("Optimization history", text, draws)


def importances(alone: Mapping[str, optuna.Study]) -> tuple[Section, dict[str, list[str]]]:
    """The section, and the parameters by metric, the most important first."""
    draws, missing, ranked = [], [], {}
    for metric, study in alone.items():
        of = label(metric) if len(alone) > 1 else ""
        found = figures.drawn(partial(figures.importances, study))
        shares = {} if isinstance(found, str) else found
        if isinstance(found, str):
            missing.append(f"{of}: {found}" if of else found)
        draws += [partial(figures.importance, f"{name} of {of}" if of else name, one) for name, one in shares.items()]
        complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        params = dict.fromkeys(name for trial in complete for name in trial.params)
        ranked[metric] = list(shares.popitem()[1] if shares else params)
    text = (
        "fANOVA: how much of the variation over all trials a parameter explains. PED-ANOVA: how much it tells the best "
        "tenth of the trials from the others. Both say little after a few trials."
    )
    return Section("Parameter importance", text, draws, missing=missing), ranked


def slices(alone: Mapping[str, optuna.Study], ranked: Mapping[str, Sequence[str]]) -> Section:
    text = (
        "Darker dots came first; crosses broke a limit or were left early. optuna-dashboard draws contours and "
        "parallel coordinates."
    )
    shown = [(metric, param) for metric in alone for param in ranked[metric][:SLICES]]
    draws = [partial(figures.slice_of, alone[metric], param, metric) for metric, param in shown]
    missing = [] if all(ranked.values()) else ["no parameter was varied in a trial that completed"]
    return Section("One parameter at a time", text, draws, small=True, missing=missing)


def front(study: Study, limits: Mapping[str, float]) -> Section:
    metrics, directions = study.objective.metrics, study.objective.directions
    title = "Pareto front"
    if len(metrics) == 1:
        title = "Throughput against latency"
        metrics, directions = trade_off(study.config)

    def draw() -> go.Figure:
        return figures.front(figures.optuna_study(study, metrics, directions), metrics, limits)

    return Section(title, "Hover to see the whole configuration.", [draw])


def load(study: Study, limits: Mapping[str, float]) -> Section:
    """Latency over the offered load, of the best trials that ran at several loads, or of a study that swept it."""
    scenario, trials = study.config.scenario, by_value(study)
    key, unit = f"scenario.{scenario.load_field}", scenario.load_unit
    several = {name: result for name, result in trials if len({run.qps for run in result.runs}) > 1}
    swept = {name: result for name, result in trials if key in result.params}
    metrics = {metric: limits.get(metric) for metric in limits or ("ttft_p99_ms", "tpot_p99_ms")}
    draws: list[Callable[[], go.Figure]] = []
    if several:
        best = [name for name in several if name not in REFERENCES][: figures.CURVES]
        shown = {name: several[name] for name in (*REFERENCES, *best) if name in several}
        draws = [partial(figures.load_curve, shown, metric, limit, unit) for metric, limit in metrics.items()]
    elif swept:
        draws = [partial(figures.load_points, swept, key, metric, limit, unit) for metric, limit in metrics.items()]
    missing = [] if draws else ["every trial ran at one load (space=load sweeps it)"]
    return Section("Latency over load", f"Hollow marks: {scenario.verdict_by} said INVALID.", draws, missing=missing)


def turns(study: Study) -> list[Section]:
    """The section on the latencies of conversations' turns; none where there are no conversations."""
    names = ("ttft", "tpot", "latency")
    rows = []
    for turn in range(1, MOST_TURNS + 1):
        for name in (*REFERENCES, study.best):
            found = study.complete[name].metrics if name in study.complete else {}
            values = [found[key] for one in names if (key := f"turn{turn}_{one}_p99_ms") in found]
            if name and values:
                rows.append([str(turn), name, *map(rounded, values)])
    text = f"p99, ms. Turn {MOST_TURNS} stands for all later ones, too."
    return [Section("Latency by turn", text, rows=[["turn", "", *map(heading, names)], *rows])] if rows else []


def costs(study: Study) -> list[Section]:
    """The section on costs, and on the GPUs that serve `target_load`; none where neither was asked for."""
    config, wanted, priced = study.config, study.config.target_load, study.config.price_per_gpu_hour
    text = f"At {priced:g} for a GPU's hour. " if priced else ""
    rows, missing, draws = [], [], []
    if wanted:
        unit = config.scenario.load_unit
        found = fleet.fleets(study.complete.items(), config, wanted)
        if found:
            text += f"{fleet.caption(config, wanted)}. "
            rows = fleet.rows(found, unit)
        else:
            missing = fleet.render(found, config, wanted)
        draws.append(partial(figures.fleets, found, unit))
    if priced:
        text += "A million tokens out pay for the whole server, the prompts included."
        draws.append(partial(figures.costs, study.complete, priced))
    return [Section("GPUs and cost", text, draws, rows=rows, missing=missing)] if draws else []


def by_value(study: Study) -> list[tuple[str, Result]]:
    """The trials that completed, the feasible ones first, each kind from the best value to the worst."""
    more, measured = sign(study.objective), {name: one for name, one in study.complete.items() if not one.duplicate_of}
    return sorted(measured.items(), key=lambda item: (not item[1].feasible, -more * item[1].values[0]))


def trade_off(config: Config) -> tuple[list[str], list[str]]:
    """Metrics and directions of the front of a study with one objective: that one, and a latency with a limit."""
    metric, direction = config.objective.metrics[0], config.objective.directions[0]
    if metric.endswith("_ms"):
        return [metric, "tokens_per_s"], [direction, "maximize"]
    limited = list(figures.latency_limits(config.scenario))
    return [metric, limited[-1] if limited else "latency_p99_ms"], [direction, "minimize"]


def bounds(study: Study) -> Section:
    seen = {result.bound for result in study.results.values() if result.bound}
    text = f"What limited it. {'; '.join(f'{kind}: {BOUNDS.get(kind, kind)}' for kind in sorted(seen))}."
    draw = partial(figures.bounds, dict(by_value(study)), study.objective.metrics[0])
    return Section("Bottleneck of each trial", text, [draw])


def caching(study: Study) -> list[Section]:
    """The section on what the prefix cache held; none where no trial found anything there."""
    if not any(result.metrics.get("prefix_hit_share") for result in study.complete.values()):
        return []
    text = (
        "The share of the prompt tokens that were in the KV cache. Crosses: a tenth of them or more had been "
        "there, were evicted, and were computed again."
    )
    return [Section("Prefix cache", text, [partial(figures.caching, study.complete)])]


def expectations(study: Study) -> list[Section]:
    """The section on what was expected of trials and of their steps, and what came; none where nothing was expected."""
    twin = left_in(study.folder / TWIN)
    pairs = {name: result for name, result in study.swept.items() if result.complete and result.expected.get("values")}
    metrics = study.objective.metrics if pairs else []
    text = "".join(f"{label(metric)}: {agreement(list(pairs.values()), at)} " for at, metric in enumerate(metrics))
    draws = [partial(figures.expectations, pairs, metric, at) for at, metric in enumerate(metrics)]
    if errors := twin.get("errors"):
        fitted_to, device = next(iter(errors)), twin["device"]
        named = twin["device_of"] or f"none is named, so {device} by default; write prior=sim with the right one"
        text += f"The twin of the server is fitted to the steps of {fitted_to}, and begins with the constants of "
        text += f"{device} ({named})."
        draws.append(partial(figures.step_errors, errors, fitted_to))
    return [Section("Expected and measured", text, draws)] if draws else []


def agreement(results: Sequence[Result], at: int) -> str:
    """Words on how well the objective's metric `at` was foreseen: the error, and whether the order is right."""
    from scipy.stats import kendalltau  # takes half a second

    expected, measured = (
        [values[at] for values in found]
        for found in ([result.expected["values"] for result in results], [result.values for result in results])
    )
    off = [abs(one / other - 1) for one, other in zip(measured, expected, strict=True) if other]
    words = count(len(results), "trial")
    words += f", off by {median(off):.1%} (median)" if off else ""
    tau = float(kendalltau(expected, measured).statistic) if len(results) > 2 else math.nan
    if math.isnan(tau):
        return f"{words}; too few, or all alike, to tell whether their order was foreseen."
    return f"{words}; Kendall's τ {tau:.2f} (1: they came in the order that was expected, 0: in any)."


def steps(study: Study) -> list[Section]:
    """The section on what the steps of the best trial and of the baseline consist of; none where none were recorded."""
    twin = left_in(study.folder / TWIN)
    if not twin:
        return []
    title = "What a step consists of"
    accounts: dict[str, Account] = twin.get("accounts", {})
    if not accounts:
        return [Section(title, missing=[twin["missing"]] if "missing" in twin else [])]
    by_token = {(name,): _by_token(account) for name, account in accounts.items()}
    by_step = {
        (words, name): _by_step(account[kind])
        for kind, words in (("prefill", "with prefill"), ("decode", "decode"))
        for name, account in accounts.items()
        if kind in account
    }
    engine = partial(figures.parts, by_token, "engine, ms for 1,000 tokens")
    step = partial(figures.parts, by_step, "ms of a step, mean")
    return [Section(title, _difference(accounts), [engine, step])]


Account = Mapping[str, Mapping[str, Any]]  # by kind of step, as sim/account.py has it


def _by_token(account: Account) -> dict[str, float]:
    """Seconds of each part for 1,000 tokens."""
    tokens = sum(share["tokens"] for share in account.values())
    return {part: 1000 * sum(share["parts"][part] for share in account.values()) / tokens for part in figures.PARTS}


def _by_step(share: Mapping[str, Any]) -> dict[str, float]:
    return {part: seconds / share["steps"] for part, seconds in share["parts"].items()}


def _difference(accounts: Mapping[str, Account]) -> str:
    """Sentences on the longest run of each trial, and on what differs most between the first and the last."""
    names = list(accounts)
    both = [accounts[names[-1]], accounts[names[0]]]
    by_token = [_by_token(account) for account in both]
    whole = [_ms(sum(one.values())) for one in by_token]
    text = "Of the longest run of each, without the time in which there was nothing to do. "
    text += f"1,000 computed tokens take {whole[0]} of {names[-1]}'s engine"
    if len(names) == 1:
        return f"{text}."
    sizes = [sum(share["tokens"] for share in one.values()) / _steps(one) for one in both]
    text += f" and {whole[1]} of {names[0]}'s. The largest difference: {_largest(*by_token)}."
    text += f" A step computes {sizes[0]:,.0f} tokens instead of {sizes[1]:,.0f}."
    prefills = [one["prefill"] for one in both if "prefill" in one]
    if len(prefills) == 2:
        held = [share["in_graphs"] / share["tokens"] for share in prefills]
        text += f" In steps with prefill the largest is {_largest(*map(_by_step, prefills))}; "
        text += f"CUDA graphs hold {held[0]:.0%} of their tokens instead of {held[1]:.0%}."
    return text


def _steps(account: Account) -> int:
    return sum(share["steps"] for share in account.values())


def _largest(now: Mapping[str, float], before: Mapping[str, float]) -> str:
    part = max(before, key=lambda part: abs(now[part] - before[part]))
    return f"{figures.PARTS[part][0]}, {_ms(now[part])} instead of {_ms(before[part])}"


def _ms(seconds: float) -> str:
    return f"{rounded(float(f'{seconds * 1e3:.3g}'))} ms"


def phases(study: Study) -> Section:
    total: dict[str, float] = dict.fromkeys(figures.PHASES, 0.0)
    for result in study.results.values():
        for phase, seconds in result.phases.items():
            total[phase] = total.get(phase, 0.0) + max(0.0, seconds)
    whole = sum(total.values())
    shares = [f"{phase} {seconds / whole:.0%}" for phase, seconds in total.items() if seconds > 0]
    text = f"{_duration(whole)} in all: {', '.join(shares)}.{starts(study)}" if whole else ""
    return Section("Where the time went", text, [partial(figures.phases, study.results)])


def starts(study: Study) -> str:
    """A sentence on the parts of a start."""
    known = [result.start for result in study.results.values() if len(result.start) > 1]
    parts = {part: median(start.get(part, 0.0) for start in known) for part in dict.fromkeys(chain(*known))}
    said = [f"{part} {seconds:.0f} s" for part, seconds in parts.items() if seconds >= 0.5]
    return f" A start, by the median of each part: {', '.join(said)}." if said else ""


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
