"""The search space: parameters, their distributions, and the conditions between them."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from simpleeval import DEFAULT_FUNCTIONS, InvalidExpression, simple_eval

from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.search.hydra_private import distribution_of

# A choice that leaves the flag to vLLM; Hydra's choice() takes no null.
DEFAULT = "default"


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
            if name not in self.only_if or _holds(self.only_if[name], known, chosen):
                chosen[name] = _suggest(trial, name, distribution)
        return chosen

    def violated(self, chosen: Mapping[str, Any], known: Mapping[str, Any]) -> str:
        """The first condition that `chosen` breaks, as a reason; empty if all hold."""
        for name, expression in self.conditions.items():
            if not _holds(expression, known, chosen):
                return f"conditions.{name}: not {expression}"
        return ""

    @cached_property
    def grid(self) -> dict[str, list[Any]]:
        """Every value of every parameter. Raises InputError for one without steps."""
        return {name: _grid_values(name, distribution) for name, distribution in self.parameters.items()}

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
    written = [f"{name}={value}" for name, value in space.items()] + list(arguments)
    for override in OverridesParser.create().parse_overrides(written):
        name = override.get_key_element()
        assert override.input_line is not None
        if not override.is_sweep_override():
            fixed[name] = override.input_line
            parameters.pop(name, None)
            continue
        if "." not in name:
            raise InputError(
                f"{override.input_line}: a study sweeps fields, not groups; start one study for each {name}"
            )
        try:
            parameters[name] = distribution_of(override)
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise InputError(f"{override.input_line}: {error}") from None
        fixed.pop(name, None)
    if not parameters:
        raise InputError(
            "nothing to tune: choose space=scheduler, or sweep a flag: 'engine.args.block_size=choice(16,32)'"
        )
    return Space(parameters, dict(conditions), dict(only_if)), list(fixed.values())


def swept_flags(params: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's flags among `params`, by name; null where the choice is vLLM's default."""
    return {
        name.removeprefix(FLAG).replace("-", "_"): None if value == DEFAULT else value
        for name, value in params.items()
        if name.startswith(FLAG)
    }


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _holds(expression: str, known: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Evaluate `expression`; an unknown flag is None, and a comparison with None holds."""
    names = {**known, **{_short(name): value for name, value in chosen.items()}}
    try:
        return bool(simple_eval(expression, names=lambda node: names.get(node.id)))
    except TypeError:  # None ≤ 4
        return True
    except (InvalidExpression, SyntaxError, ArithmeticError, ValueError, AttributeError) as error:
        raise InputError(f"condition {expression!r}: {error}") from None


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


def describe(distribution: BaseDistribution) -> str:
    """`16…1024, log`; `2048 | 4096`."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(str(choice) for choice in distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    step = f", step {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g}…{distribution.high:g}{', log' if distribution.log else step}"


def check_space(space: Space, backend: Any, known: Mapping[str, Any]) -> None:
    """Raise InputError for a parameter or a choice that vLLM does not know, and for a condition that can't be told.

    `known` has the values of flags that are not swept.
    """
    for name, distribution in space.parameters.items():
        if name.startswith(FLAG):
            choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
            values = [choice for choice in choices if choice != DEFAULT]
            backend.check({name.removeprefix(FLAG): values})
    expressions = {f"conditions.{name}": expression for name, expression in space.conditions.items()}
    expressions |= {f"only_if.{name}": expression for name, expression in space.only_if.items()}
    names = {*known, *backend.flags, *map(_short, space.parameters)}
    for where, expression in expressions.items():
        for name in _names_in(expression, where):
            if name not in names:
                close = get_close_matches(name, sorted(names), 1)
                hint = f"did you mean {close[0]}?" if close else "write a flag or a swept parameter"
                raise InputError(f"{where}: {expression!r} names {name}, which is no flag and not swept; {hint}")
        _holds(expression, known, {})


def _names_in(expression: str, where: str) -> list[str]:
    """The flags and parameters that a condition names."""
    try:
        nodes = ast.walk(ast.parse(expression, mode="eval"))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: {expression!r} can't be read: {error}") from None
    return [node.id for node in nodes if isinstance(node, ast.Name) and node.id not in DEFAULT_FUNCTIONS]
