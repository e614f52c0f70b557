"""Conditions between parameters: expressions of flags and numbers that are true or false."""

import ast
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from simpleeval import DEFAULT_OPERATORS, InvalidExpression, SimpleEval

from autotune.config.vllm_flags import value_at
from autotune.errors import InputError

FUNCTIONS = {"int": int, "float": float, "str": str, "min": min, "max": max, "abs": abs, "len": len}
LONGEST = 1000  # characters
MOST_BITS = 1024  # of a number: those of the largest that a float holds


def holds(expression: str, names: Mapping[str, Any], where: str) -> bool:
    """Evaluate the condition `expression`, which stands at the key `where`; a comparison with an unknown value holds.

    `names` has the values that are known, objects with their fields. Raises InputError for what has no value.
    """
    tree = _parsed(expression, where)
    evaluator = SimpleEval(OPERATORS, FUNCTIONS, lambda node: value_at(names, node.id))
    del evaluator.nodes[ast.JoinedStr]  # it can be told to make up gigabytes
    try:
        return bool(evaluator.eval(expression, tree))
    except (InvalidExpression, ArithmeticError, TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, TypeError) and any(value_at(names, name) is None for name in names_in(expression, where)):
            return True  # None ≤ 4
        raise InputError(f"{where}: {expression!r} can't be told: {error}") from None
    except (RecursionError, MemoryError):
        raise InputError(f"{where}: {expression[:60]!r}… is nested too deep") from None


def names_in(expression: str, where: str) -> list[str]:
    """The flags and parameters that a condition names, fields with dots. Raises InputError for what can't be read."""
    nodes = ast.walk(_parsed(expression, where))
    return [node.id for node in nodes if isinstance(node, ast.Name) and node.id not in FUNCTIONS]


@cache
def _parsed(expression: str, where: str) -> Any:
    """The expression's tree, in which `a.b` is one name. Raises InputError."""
    if len(expression) > LONGEST:
        raise InputError(f"{where}: {expression[:60]!r}… has more than {LONGEST} characters")
    try:
        return _Dotted().visit(ast.parse(expression.strip(), mode="eval")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: {expression!r} can't be read: {error}") from None


class _Dotted(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        inner = self.visit(node.value)
        if not isinstance(inner, ast.Name):
            raise ValueError(f"only a flag has fields, and .{node.attr} is asked of something else")
        return ast.copy_location(ast.Name(f"{inner.id}.{node.attr}", ast.Load()), node)


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) * math.log2(abs(base) + 1) > MOST_BITS:
        raise ValueError("the power is too large")
    return base**exponent


def _shifted_left(number: Any, bits: Any) -> Any:
    return number * _power(2, bits)


def _remainder(number: Any, divisor: Any) -> Any:
    if isinstance(number, str):  # it would format, as wide as asked for
        raise ValueError("% takes numbers")
    return number % divisor


OPERATORS = DEFAULT_OPERATORS | {ast.Pow: _power, ast.LShift: _shifted_left, ast.Mod: _remainder}
