"""What instances find in their prefix caches: a table over cache size and replicas, so that columns can ask often."""

from __future__ import annotations

import math

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.serving import prefix
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import Bucket, Workload, bucket_of
from perfmodel.spec.deployment import Routing

_SIZES = 48
_STEP = 4
"""Between numbers of replicas that tables are made for."""
_MOST_REPLICAS = 256
_LARGEST_GUARD = 1.25
"""Work of a replica over the mean beyond which an affine router passes a request on."""


_KNOWN: list[Reuse] = []


def reuse_of(workload: Workload, buckets: list[Bucket], routing: Routing) -> Reuse:
    """The table of a workload, made once: every node type asks the same one."""
    for known in _KNOWN:
        if known.same(workload, buckets, routing):
            return known
    _KNOWN[:] = [*_KNOWN[-3:], Reuse(workload, buckets, routing)]
    return _KNOWN[-1]


class Reuse:
    """Prompt tokens found in the caches of a workload's replicas, by bucket.

    The hit curve of one replica among n comes from the workload's own block ids, dealt as the router deals them; sizes and
    replicas between those computed are interpolated in their logarithms.
    """

    def __init__(self, workload: Workload, buckets: list[Bucket], routing: Routing, seed: int = 1) -> None:
        if workload.requests.blocks is None:
            raise SpecError(
                "prefix_caching needs block ids in the trace; name their column under trace.columns.blocks, or set "
                "prefix_caching: false",
                path="choices.prefix_caching",
            )
        self._routing, self._seed, self._now, self._of = routing, seed, workload.requests, buckets
        before = workload.before
        self._every = workload.requests if before is None else Requests.join([before, workload.requests])
        self._skip = len(self._every) - len(workload.requests)
        self._bucket = bucket_of(buckets, workload.requests, workload.cached())
        self._count = len(buckets)
        self._ideal = self._found(prefix.uses(self._every), math.inf)
        total = float(workload.requests.input.sum())
        self._sizes = np.geomspace(max(total * 1e-4, 1.0), max(2 * total, 2.0), _SIZES)
        self._tables: dict[int, np.ndarray] = {}
        self._uneven: dict[int, float] = {}

    def same(self, workload: Workload, buckets: list[Bucket], routing: Routing) -> bool:
        """Whether this is the table of that workload and router."""
        return self._now is workload.requests and self._of is buckets and self._routing == routing

    def _found(self, uses: prefix.Uses, capacity: float) -> np.ndarray:
        """Tokens found by bucket in a cache of `capacity` tokens."""
        cached = uses.cached(capacity, len(self._every))[self._skip :]
        return np.bincount(self._bucket, cached, minlength=self._count)

    def _table(self, replicas: int) -> np.ndarray:
        """Share of what an ideal cache finds [size, bucket]."""
        if replicas not in self._tables:
            home = prefix.route(self._every, replicas, self._routing, guard=_LARGEST_GUARD, seed=self._seed)
            uses = prefix.uses(self._every, home)
            found = np.array([self._found(uses, size) for size in self._sizes])
            self._tables[replicas] = np.clip(found / np.maximum(self._ideal, 1e-9), 0.0, 1.0)
        return self._tables[replicas]

    def share(self, cache_tokens: float, replicas: float) -> np.ndarray:
        """Share of the ideally cached tokens that a replica's cache of `cache_tokens` tokens holds [bucket]."""
        if cache_tokens <= 0:
            return np.zeros(self._count)
        wanted = min(max(replicas, 1.0), _MOST_REPLICAS)
        low = _STEP ** math.floor(math.log(wanted, _STEP) + 1e-9)
        between = math.log(wanted / low, _STEP)
        ends = []
        for n in (low, _STEP * low) if between > 1e-9 else (low,):
            table = self._table(n)
            x = np.log(max(cache_tokens, self._sizes[0] * 1e-3))
            sizes = np.concatenate([[np.log(self._sizes[0] * 1e-3)], np.log(self._sizes)])
            ends.append([np.interp(x, sizes, np.concatenate([[0.0], table[:, k]])) for k in range(self._count)])
        if len(ends) == 1:
            return np.array(ends[0])
        return (1 - between) * np.array(ends[0]) + between * np.array(ends[1])

    def imbalance(self, replicas: float) -> float:
        """Work of the busiest replica over that under random routing; what prefix affinity costs."""
        n = 2 ** round(math.log2(min(max(replicas, 1), _MOST_REPLICAS)))
        if n not in self._uneven:
            self._uneven[n] = prefix.imbalance(self._now, n, self._routing, guard=_LARGEST_GUARD, seed=self._seed)
        return self._uneven[n]
