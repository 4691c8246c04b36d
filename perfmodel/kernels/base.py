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
    """Seconds one kernel keeps each resource busy at achieved rates; `latency` overlaps with nothing.

    Nor does `apart`, in which kernels of their own move bytes before it.
    """

    compute: Num = 0.0
    vector: Num = 0.0
    memory: Num = 0.0
    cache: Num = 0.0
    latency: Num = 0.0
    apart: Num = 0.0


def stored_bytes(op: Op) -> Num:
    """Weights and cached keys and values: they come from memory at least once."""
    return sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor in STORED), start=0.0)


def passing_bytes(op: Op) -> Num:
    """Activations: they may never leave the cache."""
    return sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor not in STORED), start=0.0)


def streaming(op: Op, m: Machine) -> Demands:
    """Traffic and vector work of any kernel: the whole law of element-wise ones.

    held = min(passing, cache_share cache): the bytes of activations that the last-level cache still holds from the kernel
    before, at `cache_ratio` times the memory rate. Seconds: (stored + passing - held + held / cache_ratio) / (bandwidth e).
    """
    vector = np.maximum(
        op.flops.get("vector", 0.0) / (m.vector * m.vector_efficiency),
        op.flops.get("exp", 0.0) / (m.exp * m.vector_efficiency),
    )
    stored, passing = stored_bytes(op), passing_bytes(op)
    held = np.minimum(passing, m.law["cache_share"] * m.cache)
    rate = m.bandwidth * m.bandwidth_efficiency
    memory, cache = (stored + passing - held) / rate, held / (rate * m.law["cache_ratio"])
    if "rows" in op.shape:
        memory = np.maximum(memory, _row_seconds(op, m, passing) - cache)
    return Demands(vector=vector, memory=memory, cache=cache, latency=m.memory_latency)


def stage(op: Op, m: Machine) -> Demands:
    """One stage of a dataflow pipeline: units are laid out for it, so no tiles, work items or ramps limit its rate.

    compute = sum of FLOPs / (peak e_matrix); memory = bytes / (bandwidth e), as of `streaming` without a cache between.
    """
    flows = streaming(op, m)
    products = sum((f / m.peak(u) for u, f in op.flops.items() if u not in ("vector", "exp")), start=0.0)
    memory = (stored_bytes(op) + passing_bytes(op)) / (m.bandwidth * m.bandwidth_efficiency)
    return Demands(products / m.matrix_efficiency, flows.vector, memory, 0.0, flows.latency)


# Devices of fewer, wider cores (TPU, Gaudi) divide a row among them.
FEWEST_UNITS = 16


def _row_seconds(op: Op, m: Machine, moved: Num) -> Num:
    """Least seconds of a kernel that gives each row to one thread block (norms, rotary, gated activations).

    A unit moves `row_bytes_per_clock` at best, set by its loads in flight over their latency (Little's law), and with
    fewer rows than units the others idle: moved / (min(rows, units) clock row_bytes_per_clock).
    """
    if m.device.compute is None or m.units < FEWEST_UNITS:
        return 0.0
    each = m.device.compute.clock * m.law["row_bytes_per_clock"]
    return moved / (np.minimum(op.shape["rows"], m.units) * each)


def matrix_dtype(op: Op) -> str | None:
    """The dtype this kernel multiplies in, if it does."""
    return next((u for u in op.flops if u not in ("vector", "exp")), None)
