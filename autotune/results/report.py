"""A study as one HTML page that needs no network: report.html in its folder."""

import base64
import functools
import gzip
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
import optuna
from plotly.offline import get_plotlyjs

from autotune.measure import rouge, rules
from autotune.measure.accuracy import NLL, NOT_SCORED, NUMERICS, OVER
from autotune.measure.limits import limits_of
from autotune.measure.objective import offered_load, way_out
from autotune.measure.result import Result, State
from autotune.results import figures, summary
from autotune.results.figures import label
from autotune.results.sections import by_value, sections
from autotune.results.study import BASELINE, ON_SHARED, REFERENCES, Study
from autotune.results.summary import HEADINGS
from autotune.system.files import write_whole
from autotune.text import by_kind, rounded, shorten

PAGE = "report.html"
# Facts that say nothing of all trials.
OF_A_TRIAL = {"server", "steps", "duplicate_of", ON_SHARED, NUMERICS, NOT_SCORED}


def write(study: Study) -> Path:
    """Write report.html into the study's folder."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns where no trial is feasible, which the page tells
    path = study.folder / PAGE
    write_whole(path, page(study))
    return path


def page(study: Study) -> str:
    """The page itself."""
    beside = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=beside, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"rounded": rounded, "metric": label, "shorten": shorten, "by_flag": by_flag}
    templates.filters |= {"outcome": partial(summary.outcome, config=study.config)}
    best = study.results[study.served] if study.served else None
    metrics, params = columns(study)
    every = sections(study)
    drawn = [one for one in every if one.plots or one.rows]
    return templates.get_template("report.html.j2").render(
        study=study,
        config=study.config,
        headline=headline(study),
        best=best,
        defaults=study.baseline.defaults if study.baseline else {},
        warnings=list(filter(None, [summary.edge(best, study.config), summary.unloaded(study)])),
        verified=summary.verified(study.folder),
        cards=cards(study),
        sections=drawn,
        empty=[one for one in every if one.missing and one not in drawn],
        failures=failures(study),
        trials=by_value(study),
        metrics=metrics,
        params=params,
        facts=facts(study),
        words=summary.render(study),
        estimated=any(result.estimated for result in study.results.values()),
        written=time.strftime("%Y-%m-%d %H:%M"),
        plotly=plotly_js(),
    )


@functools.cache
def plotly_js() -> str:
    """plotly.js compressed, in base64: 2.0 MB instead of 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9)).decode()


def headline(study: Study) -> str:
    """The value of what is served beside the baseline's, or the span of the Pareto front."""
    served = study.served
    if served is None:
        return f"No trial is feasible: {way_out(study.config)}." if study.complete else "No trial has completed."
    result, baseline, metric = study.results[served], study.baseline, study.objective.metrics[0]
    if len(study.objective.metrics) > 1 and study.front:
        front = [study.results[name] for name in study.front]
        values = [(name, [one.metrics[name] for one in front]) for name in study.objective.metrics]
        spans = [f"{label(name)} {rounded(min(some))} to {rounded(max(some))}" for name, some in values]
        return f"{len(front)} trials on the Pareto front: {', '.join(spans)}"
    value = f"{rounded(result.values[0])} {label(metric)}{interval(result, metric)}"
    if served in REFERENCES:
        pronoun = "them" if served == BASELINE else "it"
        unbeaten = f"; no trial beat {pronoun}" if study.best else ", the only feasible configuration"
        return f"{value}: {REFERENCES[served]}{unbeaten}{_others(study, served)}"
    if baseline and baseline.complete and not baseline.feasible:
        words = f"{rounded(baseline.values[0])} with vLLM's defaults, which break them"
        broken = ", ".join(summary.broken(baseline, study.config))
        return f"{value} within the limits{_others(study, served)}, against {words}: {broken}"
    if not (baseline and baseline.feasible and baseline.values[0]):
        return f"{value}; no usable baseline to compare with{_others(study, served)}"
    against = f"{rounded(baseline.values[0])}{interval(baseline, metric)}"
    change = summary.change(study, served)
    return f"{change}: {value}, against {against} with vLLM's defaults{_others(study, served, BASELINE)}"


def _others(study: Study, served: str, *told: str) -> str:
    """The change of `served` against each of REFERENCES that is not `told` of: `, +3.1% against the recipe's 81`."""
    metric, found = study.objective.metrics[0], [name for name in study.references if name not in (served, *told)]
    return "".join(
        f", {summary.change(study, served, name)} against {rounded(study.results[name].values[0])}"
        f"{interval(study.results[name], metric)} with {REFERENCES[name]}"
        for name in found
    )


def by_flag(command: Sequence[str]) -> list[str]:
    """Split a command where a line is best broken: before each flag; each piece as a shell takes it."""
    pieces: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            pieces.append([])
        pieces[-1].append(word)
    return [shlex.join(piece) for piece in pieces]


def interval(result: Result, metric: str) -> str:
    """The 95 % confidence interval, ` (83.1 to 84.0)`; empty where it is not known."""
    if metric not in result.intervals:
        return ""
    low, high = result.intervals[metric]
    return f" ({rounded(low)} to {rounded(high)})"


def cards(study: Study) -> list[tuple[str, str, str]]:
    """The figures at a glance: name, value, and what to compare it with."""
    if study.served is None:
        return []
    metrics, limits = study.results[study.served].metrics, figures.latency_limits(study.config.scenario)
    others = {name: study.complete[name].metrics for name in REFERENCES if name in study.complete}
    others.pop(study.served, None)
    found = []
    for metric in dict.fromkeys([*study.objective.metrics, *HEADINGS]):
        if metric in metrics:
            words = [f"{name} {rounded(known[metric])}" for name, known in others.items() if metric in known]
            words += [f"limit {limits[metric]:,g}"] if metric in limits else []
            found.append((label(metric), rounded(metrics[metric]), ", ".join(words)))
    return found


def failures(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    """Reasons why trials did not complete, with the trials, the most frequent first; numbers in them are ignored."""
    left = {name: one for name, one in study.results.items() if not one.complete and one.state is not State.interrupted}
    trials = [(name, REFERENCES.get(name) or shorten(result.params)) for name, result in left.items()]
    reasons = [f"{'refused: ' if one.state is State.refused else ''}{one.reason}" for one in left.values()]
    return [(reasons[kind[0]], [trials[at] for at in kind]) for kind in by_kind(reasons)]


def columns(study: Study) -> tuple[list[str], list[str]]:
    """The metrics and the parameters in the table of trials; with the GPU's figures where there was one."""
    params = dict.fromkeys(key for result in study.complete.values() for key in result.params)
    measured = {metric for result in study.complete.values() for metric in result.metrics}
    others = [name for name in (*figures.GPU, f"{NLL}{OVER}", *rouge.NAMES) if name in measured]
    return list(dict.fromkeys([*study.objective.metrics, *HEADINGS, *others])), list(params)


def facts(study: Study) -> list[tuple[str, str]]:
    """Hardware and versions of all trials, and what was measured."""
    config = study.config
    started = [result.started_at for result in study.results.values() if result.started_at]
    ended = [result.ended_at for result in study.results.values() if result.ended_at]
    offered = offered_load(config.objective, config.scenario)
    named: dict[str, dict[str, None]] = {}
    for result in study.results.values():
        for key in [name for name in result.facts if name not in OF_A_TRIAL]:
            named.setdefault(key, {})[result.facts[key]] = None
    objectives = zip(config.objective.directions, config.objective.metrics, strict=True)
    found = [
        ("model", config.model.name),
        ("data set", config.dataset.name),
        ("scenario", f"{config.scenario.name} ({config.scenario.kind.value}){offered and f', {offered}'}"),
        ("limits at p99", "; ".join(map(str, limits_of(config.scenario))) or "none"),
        ("objective", ", ".join(map(" ".join, objectives))),
    ]
    broken = dict.fromkeys(what for result in study.results.values() for what in result.deviations)
    if lines := rules.told(config, list(broken)):
        found.append(("rules", "; ".join(line.strip() for line in lines)))
    if started and ended:
        first, last = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in (min(started), max(ended)))
        found.append(("ran", f"{first} to {last}"))
    versions = [(key.replace("_", " "), ", ".join(values)) for key, values in named.items() if any(values)]
    return found + versions
