"""Texts and headline figures: the outcome of a trial, the summary of a study."""

import json
import math
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path

from autotune.config.redact import redact
from autotune.config.schema import Check, Config, Kind, Rules
from autotune.config.vllm_flags import FLAG
from autotune.measure import objective, rules
from autotune.measure.accuracy import CONSTRAINT, PASSED, UNKNOWN, impossible, is_numeric
from autotune.measure.limits import heading, limits_of
from autotune.measure.result import Result, State
from autotune.results import fleet
from autotune.results.study import BASELINE, ON_SHARED, RECIPE, REFERENCES, SPACE, TIE, Study
from autotune.system.files import left_in, write_whole
from autotune.text import aligned, by_kind, count, rounded, shorten

SLOW = 0.1  # share of the median node's value that a slow one is worse by
SURPRISE = 0.15  # share of the expected value by which a measured one contradicts it
EDGE = 0.1  # share of a TPOT limit by which the TPOT of a full server is close to it
FILE = "summary.json"  # in a study's folder: its headline figures
VERDICT = "verify.json"  # there: what `autotune verify` found
# Columns of a table of trials: metric, heading, digits.
COLUMNS = [
    ("tokens_per_s", "tokens/s", 1),
    ("samples_per_s", "samples/s", 2),
    ("ttft_p99_ms", "TTFT p99 ms", 1),
    ("tpot_p99_ms", "TPOT p99 ms", 2),
    ("latency_p99_ms", "latency p99 ms", 0),
]
ESTIMATES = "These are estimates of a simulation (backend=sim), not measurements."
SERVE = {BASELINE: "the defaults", RECIPE: "the recipe"}
HEADINGS = {metric: heading for metric, heading, _ in COLUMNS}


def outcome(result: Result, config: Config) -> str:
    """One line on how a trial ended."""
    if not result.complete:
        return f"failed: {result.reason}"
    named = zip(config.objective.metrics, result.values, strict=True)
    values = ", ".join(f"{name} {rounded(value)}" for name, value in named)
    over = broken(result, config)
    why = f"; infeasible: {', '.join(over)}" if over else ""
    return f"{values}; {_judged(result)}{why}"


def _judged(result: Result) -> str:
    verdict = result.verdict + (f" ({'; '.join(result.reasons)})" if result.reasons else "")
    return f"{result.verdict_by}: {verdict}"


def single(result: Result, config: Config, folder: Path) -> str:
    """A trial that ran alone."""
    lines = ["", *_table({config.model.name: result}, config), "", outcome(result, config)]
    lines += rules.told(config, result.deviations)
    if result.estimated:
        lines.append(ESTIMATES)
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result.phases.items())
    return "\n".join([*lines, seconds, "", f"  {result.shell_command}", "", f"Everything measured: {folder}/"])


def headline(study: Study) -> dict[str, float]:
    """The study in a few figures, for MLflow's parent run."""
    counts = study.counts
    figures = {"trials": float(counts.total() - counts[State.refused]), "failed_trials": float(counts[State.failed])}
    metric, best = study.objective.metrics[0], study.best
    for name in REFERENCES:
        if name in study.complete:
            figures[f"{name}_{metric}"] = study.results[name].values[0]
    if best:
        figures[f"best_{metric}"] = study.results[best].values[0]
        for name, figure in ((BASELINE, "gain_percent"), (RECIPE, "gain_over_recipe_percent")):
            if (gain := study.gain(best, over=name)) is not None:
                figures[figure] = gain * 100
    if load := study.config.target_load:
        cheapest = next(iter(fleet.fleets(study.complete.items(), study.config, load)), None)
        if cheapest:
            figures |= {"gpus_for_target_load": float(cheapest.gpus)}
            figures |= {"cost_per_hour_for_target_load": cheapest.per_hour} if cheapest.per_hour else {}
    return figures


def write(study: Study) -> str:
    """Leave summary.txt, summary.json and, with several objectives, pareto.json in its folder; returns the text."""
    text = render(study)
    write_whole(study.folder / "summary.txt", text)
    body = {"study": study.config.study, "best": study.served, "figures": headline(study)}
    write_whole(study.folder / FILE, json.dumps(body, indent=1))
    if len(study.objective.metrics) > 1 and study.front:
        rows = {name: study.results[name] for name in study.front}
        front = [
            {"name": name, "params": row.params, "values": row.values, "command": row.shell_command}
            for name, row in rows.items()
        ]
        write_whole(study.folder / "pareto.json", json.dumps(front, indent=1))
    return text


def render(study: Study) -> str:
    """Best against baseline (or the Pareto front), the command that serves it, where things lie."""
    config, best = study.config, study.best
    several = len(study.objective.metrics) > 1
    names = study.front if several else [best] if best else []
    rows = {name: study.results[name] for name in [*REFERENCES, *names] if name in study.complete}
    parts = [_counts(study), *_apart(*_table(rows, config)), *_references(study)]
    if best is None:
        parts += _why_none(study)
    elif several:
        parts += _pareto(study)
    else:
        parts += _verdict(study, best)
        parts += _apart(edge(study.results[study.served or best], config))
    parts += _apart(unloaded(study))
    parts += _accuracy(study) + _surprises(study) + _shared(study) + _nodes(study)
    parts += _apart(f"Sampler: {config.sampler}" if "(" in config.sampler else "")
    if (load := config.target_load) and study.complete:
        parts += _apart(*fleet.render(fleet.fleets(study.complete.items(), config, load), config, load))
    parts += _apart(_verified(study))
    if config.rules is not Rules.none:
        parts += _apart(*rules.told(config, study.results[best].deviations if best else []))
    if any(result.estimated for result in study.results.values()):
        parts += _apart(f"{ESTIMATES} With prior=sim instead the same command measures, the best guesses first.")
    parts += _apart(f"Everything measured: {study.folder}/")
    if config.tracking.enabled:
        uri = redact(config.tracking.uri)
        where = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        parts.append(f"Compare the trials:  {where}")
    return "\n".join(parts) + "\n"


def _apart(*lines: str) -> list[str]:
    """The lines below a blank one; nothing if there are none."""
    return ["", *lines] if any(lines) else []


def _counts(study: Study) -> str:
    counts = study.counts
    refused, pruned, looked_up = counts[State.refused], counts[State.pruned], len(study.swept) - counts.total()
    more = f", {count(refused, 'combination')} refused before taking a GPU" if refused else ""
    more += f", {looked_up} asked for again and looked up" if looked_up else ""
    more += f", {pruned} ended early" if pruned else ""
    trials = count(counts.total() - refused, "trial")
    return f"Study {study.config.study}: {trials}, {counts[State.failed]} failed{more}"


def _references(study: Study) -> list[str]:
    """Lines on the recipe, and on what failed or broke a limit of what trials are compared with."""
    parts, recipe = [], study.config.model.recipe
    if RECIPE in study.results:
        source = ", ".join(filter(None, [recipe.source, recipe.date])) or "model.recipe"
        parts += ["", f"recipe: {shorten(study.results[RECIPE].params)} ({source})"]
    for name in REFERENCES:
        if (result := study.results.get(name)) and not result.complete:
            parts.append(f"{name} failed: {result.reason}")
        elif result and not result.feasible:
            parts.append(f"{name} is infeasible: {', '.join(broken(result, study.config))}; {_judged(result)}")
    return parts


def _why_none(study: Study) -> list[str]:
    reasons = [result.reason for result in study.swept.values() if result.state is State.failed]
    kinds = [f"  {count(len(kind), 'trial')}: {reasons[kind[0]]}" for kind in by_kind(reasons)]
    parts = _apart(*(["Why trials failed:", *kinds] if kinds else []))
    if any(result.complete for result in study.swept.values()):
        parts += ["", f"No trial is feasible: {objective.way_out(study.config)}."]
    return parts


def _verdict(study: Study, best: str) -> list[str]:
    changed = shorten(study.results[best].params)
    text = f"Best: {changed} ({'; '.join(_against(study, best)) or 'no usable baseline to compare with'})"
    served = study.served or best
    if served != best:
        beat = f"No trial beat {REFERENCES[served]} by more than {TIE:.1%}"
        text = f"{beat}. The best was {text.removeprefix('Best: ')}. Serve {SERVE[served]}:"
    return ["", text, "", f"  {study.results[served].shell_command}"]


def _accuracy(study: Study) -> list[str]:
    """Lines on the answers of what is served, and on the trials that can't be: theirs were refused, or are unknown."""
    served = study.results.get(study.served or "")
    left_out: dict[str, list[str]] = {}
    for name, result in study.complete.items():
        if result.constraints.get(CONSTRAINT, 0) > 0:
            deciding = {key: value for key, value in result.params.items() if is_numeric(key.removeprefix(FLAG))}
            told = f"{name} ({shorten(deciding)})" if deciding else name
            left_out.setdefault(result.accuracy or UNKNOWN, []).append(told)
    lines = []
    if served and served.accuracy.startswith(PASSED):
        whose = "MLPerf's bounds" if study.config.accuracy.check is Check.mlperf else "the baseline's"
        lines.append(f"Its answers against {whose}: {served.accuracy}.{_made_up(study.config)}")
    elif served and not served.accuracy and any(is_numeric(name.removeprefix(FLAG)) for name in served.params):
        why = impossible(served.args, served.estimated) or "accuracy=nll checks them"
        lines.append(f"Its answers were not checked, and its flags may change them: {why}.")
    if left_out:
        lines.append("Left out for their answers (accuracy=none leaves out the check):")
        lines += [f"  {', '.join(names)}: {verdict}" for verdict, names in left_out.items()]
    return _apart(*lines)


def _made_up(config: Config) -> str:
    """A warning where the texts that were scored are nobody's."""
    return " On made-up texts: check it with yours (dataset.path=…)." if rules.is_made_up(config.dataset) else ""


def _shared(study: Study) -> list[str]:
    """Sentences on the servers that trials shared, and on what a server of its own made of the best one."""
    sharing = [result.facts["server"].partition(",")[0] for result in study.swept.values() if result.shared_server]
    again = {name: one.facts[ON_SHARED] for name, one in study.swept.items() if ON_SHARED in one.facts}
    if not sharing and not again:
        return []
    told = "No trial but the best one shared a server."
    if sharing:
        shared = f"{count(len(sharing) + len(again), 'trial')} shared {count(len(set(sharing)), 'server')}"
        told = f"{shared}, whose scheduler was changed between them (backend.hot=never: each starts its own)."
    parts = ["", told]
    for name, on_shared in again.items():
        result, value = study.results[name], json.loads(on_shared)[0]
        fresh = rounded(result.values[0]) if result.complete else f"failed ({result.reason})"
        parts.append(f"  {name} on a server of its own: {fresh}; on the shared one it was {rounded(value)}")
    if left := study.uncertified():
        parts.append(f"  {left} was not measured on one of its own: autotune verify study={study.name}")
    return parts


def gains(study: Study, best: str) -> list[str]:
    """Phrases on what the best trial gains over each of REFERENCES that is feasible."""
    return [f"{change(study, best, name)} against {REFERENCES[name]}" for name in study.references]


def _against(study: Study, best: str) -> list[str]:
    """Phrases that set the best trial beside REFERENCES: what it gains, and which limits they break."""
    how = "estimated" if study.results[best].estimated else "measured"
    phrases = [f"{', '.join(gains(study, best))}, {how} once each"] if study.references else []
    over = {name: study.results[name] for name in REFERENCES if name in study.complete and name not in study.references}
    if over:
        phrases.append("holds the limits")
        value = f"{study.objective.metrics[0]} {rounded(study.results[best].values[0])}"
        phrases += [
            f"{value}, {rounded(one.values[0])} with {REFERENCES[name]}, which break them" for name, one in over.items()
        ]
    return phrases


def broken(result: Result, config: Config) -> list[str]:
    """The constraints that `result` breaks, and by how much."""
    over = {name: value for name, value in result.constraints.items() if value > 0}
    failed, accuracy = over.pop("failed_requests", 0), over.pop(CONSTRAINT, 0)
    limits_ms = {f"{one.name}_p99": one.seconds * 1e3 for one in limits_of(config.scenario) if not one.by_prompt}
    limits = [_over(name, share, result, limits_ms.get(name, math.inf)) for name, share in over.items()]
    limits += [f"accuracy {result.accuracy or UNKNOWN}"] if accuracy else []
    return [*limits, f"{failed:.0f} requests failed"] if failed else limits


def _over(name: str, share: float, result: Result, limit_ms: float) -> str:
    """Words on a broken constraint: what was measured, or at most to be expected of it, beside its limit."""
    known = {words: result.metrics.get(f"{name}{unit}", 0.0) for words, unit in (("", "_ms"), ("up to ", "_upper_ms"))}
    for words, value_ms in known.items():
        if value_ms > limit_ms:
            return f"{heading(name.removesuffix('_p99'))} p99 {words}{rounded(value_ms)} ms (limit {limit_ms:g})"
    return f"{name} over by {f'{share:.0%}' if share >= 0.005 else 'less than 1%'}"


def change(study: Study, name: str, over: str = BASELINE) -> str:
    """The change of the first objective's metric from `over` to `name`: `+7.8%`; its value if that is 0."""
    gain = study.gain(name, over=over)
    return f"{study.results[name].values[0]:g}" if gain is None else f"{objective.sign(study.objective) * gain:+z.1%}"


def edge(served: Result | None, config: Config) -> str:
    """A warning where a full server's TPOT is close to its limit: a slightly slower machine may then hold far less."""
    queued, limit = served and served.metrics.get("queued_tpot_p99_ms"), config.scenario.tpot_ms
    if not queued or not limit or abs(queued / limit - 1) > EDGE:
        return ""
    return (
        f"Close to a limit: while requests queue, its TPOT is {queued:.1f} ms (p99) where {limit:g} are allowed. "
        "A machine that is a little slower may hold far less: verify it where it will serve."
    )


def unloaded(study: Study) -> str:
    """A warning where vLLM's defaults serve all that is sent, so that no configuration can serve more."""
    scenario, baseline = study.config.scenario, study.baseline
    key, search = f"scenario.{scenario.load_field}", objective.LOADED.get(scenario.kind)
    if not baseline or not baseline.feasible or baseline.bound != "arrival" or scenario.kind is Kind.ClosedLoop:
        return ""
    swept = {name for result in study.swept.values() for name in result.params} | left_in(study.folder / SPACE).keys()
    if not search or objective.searches(study.objective) or objective.sign(study.objective) < 0 or key in swept:
        return ""
    load = objective.offered_load(study.objective, scenario)
    return (
        f"vLLM's defaults keep up with {load}, and nothing can serve more than is sent: raise {key}, or let "
        f"each trial find the most that it can serve (objective={search})."
    )


def verified(folder: Path) -> str:
    """The verdict of `autotune verify` on the study in `folder`; empty without one."""
    return str(left_in(folder / VERDICT).get("line", ""))


def _verified(study: Study) -> str:
    """The verdict, or how to get one of what was measured and seems better."""
    if words := verified(study.folder):
        return f"Verified: {words}"
    if not study.best or study.served != study.best or study.results[study.best].estimated:
        return ""
    return f"Next: autotune verify study={study.name} (each was measured once, and the best of many is partly luck)"


def _surprises(study: Study) -> list[str]:
    """Lines on the trials that a simulation foresaw: how many it was right about, and which not."""
    ended = {name: one for name, one in study.swept.items() if one.state in (State.complete, State.failed)}
    told = {name: _surprise(result) for name, result in ended.items() if result.expected}
    wrong = [f"  {name}: {words}" for name, words in told.items() if words]
    if wrong:
        return _apart(f"The simulation was wrong about {len(wrong)} of the {len(told)} trials that it foresaw:", *wrong)
    all_of_them = f"all {len(told)} trials" if len(told) > 1 else "the one trial"
    right = f"The simulation was right about {all_of_them} that it foresaw (within {SURPRISE:.0%})."
    return _apart(right if told else "")


def _surprise(result: Result) -> str:
    """Words on a trial that a simulation was wrong about; empty if it was right."""
    values, feasible = result.expected["values"], result.expected["feasible"]
    if not values:
        return f"expected to fail, measured {rounded(result.values[0])}" if result.complete else ""
    if not result.complete:
        return f"expected to run, and failed: {result.reason}"
    off = result.values[0] / values[0] - 1 if values[0] else 0.0
    if abs(off) <= SURPRISE and feasible == result.holds_limits:
        return ""
    words = ("", "") if feasible == result.holds_limits else (" (infeasible)", " (feasible)")
    expected = f"expected {rounded(values[0])}{words[feasible]}"
    return f"{expected}, measured {rounded(result.values[0])}{words[result.holds_limits]}"


def _nodes(study: Study) -> list[str]:
    """Lines on each node, by what its canary measured."""
    values = {node: result.values[0] for node, result in study.canaries.items() if result.complete}
    middle = statistics.median(values.values()) if values else 0.0
    lines = ["", "Nodes, by a short baseline on each:"] if study.canaries else []
    for node in sorted(study.canaries):
        worse = objective.sign(study.objective) * (middle - values[node]) if node in values else 0.0
        told = f"{rounded(values[node])}{'  slow' if worse > SLOW * middle else ''}" if node in values else "failed"
        lines.append(f"  {node}: {told}")
    return lines


def _pareto(study: Study) -> list[str]:
    parts = ["", "Pareto front: for each of these, no other is better in every objective (pareto.json)"]
    for name in study.front:
        row = study.results[name]
        parts += [f"  {name}: {shorten(row.params)}", f"    {row.shell_command}"]
    return parts


def _table(rows: Mapping[str, Result], config: Config) -> list[str]:
    if not rows:
        return []
    known = {key for key, _, _ in COLUMNS}
    columns = [*COLUMNS, *((name, name, 2) for name in config.objective.metrics if name not in known)]
    head = ["", *(heading for _, heading, _ in columns), next(iter(rows.values())).verdict_by]
    body = [
        [name, *(f"{row.metrics.get(key, math.nan):,.{digits}f}" for key, _, digits in columns), row.verdict]
        for name, row in rows.items()
    ]
    return aligned([head, *body])
