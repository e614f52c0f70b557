"""Preparation of a trial before it takes a GPU: the model, the backend, vLLM's flags, the samples."""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from inspect import Parameter, signature
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.errors import HydraException
from hydra.utils import instantiate

from autotune.config import overrides, vllm_flags
from autotune.config.overrides import typed_target
from autotune.config.schema import Answers, Check, Config, Endpoint, Kind, Mode
from autotune.data import models, samples
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import InputError
from autotune.measure import accuracy, checks, objective, rouge, rules, traffic
from autotune.measure.backend import Backend, DryRunOutcome
from autotune.system.files import expanded

WHITELIST = ("autotune.*",)  # where the functions lie that a `_target_` in conf/ may name
KINDS = {int: "a whole number from 0", float: "a finite number", str: "a text", tuple[int, int]: "two whole numbers"}
GIVEN = ("tokenizer", "model", "folder", "sessions")  # arguments that these functions get beside those in conf/


@dataclass(frozen=True)
class Prepared:
    """A model that exists, the backend to serve it, and vLLM's flags, checked."""

    model: Model
    backend: Backend
    args: dict[str, Any]  # vLLM's flags, as configured

    def facts(self, loaded: Samples) -> dict[str, str]:
        """Facts that decide what a trial measures, beside its configuration: a file may change under its name."""
        model = {"model_checksum": models.checksum(self.model)} if self.backend.needs_weights else {}
        return {"dataset_checksum": loaded.checksum, **model}

    def dry_run(self, changes: Mapping[str, Any] | None = None) -> DryRunOutcome:
        """Ask vLLM for its answer to the flags with `changes`; `resolved` has every flag that is given or known."""
        args = self.args | dict(changes or {})
        outcome = self.backend.dry_run(self.model, args)
        given = {name: value for name, value in args.items() if value is not None}
        return replace(outcome, resolved=given | outcome.resolved)


def prepare(config: Config) -> Prepared:
    """Check `config`, and locate or build its model. Raises InputError."""
    with cache_of(config) as cache:
        backend = backend_of(config, cache)
        args = read_flags(config, backend)
        rules.check(config, args)  # first: what rules set need not go together with a scenario that they don't have
        checks.check(config)
        if config.scenario.mode is Mode.accuracy and not backend.needs_weights:
            raise InputError("scenario.mode=accuracy: a simulation answers nothing; write backend=live")
        chat = config.scenario.endpoint is Endpoint.chat
        if chat and not backend.needs_weights:
            raise InputError(
                "scenario.endpoint=chat: a simulation has no chat endpoint; write endpoint=completions, or backend=live"
            )
        shape = None if backend.needs_weights else _partial(config.model.shape, "model.shape")
        found = models.locate(config.model, cache, _partial(config.model.build, "model.build"), shape)
        model = models.as_served(found, args)
        if chat and not (model.has_chat_template or args.get("chat_template")):
            raise InputError(
                f"scenario.endpoint=chat: {model.path} has no chat template; set engine.args.chat_template=<file>, or "
                f"write scenario.endpoint=completions"
            )
        if backend.needs_weights and args.get("load_format") in (None, "auto", "hf", "safetensors"):
            models.check_weights(model)
        return Prepared(model, backend, args)


def backend_of(config: Config, cache: Path) -> Backend:
    """The backend of `config`. Raises InputError for one that can't be made, and for a variable that vLLM ignores."""
    backend_class, settings = typed_target(config.backend, "backend")
    backend: Backend = backend_class(settings, cache)
    return backend


@contextmanager
def cache_of(config: Config) -> Iterator[Path]:
    """The cache's folder, made if missing. Raises InputError if it, or what the block reads, can't be used."""
    folder = expanded(config.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            yield folder
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(folder) and folder.is_dir():
            raise InputError(f"{error.filename}: {error.strerror}") from None
        if error.errno == errno.ENOENT and not error.filename:  # tempfile's
            raise InputError(f"TMPDIR: {error.strerror}; set it to a folder that can be written") from None
        raise InputError(f"cache_dir={folder}: {error.strerror or error}; write a folder with room") from None


def check(config: Config) -> None:
    """Raise InputError for what can be told from `config` alone: values out of bounds, what does not go together."""
    overrides.check(config)
    checks.check(config)


def configured_flags(config: Config) -> dict[str, Any]:
    """vLLM's flags as configured, their names with underscores."""
    layers = (config.scenario.args, config.model.args, config.engine.args)  # later ones win
    return {flag.replace("-", "_"): value for args in layers for flag, value in args.items()}


def read_flags(config: Config, backend: Backend) -> dict[str, Any]:
    """vLLM's flags as configured and as `backend` reads them. Raises InputError, naming the field that has the flag."""
    made: dict[str, Any] = {}
    groups = {"engine.args": config.engine.args, "model.args": config.model.args, "scenario.args": config.scenario.args}
    for group, args in groups.items():
        with vllm_flags.written_in(group):
            new = {flag: value for flag, value in args.items() if flag.replace("-", "_") not in made}
            made = backend.read(new) | made
    return made


def gpu_count(config: Config) -> int:
    """Number of GPUs that a trial takes."""
    return vllm_flags.gpus(configured_flags(config))


def prepare_samples(config: Config, prepared: Prepared) -> Samples:
    """The data set as token ids of the model. Raises InputError."""
    with cache_of(config) as cache:
        scenario, records = config.scenario, records_of(config)
        loaded = samples.prepare(
            config.dataset, prepared.model, cache, records, scenario.answers, scenario.endpoint is Endpoint.chat
        )
    if isinstance(vocabulary := prepared.model.config.get("vocab_size"), int):
        loaded.check_vocabulary(vocabulary)
    longest = prepared.args.get("max_model_len") or prepared.model.config.get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:  # -1 lets vLLM choose
        loaded.check_fits(longest, _shortening(config))
    traffic.check(config.scenario, loaded, objective.searches(config.objective))
    rules.check_samples(config, len(loaded))
    check_time(config, loaded)
    return loaded


def prepare_texts(config: Config, prepared: Prepared, loaded: Samples) -> list[accuracy.Text]:
    """The texts that the check of answers takes; none without one. Raises InputError for what it can't be made with."""
    check = config.accuracy.check
    if not accuracy.is_on(config.accuracy):
        return []
    if check is Check.nll:
        return accuracy.texts(loaded, config.accuracy)
    where = f"accuracy={check.value}"
    if config.scenario.answers is not Answers.none:
        raise InputError(f"{where}: conversations have no references to score answers with; write accuracy=nll")
    if check is Check.mlperf and (why_not := rules.unscorable(config, len(loaded))):
        raise InputError(f"{where}: {why_not}")
    if rules.is_made_up(config.dataset):
        instead = "dataset=cnn_dailymail, dataset.path=<file with `output`>, or accuracy=nll"
        raise InputError(f"{where}: the references of dataset={config.dataset.name} are made up; write {instead}")
    if len(loaded) < 2:
        raise InputError(f"{where}: one record, and a difference takes two or more; give more, or write accuracy=nll")
    rouge.check()
    if check is Check.mlperf:
        rouge.splitter()
    try:
        references = samples.references(config.dataset, prepared.model, records_of(config))
    except InputError as error:
        raise InputError(f"{where}: {error}, or write accuracy=nll") from None
    return accuracy.questions(loaded, references, config.accuracy)


def check_time(config: Config, loaded: Samples) -> None:
    """Raise InputError for a run that its time-out would cut off."""
    scenario, most_s = config.scenario, config.backend.get("run_timeout_s")
    lasts_s = traffic.window(scenario, loaded)[0][-1] if scenario.kind is Kind.Trace else scenario.min_duration_s
    if most_s and lasts_s >= most_s:
        raise InputError(f"backend.run_timeout_s={most_s:g}: a run lasts {lasts_s:.0f} s or more; write more than that")


def records_of(config: Config) -> Callable[..., Any] | None:
    """The function that yields the data set's records, if it has one. Raises InputError."""
    return _partial(config.dataset.records, "dataset.records")


def _shortening(config: Config) -> list[str]:
    """The fields of the data set's records that bound how long they are."""
    records = config.dataset.records or {}
    used = records if config.dataset.path is None or "path" in records else {}
    return [
        f"dataset.records.{name}" for name in used if name in ("max_prompt_tokens", "prompt_bounds", "turns_bounds")
    ]


def _partial(node: Any, where: str) -> Callable[..., Any] | None:
    """The function that `node._target_` names with the arguments that stand beside it, checked by its signature."""
    if node is None:
        return None
    if not isinstance(node, dict) or "_target_" not in node:
        raise InputError(f"{where}={node}: write a _target_, and its arguments beside it")
    try:
        made = instantiate({**node, "_partial_": True}, _convert_="all", _execution_whitelist_=WHITELIST)
    except HydraException:
        made = None
    if not isinstance(made, partial):
        raise InputError(
            f"{where}._target_={node['_target_']}: write a function of autotune's own, as conf/ names them"
        )
    parameters, hints = signature(made.func).parameters, get_type_hints(made.func)
    is_open = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
    for name, value in made.keywords.items():
        if name not in parameters and not is_open:
            raise InputError(f"{where}.{name}: no such argument; did you mean {_closest(name, parameters)}?")
        if name in parameters and not _is_a(hints[name], value):
            raise InputError(f"{where}.{name}={value}: write {_in_words(hints[name])}")
    needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if missing := [name for name in needed if name not in made.keywords and name not in GIVEN]:
        raise InputError(f"{where}.{missing[0]} is missing; write a value")
    return made


def _in_words(hint: Any) -> str:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return " or ".join("null" if kind is NoneType else KINDS.get(kind, str(kind)) for kind in kinds)


def _closest(name: str, names: Iterable[str]) -> str:
    return max(set(names) - set(GIVEN), key=lambda one: SequenceMatcher(None, name, one).ratio())


def _is_a(hint: Any, value: Any) -> bool:
    """Tell whether `value` has the type `hint`; a number must be finite, and a list may stand for a tuple."""
    if isinstance(hint, UnionType):
        return any(_is_a(one, value) for one in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_is_a, kinds, value))
    if hint is int:
        return type(value) is int and value >= 0
    return type(value) in (int, float) and isfinite(value) if hint is float else type(value) is hint
