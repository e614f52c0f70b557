"""Whether the best configurations of a study are better than vLLM's defaults, by measuring them again:

    autotune verify study=demo k=3 n=5

study       its name below multirun/, or its folder
k           how many of its best configurations are compared with the baseline
trials      those instead: [trial-3,trial-9]
n           repeats of each, every one on a fresh server
metric      one of the objective's; without it the first
confidence  of all k intervals together, 0.95
seed        of the order in which they run

Any other key=value changes the configuration of every repeat: launcher.n_jobs=1, backend.env.HF_TOKEN=…
Repeats that have completed are kept, so the same command goes on after a stop, and a larger n adds to them.

Exit code: 0 a configuration is better than the defaults and holds the limits in every repeat, 2 none is, 1 an error.
"""

import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from omegaconf import MISSING, OmegaConf

from autotune.config.command_line import errors_in_one_line, options
from autotune.config.overrides import with_fields
from autotune.config.redact import HIDDEN
from autotune.config.schema import Config
from autotune.errors import InputError, MeasureError, TrackingError
from autotune.measure import progress, trial
from autotune.measure.paired import Difference, difference
from autotune.measure.prepare import gpu_count
from autotune.measure.result import Result
from autotune.results import summary, tracking
from autotune.results.study import BASELINE, Study, load
from autotune.sweep import storage
from autotune.sweep.launchers import Job, Launcher, make_launcher
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from autotune.system.leases import devices
from autotune.text import aligned, shorten

log = logging.getLogger(__name__)

FOLDER, TABLE = "verify", "verify.txt"  # below the study's folder
POLL_S = 0.1
NO_BETTER = 2  # exit code


@dataclass
class Verify:
    study: str = MISSING
    k: int = 3
    trials: list[str] | None = None
    n: int = 5
    metric: str | None = None
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Repeat:
    """One configuration in one block."""

    name: str  # of the study's trial
    block: int  # from 1
    trial: TrialSpec


@dataclass(frozen=True)
class Row:
    """What all repeats of one configuration say."""

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


def repeats(study: Study, wanted: Verify, overrides: Sequence[str]) -> list[Repeat]:
    """Every run in the order it is started: block by block, within one in random order.

    All configurations of a block see the same load: its number is added to scenario.seed, so that none sees the
    load that the study chose it on. They also run on the same GPUs; blocks on different ones run side by side.
    A search for the highest load begins where the study's ended. Raises InputError.
    """
    names = [BASELINE, *chosen(study, wanted)]
    configs = {name: study.config_of(name, overrides) for name in names}
    first = configs[names[1]]
    check_secrets(first, study)
    groups = gpu_groups(first.gpus, max(map(gpu_count, configs.values())))

    def repeat(name: str, block: int) -> Repeat:
        gpus, seed = groups[block % len(groups)], configs[name].scenario.seed + block
        # The baseline's own launcher and GPUs may be others (baseline_gpu).
        changed = {"gpus": gpus, "launcher": first.launcher, "scenario.seed": seed}
        written = [*study.results[name].overrides, *overrides, f"scenario.seed={seed}"]
        if highest := study.results[name].metrics.get("max_qps"):
            changed["scenario.search.start_qps"] = highest
            written.append(f"scenario.search.start_qps={highest}")
        config = with_fields(configs[name], changed)
        return Repeat(name, block, TrialSpec(config, written, study.folder / FOLDER / f"{name}-{block}"))

    found = []
    for at in range(1, wanted.n + 1, len(groups)):
        blocks = range(at, min(at + len(groups), wanted.n + 1))
        orders = [random.Random(f"{wanted.seed} {block}").sample(names, len(names)) for block in blocks]
        for together in zip(*orders, strict=True):
            found += [repeat(name, block) for name, block in zip(together, blocks, strict=True)]
    return found


def gpu_groups(gpus: Any, size: int) -> list[Any]:
    """`gpus` in groups of `size`; one group of whatever there is where that is not known, or too little."""
    there = [] if gpus is None else devices(gpus)
    return [there[at : at + size] for at in range(0, len(there) - size + 1, size)] or [gpus]


def chosen(study: Study, wanted: Verify) -> list[str]:
    """The trials that are compared with the baseline. Raises InputError."""
    if not (study.baseline and study.baseline.complete):
        why = study.baseline.reason if study.baseline else "baseline=false"
        raise InputError(f"study={study.name}: there is no baseline to compare with ({why}); run the study with one")
    if wanted.n < 2 or wanted.k < 1 or not 0 < wanted.confidence < 1:
        raise InputError("write k=1 or more, n=2 or more, and a confidence between 0 and 1")
    if wanted.trials is not None:
        return [study.chosen(name) for name in dict.fromkeys(wanted.trials) if name != BASELINE]
    ranked = study.ranked_by(_metric(study, wanted))
    if not ranked:
        raise InputError(f"study={study.name}: no trial is feasible; name some: trials=[trial-3,trial-9]")
    return ranked[: wanted.k]


def _metric(study: Study, wanted: Verify) -> int:
    """Index of the metric among the objective's. Raises InputError."""
    metrics = study.objective.metrics
    if wanted.metric not in (None, *metrics):
        raise InputError(f"metric={wanted.metric}: the study's objective has {', '.join(metrics)}")
    return metrics.index(wanted.metric) if wanted.metric else 0


def check_secrets(config: Config, study: Study) -> None:
    """Raise InputError for a value that the study's folder hides and the command line does not give."""

    def hidden(node: Any, key: str) -> list[str]:
        if isinstance(node, dict):
            return [
                found for name, item in node.items() for found in hidden(item, f"{key}.{name}" if key else str(name))
            ]
        return [key] if isinstance(node, str) and HIDDEN in node else []

    if keys := hidden(OmegaConf.to_container(OmegaConf.structured(config)), ""):
        raise InputError(f"{study.folder} hides {', '.join(keys)}; add {keys[0]}=… to this command")


def run(found: Sequence[Repeat], launcher: Launcher, ended: Callable[[Repeat, Result], None]) -> None:
    """Run those that have not completed yet, up to the launcher's n_jobs side by side, and tell `ended` of each."""
    waiting = [one for one in found if not kept(one)]
    running: list[tuple[Repeat, Job]] = []
    try:
        with interrupt.held():  # no job is started that nobody knows of
            while waiting or running:
                interrupt.check()
                free = launcher.n_jobs - len(running)
                batch, waiting = waiting[:free], waiting[free:]
                running += start(batch, launcher)
                for one, job in [pair for pair in running if pair[1].done()]:
                    running.remove((one, job))
                    ended(one, Result.find(one.trial.folder) or Result(reason=job.reason()))
                if running:
                    running[0][1].wait(POLL_S)
    finally:
        for _, job in running:
            job.cancel()


def kept(one: Repeat) -> bool:
    """Whether it completed already, with this very configuration."""
    result, folder = Result.find(one.trial.folder), one.trial.folder
    return bool(result and result.complete and (folder / "config.yaml").read_text() == trial.as_yaml(one.trial.config))


def complete_blocks(found: Sequence[Repeat]) -> int:
    """How many blocks, from the first on, have completed."""
    missing = [one.block for one in found if not kept(one)]
    return min(missing) - 1 if missing else max(one.block for one in found)


def start(batch: Sequence[Repeat], launcher: Launcher) -> list[tuple[Repeat, Job]]:
    """Jobs for `batch`; a cluster's that outlived an earlier process is taken up."""
    jobs = [(one, job) for one in batch if (job := launcher.attach(one.trial.folder))]
    fresh = [one for one in batch if one not in [taken for taken, _ in jobs]]
    for one in fresh:
        one.trial.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            (one.trial.folder / "result.json").unlink()
        progress.begin(one.trial.folder)
        log.info("block %d: %s", one.block, one.name)
    return [*jobs, *zip(fresh, launcher.submit([one.trial for one in fresh]) if fresh else [], strict=True)]


def judge(study: Study, wanted: Verify, results: dict[tuple[str, int], Result]) -> Verdict:
    """What the repeats say; the study's own values take no part. `results` by name and block.

    Raises MeasureError if the baseline completed in fewer than two blocks.
    """
    index = _metric(study, wanted)
    names = [BASELINE, *dict.fromkeys(name for name, _ in results if name != BASELINE)]
    rows = {
        name: _row(study, name, index, [results[name, block] for block in range(1, wanted.n + 1)]) for name in names
    }
    baseline = rows[BASELINE]
    if sum(value is not None for value in baseline.values) < 2:
        raise MeasureError(
            f"the baseline completed fewer than two of {wanted.n} repeats: {'; '.join(baseline.failures)}"
        )
    for name in names[1:]:
        pairs = [(a, b) for a, b in zip(rows[name].values, baseline.values, strict=True) if None not in (a, b)]
        if len(pairs) >= 2:
            mine, theirs = zip(*pairs, strict=True)
            found = difference(mine, theirs, wanted.confidence, len(names) - 1)
            rows[name] = Row(**{**vars(rows[name]), "difference": found})
    direction = study.objective.directions[index]
    winner = _winner([rows[name] for name in names[1:]], baseline, 1 if direction == "maximize" else -1)
    estimated = any(result.estimated for result in results.values())
    line = _line(study, index, wanted, rows, winner)
    metric = study.objective.metrics[index]
    return Verdict(
        study.name, metric, direction, wanted.n, wanted.confidence, estimated, winner, line, list(rows.values())
    )


def _row(study: Study, name: str, index: int, found: Sequence[Result]) -> Row:
    values = [result.values[index] if result.complete else None for result in found]
    measured = [value for value in values if value is not None]
    return Row(
        name=name,
        params=study.results[name].params,
        values=values,
        held=sum(result.feasible for result in found),
        failures=sorted({result.reason for result in found if not result.complete}),
        mean=sum(measured) / len(measured) if measured else None,
    )


def _winner(rows: Sequence[Row], baseline: Row, sign: int) -> str | None:
    """The best of those that held the limits in every repeat and are better than the defaults (or these never held)."""
    n = len(baseline.values)
    sure = [
        row
        for row in rows
        if row.held == n and row.difference and (baseline.held == 0 or _least_gain(row.difference, sign) > 0)
    ]
    best = max(sure, key=lambda row: sign * (row.mean or 0.0), default=None)
    return best.name if best else None


def _least_gain(found: Difference, sign: int) -> float:
    return min(sign * found.low, sign * found.high)


def _line(study: Study, index: int, wanted: Verify, rows: dict[str, Row], winner: str | None) -> str:
    baseline, others = rows[BASELINE], [row for row in rows.values() if row.name != BASELINE]
    together = f"{wanted.confidence:.0%} confidence{f' for all {len(others)} together' if len(others) > 1 else ''}"
    if winner is None:
        broke = [row.name for row in others if row.held < wanted.n]
        why = f" ({', '.join(broke)} did not hold the limits in every repeat)" if broke else ""
        return f"No better than the defaults: nothing was, in {wanted.n} repeats, with {together}{why}."
    row = rows[winner]
    if baseline.held == 0:
        return (
            f"Better than the defaults: {winner} held the limits in each of {wanted.n} repeats, the defaults in none."
        )
    first, theirs = study.results[winner].values[index], study.results[BASELINE].values[index]
    said = f"; the study, which chose it by this, had said {first / theirs - 1:+.1%}" if theirs else ""
    gain = change(row.difference, baseline.mean)
    return f"Better than the defaults: {winner}, {gain} in {wanted.n} repeats, with {together}{said}."


def change(found: Difference | None, baseline: float | None) -> str:
    """`+7.8% [+5.1%, +10.6%]` of the baseline's mean; in the metric's unit if that is 0."""
    if found is None:
        return ""
    parts = (found.mean, found.low, found.high)
    mean, low, high = (f"{part / baseline:+.1%}" if baseline else f"{part:+.4g}" for part in parts)
    return f"{mean} [{low}, {high}]"


def table(verdict: Verdict) -> str:
    """The verdict for people."""
    baseline = verdict.rows[0]
    lines = [("", verdict.metric, "against the baseline", "real", "limits held")]
    for row in verdict.rows:
        real = f"{min(0.999, 1 - row.difference.p):.1%}" if row.difference else ""
        mean = f"{row.mean:,.4g}" if row.mean is not None else "failed"
        lines.append((row.name, mean, change(row.difference, baseline.mean), real, f"{row.held} of {verdict.n}"))
    parts = aligned(lines)
    parts += ["", *(f"  {row.name}: {shorten(row.params)}" for row in verdict.rows[1:])]
    parts += [f"  {row.name} failed: {why}" for row in verdict.rows for why in row.failures]
    parts += ["", verdict.line]
    if verdict.estimated:
        parts.append("These are estimates of a simulation (backend=sim), not measurements.")
    return "\n".join(parts) + "\n"


def verify(study: Study, wanted: Verify, overrides: Sequence[str]) -> Verdict:
    """Run what is missing, judge it all, leave verify.json and verify.txt in the study's folder."""
    found = repeats(study, wanted, overrides)
    config, folder = found[0].trial.config, study.folder
    tracking.check(config.tracking)
    (folder / FOLDER).mkdir(exist_ok=True)
    log.info(
        "%d configurations and the baseline, %d repeats each: %d runs, %d of them kept",
        len({one.name for one in found}) - 1,
        wanted.n,
        len(found),
        sum(map(kept, found)),
    )
    with (
        storage.lock(folder / ".lock", str(folder)),
        tracking.study(config.tracking, f"{study.name}-verify", folder / FOLDER) as tracker,
    ):

        def ended(one: Repeat, result: Result) -> None:
            result.params = study.results[one.name].params
            result.save(one.trial.folder)
            log.info("block %d: %s: %s", one.block, one.name, summary.outcome(result, config.objective.metrics))
            try:
                tracker.log_trial(one.trial.folder, one.trial.folder.name, result)
            except TrackingError as error:
                log.warning("%s", error)

        everywhere = study.config_of(chosen(study, wanted)[0], overrides)  # a repeat's own gpus are those of its block
        try:
            run(found, make_launcher(everywhere), ended)
        except (KeyboardInterrupt, SystemExit):
            if (blocks := complete_blocks(found)) >= 2:
                log.info("%d blocks are complete: n=%d judges them without another run", blocks, blocks)
            raise
    verdict = judge(study, wanted, {(one.name, one.block): Result.load(one.trial.folder) for one in found})
    (folder / summary.VERDICT).write_text(json.dumps(asdict(verdict), indent=1))
    (folder / TABLE).write_text(table(verdict))
    return verdict


def main() -> None:
    interrupt.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    own = {field.name for field in fields(Verify)}
    words = [word for word in sys.argv[1:] if word.partition("=")[0] in own or "=" not in word]
    with errors_in_one_line():
        wanted = options(Verify, words, __doc__)
        overrides = [word for word in sys.argv[1:] if word not in words]
        verdict = verify(load(wanted.study), wanted, overrides)
        print(f"\n{table(verdict)}\nEvery repeat: {load(wanted.study).folder / FOLDER}/")
        print(f"Into the report: autotune report study={wanted.study}")
    sys.exit(0 if verdict.winner else NO_BETTER)


if __name__ == "__main__":
    main()
