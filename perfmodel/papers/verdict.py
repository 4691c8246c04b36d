"""How a prediction compares with a claim: the tolerances of docs/papers.md, and nothing tuned per paper.

A ratio is met within |ln(predicted / claimed)| <= max(0.1, 0.3 |ln claimed|) and in the same direction; an absolute value
within 20 %. An `up to` is bounded where the best over the paper's range lies between the claim and claim^1.5 (1.5 times the
claim for an absolute value), and loose beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perfmodel.spec.paper import Claim

Verdict = Literal["reproduced", "consistent", "derived", "bounded", "loose", "exceeds", "open", "input"]
_LEAST = 0.1
_SHARE = 0.3
_ABSOLUTE = 0.2
_ROOM = 1.5

COUNTED: tuple[Verdict, ...] = ("reproduced", "consistent", "derived", "bounded", "loose", "exceeds", "open")
"""All but `input` are in the denominator."""
MET: tuple[Verdict, ...] = ("reproduced",)


def is_relative(unit: str) -> bool:
    """Whether a claim compares with a baseline: a ratio, or a change in per cent."""
    return unit in ("x", "%")


def as_ratio(value: float, unit: str, direction: str) -> float:
    """A relative claim as the factor by which the metric changes; a reduction of 100 % or more is as good as none left.

    >>> as_ratio(30, "%", "lower"), as_ratio(50, "%", "higher"), as_ratio(2.6, "x", "lower")
    (0.7, 1.5, 2.6)
    """
    if unit != "%":
        return value
    return max(1 - value / 100, 1e-6) if direction == "lower" else 1 + value / 100


def near(predicted: float, claimed: float, unit: str, direction: str) -> bool:
    """Whether one prediction meets one claimed value.

    >>> near(2.3, 2.6, "x", "higher"), near(1.2, 2.6, "x", "higher"), near(0.9, 1.05, "x", "higher")
    (True, False, False)
    >>> near(110, 100, "tokens/s", "higher"), near(130, 100, "tokens/s", "higher")
    (True, False)
    """
    if not is_relative(unit):
        return abs(predicted - claimed) <= _ABSOLUTE * abs(claimed)
    p, c = as_ratio(predicted, unit, direction), as_ratio(claimed, unit, direction)
    if p <= 0 or (p > 1) != (c > 1):
        return False
    return abs(math.log(p / c)) <= max(_LEAST, _SHARE * abs(math.log(c)))


def meets(values: Sequence[float], claim: Claim) -> bool:
    """Whether predictions over the paper's range meet the claim: the best of an `up-to`, both ends of a range, else each end.

    One prediction meets a range inside it or near its nearest end.
    """
    low, high = min(values), max(values)
    if isinstance(claim.claimed, tuple):
        first, last = claim.claimed
        if len(values) == 1:
            return near(min(max(low, first), last), low, claim.unit, claim.direction) or near(
                low, min(max(low, first), last), claim.unit, claim.direction
            )
        if claim.reach == "up-to":
            return near(high, last, claim.unit, claim.direction)
        return near(low, first, claim.unit, claim.direction) and near(high, last, claim.unit, claim.direction)
    if claim.reach == "up-to":
        return near(high, claim.claimed, claim.unit, claim.direction)
    return near(middle(values), claim.claimed, claim.unit, claim.direction)


def no_effect(claim: Claim) -> bool:
    """Whether the null model that nothing changes is within the tolerance, which then is of no direction.

    A claim of less than a tenth is met by it.
    """
    if not is_relative(claim.unit):
        return False
    least = min(claim.claimed) if isinstance(claim.claimed, tuple) else claim.claimed
    return abs(math.log(as_ratio(least, claim.unit, claim.direction))) <= _LEAST


def middle(values: Sequence[float]) -> float:
    """The typical one of predictions over a range: the median."""
    ordered = sorted(values)
    n = len(ordered)
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


def room(values: Sequence[float], claim: Claim) -> Literal["bounded", "loose", ""]:
    """Of an `up-to` that is not met: bounded below the best, loose far below, or neither."""
    if claim.reach != "up-to":
        return ""
    best = max(values)
    claimed = claim.claimed[1] if isinstance(claim.claimed, tuple) else claim.claimed
    if not is_relative(claim.unit):
        return "" if best < claimed else "bounded" if best <= _ROOM * claimed else "loose"
    p, c = as_ratio(best, claim.unit, claim.direction), as_ratio(claimed, claim.unit, claim.direction)
    if p <= 0 or (p > 1) != (c > 1) or abs(math.log(p)) < abs(math.log(c)):
        return ""
    return "bounded" if abs(math.log(p)) <= _ROOM * abs(math.log(c)) else "loose"


@dataclass(frozen=True)
class Evidence:
    """What a claim's prediction came to, and what it rests on."""

    values: tuple[float, ...]
    """At the stated parameters, one per point of the sweep."""
    varied: tuple[tuple[float, ...], ...] = ()
    """The same with each assumed parameter at the ends of its range or at a stand-in."""
    measured: bool = False
    """A parameter was read off the claim's own experiment."""
    assumed: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()
    """Parameters that are swept although the paper's range of them is assumed: what is met then rests on them."""
    bound: float | None = None
    """The best any implementation could do, where every parameter is sourced."""


def judge(claim: Claim, e: Evidence) -> tuple[Verdict, str]:
    """The verdict on a claim and the reason for it."""
    if meets(e.values, claim):
        if e.measured:
            return "derived", "an input was measured in the claim's own experiment"
        bearing = [v for v in e.varied if not meets(v, claim)]
        if bearing:
            return "consistent", f"holds at the assumed values, not over all of their range ({', '.join(e.assumed)})"
        if e.swept:
            return "consistent", f"holds over a range that is assumed ({', '.join(e.swept)})"
        return "reproduced", "holds over every assumption" if e.assumed else "every parameter is sourced"
    if e.bound is not None and not e.assumed and _beyond(claim, e.bound):
        return "exceeds", f"the claim lies beyond the bound of {e.bound:.4g} at datasheet rates, for the setting as read here"
    found = room(e.values, claim)
    if found:
        return found, claim.reason or "an `up to` below the best over the paper's range"
    return "open", claim.reason or ""


def _beyond(claim: Claim, bound: float) -> bool:
    """Whether the claim is better than the bound by more than its tolerance."""
    claimed = claim.claimed[0] if isinstance(claim.claimed, tuple) else claim.claimed
    if near(bound, claimed, claim.unit, claim.direction):
        return False
    if is_relative(claim.unit):
        p, c = as_ratio(bound, claim.unit, claim.direction), as_ratio(claimed, claim.unit, claim.direction)
        return abs(math.log(max(c, 1e-9))) > abs(math.log(max(p, 1e-9)))
    return claimed > bound if claim.direction == "higher" else claimed < bound
