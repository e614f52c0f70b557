"""Measure the best configurations of a study again, to see whether they are better than vLLM's defaults:

    autotune verify study=demo k=3 n=5

study       its name below multirun/, or its folder
k           how many of its best configurations to compare with the baseline
trials      compare these instead: [trial-3,trial-9]
n           repeats of each, every one on a fresh server
metric      one of the objective's; without it the first
confidence  of all k intervals together, 0.95
seed        of the order in which the repeats run

Any other key=value changes the configuration of every repeat: scenario.min_duration_s=300, backend.env.HF_TOKEN=…
Completed repeats are kept: the same command goes on after a stop, and a larger n adds to them.

Exit code: 0 a configuration is better than the defaults and holds the limits in every repeat, 2 none is, 1 an error.
"""

import json
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from omegaconf import MISSING

from autotune.config.bounds import within
from autotune.config.command_line import errors_in_one_line, options, own_and_overrides
from autotune.config.overrides import check, with_fields
from autotune.config.schema import Config, Hot
from autotune.errors import InputError
from autotune.measure import objective
from autotune.measure.accuracy import CONSTRAINT
from autotune.measure.prepare import gpu_count, prepare, prepare_samples
from autotune.measure.result import Result
from autotune.results import beside, summary, tracking
from autotune.results.study import BASELINE, VERIFY, Study, load
from autotune.results.verdict import Verdict, judge, render
from autotune.sweep import storage
from autotune.sweep.launchers import make_launcher
from autotune.sweep.repeats import Repeat, config_of, run_missing
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from autotune.system.files import LOCK, write_whole
from autotune.system.leases import devices
from autotune.text import count

log = logging.getLogger(__name__)

TABLE = "verify.txt"  # in the study's folder
NO_BETTER = 2  # exit code


@dataclass
class Verify:
    study: str = MISSING
    k: int = within(3, 1, 1000)
    trials: list[str] | None = None
    n: int = within(5, 2, 1000)  # a single repeat shows no spread
    metric: str | None = None
    confidence: float = within(0.95, 0.5, 0.9999)
    seed: int = 0


def configurations(study: Study, settings: Verify, overrides: Sequence[str]) -> dict[str, Config]:
    """The configurations to repeat, by trial: the baseline's, then those compared with it. Raises InputError."""
    return {name: config_of(study, name, overrides) for name in [BASELINE, *compared(study, settings)]}


def compared(study: Study, settings: Verify) -> list[str]:
    """The trials to compare with the baseline. Raises InputError."""
    if not (study.baseline and study.baseline.complete):
        why = study.baseline.reason if study.baseline else f"baseline={study.config.baseline}".lower()
        raise InputError(
            f"study={study.name}: vLLM's defaults are not there to compare with ({why}); run it with baseline=defaults"
        )
    ranked = study.ranked_by(metric_index(study, settings))
    if settings.trials is None and not ranked:
        raise InputError(f"study={study.name}: no trial is feasible; name some: trials=[trial-3,trial-9]")
    if settings.trials is None:
        return ranked[: settings.k]
    named = [study.chosen(name) for name in dict.fromkeys(settings.trials) if name != BASELINE]
    if not named:
        raise InputError(f"trials=[{','.join(settings.trials)}]: name one besides the baseline: trials=[trial-3]")
    return named


def metric_index(study: Study, settings: Verify) -> int:
    """The index of the metric among the objective's. Raises InputError."""
    metrics = study.objective.metrics
    if settings.metric not in (None, *metrics):
        raise InputError(f"metric={settings.metric}: the study's objective has {', '.join(metrics)}")
    return metrics.index(settings.metric) if settings.metric else 0


def shared(configs: Mapping[str, Config]) -> Config:
    """The configuration whose launcher and GPUs all repeats use; the baseline's own may be others (baseline_gpu)."""
    return next(config for name, config in configs.items() if name != BASELINE)


def plan(study: Study, settings: Verify, configs: Mapping[str, Config], overrides: Sequence[str]) -> list[Repeat]:
    """Every run in the order of their starts.

    All configurations of a block see the same load: its number is added to scenario.seed, so that none sees the
    load that the study chose it on. They also run on the same GPUs; blocks on different ones run side by side.
    A search for the highest load begins where the study's ended.
    """
    common = shared(configs)
    groups = gpu_groups(common.gpus, max(map(gpu_count, configs.values())))

    def repeat(name: str, block: int) -> Repeat:
        changes: dict[str, Any] = {"scenario.seed": configs[name].scenario.seed + block}
        if highest := objective.highest(study.results[name].metrics):
            changes["scenario.search.start_qps"] = highest
        changed = [f"{key}={value}" for key, value in changes.items()]
        placement = {"gpus": groups[block % len(groups)], "launcher": common.launcher}
        if configs[name].backend.get("hot") == Hot.same.value:  # each repeat has a server of its own
            placement["backend.hot"] = Hot.never.value
        spec = TrialSpec(
            with_fields(configs[name], changes | placement),
            [*study.results[name].overrides, *overrides, *changed],
            study.folder / VERIFY / f"{name}-{block}",
        )
        return Repeat(name, block, spec)

    return [repeat(name, block) for name, block in _order(list(configs), settings, len(groups))]


def _order(names: list[str], settings: Verify, side_by_side: int) -> Iterator[tuple[str, int]]:
    """Name and block of each run: so many blocks side by side, each in a random order of its own."""
    for first in range(1, settings.n + 1, side_by_side):
        blocks = range(first, min(first + side_by_side, settings.n + 1))
        orders = [random.Random(f"{settings.seed} {block}").sample(names, len(names)) for block in blocks]
        for together in zip(*orders, strict=True):
            yield from zip(together, blocks, strict=True)


def gpu_groups(gpus: Any, size: int) -> list[Any]:
    """`gpus` in groups of `size`; all of them as one group if they are unknown or too few."""
    ids = [] if gpus is None else devices(gpus)
    return [ids[first : first + size] for first in range(0, len(ids) - size + 1, size)] or [gpus]


def record(study: Study, tracker: beside.TrackingProcess, repeat: Repeat, result: Result) -> None:
    """Save, print and track the result of a repeat."""
    folder, result = repeat.trial.folder, as_gated(result, study.results[repeat.name])
    result.save(folder)
    log.info("block %d: %s: %s", repeat.block, repeat.name, summary.outcome(result, repeat.trial.config))
    tracker.log_trial(folder)


def as_gated(result: Result, known: Result) -> Result:
    """A repeat's result with what is known of the study's trial: its parameters, the gate's verdict on its answers."""
    verdict = {name: over for name, over in known.constraints.items() if name == CONSTRAINT}
    return replace(result, params=known.params, accuracy=known.accuracy, constraints=result.constraints | verdict)


def complete_blocks(repeats: Sequence[Repeat]) -> int:
    """The number of blocks, from the first on, that are complete."""
    missing = [repeat.block for repeat in repeats if not repeat.is_complete()]
    return min(missing) - 1 if missing else max(repeat.block for repeat in repeats)


def verify(study: Study, settings: Verify, overrides: Sequence[str]) -> Verdict:
    """Run the repeats that are missing, judge all, and leave verify.json and verify.txt in the study's folder."""
    configs = configurations(study, settings, overrides)
    for one in configs.values():
        check(one)
        prepare_samples(one, prepare(one))  # what was changed is told now, and not by each repeat
    repeats = plan(study, settings, configs, overrides)
    config, folder = shared(configs), study.folder / VERIFY
    tracking.check(config.tracking)
    folder.mkdir(exist_ok=True)
    log.info(
        "%s and the baseline, %d repeats each: %d runs, %d of them already complete",
        count(len(configs) - 1, "configuration"),
        settings.n,
        len(repeats),
        sum(repeat.is_complete() for repeat in repeats),
    )
    with (
        storage.lock(study.folder / LOCK, str(study.folder)),
        beside.study(config.tracking, f"{study.name}-{VERIFY}", folder) as tracker,
        closing(make_launcher(config)) as launcher,
    ):
        try:
            run_missing(repeats, launcher, partial(record, study, tracker))
        except (KeyboardInterrupt, SystemExit):
            if (blocks := complete_blocks(repeats)) >= 2:
                log.info("%d blocks are complete: n=%d judges them without another run", blocks, blocks)
            raise
    results: dict[str, list[Result]] = {name: [] for name in configs}
    for repeat in sorted(repeats, key=lambda one: one.block):  # it may have ended when nobody was there to record it
        results[repeat.name].append(as_gated(Result.load(repeat.trial.folder), study.results[repeat.name]))
    verdict = judge(study, results, metric_index(study, settings), settings.confidence)
    write_whole(study.folder / summary.VERDICT, json.dumps(asdict(verdict), indent=1))
    write_whole(study.folder / TABLE, render(verdict))
    return verdict


def main() -> None:
    interrupt.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    own, overrides = own_and_overrides(Verify, sys.argv[1:])
    with errors_in_one_line():
        settings = options(Verify, own)
        study = load(settings.study)
        verdict = verify(study, settings, overrides)
        print(f"\n{render(verdict)}\nEvery repeat: {study.folder / VERIFY}/")
        print(f"Into the report: autotune report study={settings.study}")
    sys.exit(0 if verdict.winner else NO_BETTER)


if __name__ == "__main__":
    main()
