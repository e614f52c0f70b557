"""Errors of Hydra and OmegaConf in autotune's words: the key, and what to write instead."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from autotune.config import CONF, schema
from autotune.config.bounds import ANY_NUMBER, NAME_BYTES, Rule
from autotune.config.vllm_flags import FLAG, recorded
from autotune.errors import InputError
from autotune.text import one_line


def told(error: BaseException, prefix: str = "") -> str:
    """`error` on one line: the key, `prefix` before it, and what to write instead, where OmegaConf knows them."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_option(error)
    if found := re.search(r"Could not override '(.+)'\.\s*No match in the defaults list", str(error)):
        return f"{found[1]}: {_unchosen(*found[1].split('@'))}"
    if found := re.search(r"In '((\w+)/.+)': .*Key '\2' not in 'Config'", str(error), re.DOTALL):
        return f"{found[1]}.yaml: its first line must be `# @package _global_`"
    why = error.__cause__ if isinstance(error, HydraException) else error
    if not isinstance(why, OmegaConfBaseException) or not why.full_key:
        return one_line(error)
    if isinstance(why, InterpolationToMissingValueError):
        return _missing(one_line(why).split()[-1])
    if isinstance(why, InterpolationResolutionError):
        return one_line(error) if str(why).startswith(InputError.__name__) else f"{why.full_key}: {one_line(error)}"
    key = f"{prefix}{why.full_key}"
    if isinstance(why, MissingMandatoryValue):
        return _missing(key)
    if group := _group(key):
        return f"{key}: {group}"
    if isinstance(why, (ConfigKeyError, ConfigAttributeError)) and isinstance(why.parent_node, DictConfig):
        return f"{key}: there is no such field; {_field(key, why.parent_node)}"
    if "does not support deletion" in str(why):
        return f"~{key}: a field is always there; write {key}=<value>"
    if instead := _instead(why, key):
        written = "" if why.key is None else f"={'null' if why.value is None else str(why.value)[:NAME_BYTES]}"
        return f"{key}{written}: write {instead}"
    return one_line(error)


def _missing(key: str) -> str:
    """The line for a `key` without a value: it, or an option of its group that sets it, is to be written."""
    instead = _group(key.rpartition(".")[0]).removeprefix("a group; ") or f"write {key}=<value>"
    return f"{key}: no value; {instead}"


def _group(key: str) -> str:
    """Advice for a `key` that means a group: by its last part, with dots, or below another key; else empty."""
    path, known = f"/{key.replace('.', '/')}", known_keys().get(key)
    groups = (f"/{folder.relative_to(CONF).as_posix()}" for folder in CONF.rglob("*") if folder.is_dir())
    found = next((group for group in groups if group.endswith(path) or path.endswith(group)), "")
    if not found or (known and (path != found or known not in (str, schema.Device))):
        return ""
    package = f"@{key}" if found.count("/") > 1 and len(path) > len(found) else ""
    return f"a group; write {found[1:]}{package}=<one of {', '.join(_options(found[1:]))}>"


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _unchosen(group: str, package: str = "") -> str:
    """Advice for an option of `group`, at `package`, that nothing takes in which is chosen: what would."""
    parent, *below = package.split(".") if "." in package else group.split("/")
    files = {option: str(OmegaConf.load(CONF / parent / f"{option}.yaml")) for option in _options(parent)}
    taking = [f"{parent}={option}" for option, body in files.items() if below and f"{below[0]}': '" in body]
    if not taking:
        return "nothing that is chosen has options of that name; see --help"
    return f"write {' or '.join(taking)}, too"


def _no_option(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or _options(group))
    where = str(error).partition(":")[0].removeprefix("In ").strip("'")
    file = "" if where == "config" or not where else f"{where}.yaml: "
    close = get_close_matches(name, options, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{file}{group}={name}: there is no such option; {hint}{group} has {', '.join(options)}"


def _field(key: str, node: DictConfig) -> str:
    """Advice for `key`, which `node` lacks: a field that it resembles, one of that name elsewhere, or all fields."""
    if "/" in key:
        dotted = key.replace("/", ".")
        return f"did you mean {dotted}?" if dotted in known_keys() else "only a group has a slash; see --help"
    name = key.rpartition(".")[2]
    own = [str(field) for field in node if field not in ("_target_", "hydra")]
    group = key.partition(".")[0]
    known = known_keys() if "." in key or OmegaConf.get_type(node) is schema.Config else ()  # else a command's options
    if key in known:
        return f"another option of {group} has it, this one has {', '.join(own) or 'none'}"
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if close := get_close_matches(name, own, 1) or elsewhere[:1]:
        return f"did you mean {close[0]}?"
    return f"it has {', '.join(own)}" if own else "it has none"


@cache
def known_keys() -> dict[str, Any]:
    """Every key of a Config and of what its open nodes hold, the shorter ones first, with its type."""

    def below(kind: Any, at: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(kind).items():
            yield f"{at}{name}", hint
            if is_dataclass(hint):
                yield from below(hint, f"{at}{name}.")

    groups = {
        "backend.": (schema.LiveConfig, schema.SimConfig),
        "launcher.": (schema.LocalConfig, schema.ClusterConfig),
    }
    found = [*((f"{FLAG}{flag}", Any) for flag in recorded()), *below(schema.Config, "")]
    found += [one for at, kinds in groups.items() for kind in kinds for one in below(kind, at)]
    return dict(sorted(found, key=lambda one: (one[0].count("."), one[0].startswith("backend.device"))))


def is_field(key: str) -> bool:
    """Tell whether `key` is that of a field in a group, or lies in one that has fields of others' (backend.env.X)."""
    return any(f"{key}.".startswith(f"{known}.") for known in known_keys() if "." in known)


def _instead(why: OmegaConfBaseException, key: str) -> str:
    """The values, in words, that the field takes which `why` is about; empty if that is unknown."""
    kind, rule = why.object_type, ANY_NUMBER
    hint: Any
    if kind and is_dataclass(kind) and why.key in (own := {one.name: one for one in fields(kind)}):
        hint, rule = get_type_hints(kind)[str(why.key)], own[str(why.key)].metadata.get("rule", ANY_NUMBER)
    elif why.key is None:  # a container as a whole
        hint = list[Any] if kind is list else dict[str, Any]
    else:
        hint = (get_args(_kinds(why.ref_type)[0]) or (None,))[-1]  # an item of a list, a value of a dict
    kinds = _kinds(hint)
    words = _values(kinds[0], key, rule)
    return f"{words}, or null" if words and NoneType in kinds else words


def _kinds(hint: Any) -> list[Any]:
    """The types that a field may have, null as the last one."""
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return sorted(kinds, key=lambda kind: kind is NoneType)


def _values(kind: Any, key: str, rule: Rule) -> str:
    """The values of a type in words: those of its rule, if it has one."""
    if is_dataclass(kind):
        names = [f"{key}.{one.name}=…" for one in fields(kind)]
        return f"its fields: {', '.join(names[:5])}{', …' if names[5:] else ''}"
    if get_origin(kind) is dict:
        return f"its fields: {key}.<name>=<value>"
    if get_origin(kind) is list:
        return f"a list: {key}=[…]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if kind in (int, float):
        words = (rule(math.nan) or ANY_NUMBER(math.nan)).removeprefix("write ")
        return words.replace("a number", "a whole number") if kind is int else words
    return "true or false" if kind is bool else rule("").removeprefix("write ") or "a text" if kind is str else ""
