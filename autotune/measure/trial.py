"""One trial: prepare, measure, score, leave a result.json."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from autotune.config import vllm_flags
from autotune.config.redact import redact
from autotune.config.schema import Config
from autotune.data.models import Model
from autotune.errors import BehindError, MeasureError, StoppedError
from autotune.measure import accuracy, metrics, objective, progress, rules, runs, series
from autotune.measure.backend import DryRunOutcome, Engine, Recording, Scorer
from autotune.measure.prepare import Prepared, gpu_count, prepare, prepare_samples, prepare_texts
from autotune.measure.result import Result, State
from autotune.measure.runs import RunResult
from autotune.measure.slot import Slot
from autotune.system.host import git_revision, recorded

log = logging.getLogger(__name__)


def run(config: Config, overrides: list[str], folder: Path, slot: Slot | None = None) -> Result:
    """Measure `config`; result.json and all logs go to `folder`. A server may stay in `slot`, if there is one.

    Raises the AutotuneError that ended the trial, once result.json holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, began = Result(started_at=time.time(), overrides=redact(overrides)), time.monotonic()
    result.config = names(config)
    (folder / "config.yaml").write_text(as_yaml(config))
    try:
        with nullcontext(slot) if slot else closing(Slot()) as place:
            _measure(config, result, folder, place)
        result.state = State.complete
    except BaseException as error:
        result.reason = f"{type(error).__name__}: {redact(str(error))}".rstrip(": ")
        if isinstance(error, (StoppedError, KeyboardInterrupt, SystemExit)):
            result.state = State.interrupted
        elif isinstance(error, BehindError):
            result.state, result.reason = State.pruned, str(error)
        raise
    finally:
        result.ended_at = time.time()
        if not result.estimated:
            result.phases["other"] = time.monotonic() - began - sum(result.phases.values())
        result.save(folder)
    return result


def as_yaml(config: Config) -> str:
    """The text of a trial's config.yaml, with secrets hidden."""
    return OmegaConf.to_yaml(redact(asdict(config, dict_factory=_with_names)))


def _with_names(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """`fields` as a dict, each Enum by its name."""
    return {key: value.name if isinstance(value, Enum) else value for key, value in fields}


def names(config: Config) -> dict[str, str]:
    """The options that `config` was composed of, by group."""
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "scenario": config.scenario.name,
        "objective": config.objective.name,
    }


def _measure(config: Config, result: Result, folder: Path, slot: Slot) -> None:
    prepared = prepare(config)
    result.args = redact(prepared.args)
    loaded = prepare_samples(config, prepared)
    scored = accuracy.is_wanted(config.accuracy) and "simulated" not in prepared.backend.facts
    texts = prepare_texts(config, prepared, loaded) if scored else []
    result.deviations = rules.deviations(config, prepared.args, len(loaded))
    result.facts = {
        **prepared.facts(loaded),
        "dataset_samples": str(len(loaded)),
        "autotune": git_revision(),
    }
    # The dry run takes an import of vLLM, unless the study has made it already: so it runs beside the start.
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(prepared.dry_run)
        with (
            slot.leased(config.gpus, gpu_count(config), partial(progress.check, folder)),
            prepared.backend.start(prepared.model, prepared.args, loaded, folder, slot) as engine,
        ):
            result.facts |= {"leased_gpus": slot.lease.visible} if slot.lease else {}
            every_s = config.tracking.system_metrics_s if config.tracking.enabled and not engine.estimated else 0.0
            try:
                with recorded(folder / series.SYSTEM, every_s):
                    measure(config, engine, outcome.result().resolved, folder, result)
            finally:  # steps of a trial that failed or was pruned teach, too; they are kept while the engine stops
                if recording := engine.recorded():
                    pool.submit(_keep_steps, recording, prepared, outcome, folder, result)
            if scored and isinstance(engine, Scorer):
                score(config, engine, outcome.result().resolved, texts, prepared.model, folder, result)
            stopping = time.monotonic()
    if not result.estimated:
        result.phases["stop"] = time.monotonic() - stopping


def _keep_steps(
    recording: Recording, prepared: Prepared, outcome: Future[DryRunOutcome], folder: Path, result: Result
) -> None:
    from autotune.measure import steps  # pyarrow takes a while to import

    flags = prepared.args if outcome.exception() else outcome.result().resolved
    result.facts["steps"] = steps.keep(recording, flags, prepared.model.config, folder)


def score(
    config: Config,
    engine: Scorer,
    flags: Mapping[str, Any],
    texts: Sequence[accuracy.Text],
    model: Model,
    folder: Path,
    result: Result,
) -> None:
    """Note in `result` how well the server answers; a failure is noted, too, as the runs are good without."""
    progress.phase(folder, "accuracy")
    began = time.monotonic()
    numerics = accuracy.numerics(flags, config.backend.get("env") or {})
    result.facts[accuracy.NUMERICS] = numerics
    try:
        result.metrics |= accuracy.scored(config.accuracy, engine, texts, numerics, model).metrics()
    except MeasureError as error:
        result.facts[accuracy.NOT_SCORED] = str(error)
        log.warning("answers were not scored: %s", error)
    result.phases["accuracy"] = time.monotonic() - began


def measure(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> RunResult:
    """Make the runs of `config`, and fill `result`; returns the run that it describes. `flags` are vLLM's, resolved."""
    result.estimated, result.command = engine.estimated, engine.command
    result.facts |= engine.facts
    result.start = engine.start
    result.phases["start"] = sum(engine.start.values())
    if objective.searches(config.objective):
        run = runs.highest_load(config, engine, flags, folder, result)
    elif config.scenario.repeats > 1:
        run = runs.repeated(config, engine, flags, folder, result)
    else:
        run = runs.one(config.scenario, engine, flags, folder, result)
    result.metrics, result.bound = run.metrics, run.bound
    for name in ("tokens_per_s", *objective.HIGHEST):
        if name in run.metrics:
            result.metrics[f"{name}_per_gpu"] = run.metrics[name] / vllm_flags.gpus(flags)
    if config.price_per_gpu_hour:
        result.metrics |= metrics.per_million(run.metrics, vllm_flags.gpus(flags), config.price_per_gpu_hour)
    result.verdict, result.reasons = run.measured.verdict, run.measured.reasons
    result.verdict_by = config.scenario.verdict_by
    result.values = objective.values(config.objective, result.metrics)
    result.constraints = run.constraints
    return run
