"""Requests like those of a log, from its fitted description (trace_fit): arrivals, lengths, shared prefixes, sessions."""

from __future__ import annotations

import numpy as np

from perfmodel.serving.requests import Blocks, Requests
from perfmodel.spec.fitted import Arrivals, FittedWorkload, JointLengths, Quantiles, Reuse, Root, Sharing

# Requests on either side of a drawn lag among which the best match is sought, until one is close enough.
_REACHES = (24, 96, 384, 1536)
_CLOSE = 0.05
_SINKHORN = 50


def synthesise(fitted: FittedWorkload, *, span: float | None = None, n: int | None = None, seed: int = 1) -> Requests:
    """Requests of the described kind over `span` seconds (default: the log's), or the first `n`.

    A longer span repeats the rate over time. The same seed gives the same requests. Synthetic block ids and session
    numbers carry the sharing that was fitted, and nothing of the log.
    """
    if (n is not None and n < 1) or (span is not None and span <= 0):
        raise ValueError("synthesise at least one request, over a positive span")
    rng = np.random.default_rng(seed)
    length = fitted.span_s if span is None else span
    if n is not None:
        length = fitted.span_s * np.ceil(n / fitted.requests)
    arrival = _arrivals(fitted.arrivals, fitted.span_s, length, rng)[:n]
    lengths = fitted.lengths
    segment = (arrival % fitted.span_s) / fitted.span_s * len(lengths.drift_input)
    input_, output, input_class = _lengths(lengths, segment.astype(int), rng)
    arrival = arrival - arrival[0] if arrival.size else arrival
    requests = Requests(arrival, input_, output, tick=fitted.arrivals.tick)
    return requests if fitted.sharing is None else _Sharer(fitted.sharing, requests, input_class, rng).requests()


def _arrivals(a: Arrivals, fitted_span: float, span: float, rng: np.random.Generator) -> np.ndarray:
    passes = int(np.ceil(span / fitted_span - 1e-9))
    count = np.tile(np.array(a.windows), max(passes, 1))
    for rho in a.split:
        left = _halves(count, rho, rng)
        count = np.stack([left, count - left], axis=1).ravel()
    cell = max(passes, 1) * fitted_span / count.size
    place = rng.random(int(count.sum()))
    if a.tick:  # the log's ticks were spread evenly, so are these
        place = (np.arange(place.size) - np.repeat(np.cumsum(count) - count, count)) / np.repeat(count, count)
    arrival = np.sort((np.repeat(np.arange(count.size), count) + place) * cell)
    return arrival[arrival < span]


def _halves(count: np.ndarray, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Requests of each window that fall into its first half: beta-binomial of correlation rho > 0; below 0 nearer to half."""
    if rho > 0:
        shape = (1 / rho - 1) / 2
        return rng.binomial(count, rng.beta(shape, shape, count.size))
    off = rng.binomial(count, 0.5) - count / 2
    left = count / 2 + off * np.sqrt(np.maximum(1 + (count - 1) * rho, 0.0))
    return np.clip(np.floor(left + rng.random(count.size)), 0, count).astype(int)


def value_at(at: Quantiles, values: Quantiles, probability: np.ndarray) -> np.ndarray:
    """Values of a distribution at probabilities; log-linear between its knots if all are positive."""
    if values[0] > 0:
        return np.asarray(np.exp(np.interp(probability, at, np.log(values))))
    return np.asarray(np.interp(probability, at, values))


def _lengths(
    lengths: JointLengths, segment: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input, output, input class) of requests that fall into these segments of the span."""
    edges = np.array(lengths.input_classes), np.array(lengths.output_classes)
    table = _cells_by_segment(lengths, np.bincount(segment, minlength=len(lengths.drift_input)).astype(float))
    cell = np.empty(segment.size, int)
    for s in np.unique(segment):
        mine = np.flatnonzero(segment == s)
        share = np.cumsum(table[:, s]) / table[:, s].sum()
        # Evenly spaced draws in random order: the shares come out exactly, not only on average.
        drawn = np.searchsorted(share, (np.arange(mine.size) + rng.random()) / mine.size, side="right")
        cell[rng.permutation(mine)] = np.minimum(drawn, share.size - 1)
    columns = edges[1].size - 1
    row, column = cell // columns, cell % columns
    input_ = _within(lengths.at, lengths.input, edges[0], row, rng)
    output = _within(lengths.at, lengths.output, edges[1], column, rng)
    return input_, output, row


def _within(
    at: Quantiles, values: Quantiles, edges: np.ndarray, chosen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Whole values of at least 1, spread evenly over the probabilities of each request's class."""
    probability = np.empty(chosen.size)
    for k in np.unique(chosen):
        mine = np.flatnonzero(chosen == k)
        place = (rng.permutation(mine.size) + rng.random(mine.size)) / mine.size
        probability[mine] = edges[k] + (edges[k + 1] - edges[k]) * place
    return np.maximum(np.round(value_at(at, values, probability)), 1.0)


def _cells_by_segment(lengths: JointLengths, count: np.ndarray) -> np.ndarray:
    """Expected requests [cell, segment]: shares of the joint table, tilted to each segment's mean ranks, with both margins kept.

    A tilt exp(a x + b y) of ranks moves their means by (a, b) times their covariance, to first order; scaling rows and
    columns in turn (Sinkhorn) restores the margins.
    """
    share = np.array(lengths.joint).ravel()
    middles = [(np.array(e)[1:] + np.array(e)[:-1]) / 2 - 0.5 for e in (lengths.input_classes, lengths.output_classes)]
    rank = np.stack([x.ravel() for x in np.meshgrid(*middles, indexing="ij")])  # [2, cell]
    covariance = (rank * share) @ rank.T + 1e-6 * np.eye(2)
    tilt = np.linalg.solve(covariance, np.array([lengths.drift_input, lengths.drift_output]))
    table = share[:, None] * count * np.exp(rank.T @ tilt)
    total = count.sum()
    for _ in range(_SINKHORN):
        table *= (share * total / np.maximum(table.sum(axis=1), 1e-300))[:, None]
        table *= count / np.maximum(table.sum(axis=0), 1e-300)
    return np.asarray(table + 1e-12)


class _Sharer:
    """Gives requests, in order of arrival, an earlier prompt to continue or to share a part of, and block ids accordingly."""

    def __init__(self, s: Sharing, requests: Requests, input_class: np.ndarray, rng: np.random.Generator) -> None:
        self.s, self.r, self.rng = s, requests, rng
        n = len(requests)
        self.parent = np.full(n, -1)
        self.matched = np.zeros(n)
        self.open = np.ones(n, bool)  # not continued yet
        self.session = np.full(n, -1)
        tokens = max(s.block_tokens, 1)
        self.whole = np.floor(requests.input / tokens) * tokens  # tokens in full blocks
        self.root_tokens = np.array([*(float(root.blocks * tokens) for root in s.roots), 0.0])  # the last for no root, -1
        self.root = self._draw_roots()
        lag, matched, kind = self._draw(input_class)
        for i in range(n):
            if kind[i]:
                self._attach(i, float(lag[i]), float(matched[i]), continues=kind[i] == 1)
            if self.session[i] < 0:
                self.session[i] = i
        _, self.session = np.unique(self.session, return_inverse=True)

    def _draw_roots(self) -> np.ndarray:
        """Root of each request, -1 for none: exact shares, the longest roots first, to prompts that can hold them."""
        root = np.full(len(self.r), -1)
        for k in sorted(range(len(self.s.roots)), key=lambda k: -self.s.roots[k].blocks):
            able = np.flatnonzero((root < 0) & (self.r.input > (self.s.roots[k].blocks - 1) * self.s.block_tokens))
            wanted = round(self.s.roots[k].share * len(self.r))
            root[self.rng.permutation(able)[:wanted]] = k
        return root

    def _draw(self, input_class: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lag [s], matched share of the prompt, and kind (0: new, 1: continues, 2: branches) of each request."""
        n = len(self.r)
        lag, matched, kind = np.zeros(n), np.zeros(n), np.zeros(n, int)
        fate = self.rng.random(n)
        for number, reuse in ((1, self.s.continued), (2, self.s.branched)):
            if reuse is None:
                continue
            share = np.array(reuse.share)[input_class] / self._possible(reuse)
            chosen = (fate >= 0) & (fate < share)
            fate = np.where(chosen, -1.0, fate - share)
            lag[chosen] = value_at(reuse.lag_at, reuse.lag, self.rng.random(int(chosen.sum())))
            kind[chosen] = number
            for k in np.unique(input_class[chosen]) if reuse.matched else ():
                mine = np.flatnonzero(chosen & (input_class == k))
                place = (self.rng.permutation(mine.size) + self.rng.random(mine.size)) / mine.size
                matched[mine] = value_at(reuse.matched_at, reuse.matched[k], place)
        # What would repeat a prompt from before the first arrival is new.
        kind[lag > self.r.arrival] = 0
        return lag, matched, kind

    def _possible(self, reuse: Reuse) -> float:
        """Share of lags that do not reach behind the first arrival, as in the log that the shares were counted in."""
        lags = value_at(reuse.lag_at, reuse.lag, np.linspace(0.005, 0.995, 100))
        return max(float(np.searchsorted(np.sort(lags), self.r.arrival).mean()) / lags.size, 0.05)

    def _attach(self, i: int, lag: float, matched: float, *, continues: bool) -> None:
        """Continue the open request near the lag whose prompt is nearest to what is to match, or share a part of one."""
        r, tokens = self.r, max(self.s.block_tokens, 1)
        middle = int(np.searchsorted(r.arrival, r.arrival[i] - lag))
        wanted = matched * r.input[i]
        best, least = -1, np.inf
        for reach in _REACHES:
            # Never in less than half the lag: soon reuse is what the smallest caches live by.
            near = np.arange(max(middle - reach, 0), min(middle + reach, (middle + i) // 2, i - 1) + 1)
            fit, cost = self._candidates(i, near, middle, wanted, continues)
            if fit.size:
                best, least = int(fit[np.argmin(cost)]), float(cost.min())
            if least <= max(tokens, _CLOSE * wanted):
                break
        if best < 0:
            return
        self.parent[i], self.root[i] = best, self.root[best]
        self.matched[i] = np.round(wanted / tokens)
        if continues:
            self.open[best] = False
            self.session[i] = self.session[best]
            self.matched[i] = self.whole[best] / tokens

    def _candidates(
        self, i: int, near: np.ndarray, middle: int, wanted: float, continues: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of some earlier requests that can be repeated, and tokens (or requests) by which each is off."""
        off = np.abs(near - middle).astype(float)
        if not self.s.block_tokens:
            return near[self.open[near]], off[self.open[near]]
        whole, least = self.whole[near], self.root_tokens[self.root[near]]
        if continues:
            able = self.open[near] & (whole <= self.r.input[i]) & (whole > least)
            off = np.abs(whole - wanted)
        else:
            able = (whole > wanted) & (wanted > least)
        return near[able], off[able]

    def requests(self) -> Requests:
        r = self.r
        blocks = self._blocks() if self.s.block_tokens else None
        session = self.session if self.s.continued is not None else None
        think = None if session is None else np.full(len(r), np.nan)
        return Requests(r.arrival, r.input, r.output, blocks, session, think, tick=r.tick)

    def _blocks(self) -> Blocks:
        roots, following = _root_ids(self.s.roots)
        count = np.ceil(self.r.input / self.s.block_tokens).astype(int)
        start = np.concatenate([[0], np.cumsum(count)])
        ids = np.empty(start[-1], np.int64)
        for i in range(len(self.r)):
            mine = ids[start[i] : start[i + 1]]
            j = self.parent[i]
            if j >= 0:
                head = ids[start[j] : start[j] + min(int(self.matched[i]), mine.size)]
            else:
                head = roots[self.root[i]][: mine.size] if self.root[i] >= 0 else mine[:0]
            mine[: head.size] = head
            mine[head.size :] = np.arange(following, following + mine.size - head.size)
            following += mine.size - head.size
        return Blocks(ids, start, self.s.block_tokens)


def _root_ids(roots: tuple[Root, ...]) -> tuple[list[np.ndarray], int]:
    """Block ids of each root, beginning with those of the root it extends, and the first id that is free."""
    found: list[np.ndarray] = []
    following = 0
    for root in roots:
        head = found[root.under] if root.under is not None else np.zeros(0, np.int64)
        more = np.arange(following, following + root.blocks - head.size)
        following += more.size
        found.append(np.concatenate([head, more]))
    return found, following
