"""A generation by denoising with and without a change: what it relieves, and where it stops helping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from perfmodel import units
from perfmodel.denoising import Generation, denoise
from perfmodel.estimator import Estimator
from perfmodel.explain.compare import NAMES, binding, change, crossing, seconds, where, wider


@dataclass(frozen=True)
class Denoised:
    """Before and after one change, and the break-even points of the whole generation."""

    before: Generation
    after: Generation
    breakeven: dict[str, dict[str, Any]]

    def relieved(self) -> list[tuple[str, float, float]]:
        """(resource, seconds before, seconds after), the most relieved first."""
        old, new = self.before.busy, self.after.busy
        rows = [(r, float(old.get(r, 0.0)), float(new.get(r, 0.0))) for r in {**old, **new}]
        return sorted((r for r in rows if max(r[1:]) > 0), key=lambda r: r[2] - r[1])

    def data(self) -> dict[str, Any]:
        """Plain data in base SI."""
        return {
            "seconds": [self.before.seconds, self.after.seconds], "bound_by": [_most(self.before), _most(self.after)],
            "busy_s": {r: [a, b] for r, a, b in self.relieved()},
            "kept_bytes": [self.before.cached_bytes, self.after.cached_bytes], "break_even": self.breakeven,
        }  # fmt: skip


def compare(before: Estimator, after: Estimator, batch: float, tokens: float, steps: float) -> Denoised:
    """The same `steps` over `batch` sequences of `tokens`, with and without a change."""

    def gain(b: float = batch, t: float = tokens, bandwidth: float = 1.0) -> float:
        old, new = (denoise(e if bandwidth == 1 else wider(e, bandwidth), b, t, steps) for e in (before, after))
        return math.log(float(old.seconds) / float(new.seconds))

    return Denoised(
        denoise(before, batch, tokens, steps), denoise(after, batch, tokens, steps),
        {
            "batch": crossing(lambda b: gain(b=b), batch, 1.0, 4096.0),
            "length": crossing(lambda t: gain(t=t), tokens, 16.0, float(2**20)),
            "bandwidth": crossing(lambda x: gain(bandwidth=x), 1.0, 1 / 64, 64.0),
        },
    )  # fmt: skip


def text(c: Denoised, batch: float, tokens: float, steps: float) -> str:
    """The comparison for a terminal."""
    out = [f"{batch:g} sequences of {tokens:,.0f} tokens, {steps:g} steps", "", f"{'generation':<26}{'before':>12}{'after':>12}"]
    rows = [(NAMES.get(r, r), a, b) for r, a, b in c.relieved()]
    rows.append(("expected", float(c.before.seconds), float(c.after.seconds)))
    out += [f"  {name:<24}{seconds(a):>12}{seconds(b):>12}{change(a, b):>10}" for name, a, b in rows]
    kept = [units.show(float(g.cached_bytes), "size") for g in (c.before, c.after)]
    out += [f"  {binding(_most(c.before), _most(c.after))}", "", f"{'kept between steps':<26}{kept[0]:>12}{kept[1]:>12}"]
    return "\n".join([*out, "", *(where(name, found, "the generation") for name, found in c.breakeven.items())])


def _most(g: Generation) -> str:
    return max(g.busy, key=lambda r: float(g.busy[r]))
