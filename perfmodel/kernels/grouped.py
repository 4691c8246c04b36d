"""Products of one matrix per expert: rows gathered by expert, padded to tiles, with the passes around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perfmodel.kernels.base import FEWEST_UNITS, Demands, matrix_dtype, passing_bytes, stored_bytes, streaming
from perfmodel.kernels.matrix import ramped, tiled
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

_TILE_ROWS = (16, 32, 64, 128)
_TILE_COLUMNS = 128
# 16-bit FLOPs per clock of the warp-level matrix instruction of one NVIDIA unit since Ampere: 1,024 multiply-adds
# (NVIDIA A100 whitepaper, table 1). Portable kernels use it also where a wider instruction exists.
_WARP_FLOPS = 2048


def as_served(op: Op, m: Machine) -> Op:
    """A product of routed experts with the share of them that served text touches; counts assume even routing.

    With popularities of squared coefficient of variation c (gamma law), x pairs per expert on average leave a share
    (1 + c x)^(-1/c) of the experts untouched (negative binomial), instead of exp(-x). c = 1, x = 2: 1/3 instead of 0.135.
    """
    c, shape = np.maximum(m.law["expert_popularity"], 1e-6), op.shape
    x = shape["m"] * shape["groups"] / shape["experts"]
    ratio = (1 - (1 + c * x) ** (-1 / c)) / -np.expm1(-x)
    groups = np.maximum(shape["groups"] * ratio, 1.0)
    ratio = groups / shape["groups"]
    traffic = tuple(replace(t, elements=t.elements * ratio) if t.tensor == "experts" else t for t in op.traffic)
    return replace(op, traffic=traffic, shape={**shape, "groups": groups, "m": shape["m"] / ratio})


def grouped_gemm(op: Op, m: Machine) -> Demands:
    """Demands of one of the two products of routed experts, or of any batch of equal products.

    Experts: compute as `_tiles`; touched weights at the memory rate and activations at that of `_pass_rate`. Every
    weight is fed to the matrix units however few rows it meets: elements / (units clock `expert_feed`).
    """
    d = streaming(op, m)
    if not _routed(op):  # a batch of equal products: the dense law over all their tiles
        d.compute = tiled(op, m, op.shape["groups"])
        d.memory, d.cache = ramped(d, m)
        return d
    portable = _portable(op, m)
    rate = m.bandwidth * m.bandwidth_efficiency
    elements = op.shape["groups"] * op.shape["n"] * op.shape["k"]
    return Demands(
        compute=_tiles(op, m, portable),
        # What unpacks weights takes its turn with what feeds them.
        vector=elements / _per_clock(m, m.law["expert_feed"]) + d.vector,
        memory=stored_bytes(op) / rate + passing_bytes(op) / _pass_rate(m, portable),
    )


def expert_passes(op: Op, m: Machine) -> Demands:
    """Demands of what surrounds the products of a layer of experts, one pass after another.

    A fixed time (top-k, sort, counts, offsets and their launches) and what the engine adds, `expert_call` (in a served
    model also `expert_layer`); the traffic at the rate of `_pass_rate`; in native kernels another `expert_token_bytes`
    for every element of the tokens that enter (copies and maps of the permutation; portable kernels address rows of
    the tokens instead).
    """
    d, law = streaming(op, m), m.law
    portable = _portable(op, m)
    extra = 0.0 if portable else law["expert_token_bytes"] * op.shape["elements"]
    fixed = law["portable_expert_latency" if portable else "expert_latency"]
    return Demands(
        vector=d.vector,
        memory=(passing_bytes(op) + extra) / _pass_rate(m, portable),
        latency=fixed + law["expert_call"] + (law["expert_layer"] if "experts" in op.shape else 0.0),
    )


def _routed(op: Op) -> bool:
    return any(t.tensor == "experts" for t in op.traffic)


def portable_by_default(expands: bool, m: Machine) -> bool:
    """Whether portable kernels run unless a measured row says otherwise: to expand formats the device cannot multiply.

    Portable: written for the warp-level matrix instruction, with passes in kernels of their own (Triton, Marlin).
    """
    return expands and not m.native("fp4")


def _portable(op: Op, m: Machine) -> bool:
    return bool(op.shape.get("portable", portable_by_default(bool(op.shape["expands"]), m)))


def _pass_rate(m: Machine, portable: bool) -> Num:
    """Bytes/s of activations: the memory rate; in portable kernels at most `portable_pass_bytes` per unit and clock."""
    rate = m.bandwidth * m.bandwidth_efficiency
    return np.minimum(rate, _per_clock(m, m.law["portable_pass_bytes"])) if portable else rate


def _per_clock(m: Machine, amount: Num) -> Num:
    """An amount per unit and clock as a rate of the device; no limit for a few wide cores."""
    compute = m.device.compute
    return amount * m.units * compute.clock if compute and m.units >= FEWEST_UNITS else np.inf


def _tiles(op: Op, m: Machine, portable: bool) -> Num:
    """Seconds of the tiles of all touched experts, the best of a few tile heights t.

    waves = tiles/units + 1/2, at least one; a wave lasts 2 t 128 k / (e peak / units) + `tile_overhead`
    t/128. Narrow tiles reuse their operands less, e falls as (t/128)^(1/4), but more of them share a unit and hide how
    they start and end. Kernels that expand weights keep them in registers over the rows: their e is the same for all.
    """
    dtype, shape = str(matrix_dtype(op)), op.shape
    if portable and shape["expands"]:
        rate = np.minimum(m.peak(dtype), _per_clock(m, _WARP_FLOPS)) * m.law["portable_efficiency"]
        reuse = 0.0
    else:
        rate = m.matrix_rate(dtype) * m.law["expert_efficiency"] * (m.law["portable_efficiency"] if portable else 1)
        reuse = 0.25
    rows, columns = shape["m"], shape["groups"] * np.ceil(shape["n"] / _TILE_COLUMNS)
    best: Num = np.inf
    for t in _TILE_ROWS:
        tiles = tiles_per_expert(rows, t, shape["even"]) * columns
        waves = np.where(tiles > m.units, tiles / m.units + 0.5, 1.0)
        flops = 2 * t * _TILE_COLUMNS * shape["k"]
        share = t / _TILE_ROWS[-1]
        wave = flops * m.units / (rate * share**reuse) + m.law["tile_overhead"] * share
        best = np.minimum(best, waves * wave)
    return best


def tiles_per_expert(rows: Num, t: int, even: Num) -> Num:
    """Tiles of t rows of a touched expert with `rows` rows on average: 1/2 more than rows/t, and at least one.

    The mean of ceil(r/t) over loads r that spread wider than a tile; ceil(rows/t) where all have equally many (`even`).
    """
    return np.where(even, np.ceil(rows / t), np.maximum(rows / t + 0.5, 1.0))
