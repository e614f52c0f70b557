"""Configurations composed, changed by key, and read back from a trial's folder."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from autotune.config.schema import Config
from autotune.config.upgrade import upgraded
from autotune.errors import InputError
from autotune.text import one_line


def typed(config: DictConfig) -> Config:
    """The composed configuration as the dataclasses above, interpolations resolved."""
    return _to_object(_without_hydra(config))


def with_values(config: DictConfig, values: Mapping[str, Any], composed: Config) -> Config:
    """`config` with other values at these keys; without them it is `composed`."""
    are_flags = all(re.fullmatch(r"engine\.args\.[^.]+", key) for key in values)
    if are_flags and "${engine" not in str(config):  # nothing else depends on them
        return with_fields(composed, values)
    body = _without_hydra(config)
    for key, value in values.items():
        OmegaConf.update(body, key, value, force_add=True)
    return _to_object(body)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values at these keys, and whatever was interpolated from them as it was."""
    if not values:
        return config
    changed = deepcopy(config)
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = changed
        for part in path:
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        if isinstance(node, dict):
            node[last] = value
        else:
            setattr(node, last, value)
    return changed


def typed_target(node: Mapping[str, Any], group: str) -> tuple[Any, Any]:
    """The class that `node._target_` names, and `node` as that class's `Config`. Raises InputError, naming `group`."""
    target = str(node.get("_target_", ""))
    try:
        found: Any = get_class(target)
        return found, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(found.Config), dict(node)))
    except OmegaConfBaseException as error:
        raise InputError(f"{group}: {one_line(error)}") from None
    except (ImportError, HydraException, ValueError):
        raise InputError(f"{group}._target_={target}: there is no such class; write {group}=… (--help)") from None


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a trial left in `path`, changed by `overrides` (`key=value`). Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file; the folder of a trial holds one")
    try:
        written: Any = OmegaConf.to_container(OmegaConf.load(path))
        left = OmegaConf.create(upgraded(written))
        for override in overrides:
            _check_field(left, override)
        changed = OmegaConf.merge(left, OmegaConf.from_dotlist(list(overrides)))
        assert isinstance(changed, DictConfig)
        return _to_object(changed)
    except OmegaConfBaseException as error:
        where = "the command line, or " if overrides else ""
        raise InputError(f"{where}{path}: {str(error).splitlines()[0]}") from None


def _check_field(left: Any, override: str) -> None:
    """Raise InputError for the option of a group (`tracking=none`), which is gone once a trial has been composed."""
    key = override.partition("=")[0]
    group, written = (OmegaConf.select(config, key) for config in (left, OmegaConf.from_dotlist([override])))
    if isinstance(group, DictConfig) and not isinstance(written, DictConfig):
        fields = ", ".join(f"{key}.{name!s}=…" for name in group)
        raise InputError(f"{override}: of a trial that ran, fields can be changed, not groups; write {fields}")


def _without_hydra(config: DictConfig) -> DictConfig:
    body = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(body, False)
    return body


def _to_object(body: DictConfig) -> Config:
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), body))
    assert isinstance(made, Config)
    return made
