"""The grammar of expressions: what it computes, and what it refuses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.papers.expression import evaluate, names, parse

VALUES = {("a",): 3.0, ("s", "tpot"): 0.02, ("b",): 7.0}


def value(text: str) -> float:
    return evaluate(text, lambda path: VALUES[path])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("-a ** 2", -9), ("2 ** -1", 0.5), ("8 / 4 / 2", 1), ("a - -b", 10),
        ("100 * (1 - s.tpot / 0.05)", 60), ("max(a, b, 5)", 7), ("ceil(7 / 2) + floor(7 / 2)", 7), ("sqrt(16)", 4),
        ("log(exp(2))", 2), ("1e3", 1000), ("abs(-2.5)", 2.5), ("min(a, b)", 3),
    ],
)  # fmt: skip
def test_values_by_hand(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "a if a else b", "[1, 2]", "'text'", "a.b()", "(1).real", "lambda: 1", "a @ b", "a % b",
        "a // b", "True", "f'{a}'", "a[0]", "eval(a)", "max(*a)", "max(a, key=b)", "1j", "a; b", "", "a +", "a < b", "not a",
        "a := 1", "(yield)", "max.__class__", "1" * 3000,
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


@pytest.mark.parametrize("text", ["1 / 0", "sqrt(-1)", "9 ** 9 ** 9", "exp(1000)", "(-8) ** 0.5", "log(0)", "max()", "sqrt(1, 2)"])
def test_no_value_is_one_error(text: str) -> None:
    with pytest.raises(SpecError):
        value(text)


def test_names_leave_functions_out() -> None:
    assert names("max(s.tpot, a) / other.ttft - 2") == {("s", "tpot"), ("a",), ("other", "ttft")}


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.floats(0.5, 9).map(lambda x: f"{x:.3f}"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"), max_leaves=12,
))  # fmt: skip
def test_arithmetic_agrees_with_python(text: str) -> None:
    try:
        expected = eval(text)  # digits and operators made above
    except ZeroDivisionError:
        with pytest.raises(SpecError):
            value(text)
        return
    assert math.isclose(value(text), expected, rel_tol=1e-12, abs_tol=1e-12)
