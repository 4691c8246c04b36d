"""What must be resident on one device, and what still fits."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfmodel.engine_memory import (
    Instance,
    activations,
    cache_pool,
    cache_tokens,
    graphs,
    loaded_weights,
    overhead,
    visible,
)
from perfmodel.graph import cache_residency, weight_residency
from perfmodel.kernels.elsewhere import tier_capacity
from perfmodel.machine import Machine
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.spec.calibration import Engine
from perfmodel.spec.model import Attention, Model
from perfmodel.symbols import Num

_UNBOUNDED = 2**40  # tokens no request reaches: what fits them has no limit here


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: Num
    kv: Num
    activations: Num
    """Peak of the step the engine reserves for, sampler included."""
    overhead: Num
    """Outside tensors: context, libraries, communication buffers."""
    graphs: Num
    """Captured graphs."""
    capacity: float
    """Bytes the engine lets all of these take together, by its own accounting."""

    @property
    def other(self) -> Num:
        return self.overhead + self.graphs

    @property
    def total(self) -> Num:
        return self.weights + self.kv + self.activations + self.other

    @property
    def fits(self) -> Num:
        return self.total <= self.capacity


def weight_bytes(model: Model, par: Parallelism, formats: Formats) -> Num:
    """Weights stored in the memory of the fullest device [byte]."""
    return sum((r.bytes for r in weight_residency(model, par, formats) if r.tier == "hbm"), start=0.0)


def kv_bytes_per_token(model: Model, formats: Formats, length: Num = 1.0) -> Any:
    """Cached bytes of a token over all attention layers and tiers, whole model: the mean over a sequence of `length`.

    Without techniques every token adds as much, whatever the length; budgets and residual windows make it fall or rise.
    """
    stored = cache_residency(model, Parallelism(), formats, 1, length)
    found = sum((r.bytes for r in stored if r.tensor == "kv"), start=0.0) / length
    return found if np.ndim(found) else float(found)


def state_bytes_per_sequence(model: Model, formats: Formats) -> float:
    """Recurrent state of one sequence, whole model [byte]."""
    return float(sum(r.bytes for r in cache_residency(model, Parallelism(), formats, 1, 1) if r.tensor == "state"))


def cache_bytes(
    model: Model, par: Parallelism, formats: Formats, sequences: Num, tokens: Num, block: int = 1, tier: str = "hbm"
) -> Num:
    """Keys, values and states of `sequences` with `tokens` cached tokens each, in whole blocks [byte per device].

    Sliding-window layers keep no more than their window.
    """
    whole = np.ceil(np.asarray(tokens, float) / block) * block
    total: Num = 0.0
    for window in {None, *_windows(model).values()}:
        # A window that starts anywhere in a block touches one block more than it fills.
        kept = np.minimum(whole, (np.ceil((window - 1) / block) + 1) * block) if window else whole
        for r in cache_residency(model, par, formats, sequences, kept):
            if r.tier == tier and _windows(model).get(r.name.split(".")[0]) == window:
                total = total + r.bytes
    return total


def _windows(model: Model) -> dict[str, int]:
    """Sliding windows by the block that has one."""
    mixers = {name: b.mixer for name, b in model.blocks.items()}
    return {name: m.window for name, m in mixers.items() if isinstance(m, Attention) and m.window}


def far_limits(
    model: Model, par: Parallelism, formats: Formats, m: Machine, tokens: float, block: int = 1
) -> dict[str, float]:
    """Sequences of `tokens` tokens per data-parallel rank that each farther tier has room for beside what weights take."""
    room: dict[str, float] = {}
    for tier in sorted({r.tier for r in cache_residency(model, par, formats, par.dp, tokens)} - {"hbm"}):
        weights = sum((r.bytes for r in weight_residency(model, par, formats) if r.tier == tier), start=0.0)
        one = float(cache_bytes(model, par, formats, par.dp, tokens, block, tier))
        room[tier] = max(tier_capacity(m, tier) - float(weights), 0.0) / one if one > 0 else float("inf")
    return room


def account(model: Model, par: Parallelism, formats: Formats, m: Machine, engine: Engine) -> Instance:
    """The model on this machine as the engine's version counts it."""
    total = visible(m.device, m.capacity, engine.account)
    return Instance(
        model, par, formats, engine.account, m.device.architecture, total,
        graphs=engine.graph_batch > 0, file=engine.account.host_embedding,
    )  # fmt: skip


def resident(
    model: Model,
    par: Parallelism,
    formats: Formats,
    m: Machine,
    engine: Engine,
    *,
    sequences: Num,
    tokens: Num,
    mem_fraction: float | None = None,
) -> Memory:
    """Memory of an instance that holds `sequences` of `tokens` tokens each. Raises nothing: `fits` tells."""
    i = account(model, par, formats, m, engine)
    weights, peak, outside, captured = loaded_weights(i), activations(i), overhead(i), graphs(i)
    pool = cache_pool(i, engine.memory_fraction if mem_fraction is None else mem_fraction, weights)
    return Memory(
        weights,
        cache_bytes(model, par, formats, sequences, tokens, engine.block_tokens),
        peak,
        outside,
        captured,
        weights + peak + outside + captured + pool,
    )


def kv_capacity(
    model: Model, par: Parallelism, formats: Formats, m: Machine, engine: Engine, mem_fraction: float | None = None
) -> float:
    """Bytes per device left for keys, values and states once everything else is loaded; negative: does not fit."""
    fraction = engine.memory_fraction if mem_fraction is None else mem_fraction
    return cache_pool(account(model, par, formats, m, engine), fraction)


def kv_tokens(
    model: Model, par: Parallelism, formats: Formats, m: Machine, engine: Engine, mem_fraction: float | None = None,
    length: float = 1.0,
) -> int:  # fmt: skip
    """Tokens the engine would report as the size of its cache, per data-parallel rank; 0 where nothing grows.

    length: tokens of a sequence, which matter to techniques only.
    """
    pool = kv_capacity(model, par, formats, m, engine, mem_fraction)
    return int(cache_tokens(account(model, par, formats, m, engine), max(pool, 0.0), engine.block_tokens, length=length))


def most_sequences(model: Model, par: Parallelism, formats: Formats, free: float, tokens: float, block: int) -> float:
    """Most sequences per rank of `tokens` tokens whose caches fit in `free` bytes per device; inf where they take none.

    Bytes are proportional to the sequences, unless techniques let them share.
    """

    def used(per_rank: int) -> float:
        return float(cache_bytes(model, par, formats, per_rank * par.dp, tokens, block))

    one = used(1)
    if one <= 0:
        return math.inf
    low = max(0, int(free / one))
    if formats.techniques and low:
        high = 2 * low
        while used(high) <= free:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if used(middle) <= free else (low, middle)
    return low


def longest_context(model: Model, par: Parallelism, formats: Formats, free: float, sequences: int) -> int:
    """Most tokens each of `sequences` can cache in `free` bytes per device; 0 when none fits.

    Cached bytes grow piecewise linearly with tokens, so the slope beyond every window solves it in closed form. Where
    nothing grows (windows and states only) it is the model's own limit, and `sys.maxsize` for a model without one.
    Techniques set bends of their own: there it is bisected.
    """
    beyond = float(max(_windows(model).values(), default=1))

    def used(tokens: float) -> float:
        return float(cache_bytes(model, par, formats, sequences, tokens))

    if formats.techniques:
        if used(_UNBOUNDED) <= free:
            return model.max_positions or sys.maxsize
        return bisect_right(range(_UNBOUNDED), free, lo=1, key=used) - 1
    low, high = (0.0, beyond) if free < used(beyond) else (beyond, beyond + 1)
    base, slope = used(low), (used(high) - used(low)) / (high - low)
    if free < base or (free == base and low == 0):
        return 0
    if used(high) <= used(low) * (1 + 1e-12):
        return model.max_positions or sys.maxsize
    return int(low + (free - base) / slope)
