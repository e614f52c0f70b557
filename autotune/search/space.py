"""The search space: parameters, their distributions, and the conditions between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import optuna
from hydra.core.override_parser.types import Glob, Override

from autotune.config.vllm_flags import FLAG, changes, packed, unpacked, value_at
from autotune.config.words import parsed
from autotune.errors import InputError
from autotune.search.conditions import holds
from autotune.search.distributions import Distribution, grid_values, suggest
from autotune.search.hydra_private import distribution_of
from autotune.text import one_line

# Groups whose fields decide what a trial measures, and fields of them that a study has one of.
SWEPT = ("engine", "scenario", "dataset", "backend")
NEVER_SWEPT = ("name", "_target_", "args", "env", "prefix", "python", "device", "search", "records")
MOST_POINTS = 1_000_000  # of a range
VARIABLE = "backend.env."  # prefix of environment variables
# A choice that leaves the flag to vLLM; Hydra's choice() takes no null.
DEFAULT = "default"
# Flags that can be changed while a server runs. One that trials share starts with the largest value that is swept, but
# at most with this, as more takes memory and time from all of them. None: what it starts with does not matter.
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


@dataclass(frozen=True)
class Space:
    parameters: dict[str, Distribution]  # by configuration key, in the order they are suggested
    conditions: dict[str, str] = field(default_factory=dict)  # must hold for a trial to be run, by name
    only_if: dict[str, str] = field(default_factory=dict)  # parameter → when it is suggested at all

    def suggest(self, trial: optuna.Trial, known: Mapping[str, Any]) -> dict[str, Any]:
        """Values for one trial; a parameter whose `only_if` does not hold is left to vLLM's default.

        `known` holds the values of flags that are not swept, by flag.
        """
        chosen: dict[str, Any] = {}
        for name, distribution in self.parameters.items():
            if name not in self.only_if or holds(self.only_if[name], values(known, chosen), f"only_if.{name}"):
                chosen[name] = suggest(trial, name, distribution)
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
    def grid(self) -> dict[str, Sequence[Any]]:
        """Every value of every parameter. Raises InputError for one without steps."""
        return {name: grid_values(name, distribution) for name, distribution in self.parameters.items()}

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
    parameters: dict[str, Distribution] = {}
    fixed: dict[str, str] = {}
    written = [f"{name}={value}" for name, value in space.items()]
    for at, line in enumerate([*written, *arguments]):
        override = parsed(line)
        name = _field_name(override.get_key_element())
        earlier = written[:at] if at < len(written) else arguments[: at - len(written)]
        before = [_field_name(other.partition("=")[0]) for other in earlier]
        if name in before and (override.is_sweep_override() or name in parameters):
            raise InputError(f"{line}: {name} is written twice, and swept; write it once")
        if at < len(written) and not override.is_sweep_override():
            raise InputError(f"{line}: a space holds choice(…), range(…) and interval(…); write one of them")
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
            if numbers := [value for value in values if isinstance(value, (int, float))]:
                most[flag] = min(limit, max(numbers))
    tokens = most.get("max_num_batched_tokens", known.get("max_num_batched_tokens"))
    if "max_num_seqs" in most and tokens:
        most["max_num_seqs"] = min(most["max_num_seqs"], tokens)
    return most


def _field_name(key: str) -> str:
    """A configuration key, a flag's with underscores."""
    key = key.lstrip("+")
    flag, dot, field = key.removeprefix(FLAG).partition(".")
    return f"{FLAG}{flag.replace('-', '_')}{dot}{field}" if key.startswith(FLAG) else key


def _distribution(override: Override, name: str) -> Distribution:
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
    if isinstance(sweep, Glob):
        return "write choice(…), range(…) or interval(…)"
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
    return packed(value_at(known, name.removeprefix(FLAG).replace("-", "_"))) if name.startswith(FLAG) else None


def values(known: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a condition may name: flags, and parameters by the last part of their keys."""
    short = {name.rpartition(".")[2]: value_of(value) for name, value in chosen.items()}
    return {**known, **swept_flags(chosen, known), **short}
