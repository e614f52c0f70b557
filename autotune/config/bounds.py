"""Bounds of fields: what is allowed stands beside each field in schema.py, and one check holds for all of them."""

import math
import re
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from typing import Any, get_args

from autotune.errors import InputError

Rule = Callable[[Any], str]  # what to write instead of a value, empty for one that is allowed
MOST = 2.0**31 - 1  # also the largest seed: NumPy takes twice that, and repeats count on from it
DAY_S = 86400.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}
LONGEST_S = 1000 * DAY_S
MOST_GPUS = 9999
NAME_BYTES = 200  # a file's name may have 255, and some get an ending


def number(least: float = 0.0, most: float = MOST, above: float | None = None) -> Rule:
    """The rule of numbers from `least`, or `above` a number, to `most`."""
    words = f"above {above:g}, at most" if above is not None else f"from {least:g} to"

    def rule(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        within = value > above if above is not None else value >= least
        return "" if within and value <= most else f"write a number {words} {most:.10g}"

    return rule


def finite(value: Any) -> str:
    """The rule of values that others read: vLLM, Optuna, a function of the user's own."""
    return "write a number" if isinstance(value, float) and not math.isfinite(value) else ""


def single(value: Any) -> str:
    """The rule of what a list or a dictionary of texts or numbers holds: OmegaConf takes lists and objects, too."""
    return "write one value, no list and no object" if isinstance(value, (dict, list)) else finite(value)


def file_name(value: Any) -> str:
    """The rule of names that become a file's or a folder's."""
    fits = len(str(value).encode(errors="replace")) <= NAME_BYTES
    if fits and re.fullmatch(r"\w([\w .,+=@-]*[\w+=@-])?", str(value)):
        return ""
    return f"write at most {NAME_BYTES} letters, digits and . _ - + = @, a letter or digit first"


def study(value: Any) -> str:
    """The rule of studies' names: their folders lie beside what else is in multirun/."""
    if str(value).casefold() in ("trials", "mlartifacts", "mlflow.db"):
        return f"multirun/{value} is something else; write another name"
    return file_name(value)


def path(value: Any) -> str:
    """The rule of files, folders and names that others have given."""
    return "" if str(value).strip() else "write a path or a name"


def pairs(value: Any) -> str:
    """The rule of lists of two numbers each, all above 0, and each first one once."""

    def right(one: Any) -> bool:
        return isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one <= MOST

    lists = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    if lists and all(right(one) for pair in value for one in pair) and len({pair[0] for pair in value}) == len(value):
        return ""
    return f"write pairs of numbers above 0, at most {MOST:.10g}, each first one once: [[1024,500],[8192,2000]]"


def gpus(value: Any) -> str:
    """The rule of GPUs: a list of indices, each once, or `all`."""
    lists = isinstance(value, list) and all(type(gpu) is int and 0 <= gpu <= MOST_GPUS for gpu in value)
    if value == "all" or (lists and 0 < len(value) == len(set(value))):
        return ""
    return f"write a list of indices up to {MOST_GPUS}, each once, gpus=[0,1], or gpus=all"


def three_seeds(value: Any) -> str:
    """The rule of LoadGen's seeds, of 64 bits each."""
    right = len(value) == 3 and all(type(seed) is int and 0 <= seed < 1 << 64 for seed in value)
    return "" if right else "write three whole numbers from 0, below 2^64"


def duration(value: Any) -> str:
    """The rule of durations, for `seconds`."""
    return "" if 0 < seconds(str(value)) <= LONGEST_S else "write a duration such as 30m or 2h, at most 1000d"


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, `1.5d` in seconds; 0 for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])", text.strip(), re.ASCII)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def bounded(default: Any, rule: Rule) -> Any:
    """A dataclass's field whose values, other than null, `rule` allows."""
    return field(default=default, metadata={"rule": rule})


def positive(default: Any, most: float = MOST) -> Any:
    return bounded(default, number(most=most, above=0))


def within(default: Any, least: float, most: float) -> Any:
    return bounded(default, number(least, most))


ANY_NUMBER = number()


def check(value: Any, key: str = "", rule: Rule = ANY_NUMBER, items: Rule = finite) -> None:
    """Raise InputError, naming its key, for the first value in a configuration that the rule of its field forbids.

    A number's field without a rule of its own takes ANY_NUMBER; `items` is the rule of what a container holds.
    """
    if is_dataclass(value):
        for one in fields(value):
            own, held = one.metadata.get("rule", rule), get_args(one.type)[-1:]
            of_items = single if held and held[0] in (str, int, float) else finite
            check(getattr(value, one.name), f"{key}.{one.name}".removeprefix("."), own, of_items)
        return
    if value is not None and (wrong := rule(value)):
        raise InputError(f"{key}={str(value)[:NAME_BYTES]}: {wrong}")
    if isinstance(value, dict):
        for part, item in value.items():
            check(item, f"{key}.{part}", items)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check(item, key, items)
