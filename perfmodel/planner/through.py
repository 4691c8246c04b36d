"""Time to first token of requests whose images go through an encode pool: the sum of its two sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from perfmodel.serving import arrivals, frontend
from perfmodel.serving.encode_pool import EncodeInstance, FedInstance

if TYPE_CHECKING:
    from perfmodel.planner.pools import Pool

_CELLS = 240
_TAIL = 0.999
_ROOM = 1.5


def first_token(
    pool: Pool, encoders: list[Pool], dispersion: float, per_token: float, far: float = 0.0
) -> Callable[[float], float]:
    """Share of a pool's requests whose first token comes within t seconds, `per_token` granted for each input token and
    `far` spent on the way.

    For each request the law of its wait and pass at the encode pools (by their rates, for as many images as it carries) and that
    of hand-off, wait and prefill, added as independent ones on a grid.
    """
    instance = cast(FedInstance, pool.column.instance)
    mix, mine = pool.mix, arrivals.dealt(dispersion, pool.replicas, pool.column.case.by_chance)
    outside = frontend.before_engine(pool.column.estimator.engine, pool.state, mix)
    ends = [instance.ttft_quantile(_TAIL, pool.state, mix, mine)]
    ends += [_encode(x).ttft_quantile(_TAIL, x.state, x.mix, _dealt(x, dispersion)) for x in encoders]
    grid = np.linspace(0.0, _ROOM * (ends[0] + max(ends[1:], default=0.0)), _CELLS)
    later = np.array([instance.part_shares(float(t), pool.state, mix, mine) for t in grid])
    images = np.zeros(mix.input.shape) if mix.images is None else mix.images
    met = later.copy()
    for n in np.unique(images[images > 0]):
        before = np.diff(_encoded(encoders, float(n), grid, dispersion), prepend=0.0)
        for i in np.flatnonzero(images == n):
            met[:, i] = np.convolve(before, later[:, i])[:_CELLS]
    step = grid[1]

    def share(t: float) -> float:
        at = np.clip((t - far + per_token * mix.input - outside) / step, -1.0, _CELLS - 1.001)
        low = np.maximum(at.astype(int), 0)
        each = np.arange(at.size)
        found = met[low, each] + (at - low) * (met[low + 1, each] - met[low, each])
        return mix.mean(np.where(at < 0, 0.0, found))

    return share


def _encoded(encoders: list[Pool], images: float, grid: np.ndarray, dispersion: float) -> np.ndarray:
    """P(encoded within each time of a grid) of a request with so many images, over the pools it may go through."""
    total = sum(x.rate for x in encoders)
    found = np.zeros(grid.size)
    for x in encoders:
        assert x.mix.images is not None
        like = np.abs(x.mix.images - images)
        who = (like == like.min()) * x.mix.weight
        laws = [_encode(x).part_shares(float(t), x.state, x.mix, _dealt(x, dispersion)) @ who / who.sum() for t in grid]
        found += x.rate / total * np.array(laws)
    return found


def _encode(x: Pool) -> EncodeInstance:
    return cast(EncodeInstance, x.column.instance)


def _dealt(x: Pool, dispersion: float) -> float:
    return arrivals.dealt(dispersion, x.replicas, x.column.case.by_chance)
