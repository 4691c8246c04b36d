"""Verdicts by hand: the tolerances written out, each limit from both sides."""

from __future__ import annotations

from typing import Any

import pytest

from perfmodel.papers.verdict import Evidence, judge, meets, middle, near
from perfmodel.spec.paper import Claim


def claim(claimed: Any, unit: str = "x", direction: str = "higher", **rest: Any) -> Claim:
    return Claim(metric="m", claimed=claimed, unit=unit, direction=direction, against="b", setting="s", predict="1", **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predicted", "claimed", "unit", "direction", "expected"),
    [
        # |ln(p/c)| <= 0.3 ln 4 = 0.416: factors of 1.516 either way.
        (4 * 1.51, 4, "x", "higher", True), (4 * 1.53, 4, "x", "higher", False), (4 / 1.51, 4, "x", "higher", True),
        # Small ratios have at least 0.1: 1.2 x 1.105.
        (1.32, 1.2, "x", "higher", True), (1.34, 1.2, "x", "higher", False), (0.99, 1.05, "x", "higher", False),
        # 30 % lower is a ratio of 0.7, ln = -0.357, tolerance 0.107: 0.629 .. 0.779, so 22.1 % .. 37.1 %.
        (22.5, 30, "%", "lower", True), (21.5, 30, "%", "lower", False), (36.9, 30, "%", "lower", True), (37.5, 30, "%", "lower", False),
        (-5, 3, "%", "lower", False),
        # 525 % higher is 6.25 times: ln 1.833, tolerance 0.55, so 3.61 .. 10.8 times.
        (265, 525, "%", "higher", True), (255, 525, "%", "higher", False),
        (119, 100, "tokens/s", "higher", True), (121, 100, "tokens/s", "higher", False), (79, 100, "GB", "lower", False),
    ],
)  # fmt: skip
def test_tolerances(predicted: float, claimed: float, unit: str, direction: str, expected: bool) -> None:
    assert near(predicted, claimed, unit, direction) is expected


def test_a_range_is_met_inside_it_or_at_both_ends() -> None:
    c = claim((2.0, 4.0))
    assert meets((3.0,), c)
    assert meets((1.7,), c)
    assert not meets((1.2,), c)
    assert meets((2.1, 3.0, 4.2), c)
    assert not meets((3.0, 4.2), claim((1.1, 4.0)))  # the low end is 3.0, not 1.1


def test_up_to_takes_the_best_and_typical_the_middle() -> None:
    assert judge(claim(4.0, reach="up-to"), Evidence((1.1, 1.3, 4.1)))[0] == "reproduced"
    assert judge(claim(4.0), Evidence((1.1, 1.3, 4.1)))[0] == "open"
    assert middle((1.0, 9.0, 2.0)) == 2.0


@pytest.mark.parametrize(("best", "verdict"), [(5.9, "reproduced"), (7.9, "bounded"), (8.1, "loose"), (2.0, "open")])
def test_up_to_is_bounded_until_the_claim_to_the_power_of_three_halves(best: float, verdict: str) -> None:
    # 4^1.5 = 8; reproduced up to 4 x 1.516 = 6.06.
    assert judge(claim(4.0, reach="up-to"), Evidence((best,)))[0] == verdict


def test_only_an_up_to_is_bounded() -> None:
    assert judge(claim(4.0), Evidence((7.9,)))[0] == "open"


def test_what_a_verdict_rests_on_decides_its_name() -> None:
    c = claim(2.0)
    assert judge(c, Evidence((2.0,)))[0] == "reproduced"
    assert judge(c, Evidence((2.0,), ((1.9,), (2.2,)), assumed=("x",)))[0] == "reproduced"
    assert judge(c, Evidence((2.0,), ((1.9,), (3.2,)), assumed=("x",)))[0] == "consistent"
    assert judge(c, Evidence((2.0,), swept=("x",)))[0] == "consistent"
    assert judge(c, Evidence((2.0,), measured=True))[0] == "derived"


def test_exceeds_needs_a_bound_and_sources() -> None:
    c = claim(4.0, bound="1")
    assert judge(c, Evidence((1.5,), bound=2.0))[0] == "exceeds"
    assert judge(c, Evidence((1.5,), bound=2.0, assumed=("x",)))[0] == "open"
    assert judge(c, Evidence((1.5,), bound=3.9))[0] == "open"
    lower = claim(80, "%", "lower", bound="1")  # leaves 0.2 of the time; the bound leaves 0.5
    assert judge(lower, Evidence((20.0,), bound=50.0))[0] == "exceeds"
