"""Study → words and headline figures: the outcome of a trial, the summary of a study."""

import json
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autotune.config.redact import redact
from autotune.config.schema import Config
from autotune.measure.result import Result
from autotune.results.study import BASELINE as BASELINE
from autotune.text import aligned, shorten

LOST = "lost"  # of a trial whose sweeping process ended, with whatever ran it
CANARIES = "canaries"  # a study's: by node, what a short baseline measured there; null where it failed
SLOW = 0.1  # share of the median node's value that a slow one is worse by
DUPLICATE = "duplicate_of"  # of a trial that vLLM would have run as an earlier one: that one's name
EXPECTED = "expected"  # what a simulation said of a trial
SURPRISE = 0.15  # share of the expected value by which a measured one contradicts it
EDGE = 0.1  # share of a TPOT limit within which the TPOT of a full server lies on it
FILE = "summary.json"  # in a study's folder: what it comes to, in figures
VERDICT = "verify.json"  # there: what autotune.commands.verify found
# What a table shows of a trial: metric, heading, digits.
COLUMNS = [
    ("tokens_per_s", "tokens/s", 1),
    ("samples_per_s", "samples/s", 2),
    ("ttft_p99_ms", "TTFT p99 ms", 1),
    ("tpot_p99_ms", "TPOT p99 ms", 2),
    ("latency_p99_ms", "latency p99 ms", 0),
]
HEADINGS = {metric: heading for metric, heading, _ in COLUMNS}


def outcome(result: Result, objectives: list[str]) -> str:
    """One line on how a trial ended."""
    if not result.complete:
        return f"failed: {result.reason}"
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, result.values, strict=True))
    limits = {name: value for name, value in result.constraints.items() if name != "failed_requests"}
    over = [f"{name} over by {value:.0%}" for name, value in limits.items() if value > 0]
    why = f"; infeasible: {', '.join(over)}" if over else ""
    verdict = result.verdict + (f" ({'; '.join(result.reasons)})" if result.reasons else "")
    return f"{values}; LoadGen: {verdict}{why}"


def single(result: Result, config: Config, folder: Path) -> str:
    """A trial that ran alone."""
    lines = ["", *_table({config.model.name: result}, config), "", outcome(result, config.objective.metrics)]
    if result.estimated:
        lines.append("These are estimates of a simulation (backend=sim), not measurements.")
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result.phases.items())
    return "\n".join([*lines, seconds, "", f"  {result.shell_command}", "", f"Everything measured: {folder}/"])


def best(study: optuna.Study) -> FrozenTrial | None:
    """The best feasible trial but the baseline; of several objectives, the best in the first."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state is TrialState.COMPLETE]
    feasible = [trial for trial in complete if all(value <= 0 for value in trial.constraints.values())]
    swept = [trial for trial in feasible if BASELINE not in trial.user_attrs]
    return max(swept, key=lambda trial: _sign(study) * trial.values[0], default=None)


def front(study: optuna.Study) -> list[str]:
    """Names of the feasible trials that no other beats in every objective, the best in the first at the top."""
    trials = sorted(study.best_trials, key=lambda trial: -_sign(study) * trial.values[0])
    return [folder_of(trial) for trial in trials]


def winner(study: optuna.Study, folder: Path) -> str | None:
    """Folder of what is to be served: the best trial, or the baseline if none beat it; None if nothing is feasible."""
    trial, baseline = best(study), Result.find(folder / BASELINE)
    if baseline and baseline.feasible and (trial is None or _wins(study, baseline.values[0], trial.values[0])):
        return BASELINE
    return folder_of(trial) if trial else None


def headline(study: optuna.Study, folder: Path, config: Config) -> dict[str, float]:
    """The study in a few figures, for MLflow's parent run."""
    trials = [trial for trial in study.trials if LOST not in trial.user_attrs and trial.state is not TrialState.WAITING]
    figures = {"trials": float(len(trials)), "failed_trials": float(sum(map(_failed, trials)))}
    metric = config.objective.metrics[0]
    trial, baseline = best(study), Result.find(folder / BASELINE)
    if baseline and baseline.complete:
        figures[f"baseline_{metric}"] = baseline.values[0]
    if trial:
        figures[f"best_{metric}"] = trial.values[0]
        if baseline and baseline.complete and baseline.values[0]:
            figures["gain_percent"] = _sign(study) * (trial.values[0] / baseline.values[0] - 1) * 100
    return figures


def write(study: optuna.Study, folder: Path, config: Config) -> str:
    """Leave summary.txt and summary.json in `folder`; returns the words."""
    text = words(study, folder, config)
    (folder / "summary.txt").write_text(text)
    body = {"study": config.study, "best": winner(study, folder), "figures": headline(study, folder, config)}
    (folder / FILE).write_text(json.dumps(body, indent=1))
    return text


def words(study: optuna.Study, folder: Path, config: Config) -> str:
    """Best against baseline (or the Pareto front), the command that serves it, where things lie.

    Of several objectives, the front is also written to `folder`/pareto.json.
    """
    parts = [_counts(study, config)]
    baseline, trial = Result.find(folder / BASELINE), best(study)
    names = front(study) if len(study.directions) > 1 else [folder_of(trial)] if trial else []
    rows = {BASELINE: baseline} | {name: Result.find(folder / name) for name in names}
    parts += _table({name: row for name, row in rows.items() if row and row.complete}, config)
    if baseline and not baseline.complete:
        parts.append(f"{BASELINE} failed: {baseline.reason}")
    elif baseline and not baseline.feasible:
        parts.append(f"{BASELINE} is infeasible: {outcome(baseline, config.objective.metrics)}")
    if trial is None:
        parts += _why_none(study)
    elif len(study.directions) > 1:
        parts += _pareto({name: row for name, row in rows.items() if row and name in names}, folder)
    else:
        result = rows[folder_of(trial)]
        assert result is not None
        parts += _verdict(study, trial, result, baseline)
        warning = edge(rows[winner(study, folder) or folder_of(trial)], config)
        parts += ["", warning] if warning else []
    parts += _surprises(study) + _nodes(study)
    if said := verified(folder):
        parts += ["", f"Verified: {said}"]
    if any(row and row.estimated for row in rows.values()):
        parts += ["", "These are estimates of a simulation (backend=sim), not measurements."]
    parts += ["", f"Everything measured: {folder}/"]
    if config.tracking.enabled:
        uri = redact(config.tracking.uri)
        where = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        parts.append(f"Compare the trials:  {where}")
    return "\n".join(parts) + "\n"


def _counts(study: optuna.Study, config: Config) -> str:
    asked = [trial for trial in study.trials if trial.state is not TrialState.WAITING]
    trials = [trial for trial in asked if not {BASELINE, LOST} & trial.user_attrs.keys()]
    refused = sum("refused" in trial.user_attrs for trial in trials)
    failed = sum(map(_failed, trials))
    again = sum(DUPLICATE in trial.user_attrs for trial in trials)
    more = f", {refused} combinations refused before they took a GPU" if refused else ""
    more += f", {again} asked for again and looked up" if again else ""
    pruned = [trial for trial in trials if trial.state is TrialState.PRUNED]
    ended = sum(not {"refused", "reason"} & trial.user_attrs.keys() for trial in pruned)
    more += f", {ended} ended early by the pruner" if ended else ""
    return f"Study {config.study}: {len(trials) - refused - again} trials, {failed} failed{more}\n"


def _why_none(study: optuna.Study) -> list[str]:
    reasons = sorted({f"  {trial.user_attrs['reason']}" for trial in study.trials if "reason" in trial.user_attrs})
    parts = ["", *(["Why trials failed:", *reasons] if reasons else [])]
    if any(trial.state is TrialState.COMPLETE for trial in study.trials):
        parts += ["No trial is feasible: loosen the limits, lower the load or widen the space."]
    return parts


def _verdict(study: optuna.Study, trial: FrozenTrial, result: Result, baseline: Result | None) -> list[str]:
    changed, command = shorten(trial.params), ["", f"  {result.shell_command}"]
    if not (baseline and baseline.feasible):
        return ["", f"Best: {changed} (no usable baseline to compare with)", *command]
    change = f"{result.values[0] / baseline.values[0] - 1:+.1%}" if baseline.values[0] else f"{result.values[0]:g}"
    gain = f"{change} against vLLM's defaults, measured once each"
    if not _wins(study, baseline.values[0], result.values[0]):
        return ["", f"Best: {changed} ({gain})", *command]
    worse = f"No trial beat vLLM's defaults. The best was {changed} ({gain}). Serve the defaults:"
    return ["", worse, "", f"  {baseline.shell_command}"]


def edge(served: Result | None, config: Config) -> str:
    """A warning where a step of a full server takes about as long as TPOT may be: a load then holds by a hair."""
    queued, limit = served and served.metrics.get("queued_tpot_p99_ms"), config.scenario.tpot_ms
    if not queued or not limit or abs(queued / limit - 1) > EDGE:
        return ""
    return (
        f"On an edge: while requests queue, its TPOT is {queued:.1f} ms (p99) where {limit:g} are allowed. "
        "A machine that is a little slower may hold far less: verify it where it will serve."
    )


def verified(folder: Path) -> str:
    """What autotune.commands.verify said of the study in `folder`; empty if it has not."""
    file = folder / VERDICT
    return str(json.loads(file.read_text())["line"]) if file.exists() else ""


def _surprises(study: optuna.Study) -> list[str]:
    """Where a measurement contradicts the simulation that a study's first trials came from."""
    found, checked = [], 0
    for trial in study.trials:
        expected = trial.user_attrs.get(EXPECTED)
        if expected is None or LOST in trial.user_attrs or not (_failed(trial) or trial.state is TrialState.COMPLETE):
            continue
        checked += 1
        if _failed(trial):
            found.append(f"  {folder_of(trial)}: expected to run, and failed: {trial.user_attrs['reason']}")
            continue
        off = trial.values[0] / expected["values"][0] - 1 if expected["values"][0] else 0.0
        feasible = all(value <= 0 for value in trial.constraints.values())
        if abs(off) > SURPRISE or feasible != expected["feasible"]:
            words = {True: "feasible", False: "infeasible"}
            found.append(
                f"  {folder_of(trial)}: expected {expected['values'][0]:.4g} ({words[expected['feasible']]}), "
                f"measured {trial.values[0]:.4g} ({words[feasible]})"
            )
    if not checked:
        return []
    if not found:
        return ["", f"The simulation was right about all {checked} trials that it chose (within {SURPRISE:.0%})."]
    return ["", f"The simulation was wrong about {len(found)} of the {checked} trials that it chose:", *found]


def _nodes(study: optuna.Study) -> list[str]:
    """What each node's canary showed, where there were some."""
    canaries = study.user_attrs.get(CANARIES, {})
    measured = [value for value in canaries.values() if value is not None]
    if not canaries:
        return []
    middle = statistics.median(measured) if measured else 0.0
    lines = ["", "Nodes, by a short baseline on each:"]
    for node, value in sorted(canaries.items()):
        if value is None:
            lines.append(f"  {node}: failed")
        else:
            slow = "  slow" if _sign(study) * (middle - value) > SLOW * middle else ""
            lines.append(f"  {node}: {value:.4g}{slow}")
    return lines


def _pareto(rows: Mapping[str, Result], folder: Path) -> list[str]:
    body = [
        {"name": name, "params": row.params, "values": row.values, "command": row.shell_command}
        for name, row in rows.items()
    ]
    (folder / "pareto.json").write_text(json.dumps(body, indent=1))
    parts = ["", "Pareto front: for each of these, no other is better in every objective (pareto.json)"]
    for name, row in rows.items():
        parts += [f"  {name}: {shorten(row.params)}", f"    {row.shell_command}"]
    return parts


def _table(rows: Mapping[str, Result], config: Config) -> list[str]:
    if not rows:
        return []
    known = {key for key, _, _ in COLUMNS}
    columns = [*COLUMNS, *((name, name, 2) for name in config.objective.metrics if name not in known)]
    head = ["", *(heading for _, heading, _ in columns), "LoadGen"]
    body = [
        [name, *(f"{row.metrics[key]:,.{digits}f}" for key, _, digits in columns), row.verdict]
        for name, row in rows.items()
    ]
    return aligned([head, *body])


def _failed(trial: FrozenTrial) -> bool:
    return "reason" in trial.user_attrs


def folder_of(trial: FrozenTrial) -> str:
    """The trial's folder."""
    return BASELINE if BASELINE in trial.user_attrs else f"trial-{trial.number}"


def _sign(study: optuna.Study) -> int:
    """1 where more of the first objective is better, else -1."""
    return 1 if study.directions[0] is StudyDirection.MAXIMIZE else -1


def _wins(study: optuna.Study, baseline: float, value: float) -> bool:
    """Whether the baseline's first value is as good as this one, or better."""
    return _sign(study) * (baseline - value) >= 0
