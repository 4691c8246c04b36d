"""Arrivals logged by a coarse clock: find its tick, and spread the requests of a tick over it.

Mooncake's traces, for one, sit on a clock of 3 s: ten requests at the same instant are the logger's doing, not the users'.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perfmodel.serving.requests import Requests

_FEWEST = 10  # distinct times: fewer may lie on a grid by chance
_JITTER = 0.01  # of a tick: Mooncake's are 2.999 s to 3.001 s
_ON_GRID = 0.99  # share of gaps that are whole ticks
_COARSE = 0.1  # of the mean gap between requests: a finer clock changes nothing


def tick_of(arrival: np.ndarray) -> float:
    """Seconds between the ticks of the clock that arrivals (sorted) sit on; 0.0 where it is fine or there is none.

    The tick is the small end of the gaps between distinct times, if 99 % of these gaps are whole multiples of it within
    1 %, and it is no less than a tenth of the mean gap between requests.
    """
    times = np.unique(arrival)
    # Where no two share a tick (a load generator's even pace) there is nothing to spread.
    if times.size < _FEWEST or times.size == arrival.size:
        return 0.0
    gaps = np.diff(times)
    tick = float(np.quantile(gaps, 0.05))
    ticks = np.round(gaps / tick)
    on_grid = (ticks >= 1) & (np.abs(gaps - ticks * tick) <= _JITTER * tick)
    if on_grid.mean() < _ON_GRID:
        return 0.0
    tick = float(gaps[on_grid].sum() / ticks[on_grid].sum())
    mean_gap = (times[-1] - times[0]) / (arrival.size - 1)
    return tick if tick >= _COARSE * mean_gap else 0.0


def on_clock(requests: Requests, tick: float, *, spread: bool) -> Requests:
    """Requests that keep the tick they were logged by; with `spread`, the k of one tick come at 0, 1/k, 2/k ... of it."""
    if not spread:
        return replace(requests, tick=tick)
    times, first, count = np.unique(requests.arrival, return_index=True, return_counts=True)
    # Where the clock jitters a tick ends at the next one, so that order is kept.
    length = np.minimum(np.append(np.diff(times), tick), tick)
    place = np.arange(len(requests)) - np.repeat(first, count)
    arrival = requests.arrival + place * np.repeat(length / count, count)
    return replace(requests, arrival=arrival, tick=tick)
