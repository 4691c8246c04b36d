"""Load over a day: how much capacity each moment needs when decisions come a lag ahead, and what elasticity is worth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perfmodel.spec.fleet import Profile

LEVELS = 6
"""Different amounts of capacity in a day; more are rounded up."""


@dataclass(frozen=True)
class Level:
    """A multiple of the planned rate, and the share of time for which that much capacity is held."""

    multiple: float
    share: float


def profile_of(profile: Profile, arrival: np.ndarray | None, rate: float) -> list[tuple[float, float]]:
    """(seconds, multiple of the rate) in order of time: as stated, or the trace's windows over the planned `rate`."""
    if profile.window is None or arrival is None:
        return [(h * 3600.0, m) for h, m in profile.hours]
    span = float(arrival[-1])
    edges = np.arange(0.0, max(span, profile.window) + profile.window * 0.5, profile.window)
    counts, edges = np.histogram(arrival, bins=edges)
    return [(float(b - a), float(n) / float(b - a) / rate) for n, (a, b) in zip(counts, pairwise(edges), strict=True)]


def held(periods: list[tuple[float, float]], lag: float) -> list[Level]:
    """Capacity to hold, as shares of the cycle, highest first: at each time the largest multiple over the coming lag.

    A node that serves at t was asked for at t - lag, and is paid from then on. The cycle repeats.

    >>> held([(12 * 3600, 1.0), (12 * 3600, 0.5)], 6 * 3600)
    [Level(multiple=1.0, share=0.75), Level(multiple=0.5, share=0.25)]
    """
    ends = np.cumsum([s for s, _ in periods])
    total = float(ends[-1])
    lag = min(lag, total)
    starts = ends - [s for s, _ in periods]
    cuts = np.unique(np.concatenate([[0.0, total], starts, (starts - lag) % total]))
    shares: dict[float, float] = {}
    for a, b in pairwise(cuts):
        middle = (a + b) / 2
        seen = [
            m for (s, m), start in zip(periods, starts, strict=True)
            for shift in (0.0, total) if start + shift < middle + lag and middle < start + shift + s
        ]  # fmt: skip
        shares[max(seen)] = shares.get(max(seen), 0.0) + float(b - a) / total
    return [Level(m, s) for m, s in sorted(shares.items(), reverse=True)]


def merged(levels: list[Level], most: int = LEVELS) -> list[Level]:
    """At most so many levels: those whose rounding up to the next higher one costs least are joined to it."""
    result = sorted((x for x in levels if x.share > 0), key=lambda x: -x.multiple)
    while len(result) > most:
        waste = [(result[i].multiple - result[i + 1].multiple) * result[i + 1].share for i in range(len(result) - 1)]
        i = int(np.argmin(waste))
        result[i : i + 2] = [Level(result[i].multiple, result[i].share + result[i + 1].share)]
    return result
