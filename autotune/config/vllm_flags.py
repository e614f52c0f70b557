"""vLLM's flags as configured: names with underscores, null for vLLM's default; what values vLLM takes, and as what."""

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from autotune.errors import InputError

FLAG = "engine.args."  # prefix of flags in configuration keys
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
# Flags that autotune sets for each trial, and what a user writes instead.
MANAGED = {
    "model": "model.path",
    "host": "nothing (servers listen on 127.0.0.1)",
    "port": "backend.port",
    "served_model_name": "nothing (it identifies the trial's server)",
    "api_key": "nothing (servers listen on 127.0.0.1)",
    "hf_token": "the environment variable HF_TOKEN (vLLM logs its flags)",
    "revision": "model.revision",
    "uds": "nothing (servers listen on 127.0.0.1)",
}
FACTORS = {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
FACTORS |= {letter: 1024**power for power, letter in enumerate("KMGT", 1)}
SHORT_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


@dataclass(frozen=True)
class Flag:
    """A flag of `vllm serve`, as live/probe.py reads it from vLLM's parser."""

    kind: str = "str"  # one of KINDS, or text that vLLM reads itself
    many: bool = False  # takes several values
    optional: bool = False  # takes None for no value
    choices: list[Any] | None = None
    negatable: bool = False  # has a --no-… form
    bounds: dict[str, float] = field(default_factory=dict)  # by the names in BOUNDS

    @property
    def takes_value(self) -> bool:
        return self.kind != "switch"


@cache
def recorded() -> dict[str, Flag]:
    """The flags of vLLM 0.32, by name: what vllm_flags.json beside this module holds, where no vLLM is asked."""
    body = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {name: Flag(**flag) for name, flag in body.items()}


def short_number(text: str) -> int:
    """The number that vLLM reads: 4k is 4000, 4K is 4096, 1.5k is 1500. Raises ValueError."""
    if not (found := SHORT_NUMBER.fullmatch(text.strip())):
        return int(text)
    number, letter = found.groups()
    return int(float(number) * FACTORS[letter]) if letter.islower() else int(number) * FACTORS[letter]


def length(text: str) -> int:
    return -1 if text.strip().lower() in ("-1", "auto") else short_number(text)


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


# Names of vLLM's functions that read a flag's value: what stands for them here, and what they take.
KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "human_readable_int": (short_number, "a whole number, or one like 4k (4000) or 4K (4096)"),
    "human_readable_int_or_auto": (length, "a whole number, one like 4k (4000) or 4K (4096), or auto"),
    "float": (finite, "a number"),
}
OBJECTS = ("loads", "parse_dataclass")  # that read JSON
TEXT_OR_OBJECT = "union_dict_and_str"


def read(args: Mapping[str, Any], flags: Mapping[str, Flag], reader: str) -> dict[str, Any]:
    """`args` as vLLM reads them: numbers are numbers, JSON is objects, flags of several values have lists.

    Raises InputError for a flag that is none of `flags`, and for a value that it does not take; `reader` (vLLM 0.32.0)
    is named.
    """
    made = {}
    for written, value in args.items():
        name, where = written.replace("-", "_"), f"{FLAG}{written}"
        if name in MANAGED:
            raise InputError(f"{where}: set by autotune itself; write {MANAGED[name]} instead")
        if name not in flags:
            close = get_close_matches(name, flags, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(close)}?" if close else "see `vllm serve --help=all`"
            raise InputError(f"{where}: {reader} has no such flag; {hint}")
        try:
            made[name] = _value(value, flags[name])
        except ValueError as error:
            shown = as_text(value)
            shown = shown if len(shown) < 60 else f"{shown[:60]}…"
            raise InputError(f"{where}={shown}: {reader} {error}") from None
    return made


@contextmanager
def written_in(group: str) -> Iterator[None]:
    """Name `group` (model.args) in an InputError for a flag that stands there."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(f"^{re.escape(FLAG)}", f"{group}.", str(error))) from None


def _value(value: Any, flag: Flag) -> Any:
    """`value` as vLLM reads it for `flag`. Raises ValueError, which says what it takes."""
    if value is None or (flag.optional and value in ("", "None")):
        return None
    if flag.many:
        items = unpacked(value)
        items = items if isinstance(items, list) else [items]
        if not items or None in items:
            raise ValueError("takes a list with at least one value, and no null in it")
        return [_one(item, flag) for item in items]
    return _one(value, flag)


def _one(value: Any, flag: Flag) -> Any:
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise ValueError("takes true or false")
        return value
    if flag.kind in (*OBJECTS, TEXT_OR_OBJECT):
        found = numbered(unpacked(value))
        wanted: Any = dict if flag.kind == "parse_dataclass" else (dict, list)
        if not isinstance(found, wanted) and flag.kind != TEXT_OR_OBJECT:
            raise ValueError("takes an object: write {name: value} or JSON")
        return found
    if flag.many and isinstance(value, dict):  # lora_modules takes JSON, too
        return value
    takes, wanted = KINDS.get(flag.kind, (str, "text"))
    if isinstance(value, (bool, dict, list)):
        raise ValueError(f"takes {wanted}")
    if flag.choices and str(value) not in map(str, flag.choices):
        raise ValueError(f"accepts {', '.join(map(str, flag.choices))}")
    try:
        made = takes(str(value))
    except (ValueError, OverflowError):
        drawn = "; write int(interval(…)) in a sweep" if isinstance(value, float) else ""
        raise ValueError(f"takes {wanted}{drawn}") from None
    if not all(BOUNDS[name][0](made, bound) for name, bound in flag.bounds.items() if isinstance(made, (int, float))):
        raise ValueError(f"takes {' and '.join(f'{BOUNDS[name][1]} {bound:g}' for name, bound in flag.bounds.items())}")
    return made


def unpacked(value: Any) -> Any:
    """The object or the list that JSON text holds; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def packed(value: Any) -> Any:
    """JSON text of an object or a list, always in the same order; any other value as it is."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def numbered(value: Any) -> Any:
    """An object with the short numbers in it (80m) as vLLM reads them in `--flag.field 80m`."""
    if isinstance(value, dict):
        return {name: numbered(item) for name, item in value.items()}
    if isinstance(value, list):
        return [numbered(item) for item in value]
    return short_number(value) if isinstance(value, str) and SHORT_NUMBER.fullmatch(value) else value


def as_text(value: Any) -> str:
    """A flag's value as one word."""
    return str(packed(value))


def changes(args: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, each whole, that differ from `args` once `fields` of them (compilation_config.mode) are set.

    A null in an object takes the field out of it.
    """
    made: dict[str, Any] = {}
    for field_name in sorted(fields, key=lambda name: name.count(".")):  # an object before its fields
        flag, *path = field_name.split(".")
        flag = flag.replace("-", "_")
        if not path:
            made[flag] = fields[field_name]
            continue
        whole = deepcopy(unpacked(made.get(flag, args.get(flag))))
        node = made[flag] = whole if isinstance(whole, dict) else {}
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = fields[field_name]
        if fields[field_name] is None:
            del node[path[-1]]
    return {flag: None if value == {} else value for flag, value in made.items()}


def value_at(args: Mapping[str, Any], name: str) -> Any:
    """The value of a flag or, with dots, of a field of one; None if there is none."""
    node: Any = args
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def gpus(args: Mapping[str, Any]) -> int:
    """Number of GPUs that a server with these flags takes."""
    return prod(int(args.get(name) or 1) for name in PARALLEL)


def command_line(args: Mapping[str, Any], flags: Mapping[str, Flag]) -> list[str]:
    """Arguments of `vllm serve` for `args`: nulls are left out, lists become several words, objects JSON.

    A boolean becomes `--flag` or `--no-flag`; false is left out for one of `flags` that has no --no-… form.
    """
    words: list[str] = []
    for name, value in args.items():
        flag, known = name.replace("_", "-"), flags.get(name.replace("-", "_"))
        if value is None:
            continue
        if isinstance(value, bool) and (known is None or not known.takes_value):
            words += [f"--{flag}"] if value else [f"--no-{flag}"] if known is None or known.negatable else []
        else:
            several = isinstance(value, list) and (known is None or known.many)
            words += [f"--{flag}", *map(as_text, value if several else [value])]
    return words


def groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag of a command line, without its leading hyphens, and the words that follow it."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name, [value] if equals else []))
        else:
            flags[-1][1].append(word)
    return flags
