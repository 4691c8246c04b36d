"""What every kernel law shares: the demands on each resource, and how traffic divides between cache and memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

STORED = ("weights", "experts", "kv", "state")


@dataclass
class Demands:
    """Seconds one kernel keeps each resource busy at achieved rates; `latency` overlaps with nothing."""

    compute: Num = 0.0
    vector: Num = 0.0
    memory: Num = 0.0
    cache: Num = 0.0
    latency: Num = 0.0


def stored_bytes(op: Op) -> Num:
    """Weights and cached keys and values: they come from memory at least once."""
    return sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor in STORED), start=0.0)


def passing_bytes(op: Op) -> Num:
    """Activations: they may never leave the cache."""
    return sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor not in STORED), start=0.0)


def streaming(op: Op, m: Machine) -> Demands:
    """Traffic and vector work of any kernel: the whole law of element-wise ones.

    Activations stay in the last-level cache when they fill less than half of it.
    """
    vector = np.maximum(
        op.flops.get("vector", 0.0) / (m.vector * m.vector_efficiency),
        op.flops.get("exp", 0.0) / (m.exp * m.vector_efficiency),
    )
    stored, passing = stored_bytes(op), passing_bytes(op)
    cached = passing <= m.cache / 2
    rate = m.bandwidth * m.bandwidth_efficiency
    return Demands(
        vector=vector,
        memory=(stored + np.where(cached, 0.0, passing)) / rate,
        cache=np.where(cached, passing, 0.0) / (rate * m.law["cache_ratio"]),
        latency=m.memory_latency,
    )


def matrix_dtype(op: Op) -> str | None:
    """The dtype this kernel multiplies in, if it does."""
    return next((u for u in op.flops if u not in ("vector", "exp")), None)
