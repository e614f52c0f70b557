"""The report's figures: Optuna's own, and those of serving that Optuna doesn't know.

Each raises NotDrawnError where a study has nothing to draw, with the reason for the reader.
"""

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import optuna
import plotly.graph_objects as go
import plotly.io
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from autotune.config.schema import ScenarioConfig
from autotune.config.vllm_flags import FLAG, packed
from autotune.measure.bottleneck import LOST
from autotune.measure.limits import limits_of
from autotune.measure.objective import HIGHEST
from autotune.measure.result import Result, State
from autotune.measure.runs import AT_MOST
from autotune.results import summary
from autotune.results.fleet import Fleet, cost
from autotune.results.study import REFERENCES, SPACE, TRIAL, Study
from autotune.system.files import left_in
from autotune.text import count, rounded

not_needed: Any = sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]
try:  # Optuna would import it, too: that takes a second, and much longer where it has to look for fonts
    from optuna.visualization import plot_optimization_history, plot_pareto_front
finally:
    if not_needed is None:
        del sys.modules["matplotlib"]

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Choices for a categorical distribution")  # of a file that was edited

LEFT = "left early"  # the constraint of a trial that does not hold the best load of its study
BURST = "burst"  # the role of a run that offers no rate: all requests come at once
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, YELLOW = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"),
)
GREY, LIGHT = "#767676", "#BBBBBB"
PLAIN = {"separatethousands": True, "exponentformat": "none"}  # 16,384 instead of 16.384k
TEMPLATE = go.layout.Template(plotly.io.templates["plotly_white"])
TEMPLATE.layout.update(
    colorway=[BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, YELLOW],
    font={"family": "system-ui, sans-serif", "size": 12, "color": "#1a1a1a"},
    margin={"l": 8, "r": 8, "t": 30, "b": 8},
    hoverlabel={"align": "left", "font": {"size": 11}},
    legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    title={"text": ""},
    xaxis={"automargin": True, **PLAIN},
    yaxis={"automargin": True, "ticklabelstandoff": 4, **PLAIN},
)
# Parts of a step's time, in the order in which bars show them.
PARTS = {
    "launch": ("launches (the GPU waits)", VERMILLION),
    "schedule": ("scheduling (the GPU waits)", ORANGE),
    "weights": ("weights and fixed costs", BLUE),
    "tokens": ("tokens", SKY),
    "attention": ("attention", GREEN),
    "sequences": ("sequences", PURPLE),
}
PHASES = {"start": SKY, "warmup": YELLOW, "run": BLUE, "accuracy": GREEN, "stop": PURPLE, "other": GREY}
T = TypeVar("T")
LEAST = 4  # trials that importance is computed of
FOREST = 200  # trials that fANOVA's forest is grown of: its time goes with them
GPU = {"gpu_utilization": "GPU busy", "gpu_j_per_token": "J/token"}  # of a trial, by metric
HOVER = "<br>%{hovertext}<extra></extra>"  # ends what is shown under the pointer
STACKED: dict[str, Any] = {"barmode": "stack", "legend": {"traceorder": "normal"}}
CURVES = 5  # trials whose load curves are drawn, besides the baseline


class NotDrawnError(Exception):
    """A study has nothing to draw; the message says why, in one line."""


def optuna_study(study: Study, metrics: Sequence[str], directions: Sequence[str]) -> optuna.Study:
    """The trials of `study` as Optuna's figures want them, with `metrics` as their values and short names.

    Trials keep their numbers; what a trial serves is among its user attributes, which the figures show. A trial that
    was left early counts as infeasible, with about the load that it holds.
    """
    made = optuna.create_study(directions=list(directions))  # type: ignore[arg-type]
    known = distributions(study)
    numbers = [int(name.removeprefix(TRIAL)) for name in study.results if name.startswith(TRIAL)]
    for name in (f"{TRIAL}{number}" for number in range(max(numbers, default=-1) + 1)):
        result = study.swept.get(name, Result())
        made.add_trial(_optuna_trial(name, result, known, metrics))
    return made


def _optuna_trial(
    name: str, result: Result, known: Mapping[str, BaseDistribution], metrics: Sequence[str]
) -> FrozenTrial:
    shown, constraints = result.metrics if result.complete else {}, result.constraints
    if result.state is State.pruned and AT_MOST in result.metrics:
        shown, constraints = dict.fromkeys(HIGHEST, result.metrics[AT_MOST]), {LEFT: 1.0}
    complete = all(math.isfinite(shown.get(metric, math.nan)) for metric in metrics)
    args = {flag: value for flag, value in result.args.items() if f"{FLAG}{flag}" not in result.params}
    return create_trial(
        state=TrialState.COMPLETE if complete else TrialState.FAIL,
        values=[shown[metric] for metric in metrics] if complete else None,
        params=_short(result.params),
        distributions=_short({key: known[key] for key in result.params}),
        constraints=constraints if complete else None,
        user_attrs={"trial": name, "other flags": args} | ({"bound": result.bound} if result.bound else {}),
    )


def distributions(study: Study) -> dict[str, BaseDistribution]:
    """The space that `study` was drawn from, as its folder has it, widened to every value that a trial had."""
    written = left_in(study.folder / SPACE)  # version 0.1 left none
    seen: dict[str, list[Any]] = {}
    for result in study.swept.values():
        for key, value in result.params.items():
            seen.setdefault(key, []).append(value)
    return {key: _widened(_distribution(written.get(key)), values) for key, values in seen.items()}


def _distribution(written: Any) -> BaseDistribution | None:
    """The distribution that a line of space.json holds; None for none, and for one of another version."""
    with suppress(ValueError, TypeError, KeyError):
        return json_to_distribution(json.dumps(written))
    return None


def _widened(distribution: BaseDistribution | None, values: Sequence[Any]) -> BaseDistribution:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values) or isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
        return CategoricalDistribution(list(dict.fromkeys(map(packed, [*choices, *values]))))
    if isinstance(distribution, (IntDistribution, FloatDistribution)):
        numbers += [distribution.low, distribution.high]
    low, high, log = min(numbers), max(numbers), bool(getattr(distribution, "log", False))
    whole = isinstance(low, int) and isinstance(high, int) and not isinstance(distribution, FloatDistribution)
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def _short(by_key: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(FLAG): value for key, value in by_key.items()}


def history(study: optuna.Study, metric: str, references: Mapping[str, Result]) -> go.Figure:
    """Draw each trial's value and the best so far, with what they are compared with."""
    trials = _complete(study, 1)
    figure = plot_optimization_history(study, target_name=label(metric))
    best = {"color": BLUE, "shape": "hv"}  # it changes when a trial ends, not on the way to it
    figure.update_traces(name="best so far", line=best, selector={"name": "Best Value"})
    values = {name: one.metrics[metric] for name, one in references.items() if metric in one.metrics}
    ends = [trials[0].number - 0.5, trials[-1].number + 0.5]  # one trial has a line, too
    for (name, value), color in zip(values.items(), (VERMILLION, ORANGE), strict=False):
        words, line = f"{name} {rounded(value)}", {"dash": "dash", "color": color}
        figure.add_scatter(x=ends, y=[value, value], mode="lines", name=words, line=line, hoverinfo="skip")
    return finished(figure, x={"title_text": "trial", "dtick": 1 if ends[1] - ends[0] < 10 else None})


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """Shares by parameter, the most important first, by what they say of it. Raises NotDrawnError.

    fANOVA: share of the variance over all trials. PED-ANOVA: what tells the best 10 % from the others.
    """
    trials = _complete(study, LEAST)
    if len({trial.values[0] for trial in trials}) == 1:
        raise NotDrawnError("every trial measured the same value: no parameter mattered")
    known = {name: distribution for trial in trials for name, distribution in trial.distributions.items()}
    varied = [name for name, distribution in known.items() if not distribution.single()]
    if not varied:
        raise NotDrawnError("no parameter was varied")
    some = optuna.create_study(direction=study.direction)
    some.add_trials(spread(trials, FOREST))
    everywhere = [name for name in varied if all(name in trial.params for trial in trials)]
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator  # scikit-learn: 2 s

    found = {}
    if everywhere:
        found["fANOVA"] = _importance(some, FanovaImportanceEvaluator(seed=0), everywhere)
    found["PED-ANOVA"] = _importance(study, PedAnovaImportanceEvaluator(), varied)
    return found


def _importance(study: optuna.Study, evaluator: Any, params: list[str]) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few trials
        found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator, params=params)
    return found


def importance(name: str, shares: Mapping[str, float]) -> go.Figure:
    """Draw the shares of one evaluator as bars."""
    params, values = list(shares)[::-1], list(shares.values())[::-1]
    bars = go.Bar(x=values, y=params, text=[f"{share:.0%}" for share in values], orientation="h")
    axis = {"showticklabels": False, "rangemode": "tozero", "title_text": name}
    return finished([bars], x=axis, height=90 + 26 * len(params))


def slice_of(study: optuna.Study, param: str, metric: str) -> go.Figure:
    """Draw the metric over one parameter, of the trials that have it.

    Optuna's own plot leaves out what broke a limit where the parameter is one of choices.
    """
    trials = [trial for trial in _complete(study, 1) if param in trial.params]
    distribution, traces = trials[0].distributions[param], []
    axis: dict[str, Any] = {"title_text": param}
    if is_choice := isinstance(distribution, CategoricalDistribution):
        axis |= {"type": "category", "categoryorder": "array", "categoryarray": [*map(str, distribution.choices)]}
    elif isinstance(distribution, (IntDistribution, FloatDistribution)) and distribution.log:
        axis |= {"type": "log", "dtick": math.log10(4) if distribution.high > 16 * distribution.low else None}
    for feasible in (False, True):
        some = [one for one in trials if all(value <= 0 for value in one.constraints.values()) == feasible]
        dots = [(one.params[param], one.values[0], told(one.user_attrs["trial"], one.params)) for one in some]
        dots = [(str(x), y, words) for x, y, words in dots] if is_choice else dots
        by_age = {"color": [one.number for one in some], "colorscale": "Cividis"}
        traces.append(_dots(dots, "%{y:,.4~r}", **(by_age if feasible else {"color": LIGHT, "symbol": "x"})))
    return finished(traces, x=axis, y=label(metric), height=300, showlegend=False)


def front(study: optuna.Study, metrics: Sequence[str], limits: Mapping[str, float]) -> go.Figure:
    """Draw the Pareto front of `study` in `metrics`, beside the trials that are not on it; limits as lines."""
    trials = _complete(study, 2)
    if len(metrics) not in (2, 3):
        raise NotDrawnError(f"a front is drawn of two or three objectives, not of {len(metrics)}")
    figure = plot_pareto_front(study, target_names=[label(metric) for metric in metrics])
    figure.update_traces(marker={"showscale": False, "colorscale": None})
    for trace in figure.data:
        best = "Best" in (trace.hovertemplate or "")
        outside = "Infeasible" in (trace.hovertemplate or "")
        trace.name = "on the front" if best else "over a limit" if outside else "beaten by another"
        trace.marker.color = VERMILLION if best else LIGHT if outside else BLUE
        trace.marker.update(symbol="diamond" if best else "x" if outside else "circle", size=10 if best else 6)
        trace.showlegend = bool(trace.x)
    for axis, metric in zip("xy", metrics, strict=False):
        shown = [trial.values[metrics.index(metric)] for trial in trials]
        if metric in limits and len(metrics) == 2 and limits[metric] < 2 * max(shown):
            _limit(figure, limits[metric], axis)
    return finished(figure, height=440)


def load_curve(results: Mapping[str, Result], metric: str, limit: float | None, unit: str) -> go.Figure:
    """Draw a latency over the offered load, a line for each trial of several runs; hollow: INVALID."""
    lines = []
    for name, result in results.items():
        known = [run for run in result.runs if metric in run.metrics and run.role != BURST]
        runs = sorted(known, key=lambda run: run.qps)
        lines.append(
            go.Scatter(
                x=[run.qps for run in runs],
                y=[run.metrics[metric] for run in runs],
                name=name,
                mode="lines+markers",
                marker={"symbol": ["circle" if run.verdict == "VALID" else "circle-open" for run in runs], "size": 8},
                line={"dash": "dash"} if name in REFERENCES else {},
                hovertext=[told(f"{name}: {run.verdict} {'; '.join(run.reasons)}", result.params) for run in runs],
                hovertemplate=f"%{{x:,.4~r}} {unit}: %{{y:,.4~r}} ms{HOVER}",
            )
        )
    return _over_load(lines, metric, limit, unit)


def load_points(results: Mapping[str, Result], key: str, metric: str, limit: float | None, unit: str) -> go.Figure:
    """Draw the same for a study that swept the load, a parameter with this key: a point for each trial."""
    traces = []
    for verdict, symbol, colour in (("VALID", "circle", BLUE), ("INVALID", "circle-open", VERMILLION)):
        some = {name: one for name, one in results.items() if (one.verdict == "VALID") == (verdict == "VALID")}
        dots = [(one.params[key], one.metrics[metric], told(name, one.params)) for name, one in some.items()]
        traces.append(_dots(dots, f"%{{x:,.4~r}} {unit}: %{{y:,.4~r}} ms", name=verdict, symbol=symbol, color=colour))
    return _over_load(traces, metric, limit, unit)


def _over_load(traces: list[go.Scatter], metric: str, limit: float | None, unit: str) -> go.Figure:
    axis = {"title_text": label(metric), "rangemode": "tozero"}
    figure = finished(traces, x=f"offered load, {unit}", y=axis)
    if limit is not None:
        _limit(figure, limit)
    return figure


def _limit(figure: go.Figure, value: float, axis: str = "y") -> None:
    """Draw a line across the figure where `axis` has this value."""
    annotation = {"text": f"limit {value:,g} ms", "font": {"color": VERMILLION}, "bgcolor": "rgba(255,255,255,.8)"}
    line = {"dash": "dot", "color": VERMILLION}
    add = figure.add_hline if axis == "y" else figure.add_vline
    add(value, line=line, annotation=annotation, annotation_position="top left")


def bounds(results: Mapping[str, Result], metric: str) -> go.Figure:
    """Draw what each trial reached, by its bottleneck."""
    bound = {name: result for name, result in results.items() if result.bound and metric in result.metrics}
    if not bound:
        raise NotDrawnError("no trial knows its bottleneck")
    counts = Counter(result.bound for result in bound.values())
    dots = go.Box(  # without its box: it keeps dots apart that would lie on each other
        x=[result.metrics[metric] for result in bound.values()],
        y=[f"{result.bound} ({counts[result.bound]})" for result in bound.values()],
        orientation="h",
        boxpoints="all",
        pointpos=0,
        fillcolor="rgba(0,0,0,0)",
        line={"color": "rgba(0,0,0,0)"},
        marker={"color": BLUE, "opacity": 0.6},
        hovertext=[told(name, result.params) for name, result in bound.items()],
        hovertemplate=f"%{{x:,.4~r}}{HOVER}",
        hoveron="points",
    )
    kinds = [f"{kind} ({count})" for kind, count in counts.most_common()]
    axis = {"categoryorder": "array", "categoryarray": kinds, "autorange": "reversed"}
    return finished([dots], x=label(metric), y=axis, height=110 + 45 * len(kinds))


def caching(results: Mapping[str, Result]) -> go.Figure:
    """Draw the share of prompt tokens that were found in the KV cache over what running requests took of it at most."""
    known = {name: one for name, one in results.items() if {"prefix_hit_share", "kv_use_max"} <= one.metrics.keys()}
    lost = {name: one.metrics.get("prefix_lost_share", 0.0) for name, one in known.items()}
    words = {name: told(f"{name}: {lost[name]:.0%} computed again", one.params) for name, one in known.items()}
    dots = [(one.metrics["kv_use_max"], one.metrics["prefix_hit_share"], words[name]) for name, one in known.items()]
    symbols = ["x" if share >= LOST else "circle" for share in lost.values()]
    traces = [_dots(dots, "KV use %{x:.0%}, found %{y:.1%}", symbol=symbols, color=BLUE)]
    axis = {"tickformat": ".0%", "rangemode": "tozero"}
    taken = axis | {"title_text": "KV cache that running requests took, at most"}
    return finished(traces, x=taken, y=axis | {"title_text": "prompt tokens found in it"}, height=380)


def fleets(found: Sequence[Fleet], unit: str) -> go.Figure:
    """Draw the GPUs that serve the load, by parallelism."""
    if not found:
        raise NotDrawnError("nothing that was tried serves the load within the limits")
    bars = go.Bar(
        x=[fleet.gpus for fleet in found],
        y=[fleet.parallelism for fleet in found],
        orientation="h",
        text=[f"{fleet.servers} × {fleet.gpus // fleet.servers}" for fleet in found],
        hovertext=[f"{fleet.name}: {rounded(fleet.each)} {unit} each" for fleet in found],
        hovertemplate=f"%{{x}} GPUs{HOVER}",
    )
    axis = {"title_text": "GPUs (servers × GPUs of each)", "rangemode": "tozero"}
    return finished([bars], x=axis, y={"autorange": "reversed"}, height=150 + 35 * len(found))


def costs(results: Mapping[str, Result], per_gpu_hour: float) -> go.Figure:
    """Draw the cost of a million output tokens over the throughput of a GPU, a dot for each trial."""
    if not results:
        raise NotDrawnError("no trial completed")
    points = {name: (one.metrics["tokens_per_s_per_gpu"], cost(one, per_gpu_hour)) for name, one in results.items()}
    axis = {"title_text": "cost per million output tokens", "rangemode": "tozero"}
    return finished(_by_limits(results, points, "%{y:,.4~r} for a million tokens"), x="tokens/s of a GPU", y=axis)


def phases(results: Mapping[str, Result]) -> go.Figure:
    """Draw the seconds of each trial by phase, in the order in which they began."""
    timed = {name: result for name, result in results.items() if result.phases}
    if not timed:
        raise NotDrawnError("no trial got as far as to take time")
    trials = [name.removeprefix(TRIAL) for name in timed]
    seconds = {phase: [max(0.0, one.phases.get(phase, 0.0)) for one in timed.values()] for phase in PHASES}
    bars = [
        go.Bar(x=trials, y=seconds[phase], name=phase, marker={"color": colour, "line": {"width": 0}})
        for phase, colour in PHASES.items()
        if any(seconds[phase])
    ]
    axis = {"type": "category", "nticks": 12, "title_text": "trial"}
    return finished(bars, x=axis, y="seconds", **STACKED, bargap=0.1)


def expectations(results: Mapping[str, Result], metric: str, at: int) -> go.Figure:
    """Draw what each trial measured over what was expected of it; `at` is the metric's place in the objective."""
    points = {name: (result.expected["values"][at], result.values[at]) for name, result in results.items()}
    seen = [value for point in points.values() for value in point]
    ends = [min(seen), max(seen)]
    line = {"dash": "dot", "color": GREY}
    diagonal = go.Scatter(x=ends, y=ends, name="as expected", mode="lines", line=line, hoverinfo="skip")
    dots = _by_limits(results, points, "expected %{x:,.4~r}, measured %{y:,.4~r}")
    return finished([*dots, diagonal], x=f"expected {label(metric)}", y=f"measured {label(metric)}")


def step_errors(errors: Mapping[str, Sequence[Mapping[str, Any]]], fitted_to: str) -> go.Figure:
    """Draw the error of the twin for each kind of step, by trial."""
    bars = [
        go.Bar(
            x=[row["error"] for row in rows],
            y=[row["kind"] for row in rows],
            name=f"{name} ({'fitted to' if name == fitted_to else 'not fitted to'})",
            orientation="h",
            text=[f"{row['error']:.2%}" for row in rows],
            hovertext=[f"{row['steps']:,} steps, median {row['measured_s'] * 1e3:.1f} ms" for row in rows],
            hovertemplate="%{x:.2%} (%{hovertext})<extra></extra>",
        )
        for name, rows in errors.items()
    ]
    kinds = {row["kind"] for rows in errors.values() for row in rows}
    in_order = sorted(kinds, key=lambda kind: ("no graph" in kind, "over" in kind, len(kind), kind))
    axis = {"tickformat": "~%", "nticks": 5, "rangemode": "tozero", "title_text": "median error of a step's time"}
    order = {"categoryorder": "array", "categoryarray": in_order, "autorange": "reversed"}
    return finished(bars, x=axis, y=order, height=130 + 30 * len(kinds) * len(errors), barmode="group")


def parts(bars: Mapping[Any, Mapping[str, float]], title: str) -> go.Figure:
    """Draw seconds by part, stacked, as ms; a bar is named by a tuple: a trial, or a kind of step and a trial."""
    names = [list(names) for names in zip(*bars, strict=True)]
    traces = [
        go.Bar(
            x=[bar.get(part, 0.0) * 1e3 for bar in bars.values()],
            y=names if len(names) > 1 else names[0],
            name=words,
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{words}: %{{x:.3g}} ms<extra></extra>",
        )
        for part, (words, colour) in PARTS.items()
    ]
    return finished(traces, x=title, y={"autorange": "reversed"}, height=190 + 45 * len(bars), **STACKED)


def _dots(dots: Sequence[tuple[Any, float | None, str]], hover: str, name: str = "", **marker: Any) -> go.Scatter:
    """Dots at x and y, each with its words under `hover`."""
    x, y, words = zip(*dots, strict=True) if dots else ((), (), ())
    shown = {"hovertext": words, "hovertemplate": f"{hover}{HOVER}"}
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker={"size": 8, **marker}, **shown)


def _by_limits(
    results: Mapping[str, Result], points: Mapping[str, tuple[float, float | None]], hover: str
) -> list[go.Scatter]:
    """Dots of the trials that hold the limits, and of those that broke one."""
    traces = []
    for feasible, words, colour, symbol in (
        (True, "holds the limits", BLUE, "circle"),
        (False, "broke one", GREY, "x"),
    ):
        dots = [(*points[name], told(name, one.params)) for name, one in results.items() if one.feasible == feasible]
        traces.append(_dots(dots, hover, words, color=colour, symbol=symbol).update(showlegend=bool(dots)))
    return traces


def spread(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """At most `count` trials, evenly over the range of their values."""
    ordered = sorted(trials, key=lambda trial: trial.values[0])
    if len(ordered) <= count:
        return ordered
    return [ordered[round(at * (len(ordered) - 1) / (count - 1))] for at in range(count)]


def drawn(draw: Callable[[], T]) -> T | str:
    """Return what `draw` makes, or the reason why it makes nothing; no error of Optuna's or plotly's ends a report."""
    try:
        return draw()
    except NotDrawnError as why:
        return str(why)
    except Exception as error:
        return f"could not be drawn: {type(error).__name__}: {error}"


def finished(made: Any, x: Any = "", y: Any = "", height: int = 360, **layout: Any) -> go.Figure:
    """A figure of traces, or Optuna's, in the report's style and as wide as its place; `x` and `y`: titles, or more."""
    figure = go.Figure(made)
    margin = TEMPLATE.layout.margin
    figure.update_layout(template=TEMPLATE, title=None, width=None, height=height, margin=margin, **layout)
    for axis, update in ((x, figure.update_xaxes), (y, figure.update_yaxes)):
        if axis:
            update(axis if isinstance(axis, dict) else {"title_text": axis})
    return figure


def label(metric: str) -> str:
    """A metric's heading, with its unit."""
    named = summary.HEADINGS | GPU
    words = metric.replace("_ms", " ms").replace("_per_s", "/s").replace("_qps", " queries/s").replace("_", " ")
    return named.get(metric, words)


def told(trial: str, params: Mapping[str, Any]) -> str:
    """A trial and its parameters, one on each line, for hover."""
    lines = [f"{key}={value}" for key, value in _short(params).items()]
    return "<br>".join([trial, *(lines or ["vLLM's defaults"])])


def latency_limits(scenario: ScenarioConfig) -> dict[str, float]:
    """Limits by the metric that they are of, ms; the loosest of those that depend on the prompt's length."""
    held = {f"{limit.name}_p99_ms": limit.loosest * 1e3 for limit in limits_of(scenario)}
    return {metric: limit for metric, limit in held.items() if limit < math.inf}


def _complete(study: optuna.Study, least: int) -> list[FrozenTrial]:
    """Its trials that completed. Raises NotDrawnError if there are fewer than `least`."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(trials) < least:
        has = f"{'is' if len(trials) == 1 else 'are'} {len(trials)}"
        raise NotDrawnError(f"needs {count(least, 'trial')} that completed, and there {has}")
    return trials
