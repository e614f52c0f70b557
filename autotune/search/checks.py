"""Checks of a search space before a study starts: what vLLM and the configuration take, and what can be told."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice, product
from typing import Any

from optuna.distributions import CategoricalDistribution

from autotune.config.advice import is_field
from autotune.config.overrides import with_fields
from autotune.config.schema import Config
from autotune.config.vllm_flags import FLAG, changes, packed, read, recorded, value_at
from autotune.errors import InputError
from autotune.measure.prepare import backend_of, cache_of
from autotune.measure.prepare import check as check_config
from autotune.search.conditions import holds, names_in
from autotune.search.distributions import Distribution, ends
from autotune.search.space import DEFAULT, VARIABLE, Space, value_of, values
from autotune.system.files import expanded

log = logging.getLogger(__name__)

POINTS = 1000  # of the space, at which a condition is tried


def check_space(space: Space, config: Config, backend: Any, known: Mapping[str, Any]) -> Space:
    """`space` with its flags' values as vLLM reads them; `known` has the values of flags that are not swept.

    Raises InputError for a parameter or a value that vLLM does not take, and for a condition that can't be told.
    """
    parameters = {
        name: _as_read(name, distribution, backend) if name.startswith(FLAG) else distribution
        for name, distribution in without_unknown(space, backend).parameters.items()
    }
    for name, distribution in parameters.items():
        if not name.startswith(FLAG):
            _check_field(name, [value_of(value) for value in ends(distribution)], config)
    flags = {*known, *backend.flags, *recorded()}
    for key in space.only_if:
        known_flag = key.startswith(FLAG) and key.removeprefix(FLAG).partition(".")[0] in flags
        if not known_flag and key not in space.parameters and not is_field(key):
            raise InputError(f"only_if.{key}: no parameter has that name; write its whole key: {FLAG}<flag>")
    nameable = flags | {one for key in space.parameters for one in (key.rpartition(".")[2], key.removeprefix(FLAG))}
    for kind, expressions in (("conditions", space.conditions), ("only_if", space.only_if)):
        for name, expression in expressions.items():
            _check_condition(expression, f"{kind}.{name}", parameters, nameable, known)
    return replace(space, parameters=parameters)


def _check_field(name: str, values: Sequence[Any], config: Config) -> None:
    """Raise InputError for one of `values` that the field `name` does not take."""
    for value in values:
        changed = with_fields(config, {name: value})
        check_config(changed)
        if name == "dataset.path" and (path := changed.dataset.path) and not expanded(path).is_file():
            raise InputError(f"{name}={value}: no such file")
    if name.startswith(VARIABLE):
        with cache_of(config) as folder:
            backend_of(changed, folder)


def _check_condition(
    expression: str, where: str, parameters: Mapping[str, Distribution], nameable: Set[str], known: Mapping[str, Any]
) -> None:
    """Raise InputError for a condition that names something else, or that can't be told somewhere in the space."""
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
    if not names:
        raise InputError(f"{where}: {expression!r} names no flag; write a flag or a swept parameter into it")


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


def _as_read(name: str, distribution: Distribution, backend: Any) -> Distribution:
    """The distribution of a flag, each of its values as vLLM reads it. Raises InputError."""
    field = name.removeprefix(FLAG)

    def as_read(value: Any) -> Any:
        return packed(value_at(backend.read(changes({}, {field: value_of(value)})), field.replace("-", "_")))

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
