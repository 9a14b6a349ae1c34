"""Arithmetic in texts, as the model zoo's configs have it: a small part of Python's expressions, and nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

__all__ = ["evaluated"]

LONGEST = 1000
"""The largest number of characters."""
STEPS = 10_000
"""The largest number of values that are computed."""
LARGEST = 2.0**63
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "float": float, "int": int, "max": max, "min": min, "range": range, "round": round,
}  # fmt: skip


def evaluated(text: str) -> Any:
    """Compute numbers, or lists of numbers, from a text.

    It knows numbers, ``+ - * / // % **``, lists, tuples, ``[... for x in ...]`` and the functions ``abs``, ``float``,
    ``int``, ``max``, ``min``, ``range`` and ``round``.

    Raises:
        ValueError: the text has anything else, or its numbers are too large or too many.

    Example:
        >>> evaluated("[[x, x * 2**0.5] for x in [32, 64]]")
        [[32, 45.254833995939045], [64, 90.50966799187809]]
    """
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    try:
        return _Evaluation().value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"no arithmetic: {type(error).__name__}") from error


class _Evaluation:
    """One evaluation, which counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def value(self, node: ast.AST, names: dict[str, Any]) -> Any:
        """Return the value of a part; ``names`` are those that comprehensions around it have bound."""
        self._step()
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _checked(number)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.List(elts=parts):
                return [self.value(part, names) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple(self.value(part, names) for part in parts)
            case ast.UnaryOp(op=sign, operand=part) if type(sign) in SIGNS:
                return SIGNS[type(sign)](_checked(self.value(part, names)))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
                return self._binary(type(sign), self.value(left, names), self.value(right, names))
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
                return self._call(name, [self.value(part, names) for part in parts])
            case ast.ListComp(elt=part, generators=generators):
                return self._listed(part, generators, names)
        raise ValueError(f"no arithmetic: {type(node).__name__}")

    def _step(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise ValueError(f"more than {STEPS} values")

    def _binary(self, sign: type, left: Any, right: Any) -> Any:
        _checked(left), _checked(right)
        if sign is ast.Pow and abs(right) > 64:
            raise ValueError("an exponent beyond 64")
        return _checked(OPERATORS[sign](left, right))

    def _call(self, name: str, values: list[Any]) -> Any:
        if name == "round" and len(values) != 1:  # with digits it may take for ever
            raise ValueError("no arithmetic: round with digits")
        found = FUNCTIONS[name](*values)
        if not isinstance(found, range):
            return _checked(found)
        if len(found) > STEPS:
            raise ValueError(f"more than {STEPS} values")
        return found

    def _listed(self, part: ast.AST, generators: list[ast.comprehension], names: dict[str, Any]) -> list[Any]:
        if not generators:
            return [self.value(part, names)]
        first, *others = generators
        if first.ifs or first.is_async or not isinstance(first.target, ast.Name):
            raise ValueError("no arithmetic: a condition")
        found: list[Any] = []
        for item in self.value(first.iter, names):
            self._step()
            found += self._listed(part, others, {**names, first.target.id: item})
        return found


def _checked(number: Any) -> Any:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"no arithmetic: {type(number).__name__}")
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise ValueError("a number that is too large")
    return number
