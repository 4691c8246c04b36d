"""Two estimates side by side: which resource a change relieved, what binds now, and where it stops helping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from perfmodel import units
from perfmodel.errors import Infeasible
from perfmodel.estimator import Estimator
from perfmodel.parts import Parts

_HALVINGS = 40
_SAME = 1e-3
"""Relative difference of times below which a change does nothing."""
NAMES = {"compute": "matrix", "hbm": "memory", "host": "host work", "host_link": "host link"}


@dataclass(frozen=True)
class Side:
    """One of the two: its parts of a prefill and of a decode round, and what it stores."""

    prefill: Parts
    decode: Parts
    tpot: float
    tokens: float
    """Emitted per round."""
    weights: float
    kv: float
    max_batch: int


@dataclass(frozen=True)
class Comparison:
    """Before and after one change, and the break-even points of its decode time."""

    before: Side
    after: Side
    breakeven: dict[str, dict[str, Any]]

    def relieved(self, phase: str) -> list[tuple[str, float, float]]:
        """(resource, seconds before, seconds after) of a `prefill` or `decode` step, the most relieved first."""
        old, new = (getattr(side, phase).busy for side in (self.before, self.after))
        rows = [(r, old.get(r, 0.0), new.get(r, 0.0)) for r in {**old, **new}]
        return sorted((r for r in rows if max(r[1:]) > 0), key=lambda r: r[2] - r[1])

    def data(self) -> dict[str, Any]:
        """Plain data in base SI."""
        return {
            phase: {
                "seconds": [getattr(self.before, phase).seconds, getattr(self.after, phase).seconds],
                "bound_by": [getattr(self.before, phase).bottleneck, getattr(self.after, phase).bottleneck],
                "busy_s": {r: [a, b] for r, a, b in self.relieved(phase)},
            }
            for phase in ("prefill", "decode")
        } | {
            "tpot_s": [self.before.tpot, self.after.tpot], "tokens_per_round": [self.before.tokens, self.after.tokens],
            "weights": [self.before.weights, self.after.weights], "kv": [self.before.kv, self.after.kv],
            "max_batch": [self.before.max_batch, self.after.max_batch], "break_even": self.breakeven,
        }  # fmt: skip


def compare(before: Estimator, after: Estimator, batch: float, isl: int, osl: int) -> Comparison:
    """The same request with and without a change; decode at the middle of the output."""
    context = isl + osl / 2
    return Comparison(
        _side(before, batch, isl, osl, context), _side(after, batch, isl, osl, context),
        {
            "batch": crossing(lambda b: _gain(before, after, b, context), batch, 1.0, 65536.0),
            "context": crossing(lambda c: _gain(before, after, batch, c), context, 16.0, float(2**24)),
            "bandwidth": crossing(
                lambda x: _gain(wider(before, x), wider(after, x), batch, context), 1.0, 1 / 64, 64.0
            ),
        },
    )  # fmt: skip


def _side(e: Estimator, batch: float, isl: int, osl: int, context: float) -> Side:
    held = e.memory(batch, isl + osl)
    try:
        most = e.max_batch(isl + osl)
    except Infeasible:
        most = 0
    return Side(
        e.parts(1, isl, 0, is_decode=False), e.parts(batch, float(e.round(batch).new), context - 1, is_decode=True),
        float(e.decode(batch, context)), float(e.round(batch).tokens), float(held.weights), float(held.kv), most,
    )  # fmt: skip


def _gain(before: Estimator, after: Estimator, batch: float, context: float) -> float:
    """Logarithm of how much sooner a token comes; positive: the change helps."""
    return math.log(float(before.decode(batch, context)) / float(after.decode(batch, context)))


def wider(e: Estimator, factor: float) -> Estimator:
    """The same instance with `factor` times the memory bandwidth."""
    other = object.__new__(type(e))
    other.__dict__.update({k: v for k, v in e.__dict__.items() if not k.startswith("_")})
    other.machine = replace(e.machine, bandwidth=e.machine.bandwidth * factor)
    other._remembered, other._dtypes = {}, e._dtypes
    # Drafts of a decode round, built by now, get the same bandwidth.
    other._drafts = {key: wider(draft, factor) for key, draft in e._drafts.items()}
    return other


def crossing(gain: Callable[[float], float], here: float, low: float, high: float) -> dict[str, Any]:
    """Where a gain changes its sign, nearest to `here` on a logarithmic scale; none: it has one sign throughout."""
    now = gain(here)
    ends = []
    for end in (low, high):
        if abs(now) > _SAME and (gain(end) > 0) != (now > 0):
            inner, outer = here, end
            for _ in range(_HALVINGS):
                middle = math.sqrt(inner * outer)
                inner, outer = (middle, outer) if (gain(middle) > 0) == (now > 0) else (inner, middle)
            ends.append(inner)
    nearest = min(ends, key=lambda x: abs(math.log(x / here)), default=None)
    return {"here": here, "gain_here": math.exp(now), "at": nearest, "low": low, "high": high}


def text(c: Comparison, batch: float, isl: int, osl: int) -> str:
    """The comparison for a terminal."""
    out = [f"{batch:g} sequences, {isl:,} prompt tokens, {osl:,} output tokens each", ""]
    for phase, title in (("prefill", "prefill of one prompt"), ("decode", "decode round")):
        old, new = getattr(c.before, phase), getattr(c.after, phase)
        out.append(f"{title:<26}{'before':>12}{'after':>12}")
        out += [f"  {NAMES.get(r, r):<24}{seconds(a):>12}{seconds(b):>12}{change(a, b):>10}" for r, a, b in c.relieved(phase)]
        times = old.seconds, new.seconds
        out.append(f"  {'expected':<24}{seconds(times[0]):>12}{seconds(times[1]):>12}{change(*times):>10}")
        out += [f"  {binding(old.bottleneck, new.bottleneck)}", ""]
    a, b = c.before, c.after
    out.append(f"{'per output token':<26}{seconds(a.tpot):>12}{seconds(b.tpot):>12}{change(a.tpot, b.tpot):>10}")
    if b.tokens != a.tokens:
        out.append(f"{'tokens a round':<26}{a.tokens:>12.3g}{b.tokens:>12.3g}")
    for name, x, y in (("weights", a.weights, b.weights), ("keys and values", a.kv, b.kv)):
        out.append(f"{name:<26}{units.show(x, 'size'):>12}{units.show(y, 'size'):>12}{change(x, y):>10}")
    out.append(f"{'largest batch':<26}{a.max_batch:>12,}{b.max_batch:>12,}{change(a.max_batch, b.max_batch):>10}")
    out += ["", *(where(name, found) for name, found in c.breakeven.items())]
    return "\n".join(out)


def binding(old: str, new: str) -> str:
    """Which resource bound and binds."""
    a, b = NAMES.get(old, old), NAMES.get(new, new)
    return f"{a} binds before and after" if a == b else f"{a} bound before, {b} binds now"


def where(name: str, found: dict[str, Any], what: str = "decode") -> str:
    """One break-even point in words."""
    show = (lambda x: f"{x:.3g} x the bandwidth") if name == "bandwidth" else (lambda x: f"{name} {x:,.0f}")
    gain, at = found["gain_here"], found["at"]
    if abs(math.log(gain)) <= _SAME:
        return f"does nothing for {what} at {show(found['here'])}"
    helps = "helps" if gain > 1 else "costs"
    if at is None:
        return f"{helps} at every {name} from {show(found['low'])} to {show(found['high'])}"
    other = "costs" if gain > 1 else "helps"
    if at > found["here"]:
        return f"{helps} up to {show(at)}; {other} above"
    return f"{helps} from {show(at)}; {other} below"


def seconds(x: float) -> str:
    """A time as it is read; nothing for none."""
    return units.show(x, "time") if x > 0 else "-"


def change(a: float, b: float) -> str:
    """By what factor a number changed."""
    return f"x {b / a:.2f}" if a > 0 and b > 0 else ""
