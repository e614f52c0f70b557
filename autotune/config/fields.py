"""The fields of the configuration for `autotune --help`, each with the comment beside or above it in schema.py."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import EnumType
from typing import Any, get_type_hints

from autotune.config import schema

WIDTH, WORDS_AT = 120, 34  # columns: of a line, and where a field's words begin
PART = re.compile(r"    # (?P<above>.*)|    (?P<name>\w+): .*?(?:  # (?P<beside>.*))?")
OF_AN_OPTION = {
    "backend=live": schema.LiveConfig,
    "backend=sim": schema.SimConfig,
    "launcher=gpus": schema.LocalConfig,
    "launcher=slurm": schema.ClusterConfig,
}
LEFT_OUT = (schema.BenchmarkConfig, schema.Device)  # records in conf/, which nobody writes on a command line


def render() -> str:
    """Every field with its words; of those of one option of a group, this option comes first."""
    found = [*described(schema.Config)]
    for option, kind in OF_AN_OPTION.items():
        group = option.partition("=")[0]
        found += [(key, f"{option}: {words}") for key, words in described(kind, f"{group}.")]
    return "\n".join(_paragraph(key, words) for key, words in found)


def described(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each field of `kind` by its key, with the words on it; names of options are the groups' own."""
    types, above = get_type_hints(kind), []
    for line in inspect.getsource(kind).splitlines():
        part = PART.fullmatch(line)
        if part and part["above"]:
            above.append(part["above"])
            continue
        name = part["name"] if part else ""
        inner, words = types.get(name), " ".join([*above, part["beside"] or ""] if part else []).strip()
        above = []
        if is_dataclass(inner) and inner not in LEFT_OUT:
            yield from described(inner, f"{prefix}{name}.")
        elif inner and inner not in LEFT_OUT and name not in ("name", "_target_"):
            choices = " | ".join(inner.__members__) if isinstance(inner, EnumType) else ""
            yield f"{prefix}{name}", ": ".join(filter(None, [choices, words]))


def _paragraph(key: str, words: str) -> str:
    first, indent = f"{key:<{WORDS_AT - 1}} ", " " * WORDS_AT
    return textwrap.fill(words, WIDTH, initial_indent=first, subsequent_indent=indent) or key
