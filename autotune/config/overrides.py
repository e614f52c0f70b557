"""A configuration as dataclasses: composed by Hydra, changed by key, or read back from a trial's folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from autotune.config import CONF, bounds, redact
from autotune.config.advice import told
from autotune.config.schema import Config
from autotune.config.upgrade import upgraded
from autotune.errors import InputError
from autotune.text import one_line


def typed(config: DictConfig) -> Config:
    """The composed configuration with its interpolations resolved, checked."""
    made = _to_object(_without_hydra(config))
    learn_secrets(made)
    check(made)
    return made


def check(config: Config) -> None:
    """Raise InputError for a field that `config`'s backend or launcher lacks, and for a value outside its bounds."""
    groups = {"backend": config.backend, "launcher": config.launcher, "prior.backend": config.prior.backend}
    for group, node in groups.items():
        if node is not None:
            bounds.check(typed_target(node, group)[1], group)
    bounds.check(config)


def learn_secrets(config: Config) -> None:
    """Hide the secrets of `config` in all that this process writes from here on. Raises InputError for no names."""
    bounds.check(config.secrets, "secrets", items=bounds.single)
    redact.add_names(config.secrets)
    redact.redact(asdict(config))


def with_values(config: DictConfig, values: Mapping[str, Any], composed: Config) -> Config:
    """`config` with `values` at their keys; `composed` is `config` as it stands."""
    are_flags = all(re.fullmatch(r"engine\.args\.[^.]+", key) for key in values)
    if are_flags and "${engine" not in str(config):  # no interpolation depends on them
        return with_fields(composed, values)
    body = _without_hydra(config)
    for key, value in values.items():
        OmegaConf.update(body, key, value, force_add=True)
    return _to_object(body)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with `values` at their keys; what was interpolated from these keys keeps its value.

    Raises InputError for a key that is no field, and for a value of another type than its field.
    """
    if not values:
        return config
    changed = deepcopy(config)
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = changed
        try:
            for part in path:
                node = node[part] if isinstance(node, dict) else getattr(node, part)
        except (KeyError, AttributeError):
            raise InputError(f"{key}: there is no such field") from None
        if isinstance(node, dict):
            node[last] = value
        else:
            setattr(node, last, _as_field(node, last, value, key))
    return changed


def _as_field(node: Any, name: str, value: Any, key: str) -> Any:
    """`value` as the type of the field `name` of `node` has it: an Enum of its name. Raises InputError."""
    kind: Any = type(node)
    try:
        typed: Any = OmegaConf.merge(_schema(kind), {name: value})
    except OmegaConfBaseException as error:
        raise InputError(told(error, key.removesuffix(name))) from None
    made = typed[name]
    return OmegaConf.to_object(made) if OmegaConf.is_config(made) else made


def typed_target(node: Mapping[str, Any], group: str) -> tuple[Any, Any]:
    """The class that `node._target_` names, and `node` as that class's `Config`. Raises InputError, naming `group`."""
    if not isinstance(node, Mapping):
        raise InputError(f"{group}={node}: write an option of the group (--help)")
    target = str(node.get("_target_", ""))
    try:
        target_class: Any = get_class(target)
        return target_class, OmegaConf.to_object(OmegaConf.merge(_schema(target_class.Config), dict(node)))
    except OmegaConfBaseException as error:
        raise InputError(told(error, f"{group}.")) from None
    except (ImportError, HydraException, ValueError, AttributeError):  # or a class without Config
        raise InputError(f"{group}._target_={target}: there is no such class; write {group}=… (--help)") from None


def as_override(value: Any) -> str:
    """A parameter's value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{as_override(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def check_trusted(config: Config, overrides: Sequence[str], path: Path) -> None:
    """Raise InputError if `config`, read from `path`, would run code that is neither autotune's own nor in `overrides`.

    A study's folder may come from anyone; to run one more class of it takes a word on the command line.
    """
    allowed = _own_targets() | {override.partition("=")[2] for override in overrides}
    for key, target in leaves(asdict(config), lists=True):
        if key.rpartition(".")[2] == "_target_" and str(target) not in allowed:
            raise InputError(f"{path}: {key}={target} is not autotune's own; add {key}={target} if you trust it")


def leaves(node: Any, key: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Each value in `node` that is no object, by its key below `key`; with `lists` a list's items by their numbers."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if lists and isinstance(node, list) else None
    if items is None:
        yield key, node
    else:
        for name, item in items:
            yield from leaves(item, f"{key}.{name}" if key else str(name), lists)


@cache
def _own_targets() -> frozenset[str]:
    """The classes and functions that conf/ names."""
    texts = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return frozenset(target for text in texts for target in re.findall(r"_target_: (\S+)", text))


def _literally(node: Any) -> Any:
    """`node` of a file that was written without interpolations: what looks like one is text."""
    if isinstance(node, dict):
        return {key: _literally(item) for key, item in node.items()}
    if isinstance(node, list):
        return [_literally(item) for item in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml that a trial left at `path`, changed by `overrides` (`key=value`). Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file; the folder of a trial holds one")
    try:
        written: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(written, dict):
            raise InputError(f"{path}: a {type(written).__name__}, not the configuration of a trial")
        config = OmegaConf.create(_literally(upgraded(written)))
        for override in overrides:
            _check_field(config, override)
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        assert isinstance(changed, DictConfig)
        made = _to_object(changed)
    except OmegaConfBaseException as error:
        where = "the command line, or " if overrides else ""
        raise InputError(f"{where}{path}: {told(error)}") from None
    except (YAMLError, OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not the configuration of a trial ({one_line(error)})") from None
    learn_secrets(made)
    return made


def _check_field(config: Any, override: str) -> None:
    """Raise InputError if `override` picks an option of a group (`tracking=none`): of a composed trial none is left."""
    key = override.partition("=")[0]
    group, written = (OmegaConf.select(node, key) for node in (config, OmegaConf.from_dotlist([override])))
    if isinstance(group, DictConfig) and not isinstance(written, DictConfig):
        fields = ", ".join(f"{key}.{name!s}=…" for name in group)
        raise InputError(f"{override}: of a trial that ran, fields can be changed, not groups; write {fields}")


@cache
def _schema(kind: type) -> DictConfig:
    """`kind`, a dataclass, as OmegaConf checks it: to make one takes as long as to use it."""
    made = OmegaConf.structured(kind)
    assert isinstance(made, DictConfig)
    return made


def _without_hydra(config: DictConfig) -> DictConfig:
    """A copy whose nodes are open, and plain where conf/ took a schema in: `_target_` alone decides their class."""
    body: Any = OmegaConf.to_container(config)
    body.pop("hydra", None)
    plain = OmegaConf.create(body)
    assert isinstance(plain, DictConfig)
    return plain


def _to_object(body: DictConfig) -> Config:
    made = OmegaConf.to_object(OmegaConf.merge(_schema(Config), body))
    assert isinstance(made, Config)
    return made
