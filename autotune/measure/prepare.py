"""Preparation of a trial before it takes a GPU: the model, the backend, vLLM's flags, the samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from autotune.config import vllm_flags
from autotune.config.overrides import typed_target
from autotune.config.schema import Config
from autotune.data import models, samples
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.measure import objective, runs
from autotune.measure.backend import Backend, DryRunOutcome

WHITELIST = ("autotune.*",)  # where the functions lie that a `_target_` in conf/ may name


@dataclass(frozen=True)
class Prepared:
    """A model that exists, the backend to serve it, and vLLM's flags, checked."""

    model: Model
    backend: Backend
    args: dict[str, Any]  # vLLM's flags, as configured

    def dry_run(self, changes: Mapping[str, Any] | None = None) -> DryRunOutcome:
        """Ask vLLM for its answer to the flags with `changes`; `resolved` has every flag that is given or known."""
        args = self.args | dict(changes or {})
        outcome = self.backend.dry_run(self.model, args)
        given = {name: value for name, value in args.items() if value is not None}
        return replace(outcome, resolved=given | outcome.resolved)


def prepare(config: Config) -> Prepared:
    """Check `config`, and locate or build its model. Raises InputError."""
    cache = Path(config.cache_dir).expanduser()
    backend_class, settings = typed_target(config.backend, "backend")
    backend: Backend = backend_class(settings, cache)
    objective.check(config.objective)
    runs.check(config)
    args = backend.read(configured_flags(config))
    shape = None if backend.needs_weights else _partial(config.model.shape)
    return Prepared(models.locate(config.model, cache, _partial(config.model.build), shape), backend, args)


def configured_flags(config: Config) -> dict[str, Any]:
    """vLLM's flags as configured, their names with underscores."""
    layers = (config.scenario.args, config.model.args, config.engine.args)  # later ones win
    return {flag.replace("-", "_"): value for args in layers for flag, value in args.items()}


def gpu_count(config: Config) -> int:
    """Number of GPUs that a trial takes."""
    return vllm_flags.gpus(configured_flags(config))


def prepare_samples(config: Config, prepared: Prepared) -> Samples:
    """The data set as token ids of the model. Raises InputError."""
    cache = Path(config.cache_dir).expanduser()
    loaded = samples.prepare(config.dataset, prepared.model, cache, _partial(config.dataset.records))
    longest = prepared.args.get("max_model_len") or prepared.model.config.get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:  # -1 lets vLLM choose
        loaded.check_fits(longest)
    return loaded


def _partial(node: Any) -> Callable[..., Any] | None:
    if node is None:
        return None
    made = instantiate({**node, "_partial_": True}, _convert_="all", _execution_whitelist_=WHITELIST)
    assert isinstance(made, partial)
    return made
