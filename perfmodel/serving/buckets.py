"""Buckets: classes of requests by what a router sees on arrival. The output length stays a distribution inside each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.serving.requests import Requests

if TYPE_CHECKING:
    from perfmodel.serving.workload import Workload

Values = tuple[str, ...] | tuple[float, float]
Key = dict[str, Values]
Sight = Literal["input", "cached", "model", "tenant", "max_tokens", "images", "output"]
SIGHTS = ("input", "cached", "model", "tenant", "max_tokens", "images", "output")
_POINTS = 800  # sample points of all buckets together
_FEWEST = 64  # of one bucket
_LABELS = 8  # values of a label that are told apart; the rarer ones share a bucket
_PARTS = {"cached": 2, "max_tokens": 2, "images": 2, "output": 3}  # classes of a number other than the input length


@dataclass(frozen=True)
class Bucket:
    """Requests that look alike to a router: similar input length, and the same class of whatever else it goes by."""

    low: float
    high: float
    share: float
    input: np.ndarray
    """Input tokens of equally likely sample points; `output` and `cached` are of the same points."""
    output: np.ndarray
    cached: np.ndarray | None = None
    """Prompt tokens that an ideal cache holds; None where the trace has no block ids."""
    images: np.ndarray | None = None
    """Images that they carry; None where the workload has none."""
    key: Key = field(default_factory=dict)
    """Beyond the input length: the values of a label, or the range above the first up to the second number."""
    edges: tuple[float, float] = (-math.inf, math.inf)
    """Input tokens, above the first up to the second, that a router sends here."""

    @property
    def label(self) -> str:
        more = "".join(f", {name} {_shown(values)}" for name, values in self.key.items())
        return f"{self.low:.0f}-{self.high:.0f} tokens{more}"


def _shown(values: Values) -> str:
    if isinstance(values[0], str):
        return values[0] if len(values) == 1 else "others"
    low, high = float(values[0]), float(values[1])
    return f"up to {high:.3g}" if low == -math.inf else f"above {low:.3g}" if high == math.inf else f"{low:.3g} to {high:.3g}"


def buckets(workload: Workload, count: int, by: Sequence[Sight] = ("input",)) -> list[Bucket]:
    """About `count` buckets, each with about the same number of input tokens.

    `by`: what the router goes by. Labels are told apart by value; `cached` by the share of the prompt that an ideal cache
    holds, at the median of work; `max_tokens` likewise; `output` is what only an oracle sees. What is left of the count
    parts the input lengths. Raises SpecError for a sight that the trace does not have.
    """
    r = workload.requests
    cached = workload.cached()
    sees = _sights(r, cached, by)
    classes: list[tuple[np.ndarray, Key]] = [(np.arange(len(r)), {})]
    for name in by:
        if name != "input":
            classes = [found for index, key in classes for found in _parted(name, sees[name], index, key, r.input)]
    work = np.array([r.input[index].sum() for index, _ in classes])
    wanted = np.maximum(1, np.round(count * work / work.sum())).astype(int) if "input" in by else np.ones(len(classes), int)
    points = max(_FEWEST, _POINTS // max(int(wanted.sum()), 1))
    result = []
    for (index, key), parts in zip(classes, wanted, strict=True):
        result += _by_input(r, cached, index, key, int(parts), points)
    return result


def bucket_of(groups: Sequence[Bucket], requests: Requests, cached: np.ndarray | None = None) -> np.ndarray:
    """Number of the bucket a router sends each request to. `cached`: prefix tokens it would find, if it goes by them."""
    sees = {"cached": None if cached is None else cached / requests.input, "output": requests.output, **requests.labels}
    found = np.zeros(len(requests), int)
    for k, bucket in enumerate(groups):
        mine = (requests.input > bucket.edges[0]) & (requests.input <= bucket.edges[1])
        for name, values in bucket.key.items():
            seen = sees.get(name)
            if seen is None:
                raise ValueError(f"these buckets go by {name}, which the requests do not have")
            mine &= np.isin(seen, values) if isinstance(values[0], str) else (seen > values[0]) & (seen <= values[1])
        found[mine] = k
    return found


def representatives(order: np.ndarray, values: np.ndarray, points: int) -> np.ndarray:
    """`points` equally likely points that stand for requests with values [quantity, request]: means kept exactly.

    Requests are sorted by `order` into runs, each run by its last quantity (the output) into equal parts; a point is a
    part's mean. As many points as requests, or more, gives the requests themselves.
    """
    n = order.size
    if points >= n:
        return values
    runs = max(1, math.isqrt(points))
    inner = points // runs
    rank = np.empty(n, int)
    rank[np.argsort(order, kind="stable")] = np.arange(n)
    sequence = values[:, np.lexsort((values[1], rank * runs // n))]
    # Means over equal, possibly fractional, stretches of the sequence.
    total = np.concatenate([np.zeros((values.shape[0], 1)), np.cumsum(sequence, axis=1)], axis=1)
    at = np.linspace(0, n, runs * inner + 1)
    sums = np.stack([np.interp(at, np.arange(n + 1), row) for row in total])
    found = np.diff(sums, axis=1) / (n / (runs * inner))
    return np.clip(found, *(f(values, axis=1, keepdims=True) for f in (np.min, np.max)))  # equal values stay exactly so


def _sights(r: Requests, cached: np.ndarray | None, by: Sequence[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {"output": r.output, **r.labels}
    for name in by:
        if name not in SIGHTS:
            raise SpecError(f"a router does not see {name!r}{did_you_mean(name, SIGHTS)}; it may go by {', '.join(SIGHTS)}")
        if name == "cached":
            if cached is None:
                raise SpecError("the trace has no block ids, so no router can go by cached prefixes", path="choices.bucket_by")
            found["cached"] = cached / r.input
        elif name not in found and name != "input":
            raise SpecError(
                f"the trace has no column {name!r} for the router to go by; name it under columns.labels",
                path="choices.bucket_by",
            )  # fmt: skip
    return found


def _with_prefixes(values: np.ndarray, points: int) -> np.ndarray:
    """Points that stand for requests [input, output, cached], those with a long shared prefix apart from those without.

    The mean of a prompt that is found and one that is not is a prompt that nobody sends. The parts' shares are rounded to whole
    points.
    """
    shared = values[2] > values[0] / 2
    points = min(points, values.shape[1])
    most = round(points * float(shared.mean()))
    parts = [(values[:, shared], most), (values[:, ~shared], points - most)]
    return np.concatenate([representatives(v[0], v, n) for v, n in parts if n and v.size], axis=1)


def _with_images(values: np.ndarray, points: int) -> np.ndarray:
    """Points that stand for requests [input, output, images], each of requests with like numbers of images.

    Nobody sends half an image, and the time to encode none is none.
    """
    _, place = np.unique(values[2], return_inverse=True)
    # Many different numbers are told apart as far as there are points: the largest together.
    classes = np.minimum(place, max(points // 8, 2) - 1)
    parts = []
    for n in range(int(classes.max()) + 1):
        mine = values[:, classes == n]
        parts.append(representatives(mine[0], mine, max(round(points * mine.shape[1] / values.shape[1]), 1)))
    return np.concatenate(parts, axis=1)


def _parted(
    name: str, seen: np.ndarray, index: np.ndarray, key: Key, work: np.ndarray
) -> list[tuple[np.ndarray, Key]]:
    """A class of requests parted by one more sight."""
    mine = seen[index]
    if mine.dtype.kind not in "fiu":
        values, counts = np.unique(mine, return_counts=True)
        ranked = [str(v) for v in values[np.argsort(-counts, kind="stable")]]
        groups = [(v,) for v in ranked] if len(ranked) <= _LABELS else [*((v,) for v in ranked[: _LABELS - 1]),
                                                                        tuple(ranked[_LABELS - 1 :])]  # fmt: skip
        return [(index[np.isin(mine, group)], {**key, name: group}) for group in groups]
    order = np.argsort(mine, kind="stable")
    done = np.cumsum(work[index][order])
    cuts = np.searchsorted(done, done[-1] * np.arange(1, _PARTS[name]) / _PARTS[name])
    # A value that holds most of the work is a class of its own.
    lower = mine[mine < mine.max()]
    inner = np.unique(np.minimum(mine[order][cuts], lower.max())).tolist() if lower.size else []
    edges = [-math.inf, *inner, math.inf]
    parts = [
        (index[(mine > low) & (mine <= high)], {**key, name: (low, high)})
        for low, high in pairwise(edges)
    ]
    return [part for part in parts if part[0].size]


def _by_input(
    r: Requests, cached: np.ndarray | None, index: np.ndarray, key: Key,
    parts: int, points: int,
) -> list[Bucket]:  # fmt: skip
    """A class parted by input length into buckets of equal input tokens."""
    index = index[np.argsort(r.input[index], kind="stable")]
    inputs = r.input[index]
    work = np.cumsum(inputs)
    cuts = np.searchsorted(work, np.linspace(0, work[-1], parts + 1)[1:-1])
    # A router cannot tell equal lengths apart, so a bucket ends after the last request of a length.
    ends = np.unique(np.searchsorted(inputs, inputs[np.minimum(cuts, inputs.size - 1)], side="right"))
    groups = [g for g in np.split(index, ends) if g.size]
    upper = [float(r.input[g].max()) for g in groups]
    edges = [-math.inf, *upper[:-1], math.inf]
    images = r.labels.get("images")
    result = []
    for k, group in enumerate(groups):
        more = cached if cached is not None else images
        rows = np.stack([r.input[group], r.output[group], *([] if more is None else [more[group]])])
        if more is None:
            found = representatives(rows[0], rows, points)
        else:
            found = (_with_prefixes if cached is not None else _with_images)(rows, points)
        result.append(Bucket(
            float(r.input[group].min()), upper[k], group.size / len(r), found[0], found[1],
            None if cached is None else found[2], None if cached is not None or images is None else found[2], key,
            (edges[k], edges[k + 1]),
        ))  # fmt: skip
    return result
