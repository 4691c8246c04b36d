"""Arithmetic in a YAML file: numbers, dotted names, + - * / **, and a few functions. Parsed, never executed.

    expression = number | name {"." name} | function "(" arguments ")" | "(" expression ")" | - expression | a op b
    op         = + | - | * | / | **
    function   = min max sqrt log exp ceil floor abs

Python's own parser reads the text; every node that is not in the list above is refused.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from perfmodel.errors import SpecError, did_you_mean

FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "sqrt": math.sqrt, "log": math.log, "exp": math.exp, "ceil": math.ceil, "floor": math.floor,
    "abs": abs,
}  # fmt: skip
_LONGEST = 2000  # characters of one expression
_LARGEST_POWER = 64.0

Lookup = Callable[[tuple[str, ...]], Any]


@lru_cache(maxsize=2048)
def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises SpecError for anything beyond the grammar."""
    if len(text) > _LONGEST:
        raise SpecError(f"an expression of {len(text)} characters; at most {_LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SpecError(f"cannot read the expression {text!r}") from None
    _check(tree, text)
    return tree


def _check(node: ast.AST, text: str) -> None:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float()):
            return
        case ast.Name() if not node.id.startswith("_"):
            return
        case ast.Attribute() if not node.attr.startswith("_") and isinstance(node.value, (ast.Name, ast.Attribute)):
            return _check(node.value, text)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return _check(node.operand, text)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow()):
            _check(node.left, text)
            return _check(node.right, text)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            if name not in FUNCTIONS:
                hint = did_you_mean(name, FUNCTIONS)
                raise SpecError(f"unknown function {name!r} in {text!r}{hint}; known: {', '.join(FUNCTIONS)}")
            for argument in node.args:
                _check(argument, text)
            return
    raise SpecError(f"{text!r} holds {type(node).__name__.lower()}: only numbers, names, + - * / ** and functions are read")


def names(text: str) -> set[tuple[str, ...]]:
    """Dotted names an expression uses."""
    found: set[tuple[str, ...]] = set()

    def visit(node: ast.AST) -> None:
        path = _path(node)
        if path:
            found.add(path)
            return
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.Call) and child is node.func):
                visit(child)

    visit(parse(text))
    return found


def _path(node: ast.AST) -> tuple[str, ...]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return (node.id, *parts) if isinstance(node, ast.Name) else ()


def evaluate(text: str, lookup: Lookup) -> Any:
    """The value of an expression; `lookup` gives that of a dotted name. Raises SpecError where there is none."""

    def value(node: ast.AST) -> Any:
        path = _path(node)
        if path:
            return lookup(path)
        match node:
            case ast.Constant():
                return float(node.value)  # type: ignore[arg-type]
            case ast.UnaryOp():
                return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
            case ast.Call(func=ast.Name(id=name)):
                return float(FUNCTIONS[name](*(value(a) for a in node.args)))
            case ast.BinOp():
                return _binary(node.op, value(node.left), value(node.right))
        raise AssertionError(node)

    try:
        found = value(parse(text))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise SpecError(f"{text!r} has no value: {error}") from None
    if isinstance(found, complex) or (isinstance(found, float) and not math.isfinite(found)):
        raise SpecError(f"{text!r} has no finite value")
    return found


def _binary(op: ast.operator, a: float, b: float) -> float:
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div():
            return a / b
    if abs(b) > _LARGEST_POWER:
        raise ValueError(f"a power of {b:g}")
    return float(a**b)
