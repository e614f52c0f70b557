"""The verdict of `autotune verify`: whether configurations that were measured again are better than vLLM's defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.errors import MeasureError
from autotune.measure import objective
from autotune.measure.paired import Difference, paired_difference
from autotune.measure.result import Result
from autotune.results import summary
from autotune.results.study import BASELINE, Study
from autotune.text import aligned, rounded, shorten


@dataclass(frozen=True)
class Row:
    """The repeats of one configuration."""

    name: str
    params: dict[str, Any]
    values: list[float | None]  # by block; null where it failed
    held: int  # repeats that completed within every limit
    failures: list[str]  # why the others did not complete
    mean: float | None = None
    difference: Difference | None = None  # to the baseline; null for that itself, and for fewer than two shared blocks


@dataclass(frozen=True)
class Verdict:
    study: str
    metric: str
    direction: str
    n: int
    confidence: float
    estimated: bool
    winner: str | None  # better than the defaults
    line: str  # for a report
    rows: list[Row]  # the baseline first


def judge(study: Study, repeats: Mapping[str, Sequence[Result]], metric: int, confidence: float) -> Verdict:
    """Judge `repeats`, by trial and in the order of their blocks; the study's own values take no part.

    `metric` is the index of one of the objective's. Raises MeasureError if the baseline completed in fewer than two
    blocks.
    """
    baseline = _row(study, BASELINE, metric, repeats[BASELINE])
    n, trials = len(baseline.values), [name for name in repeats if name != BASELINE]
    if sum(value is not None for value in baseline.values) < 2:
        failures = "; ".join(baseline.failures)
        raise MeasureError(f"the baseline completed fewer than two of {n} repeats: {failures}")
    measured = [_row(study, name, metric, repeats[name]) for name in trials]
    rows = [replace(row, difference=_difference(row, baseline, confidence, len(trials))) for row in measured]
    winner = _winner(rows, baseline, objective.sign(study.objective, metric))
    together = f" for all {len(rows)} together" if len(rows) > 1 else ""
    return Verdict(
        study=study.name,
        metric=study.objective.metrics[metric],
        direction=study.objective.directions[metric],
        n=n,
        confidence=confidence,
        estimated=any(result.estimated for results in repeats.values() for result in results),
        winner=winner.name if winner else None,
        line=_line(study, metric, baseline, rows, winner, f"with {confidence:.0%} confidence{together}"),
        rows=[baseline, *rows],
    )


def _row(study: Study, name: str, metric: int, results: Sequence[Result]) -> Row:
    values = [result.values[metric] if result.complete else None for result in results]
    measured = [value for value in values if value is not None]
    return Row(
        name=name,
        params=study.results[name].params,
        values=values,
        held=sum(result.feasible for result in results),
        failures=sorted({result.reason for result in results if not result.complete}),
        mean=sum(measured) / len(measured) if measured else None,
    )


def _difference(row: Row, baseline: Row, confidence: float, comparisons: int) -> Difference | None:
    pairs = [pair for pair in zip(row.values, baseline.values, strict=True) if None not in pair]
    if len(pairs) < 2:
        return None
    values, baselines = zip(*pairs, strict=True)
    return paired_difference(values, baselines, confidence, comparisons)


def _winner(rows: Sequence[Row], baseline: Row, sign: int) -> Row | None:
    """The best of those that held the limits in every repeat and are better than the defaults (or these never held)."""

    def is_better(row: Row) -> bool:
        if row.difference is None or row.held < len(row.values):
            return False
        return baseline.held == 0 or min(sign * row.difference.low, sign * row.difference.high) > 0

    return max(filter(is_better, rows), key=lambda row: sign * (row.mean or 0.0), default=None)


def _line(study: Study, metric: int, baseline: Row, rows: Sequence[Row], winner: Row | None, confidence: str) -> str:
    """The verdict in one line."""
    n = len(baseline.values)
    if not winner:
        over = [row.name for row in rows if row.held < n]
        why = f" ({', '.join(over)} did not hold the limits in every repeat)" if over else ""
        return f"No configuration beat the defaults in {n} repeats, {confidence}{why}."
    if baseline.held == 0:
        repeats = f"each of {n} repeats, the defaults in none"
        return f"Better than the defaults: {winner.name} held the limits in {repeats}."
    value, default = (study.results[name].values[metric] for name in (winner.name, BASELINE))
    in_study = f"; the study itself had shown {value / default - 1:+z.1%}" if default else ""
    gain = change(winner.difference, baseline.mean)
    return f"Better than the defaults: {winner.name}, {gain} in {n} repeats, {confidence}{in_study}."


def change(difference: Difference | None, baseline: float | None) -> str:
    """`+7.8% [+5.1%, +10.6%]` of the baseline's mean; in the metric's unit if that is 0."""
    if difference is None:
        return ""
    parts = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{part / baseline:+z.1%}" if baseline else f"{part:+.4g}" for part in parts)
    return f"{mean} [{low}, {high}]"


def render(verdict: Verdict) -> str:
    """The verdict as text."""
    baseline = verdict.rows[0]
    table = [("", verdict.metric, "against the baseline", "real", "limits held")]
    for row in verdict.rows:
        real = f"{min(0.999, 1 - row.difference.p):.1%}" if row.difference else ""
        mean = rounded(row.mean) if row.mean is not None else "failed"
        table.append((row.name, mean, change(row.difference, baseline.mean), real, f"{row.held} of {verdict.n}"))
    lines = aligned(table)
    lines += ["", *(f"  {row.name}: {shorten(row.params)}" for row in verdict.rows[1:])]
    lines += [f"  {row.name} failed: {why}" for row in verdict.rows for why in row.failures]
    lines += ["", verdict.line]
    if verdict.estimated:
        lines.append(summary.ESTIMATES)
    return "\n".join(lines) + "\n"
