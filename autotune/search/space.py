"""The search space: parameters, their distributions, and the conditions between them."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import islice, product
from math import prod
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autotune.config.overrides import with_fields
from autotune.config.schema import Config
from autotune.config.vllm_flags import FLAG, as_text, changes, read, recorded, unpacked, value_at
from autotune.errors import InputError
from autotune.measure.prepare import backend_of, cache_of
from autotune.measure.prepare import check as check_config
from autotune.search.conditions import holds, names_in
from autotune.search.hydra_private import distribution_of
from autotune.system.files import expanded
from autotune.text import one_line

log = logging.getLogger(__name__)

# Groups whose fields decide what a trial measures, and fields of them that a study has one of.
SWEPT = ("engine", "scenario", "dataset", "backend")
NEVER_SWEPT = ("name", "_target_", "args", "env", "prefix", "python", "device", "search", "records")
MOST_POINTS = 1_000_000  # of a range
VARIABLE = "backend.env."  # prefix of environment variables
# A choice that leaves the flag to vLLM; Hydra's choice() takes no null.
DEFAULT = "default"
# Flags that can be changed of a running server, and the most that one which trials share starts with, unless a trial
# asks for more: what is beyond takes memory and time from all of them. Null: it starts with any value.
CHANGEABLE = {
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 16384,
    "max_cudagraph_capture_size": 2048,  # 240 graphs
    "gpu_memory_utilization": 1.0,
    "kv_cache_memory_bytes": math.inf,
    "num_gpu_blocks_override": math.inf,
    "max_num_active_seqs": None,
    "max_num_scheduled_tokens": None,
    "long_prefill_token_threshold": None,
    "long_prefill_token_threshold_adaptive": None,
    "enable_chunked_prefill": None,
    "enable_prefix_caching": 1,
    "scheduling_policy": None,
    "watermark": None,
}
POINTS = 1000  # of the space, at which a condition is tried before the study starts


@dataclass(frozen=True)
class Space:
    parameters: dict[str, BaseDistribution]  # by configuration key, in the order they are suggested
    conditions: dict[str, str] = field(default_factory=dict)  # must hold for a trial to be run, by name
    only_if: dict[str, str] = field(default_factory=dict)  # parameter → when it is suggested at all

    def suggest(self, trial: optuna.Trial, known: Mapping[str, Any]) -> dict[str, Any]:
        """Values for one trial; a parameter whose `only_if` does not hold is left to vLLM's default.

        `known` holds the values of flags that are not swept, by flag.
        """
        chosen: dict[str, Any] = {}
        for name, distribution in self.parameters.items():
            if name not in self.only_if or holds(self.only_if[name], values(known, chosen), f"only_if.{name}"):
                chosen[name] = _suggest(trial, name, distribution)
        return chosen

    def violated(self, chosen: Mapping[str, Any], known: Mapping[str, Any]) -> str:
        """The first condition that `chosen` breaks, as a reason; empty if all hold."""
        named = values(known, chosen)
        for name, expression in self.conditions.items():
            try:
                if not holds(expression, named, f"conditions.{name}"):
                    return f"conditions.{name}: not {expression}"
            except InputError as error:  # of these values alone: check_space has tried others
                return str(error)
        return ""

    @cached_property
    def grid(self) -> dict[str, list[Any]]:
        """Every value of every parameter. Raises InputError for one without steps."""
        return {name: _grid_values(name, distribution) for name, distribution in self.parameters.items()}

    @property
    def restarting(self) -> list[str]:
        """Parameters whose change takes another server."""
        flags = [name for name in self.parameters if name.startswith((FLAG, VARIABLE))]
        return [name for name in flags if name.removeprefix(FLAG) not in CHANGEABLE]

    @property
    def grid_size(self) -> int:
        return prod(len(values) for values in self.grid.values())


def parse(
    space: Mapping[str, Any], arguments: Sequence[str], conditions: Mapping[str, str], only_if: Mapping[str, str]
) -> tuple[Space, list[str]]:
    """The space of a `space` group's parameters and a command line's `arguments`, and the overrides that stay fixed.

    A fixed value on the command line takes its parameter out of the space. Raises InputError.
    """
    parameters: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    written = [f"{name}={value}" for name, value in space.items()]
    for at, override in enumerate(OverridesParser.create().parse_overrides([*written, *arguments])):
        name = _field_name(override.get_key_element())
        line = override.input_line
        assert line is not None
        before = [_field_name(other.partition("=")[0]) for other in arguments[: max(0, at - len(written))]]
        if name in before and (override.is_sweep_override() or name in parameters):
            raise InputError(f"{line}: {name} is written twice, and swept; write it once")
        if override.is_sweep_override():
            parameters[name] = _distribution(override, name)
            fixed.pop(name, None)
        else:
            fixed[name] = line
            parameters.pop(name, None)
    if not parameters:
        raise InputError(
            "nothing to tune: choose space=scheduler, or sweep a flag: 'engine.args.block_size=choice(16,32)'"
        )
    return Space(parameters, dict(conditions), dict(only_if)), list(fixed.values())


def shared_start(space: Space, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Flags with which a server that trials share starts: the most of what is swept; None if each needs its own.

    `known` holds vLLM's values of flags that are not swept, by flag.
    """
    swept = {name.removeprefix(FLAG): one for name, one in space.parameters.items() if name.startswith(FLAG)}
    if swept and not swept.keys() & CHANGEABLE.keys():
        return None
    most = {}
    for flag, distribution in swept.items():
        if (limit := CHANGEABLE.get(flag)) is not None:
            values = [*getattr(distribution, "choices", ()), getattr(distribution, "high", None)]
            if DEFAULT in values or f"{FLAG}{flag}" in space.only_if:
                values.append(known.get(flag))
            most[flag] = min(limit, max(value for value in values if isinstance(value, (int, float))))
    tokens = most.get("max_num_batched_tokens", known.get("max_num_batched_tokens"))
    if "max_num_seqs" in most and tokens:
        most["max_num_seqs"] = min(most["max_num_seqs"], tokens)
    return most


def _field_name(key: str) -> str:
    """A configuration key, a flag's with underscores."""
    key = key.lstrip("+")
    flag, dot, field = key.removeprefix(FLAG).partition(".")
    return f"{FLAG}{flag.replace('-', '_')}{dot}{field}" if key.startswith(FLAG) else key


def _distribution(override: Override, name: str) -> BaseDistribution:
    """The distribution that a sweep means. Raises InputError."""
    group, _, field = name.partition(".")
    if not field:
        raise InputError(f"{override.input_line}: a study sweeps fields, not groups; start one study for each {name}")
    if group not in SWEPT or field in NEVER_SWEPT or (field.startswith("args.") and group != "engine"):
        raise InputError(
            f"{override.input_line}: {name} can't be swept; sweep a flag ({FLAG}…) or a field of {', '.join(SWEPT[1:])}"
        )
    if wrong := _wrong_ends(override):
        raise InputError(f"{override.input_line}: {wrong}")
    try:
        return distribution_of(override)
    except (ArithmeticError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        why = one_line(error) or "write choice(…), range(…) or interval(…)"
        raise InputError(f"{override.input_line}: {why}") from None


def _wrong_ends(override: Override) -> str:
    """Advice for a sweep whose numbers or tags mean nothing; empty for one that is right."""
    sweep: Any = override.value()
    ends = [value for end in ("start", "stop", "end") if (value := getattr(sweep, end, None)) is not None]
    step = getattr(sweep, "step", None)
    if not all(math.isfinite(value) for value in ends):
        return "write two numbers"
    if sweep.tags - {"log"}:
        return "the only tag is log: tag(log, interval(…))"
    if sweep.tags and not override.is_interval_sweep():
        return "write a log scale as tag(log, interval(…)) or tag(log, int(interval(…)))"
    if sweep.tags and ends[0] <= 0:
        return "a log scale begins above 0"
    if step == 0:
        return "write a step above 0"
    if ends and (ends[1] < ends[0] if step is None else (ends[1] - ends[0]) * step <= 0):
        return "write the smaller number first"
    if step and abs(ends[1] - ends[0]) > MOST_POINTS * abs(step):
        return f"more than {MOST_POINTS} steps; write interval(…) or a larger step"
    return ""


def value_of(choice: Any) -> Any:
    """The value that a choice stands for: Optuna's choices are text where the configuration has objects and lists."""
    return None if choice == DEFAULT else unpacked(choice)


def swept_flags(params: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's flags that `params` change in `args`, by name; null where the choice is vLLM's default."""
    fields = {name.removeprefix(FLAG): value_of(value) for name, value in params.items() if name.startswith(FLAG)}
    return changes(args, fields)


def default_of(name: str, known: Mapping[str, Any]) -> Any:
    """The value that a parameter has where it is not swept, as its choices are written; None if it is unknown."""
    found = value_at(known, name.removeprefix(FLAG).replace("-", "_")) if name.startswith(FLAG) else None
    return as_text(found) if isinstance(found, (dict, list)) else found


def values(known: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a condition may name: flags, and parameters by the last part of their keys."""
    short = {name.rpartition(".")[2]: value_of(value) for name, value in chosen.items()}
    return {**known, **swept_flags(chosen, known), **short}


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    suggest: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _grid_values(name: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if distribution.step is None:
        raise InputError(f"sampler=grid: {name} has no steps; write {name}=range(low,high,step=…) or choice(…)")
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    count = round((distribution.high - distribution.low) / distribution.step)
    return [float(f"{distribution.low + number * distribution.step:.12g}") for number in range(count + 1)]


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Tell whether `distribution` could suggest `value`."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8


def scaled(value: Any, distribution: BaseDistribution) -> float:
    """The place of a number in its range, from 0 to 1; the middle if there is none, or no range."""
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = distribution.low, distribution.high
    if value is None or low == high:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def describe(distribution: BaseDistribution) -> str:
    """`16…1024, log`; `2048 | 4096`."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(str(choice) for choice in distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    step = f", step {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g}…{distribution.high:g}{', log' if distribution.log else step}"


def without_unknown(space: Space, backend: Any) -> Space:
    """`space` without the flags that another vLLM has and `backend` lacks, which one line names.

    Raises InputError if nothing is left.
    """
    simulated = "simulated" in backend.facts

    def lacks(name: str) -> bool:
        flag = name.removeprefix(FLAG).partition(".")[0]
        if name.startswith(FLAG):
            return flag in recorded() and flag not in backend.flags
        return simulated and name.startswith(VARIABLE)

    lacking = [name for name in space.parameters if lacks(name)]
    if not lacking:
        return space
    reader = "the simulation" if simulated else f"vLLM {backend.facts.get('vllm')}"
    names = ", ".join(name.removeprefix(FLAG) for name in lacking)
    if len(lacking) == len(space.parameters):
        raise InputError(f"nothing to tune: {reader} has no {names}; choose another space")
    log.warning("left out of the space, as %s has no %s", reader, names)
    return replace(space, parameters={name: one for name, one in space.parameters.items() if name not in lacking})


def check_space(space: Space, config: Config, backend: Any, known: Mapping[str, Any]) -> Space:
    """`space` with its flags' values as vLLM reads them; `known` has the values of flags that are not swept.

    Raises InputError for a parameter or a value that vLLM does not take, and for a condition that can't be told.
    """
    known_to_it = without_unknown(space, backend)
    parameters = {
        name: _as_read(name, distribution, backend) if name.startswith(FLAG) else distribution
        for name, distribution in known_to_it.parameters.items()
    }
    checked = replace(space, parameters=parameters)
    for name, distribution in parameters.items():
        for value in [] if name.startswith(FLAG) else map(value_of, ends(distribution)):
            changed = with_fields(config, {name: value})
            check_config(changed)
            if name == "dataset.path" and value is not None and not expanded(value).is_file():
                raise InputError(f"{name}={value}: no such file")
        if name.startswith(VARIABLE):
            with cache_of(config) as folder:
                backend_of(changed, folder)
    expressions = {f"conditions.{name}": expression for name, expression in space.conditions.items()}
    expressions |= {f"only_if.{name}": expression for name, expression in space.only_if.items()}
    nameable = {*known, *backend.flags, *recorded()}
    nameable |= {part for key in space.parameters for part in (key.rpartition(".")[2], key.removeprefix(FLAG))}
    for key in space.only_if:
        known_flag = key.startswith(FLAG) and key.removeprefix(FLAG).partition(".")[0] in nameable
        if not known_flag and key not in space.parameters and key.partition(".")[0] not in SWEPT[1:]:
            raise InputError(f"only_if.{key}: no parameter has that name; write its whole key: {FLAG}<flag>")
    for where, expression in expressions.items():
        names = names_in(expression, where)
        for name in names:
            if name not in nameable and value_at(known, name) is None:
                close = get_close_matches(name, sorted(nameable), 1)
                hint = f"did you mean {close[0]}?" if close else "write a flag or a swept parameter"
                raise InputError(f"{where}: {expression!r} names {name}, which is no flag and not swept; {hint}")
        named = [key for key in parameters if key.rpartition(".")[2] in names or key.removeprefix(FLAG) in names]
        points = product(*(ends(parameters[key]) for key in named))
        for point in islice(points, POINTS):
            holds(expression, values(known, dict(zip(named, point, strict=True))), where)
    return checked


def _as_read(name: str, distribution: BaseDistribution, backend: Any) -> BaseDistribution:
    """The distribution of a flag, each of its values as vLLM reads it. Raises InputError."""
    field = name.removeprefix(FLAG)

    def as_read(value: Any) -> Any:
        found = value_at(backend.read(changes({}, {field: value_of(value)})), field.replace("-", "_"))
        return as_text(found) if isinstance(found, (dict, list)) else found

    if isinstance(distribution, CategoricalDistribution):
        choices: list[Any] = []
        for choice in distribution.choices:
            try:
                choices.append(choice if choice == DEFAULT else as_read(choice))
            except InputError as error:
                if len(distribution.choices) == 1 or not _is_recorded(field, choice):
                    raise
                log.warning("left out of the space: %s", error)
        return CategoricalDistribution(list(dict.fromkeys(choices)))
    for value in ends(distribution):
        as_read(value)
    return distribution


def _is_recorded(field: str, choice: Any) -> bool:
    """Tell whether the recorded vLLM takes `choice`, though the installed one does not."""
    try:
        read(changes({}, {field: value_of(choice)}), recorded(), "vLLM")
    except InputError:
        return False
    return True


def ends(distribution: BaseDistribution) -> Sequence[Any]:
    """Values that are in their field's bounds only if all of `distribution` is: each choice, or a range's ends.

    Of a range without steps also one that is no whole number.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = distribution.low, distribution.high
    return [low, high] if distribution.step else [low, high, low + 0.3819 * (high - low)]
