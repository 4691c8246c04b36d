"""What a trace says of cached blocks: how often they are used again by age, what that saves, and what room it takes.

A segment is the blocks of a class (used once so far, twice, more often) in a span of ages (seconds since the last use).
Counts are those of the trace after a warm-up, so that what the cache would hold by then is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.prefix import Uses
from perfmodel.serving.requests import Requests

_YOUNGEST_S = 1.0


@dataclass(frozen=True)
class Profile:
    """Rates and mean amounts per segment [class, age]; everything per second of the trace after the warm-up."""

    edges: np.ndarray
    """Seconds at which the age spans begin, and infinity [age + 1]."""
    hits: np.ndarray
    """Prompt tokens per second whose block was last used that long ago."""
    requests: np.ndarray
    """Requests per second with such hits, each counted by the share of its hits that they are."""
    saved: np.ndarray
    """Prefill seconds per second that finding them saves."""
    held: np.ndarray
    """Tokens of blocks of that age, at any time: the room they take."""
    entered: np.ndarray
    """Tokens per second that reach that age."""
    prompt: float
    """Prompt tokens per second."""
    work: float
    """Prefill seconds per second without any cache."""
    seconds: float
    """Length of the trace after the warm-up."""
    warm_up: float
    overlap: tuple[np.ndarray, np.ndarray]
    """(tokens found at best, prefill seconds of the others) of each request: what can hide a fetch."""
    layers: int


def token_seconds(e: Estimator, depth: np.ndarray) -> np.ndarray:
    """Prefill seconds of one prompt token after `depth` others, in steps that are full [shape of depth]."""
    chunk = float(e.engine.chunk_tokens)
    grid = np.concatenate([[0.0], np.geomspace(chunk / 8, max(float(np.max(depth, initial=0.0)), chunk), 24)])
    cost = np.asarray(e.prefill(1, chunk, grid)) / chunk
    # A step's tokens lie half a step deeper than its start on average.
    return np.interp(np.asarray(depth), grid + chunk / 2, cost)


def profile(
    e: Estimator, requests: Requests, u: Uses, *, classes: int = 3, ages: int = 40, warm_up: float | None = None
) -> Profile:
    """Segments of a trace. warm_up: seconds at its beginning that fill the cache [a third of it].

    Raises SpecError for a trace too short to show any reuse.
    """
    end = float(requests.arrival[-1]) if len(requests) else 0.0
    begin = end / 3 if warm_up is None else warm_up
    if not 0 <= begin < end or begin < _YOUNGEST_S:
        raise SpecError(f"a trace of {end:.0f} s is too short to see reuse after a warm-up of {begin:.0f} s")
    seconds = end - begin
    edges = np.concatenate([[0.0], np.geomspace(_YOUNGEST_S, begin, ages - 1), [np.inf]])
    shape = (classes, edges.size - 1)
    cost = token_seconds(e, u.depth)
    seen = u.at >= begin
    again = seen & np.isfinite(u.since)
    kind = np.minimum(u.earlier, classes - 1)
    cell = np.minimum(u.earlier[again] - 1, classes - 1) * shape[1] + np.searchsorted(edges, u.since[again], "right") - 1

    def spread(weight: np.ndarray) -> np.ndarray:
        return np.bincount(cell, weight, minlength=classes * shape[1]).reshape(shape) / seconds

    most = np.bincount(u.request[again], u.saved[again], minlength=len(requests))
    share = u.saved[again] / np.maximum(most, 1.0)[u.request[again]]
    held, entered = np.zeros(shape), np.zeros(shape)
    leaves = np.minimum(u.at + u.until, end)
    for k in range(shape[1]):
        reaches = u.at + edges[k]
        stay = np.minimum(u.at + edges[k + 1], leaves) - np.maximum(reaches, begin)
        held[:, k] = np.bincount(kind, u.tokens * np.maximum(stay, 0.0), minlength=classes) / seconds
        crosses = (reaches >= begin) & (reaches < leaves)
        entered[:, k] = np.bincount(kind[crosses], u.tokens[crosses], minlength=classes) / seconds
    first = requests.arrival >= begin
    rest = np.bincount(u.request[~again], (u.saved * cost)[~again], minlength=len(requests))
    chosen = first & (most > 0)
    return Profile(
        edges, spread(u.saved[again]), spread(share), spread((u.saved * cost)[again]), held, entered,
        float(requests.input[first].sum()) / seconds, float((u.tokens * cost)[seen].sum()) / seconds, seconds, begin,
        (most[chosen], rest[chosen]), e.model.n_layers,
    )  # fmt: skip


def visible_fetch(p: Profile, fetch: float) -> float:
    """Share of fetch seconds (at `fetch` s per token) that layer-wise loading does not hide behind the prompt's own prefill.

    Layer i computes while layer i + 1 loads: of n layers, one load at least is seen.
    """
    found, rest = p.overlap
    whole = found * fetch
    if fetch <= 0 or whole.sum() <= 0:
        return 1.0
    seen = np.maximum(whole - rest * (1 - 1 / p.layers), whole / p.layers)
    return float(seen.sum() / whole.sum())
