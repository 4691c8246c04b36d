"""Time to first token of each request of a mix, from the laws of the step cycle."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from perfmodel.serving.cycle import Cycle

_CLASSES = 7
_SINGLE = 12  # cells that are bins of their own
_BINS = 28
_NOTHING = 1e-6
_AFTER = 1 + 1e-9
_PARTS = (1 / 6, 1 / 2, 5 / 6)


class Waiting:
    """Waits of requests whose prefill alone takes `own` seconds beside decoding ones and `alone` on an idle engine.

    Requests of like work share a law: theirs is shifted by what their own prefill takes more.
    """

    def __init__(self, cycle: Cycle, own: np.ndarray, alone: np.ndarray) -> None:
        load = cycle.load
        order = np.argsort(load.work, kind="stable")
        edges = np.searchsorted(np.cumsum(load.weight[order]), np.arange(1, _CLASSES) / _CLASSES)
        parts = [p for p in np.split(order, np.unique(edges)) if p.size]
        self._class = np.empty(own.size, int)
        for c, part in enumerate(parts):
            self._class[part] = c
        begin = np.cumsum([0] + [p.size for p in parts[:-1]])
        share = np.add.reduceat(load.weight[order], begin)

        def middle(values: np.ndarray) -> np.ndarray:
            return np.asarray(np.add.reduceat((load.weight * values)[order], begin) / share)

        work, first = middle(load.work), middle(own)
        waits, chance = _waits(cycle, work)
        if not chance.size:
            waits, chance = np.zeros((work.size, 1)), np.zeros((work.size, 1))
        values = waits + first[:, None]
        self.mean = float(share @ (values * chance).sum(1)) + cycle.idle * float(load.weight @ alone)
        place = np.argsort(values, axis=1, kind="stable")
        values = np.take_along_axis(values, place, axis=1)
        # Weights of cells may be negative by rounding: a law never falls.
        below = np.maximum.accumulate(np.cumsum(np.take_along_axis(chance, place, axis=1), axis=1), axis=1)
        self._share = np.maximum(below / np.maximum(below[:, -1:], 1e-300), 0.0)
        self._idle, self._alone = cycle.idle, alone
        self._span = float(values.max()) * _AFTER
        # Nobody is served before the first value.
        # And everybody by the last, also of a class whose own last value is smaller than the others'.
        first_and_last = values[:, :1], np.full((len(parts), 1), self._span)
        values = np.concatenate(
            [np.zeros((len(parts), 1)), first_and_last[0], np.maximum(values, 0.0), first_and_last[1]], axis=1
        )
        self._share = np.concatenate(
            [np.zeros((len(parts), 2)), self._share, np.ones((len(parts), 1))], axis=1
        )
        self._table = (values + 2 * self._span * np.arange(len(parts))[:, None]).ravel()
        self._shift = own - first[self._class]

    def within(self, limits: np.ndarray) -> np.ndarray:
        """P(first token within the limit) of each request [s]."""
        # One table for all classes, each moved by more than any value.
        room = np.clip(limits - self._shift, 0.0, self._span)
        queued = np.interp(room + self._class * 2 * self._span, self._table, self._share.ravel())
        return self._idle * (limits >= self._alone) + (1 - self._idle) * queued


def _waits(cycle: Cycle, work: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds beyond a request's own prefill, and their probability [class, point]."""
    load = cycle.load
    busy = load.rate * float(load.weight @ load.work)
    full = load.chunk + load.overhead
    own = work[:, None]
    least = np.maximum(np.ceil(own / load.chunk - 1e-9), 1)
    alone = load.seconds(own)
    start, width = _bins(cycle.grid.size)
    middle = np.add.reduceat(cycle.grid, start) / width
    found, chance = [], []

    def add(values: np.ndarray, weights: np.ndarray) -> None:
        shape = np.broadcast_shapes(values.shape, weights.shape)
        found.append(np.broadcast_to(values, shape))
        chance.append(np.broadcast_to(weights, shape))

    def later(seconds: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(nothing comes in so many seconds), and what comes otherwise, as far as it has room in the last step."""
        nothing = np.exp(-load.rate * seconds)
        return nothing, np.minimum(busy * seconds / np.maximum(1 - nothing, 1e-12), room)

    # Requests that share a step, behind a running one of its group.
    weight = np.add.reduceat(cycle.gathered, start, axis=1)
    group, bin_ = np.nonzero(np.abs(weight) > _NOTHING)
    seconds, weight = middle[bin_], weight[group, bin_]
    rest = np.minimum(cycle.rest[group], seconds)
    others = seconds - rest
    fits = others <= load.chunk - work[-1]
    add(rest[fits] + load.seconds(own + others[fits]) - alone, weight[fits])
    if not fits.all():
        # Where the gate exceeds a budget of tokens it matters how many stand before the request: evenly many.
        rest, others, weight = rest[~fits], others[~fits], weight[~fits]
        together = load.seconds(own + others) - alone
        one_step = own + others <= load.chunk
        for place in _PARTS:
            steps = np.maximum(np.ceil((own + others * place) / load.chunk - 1e-9), 1)
            served = np.minimum(own + others, steps * load.chunk)
            nothing, more = later((steps - 1) * full, steps * load.chunk - served)
            for extra, part in ((0.0, nothing), (more, 1 - nothing)):
                late = served + extra - own + (steps - least) * load.overhead
                add(rest + np.where(one_step, together, late), weight / len(_PARTS) * part)
    weight = np.add.reduceat(cycle.ahead, start)
    some = np.abs(weight) > _NOTHING
    seconds, weight = middle[some], weight[some]
    for share in _PARTS if seconds.size else ():
        rest = np.minimum(share * full, seconds)
        place = own + (seconds - rest) / (1 + load.overhead / load.chunk)
        steps = np.maximum(np.ceil(place / load.chunk - 1e-9), 1)
        # Those behind fill what is left of the last step.
        nothing, more = later(rest + (steps - 1) * full, steps * load.chunk - place)
        for extra, part in ((0.0, nothing), (more, 1 - nothing)):
            add(seconds + extra, weight / len(_PARTS) * part)
    return np.concatenate(found, axis=1), np.concatenate(chance, axis=1)


@lru_cache(maxsize=8)
def _bins(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """First cell and width of the bins that stand for a law's cells, ever wider apart."""
    start = np.unique(np.concatenate([np.arange(_SINGLE), np.geomspace(_SINGLE, cells, _BINS)[:-1].round()]).astype(int))
    return start, np.diff(np.append(start, cells))
