"""A request log as a few hundred numbers that hold no row of it, from which like requests can be synthesised.

Arrivals: requests by window (the rate over time), and inside the windows a multiplicative cascade: each window is halved
again and again, and at each halving two requests fall into the same half more often than by chance by a correlation
rho_l (the beta multipliers of the multifractal wavelet model, Riedi, Crouse, Ribeiro and Baraniuk, IEEE Trans. Inf.
Theory 45, 1999). It keeps the dispersion at every time scale between the window and a few milliseconds.
Lengths: both distributions by quantiles, their joint shares by classes, and their drift over time by segments.
Sharing: roots (prefixes common to many), and, by input class, how often and how much of an earlier prompt a request
repeats and how long after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, takewhile

import numpy as np
import yaml

from perfmodel.errors import SpecError
from perfmodel.serving import sharing
from perfmodel.serving.requests import Requests
from perfmodel.spec.fitted import Arrivals, FittedWorkload, JointLengths, Reuse, Root, Sharing

_WINDOWS = 192
_WINDOW_REQUESTS = 20  # no finer windows than these on average: a window is a rate, not a request
_FINEST = 5e-3  # seconds: shorter than any engine step
_SEGMENTS = 12
_KNOTS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85,
          0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.9975, 0.999, 1.0)  # fmt: skip
_INPUT_CLASSES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99, 1.0)
_OUTPUT_CLASSES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
_LAGS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
_MATCHES = (0.0, 0.05, 0.15, 0.4, 0.8, 1.0)
_ROOT_SHARE = 0.01
_ROOTS = 24
_LEAST = 50  # requests: fewer say nothing about a distribution


def fit(requests: Requests, source: str = "") -> FittedWorkload:
    """Describe requests without content. Raises SpecError for fewer than 50 requests, or all at one time."""
    n = len(requests)
    if n < _LEAST or requests.arrival[-1] <= requests.arrival[0]:
        last = requests.arrival[-1]
        raise SpecError(f"too few requests: {n} over {last:g} s, where a fit takes {_LEAST} at different times", file=source)
    span = float(requests.arrival[-1]) * n / (n - 1)
    windows, levels = _grid(n, span, requests.tick)
    if requests.tick:
        span = windows * 2**levels * requests.tick  # whole ticks
    lengths, input_class = _lengths(requests, span)
    return FittedWorkload(
        kind="workload", version=1, source=source, requests=n, span_s=span,
        arrivals=_arrivals(requests, span, windows, levels), lengths=lengths, sharing=_sharing(requests, input_class),
    )  # fmt: skip


def to_yaml(fitted: FittedWorkload) -> str:
    """The file: numbers rounded to four digits, lists on lines of their own."""
    data = fitted.model_dump(exclude_none=True)
    head = "# Written by `perfmodel trace fit`: statistics of a request log; no row of it, no content, no identifiers.\n"
    return head + yaml.dump(_rounded(data), Dumper=_Dumper, sort_keys=False, width=116, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    """Numbers as YAML 1.2 reads them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _rounded(x: object) -> object:
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_rounded(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def _grid(n: int, span: float, tick: float) -> tuple[int, int]:
    """Windows, and times each is halved: down to milliseconds, or to the tick of a coarse clock."""
    windows = int(np.clip(n // _WINDOW_REQUESTS, 1, _WINDOWS))
    halvings = np.log2(span / windows / (tick or _FINEST))
    if not tick:
        return windows, max(0, int(halvings))
    levels = max(0, int(np.ceil(halvings)))
    return int(np.ceil(span / tick / 2**levels)), levels


def _arrivals(requests: Requests, span: float, windows: int, levels: int) -> Arrivals:
    cells = windows * 2**levels
    # A coarse clock's ticks jitter by up to 1 % of one.
    cell = (requests.arrival / span * cells + (0.01 if requests.tick else 0.0)).astype(int)
    count = np.bincount(np.minimum(cell, cells - 1), minlength=cells)
    split = []
    for level in range(levels):
        halves = count.reshape(-1, 2, 2 ** (levels - level - 1)).sum(axis=2)
        split.append(_correlation(halves[:, 0].astype(float), halves.sum(axis=1).astype(float)))
    rate = count.reshape(windows, -1).sum(axis=1)
    return Arrivals(windows=tuple(rate.tolist()), split=tuple(split), tick=requests.tick)


def _correlation(left: np.ndarray, both: np.ndarray) -> float:
    """Correlation rho of the halves that two requests of a window fall into, from var(left) = m/4 (1 + (m - 1) rho).

    >>> _correlation(np.array([10.0, 0.0]), np.array([10.0, 10.0])), _correlation(np.full(9, 5.0), np.full(9, 10.0))
    (0.999, -0.1111111111111111)
    """
    pairs = float((both * (both - 1)).sum()) / 4
    if pairs < 1:
        return 0.0
    return float(np.clip(((left - both / 2) ** 2 - both / 4).sum() / pairs, -1.0, 0.999))


def _quantiles(values: np.ndarray, at: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(np.quantile(values, at).tolist())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value among all, 0 to 1; equal values share their mean place."""
    ordered = np.sort(values)
    low, high = np.searchsorted(ordered, values, side="left"), np.searchsorted(ordered, values, side="right")
    return np.asarray((low + high) / 2 / values.size)


def _lengths(requests: Requests, span: float) -> tuple[JointLengths, np.ndarray]:
    input_rank, output_rank = _ranks(requests.input), _ranks(requests.output)
    row = np.clip(np.searchsorted(_INPUT_CLASSES, input_rank, side="right") - 1, 0, len(_INPUT_CLASSES) - 2)
    column = np.clip(np.searchsorted(_OUTPUT_CLASSES, output_rank, side="right") - 1, 0, len(_OUTPUT_CLASSES) - 2)
    joint = np.zeros((len(_INPUT_CLASSES) - 1, len(_OUTPUT_CLASSES) - 1))
    np.add.at(joint, (row, column), 1.0)
    segment = np.minimum((requests.arrival / span * _SEGMENTS).astype(int), _SEGMENTS - 1)
    count = np.maximum(np.bincount(segment, minlength=_SEGMENTS), 1)
    drift = [np.bincount(segment, rank - 0.5, minlength=_SEGMENTS) / count for rank in (input_rank, output_rank)]
    lengths = JointLengths(
        at=_KNOTS, input=_quantiles(requests.input, _KNOTS), output=_quantiles(requests.output, _KNOTS),
        input_classes=_INPUT_CLASSES, output_classes=_OUTPUT_CLASSES, joint=tuple(map(tuple, (joint / len(requests)).tolist())),
        drift_input=tuple(drift[0].tolist()), drift_output=tuple(drift[1].tolist()),
    )  # fmt: skip
    return lengths, row


@dataclass
class Matches:
    """Per request: the earlier request it repeats (-1: none), the tokens that both share, and whether it continues it."""

    earlier: np.ndarray
    tokens: np.ndarray
    continues: np.ndarray
    root: np.ndarray
    """Number of its root, -1 for none."""
    roots: list[Root]


def _sharing(requests: Requests, input_class: np.ndarray) -> Sharing | None:
    if requests.blocks is None:
        if requests.session is None:
            return None
        before = sharing.previous_turn(requests)
        lag = requests.arrival - requests.arrival[before]
        return Sharing(continued=_reuse(before >= 0, lag, None, input_class))
    found = matches(requests)
    lag = requests.arrival - requests.arrival[found.earlier]
    part = found.tokens / requests.input
    again = found.earlier >= 0
    return Sharing(
        block_tokens=requests.blocks.tokens, roots=tuple(found.roots),
        continued=_reuse(again & found.continues, lag, part, input_class),
        branched=_reuse(again & ~found.continues, lag, part, input_class),
    )  # fmt: skip


def _reuse(chosen: np.ndarray, lag: np.ndarray, part: np.ndarray | None, input_class: np.ndarray) -> Reuse | None:
    if chosen.sum() < 2:
        return None
    classes = len(_INPUT_CLASSES) - 1
    share = [float(chosen[input_class == k].mean()) if np.any(input_class == k) else 0.0 for k in range(classes)]
    matched = []
    if part is not None:
        for k in range(classes):
            inside = chosen & (input_class == k)
            matched.append(_quantiles(part[inside if inside.any() else chosen], _MATCHES))
    return Reuse(
        share=tuple(share), matched_at=_MATCHES if matched else (0.0, 1.0), matched=tuple(matched),
        lag_at=_LAGS, lag=_quantiles(lag[chosen], _LAGS),
    )  # fmt: skip


def matches(requests: Requests) -> Matches:
    """Which earlier prompt each request repeats beyond its root, with nothing ever evicted (requests in order of arrival)."""
    blocks = requests.blocks
    assert blocks is not None
    full = sharing.full_blocks(requests)
    root_of, roots = _roots(requests)
    n = len(requests)
    earlier, tokens, root = np.full(n, -1), np.zeros(n), np.full(n, -1)
    continues = np.zeros(n, bool)
    holder: dict[int, int] = {}
    for i in range(n):
        ids = blocks.of(i).tolist()
        head = list(takewhile(root_of.__contains__, ids))
        depth = len(head)
        for place, block in enumerate(head, start=1):
            if place == roots[root_of[block]].blocks:
                root[i] = root_of[block]
        hit = 0
        while hit < len(ids) and ids[hit] in holder:
            hit += 1
        if hit > depth:
            j = holder[ids[hit - 1]]
            earlier[i], tokens[i] = j, min(hit * blocks.tokens, requests.input[i])
            continues[i] = hit >= full[j]
        for block in ids:
            holder[block] = i
    return Matches(earlier, tokens, continues, root, roots)


def _roots(requests: Requests) -> tuple[dict[int, int], list[Root]]:
    """Root that ends with or holds each popular block, and the roots: the longest popular prefixes and where they fork."""
    blocks = requests.blocks
    assert blocks is not None
    ids, count = np.unique(blocks.ids, return_counts=True)
    often = ids[count >= _ROOT_SHARE * len(requests)]
    common = set(np.intersect1d(often, sharing.popular(requests)).tolist())
    ends: dict[tuple[int, ...], int] = {}
    for i in range(len(requests)):
        head = tuple(takewhile(common.__contains__, blocks.of(i).tolist()))
        if head:
            ends[head] = ends.get(head, 0) + 1
    longest = sorted(ends, key=lambda p: -ends[p])[:_ROOTS]
    forks = {tuple(x for x, y in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
             for a, b in combinations(longest, 2)}  # fmt: skip
    kept = sorted({*longest, *forks} - {()}, key=lambda p: (len(p), p))
    number = {path: k for k, path in enumerate(kept)}
    shares = [0] * len(kept)
    under: list[int | None] = []
    for path in kept:
        under.append(next((number[path[:k]] for k in range(len(path) - 1, 0, -1) if path[:k] in number), None))
    for path, times in ends.items():
        nearest = next((number[path[:k]] for k in range(len(path), 0, -1) if path[:k] in number), None)
        if nearest is not None:
            shares[nearest] += times
    found: dict[int, int] = {}
    for path, k in number.items():  # shorter first, so that a block belongs to the shortest root that holds it
        for block in path:
            found.setdefault(block, k)
    roots = [Root(blocks=len(path), under=under[k], share=shares[k] / len(requests)) for path, k in number.items()]
    return found, roots
