"""Study → words: the outcome of a trial, the summary of a study."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from autotune.result import Result
from autotune.schema import Config

BASELINE = "baseline"
# What a table shows of a trial: metric, heading, digits.
COLUMNS = [
    ("tokens_per_s", "tokens/s", 1),
    ("samples_per_s", "samples/s", 2),
    ("ttft_p99_ms", "TTFT p99 ms", 1),
    ("tpot_p99_ms", "TPOT p99 ms", 2),
    ("latency_p99_ms", "latency p99 ms", 0),
]


def shorten(params: Mapping[str, Any]) -> str:
    """`max_num_seqs=64 block_size=32`: what a trial changed, without prefixes."""
    return " ".join(f"{name.removeprefix('engine.args.')}={value}" for name, value in params.items())


def outcome(result: Result, objectives: list[str]) -> str:
    """One line on how a trial ended."""
    if not result.complete:
        return f"failed: {result.reason}"
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, result.values, strict=True))
    over = [f"{name} over by {value:.0%}" for name, value in result.constraints.items() if value > 0]
    why = f"; infeasible: {', '.join(over)}" if over else ""
    verdict = result.verdict + (f" ({'; '.join(result.reasons)})" if result.reasons else "")
    return f"{values}; LoadGen: {verdict}{why}"


def single(result: Result, config: Config, folder: Path) -> str:
    """A trial that ran alone."""
    lines = ["", *_table({config.model.name: result}), "", outcome(result, config.objective.metrics)]
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result.phases.items())
    return "\n".join([*lines, seconds, "", f"  {result.shell_command}", "", f"Everything measured: {folder}/"])


def best(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The best feasible trial; of several objectives, the best in the first."""
    complete = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    feasible = [trial for trial in complete if all(value <= 0 for value in trial.constraints.values())]
    sign = 1 if study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else -1
    return max(feasible, key=lambda trial: sign * trial.values[0], default=None)


def headline(study: optuna.Study, folder: Path, config: Config) -> dict[str, float]:
    """The study in a few figures, for MLflow's parent run."""
    figures = {"trials": float(len(study.trials))}
    figures["failed_trials"] = float(sum(trial.state is TrialState.FAIL for trial in study.trials))
    name = config.objective.metrics[0]
    trial, baseline = best(study), _load(folder / BASELINE)
    if baseline and baseline.complete:
        figures[f"baseline_{name}"] = baseline.values[0]
    if trial:
        figures[f"best_{name}"] = trial.values[0]
        if baseline and baseline.complete:
            figures["gain_percent"] = (trial.values[0] / baseline.values[0] - 1) * 100
    return figures


def summary(study: optuna.Study, folder: Path, config: Config) -> str:
    """Best against baseline, the command that serves it, where things lie."""
    states = [trial.state for trial in study.trials]
    failed = states.count(TrialState.FAIL)
    lines = [f"Study {config.study}: {len(states)} trials, {failed} failed", ""]
    trial, baseline = best(study), _load(folder / BASELINE)
    rows = {BASELINE: baseline}
    if trial:
        rows[f"best: trial-{trial.number}"] = _load(folder / f"trial-{trial.number}")
    lines += _table({name: row for name, row in rows.items() if row and row.complete})
    for name, row in rows.items():
        if row and not row.complete:
            lines.append(f"{name} failed: {row.reason}")
        elif row and not row.feasible:
            lines.append(f"{name} is infeasible: {outcome(row, config.objective.metrics)}")
    if trial is None:
        reasons = sorted({f"  {t.user_attrs['reason']}" for t in study.trials if "reason" in t.user_attrs})
        if failed < len(states):
            lines += ["", "No trial is feasible: loosen the limits or widen the space."]
        if reasons:
            lines += ["", "Why trials failed:", *reasons]
    else:
        lines += ["", *_verdict(study, trial, baseline, rows[f"best: trial-{trial.number}"])]
    uri = config.tracking.uri
    lines += ["", f"Everything measured: {folder}/"]
    if config.tracking.enabled:
        lines.append(f"Compare the trials:  mlflow ui --backend-store-uri {shlex.quote(uri)}")
    return "\n".join(lines) + "\n"


def _verdict(
    study: optuna.Study, trial: optuna.trial.FrozenTrial, baseline: Result | None, result: Result | None
) -> list[str]:
    assert result is not None
    changed, command = shorten(trial.params), ["", f"  {result.shell_command}"]
    if not (baseline and baseline.feasible):
        return [f"Best: {changed} (no usable baseline to compare with)", *command]
    gain = f"{result.values[0] / baseline.values[0] - 1:+.1%} against vLLM's defaults, measured once each"
    sign = 1 if study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else -1
    if sign * (result.values[0] - baseline.values[0]) > 0:
        return [f"Best: {changed} ({gain})", *command]
    return [
        f"No trial beat vLLM's defaults. The best was {changed} ({gain}). Serve the defaults:",
        "",
        f"  {baseline.shell_command}",
    ]


def _table(rows: Mapping[str, Result]) -> list[str]:
    if not rows:
        return []
    head = ["", *(heading for _, heading, _ in COLUMNS), "LoadGen"]
    body = [
        [name, *(f"{row.metrics[key]:,.{digits}f}" for key, _, digits in COLUMNS), row.verdict]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]


def _load(folder: Path) -> Result | None:
    try:
        return Result.load(folder)
    except FileNotFoundError:
        return None
