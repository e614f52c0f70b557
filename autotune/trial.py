"""One trial: prepare, measure, score, leave a result.json."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from autotune import models, objective, runs, samples, tracking, vllm_args
from autotune.backend import Backend, Engine
from autotune.facts import git_revision
from autotune.models import Model
from autotune.redact import redact
from autotune.result import Result
from autotune.runs import Run
from autotune.samples import Samples
from autotune.schema import Config

log = logging.getLogger(__name__)

# What `_target_` in conf/ may name.
WHITELIST = ("autotune.*",)


@dataclass(frozen=True)
class Prepared:
    """What is served, before it takes a GPU: it exists and its flags are known."""

    model: Model
    backend: Backend
    args: dict[str, Any]  # vLLM's flags


def prepare(config: Config) -> Prepared:
    """Check the model and vLLM's flags. Raises InputError."""
    cache = Path(config.cache_dir)
    backend_class: Any = get_class(config.backend["_target_"])
    settings = OmegaConf.merge(OmegaConf.structured(backend_class.Config), config.backend)
    backend = backend_class(OmegaConf.to_object(settings), cache)
    args = vllm_flags(config)
    objective.check(config.objective)
    runs.check(config)
    backend.check(args)
    shape = None if backend.needs_weights else _partial(config.model.shape)
    return Prepared(models.locate(config.model, cache, _partial(config.model.build), shape), backend, args)


def vllm_flags(config: Config) -> dict[str, Any]:
    """vLLM's flags as `config` has them, by name with underscores."""
    written = (config.scenario.args, config.model.args, config.engine.args)  # the last wins
    return {flag.replace("-", "_"): value for args in written for flag, value in args.items()}


def prepare_samples(config: Config, prepared: Prepared) -> Samples:
    """The data set as the model sees it. Raises InputError."""
    loaded = samples.prepare(config.dataset, prepared.model, Path(config.cache_dir), _partial(config.dataset.records))
    longest = prepared.args.get("max_model_len") or prepared.model.config.get("max_position_embeddings")
    if isinstance(longest, int):
        loaded.check_fits(longest)
    return loaded


def _partial(node: Any) -> Callable[..., Any] | None:
    if node is None:
        return None
    made = instantiate({**node, "_partial_": True}, _convert_="all", _execution_whitelist_=WHITELIST)
    assert isinstance(made, partial)
    return made


def run(config: Config, overrides: list[str], folder: Path) -> Result:
    """Measure `config`; result.json and all logs go to `folder`.

    Raises the AutotuneError that ended the trial, after it was written down.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = Result(started_at=time.time(), overrides=redact(overrides))
    result.config = names(config)
    (folder / "config.yaml").write_text(as_yaml(config))
    try:
        _measure(config, result, folder)
        result.state = "complete"
    except BaseException as error:
        result.reason = f"{type(error).__name__}: {redact(str(error))}".rstrip(": ")
        raise
    finally:
        result.ended_at = time.time()
        elapsed = result.ended_at - result.started_at
        if not result.estimated:
            result.phases["other"] = elapsed - sum(result.phases.values())
        result.save(folder)
    return result


def as_yaml(config: Config) -> str:
    """`config` as a trial leaves it in config.yaml, secrets hidden."""
    return OmegaConf.to_yaml(redact(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)))


def names(config: Config) -> dict[str, str]:
    """What was chosen of each group."""
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "scenario": config.scenario.name,
        "objective": config.objective.name,
    }


def _measure(config: Config, result: Result, folder: Path) -> None:
    prepared = prepare(config)
    result.args = redact(prepared.args)
    loaded = prepare_samples(config, prepared)
    result.facts = {
        "dataset_checksum": loaded.checksum,
        "dataset_samples": str(len(loaded)),
        "autotune": git_revision(),
    }
    # Beside the start: vLLM's answer, where a study has not asked already, takes an import of it, too.
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(prepared.backend.dry_run, prepared.model, prepared.args)
        with prepared.backend.start(prepared.model, prepared.args, loaded, folder) as engine:
            flags = prepared.args | answer.result().resolved
            with nullcontext() if engine.estimated else tracking.system_metrics(config.tracking, folder):
                measure(config, engine, flags, folder, result)
            stopping = time.monotonic()
    if not result.estimated:
        result.phases["stop"] = time.monotonic() - stopping


def measure(config: Config, engine: Engine, flags: Mapping[str, Any], folder: Path, result: Result) -> Run:
    """Make the runs that `config` asks for on `engine`, and fill `result`; `flags` are vLLM's, resolved.

    Returns the run that `result` tells of.
    """
    result.estimated, result.command = engine.estimated, engine.command
    result.start = engine.start
    result.phases["start"] = sum(engine.start.values())
    if objective.searches(config.objective):
        run = runs.highest_load(config, engine, flags, folder, result)
    elif config.scenario.repeats > 1:
        run = runs.repeated(config, engine, flags, folder, result)
    else:
        run = runs.one(config.scenario, engine, flags, folder, result)
    result.metrics, result.bound = run.metrics, run.bound
    for name in ("tokens_per_s", "max_qps"):
        if name in run.metrics:
            result.metrics[f"{name}_per_gpu"] = run.metrics[name] / vllm_args.gpus(flags)
    result.verdict, result.reasons = run.measured.verdict, run.measured.reasons
    result.facts |= run.measured.facts
    result.values = objective.values(config.objective, result.metrics)
    result.constraints = run.constraints
    return run
