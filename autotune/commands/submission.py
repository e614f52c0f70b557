"""Make a submission to MLPerf Inference of a study's best configuration, all but what only a person can write:

    autotune submission study=tune out=tree submitter=Acme system=one_h200 offline=24 server=12

study       its name below multirun/, or its folder
out         folder of the tree; the command completes one that is there
submitter   and
system      their names in the tree
offline     scenarios, each with the rate to run it at, queries/s: offline=24 server=12 interactive=9;
            for the edge single_stream=2
trial       the configuration; without it the best
division    closed, or open
checker     a checkout of github.com/mlcommons/inference, whose submission checker is to look at the tree, too

For each scenario LoadGen runs for performance, for accuracy and for the compliance tests, by MLPerf's rules. Any other
key=value changes each run: dataset.path=cnn_eval.json. Runs that are complete are kept, and so is
what a person has written into the tree: the same command goes on.

Exit code: 0 nothing is missing, 2 something is, 1 an error. Nothing here is verified by MLCommons.
"""

import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from autotune.config import bounds
from autotune.config.command_line import compose, errors_in_one_line, options, own_and_overrides
from autotune.config.overrides import leaves, with_fields
from autotune.config.schema import Check, Config, Hot, Mode, Output, Rules, TrackingConfig
from autotune.data import samples
from autotune.data.models import Model
from autotune.errors import InputError, MeasureError
from autotune.measure import prepare, rouge, rules
from autotune.measure.result import Result
from autotune.results import submission as tree_of
from autotune.results.study import Study, load
from autotune.results.submission import ACCURACY, NAMES, UNVERIFIED, Run, Runs, Tree
from autotune.sweep import storage
from autotune.sweep.launchers import make_launcher
from autotune.sweep.repeats import Repeat, config_of, run_missing
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from autotune.system.files import LOCK, expanded, read_json, write_whole
from autotune.text import aligned

log = logging.getLogger(__name__)

FOLDER = "submission"  # below the study's folder
INCOMPLETE = 2  # exit code
SHOWN = 20  # of the checker's objections
CHECKER = "tools/submission"  # in a checkout of mlcommons/inference


@dataclass
class Submission:
    study: str = MISSING
    out: str = MISSING
    submitter: str = bounds.bounded(MISSING, bounds.file_name)
    system: str = bounds.bounded(MISSING, bounds.file_name)
    offline: float | None = bounds.positive(None, 1e6)
    server: float | None = bounds.positive(None, 1e6)
    interactive: float | None = bounds.positive(None, 1e6)
    single_stream: float | None = bounds.positive(None, 1e6)
    trial: str | None = None
    division: Rules = Rules.closed
    checker: str | None = None


def configuration(study: Study, settings: Submission, overrides: Sequence[str]) -> Config:
    """The configuration to submit, without a scenario. Raises InputError."""
    trial = study.chosen(settings.trial)
    if study.results[trial].estimated:
        raise InputError(f"study={study.name}: simulated, and a simulation answers nothing; run it with backend=live")
    config = config_of(study, trial, overrides)
    benchmark = config.benchmark
    if benchmark.name is None:
        raise InputError(f"study={study.name}: its model is in no benchmark of MLPerf's; run it with benchmark=…")
    if benchmark.lacks or benchmark.scorer != "rouge":
        raise InputError(f"{benchmark.name}: no submission, as autotune lacks {'; '.join(benchmark.lacks)}")
    length = benchmark.performance
    dataset = replace(
        config.dataset,
        output=Output.natural,
        max_output_tokens=length.max_tokens,
        min_output_tokens=length.min_tokens,
    )
    return replace(
        config,
        rules=settings.division,
        dataset=dataset,
        backend=config.backend | ({"hot": Hot.same.value} if config.backend.get("hot") == Hot.auto.value else {}),
        objective=compose(["objective=throughput"])[0].objective,
        accuracy=replace(config.accuracy, check=Check.none),
        tracking=TrackingConfig(enabled=False, uri="", experiment=""),
    )


def planned(study: Study, settings: Submission, config: Config, overrides: Sequence[str]) -> list[Repeat]:
    """The runs that a submission takes. Raises InputError for a scenario that the benchmark lacks, and for none."""
    benchmark = config.benchmark
    rates = {name: getattr(settings, name) for name in NAMES if getattr(settings, name) is not None}
    has = [name for name in NAMES if getattr(benchmark.scenarios, name).loadgen]
    if wrong := [name for name in rates if name not in has] or ([] if rates else ["no scenario"]):
        raise InputError(f"{wrong[0]}: {benchmark.name} has {', '.join(has)}; write each as {has[0]}=<queries/s>")
    planned = []
    written: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    changes = {key: value for key, value in leaves(written) if key.startswith(("scenario.", "dataset."))}
    for name, rate in rates.items():
        asked = replace(rules.asked(benchmark, name, rate), warmup_requests=config.scenario.warmup_requests)
        kinds = {
            "performance": asked,
            "accuracy": replace(asked, mode=Mode.accuracy),
            **{test: replace(asked, audit=rules.TESTS[test]) for test in benchmark.tests},
        }
        for kind, scenario in kinds.items():
            one = with_fields(replace(config, scenario=scenario), changes)  # which `closed` refuses
            rules.check(one, prepare.configured_flags(one))
            prepare.check(one)
            folder = study.folder / FOLDER / f"{name}-{kind}"
            planned.append(Repeat(folder.name, 1, TrialSpec(one, list(overrides), folder)))
    return planned


def measure(study: Study, repeats: Sequence[Repeat], config: Config) -> Runs:
    """Make the runs that are missing; all of them. Raises MeasureError if one has failed."""
    failed: list[str] = []

    def ended(repeat: Repeat, result: Result) -> None:
        log.info("%s: %s", repeat.name, result.verdict or result.reason)
        if not result.complete:
            failed.append(f"{repeat.name} failed: {result.reason}")

    with storage.lock(study.folder / LOCK, str(study.folder)), closing(make_launcher(config)) as launcher:
        run_missing(repeats, launcher, ended)
    if failed:
        raise MeasureError(f"{'; '.join(failed)}; the same command goes on with the others kept")
    runs = {}
    for repeat in repeats:
        name, _, kind = repeat.name.partition("-")
        runs[name, kind] = Run(repeat.trial.folder, Result.load(repeat.trial.folder))
    return runs


def score(runs: Runs, config: Config, model: Model) -> dict[str, dict[str, float]]:
    """The scores of the answers of each accuracy run, by scenario. Raises InputError if they can't be made."""
    split = rouge.splitter()
    wanted = samples.references(config.dataset, model, prepare.records_of(config))
    found = {}
    for (name, kind), run in runs.items():
        if kind == "accuracy":
            answers = tree_of.answers_in(run.folder / ACCURACY)
            texts = rouge.texts([ids.tolist() for ids in answers.values()], model)
            log.info("%s: scoring %d answers", name, len(texts))
            found[name] = rouge.scores(texts, [wanted[number] for number in answers], split)
    return found


def ends_of(model: Model) -> set[int]:
    """The tokens with which `model` ends an answer."""
    ends: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (path := model.folder / file).exists():
            told = read_json(path).get("eos_token_id")
            ends |= set(told if isinstance(told, list) else [] if told is None else [told])
    return ends


def check_with(checkout: Path, tree: Tree) -> str:
    """The objections of MLPerf's own checker; empty if it has none."""
    folder, out = checkout / CHECKER, tree.out.resolve()
    words = [sys.executable, "-m", "submission_checker.main", "--input", str(out), "--version"]
    words += [str(tree.benchmark.round), "--submitter", tree.submitter, "--csv", str(out / "checker.csv")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    said = f"{done.stdout}{done.stderr}"
    write_whole(out / "checker.log", said)
    told = [line.partition("] ")[2] for line in said.splitlines() if " ERROR]" in line or "not met" in line]
    return "" if done.returncode == 0 else "\n".join(told or said.splitlines()[-5:])


def render(tree: Tree, runs: Runs, scored: dict[str, dict[str, float]]) -> str:
    """Each run in a line, under the word that none of it is verified."""
    rows: list[Sequence[str]] = [("unverified", "run", "tokens/s", "LoadGen", "scores")]
    for (name, kind), run in runs.items():
        told = " ".join(f"{key}={value:g}" for key, value in scored.get(name, {}).items()) if kind == "accuracy" else ""
        rate = f"{run.result.metrics['tokens_per_s']:,.1f}" if kind == "performance" else ""
        verdict = run.result.verdict if kind == "performance" else ""
        if kind in rules.TESTS:
            told = "passed" if tree_of.passed(tree, name, kind) else "failed"
        rows.append((NAMES[name], kind, rate, verdict, told))
    return "\n".join([UNVERIFIED, "", *aligned(rows, left=True)])


def submit(study: Study, settings: Submission, overrides: Sequence[str]) -> list[str]:
    """Make the runs and the tree, and print what was found; returns what is missing."""
    config = configuration(study, settings, overrides)
    repeats = planned(study, settings, config, overrides)
    tree = Tree(expanded(settings.out), settings.division.value, settings.submitter, settings.system, config.benchmark)
    # Before hours of runs, not after:
    rouge.splitter()
    tree.root.mkdir(parents=True, exist_ok=True)
    if settings.checker and not (expanded(settings.checker) / CHECKER / "submission_checker" / "main.py").exists():
        raise InputError(
            f"checker={settings.checker}: it has no {CHECKER}/submission_checker; write a checkout's folder"
        )
    model = prepare.prepare(repeats[0].trial.config).model
    log.info("%d runs, %d of them already complete", len(repeats), sum(one.is_complete() for one in repeats))
    runs = measure(study, repeats, config)
    scored = score(runs, config, model)
    tree_of.write(tree, runs, scored, ends_of(model))
    names = list(dict.fromkeys(name for name, _ in runs))
    missing = tree_of.problems(tree, runs, scored)
    unwritten = tree_of.to_fill_in(tree, names)
    parts = [render(tree, runs, scored), *(["", "It is no submission yet:", *missing] if missing else [])]
    parts += ["", "A person has to fill in:", *unwritten] if unwritten else []
    if settings.checker:
        said = check_with(expanded(settings.checker), tree)
        objections = said.splitlines()
        parts += ["", f"MLPerf's own checker ({tree.out}/checker.log):", *(objections[:SHOWN] or ["no objection"])]
        parts += [f"and {len(objections) - SHOWN} more"] if len(objections) > SHOWN else []
        missing += [said] if said else []
    text = "\n".join(parts)
    write_whole(tree.out / "summary.txt", f"{text}\n")
    print(f"\n{text}\n\nThe tree: {tree.out}/")
    return missing + unwritten


def main() -> None:
    interrupt.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    own, overrides = own_and_overrides(Submission, sys.argv[1:])
    with errors_in_one_line():
        settings = options(Submission, own)
        if settings.division is Rules.none:
            raise InputError("division=none: write closed or open")
        missing = submit(load(settings.study), settings, overrides)
    sys.exit(INCOMPLETE if missing else 0)


if __name__ == "__main__":
    main()
