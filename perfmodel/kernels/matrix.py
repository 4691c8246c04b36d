"""Tiled matrix products: output tiles and k-splits over the units of a device."""

from __future__ import annotations

import numpy as np

from perfmodel.kernels.base import STORED, Demands, matrix_dtype, stored_bytes, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

# Output tiles (rows, columns) and k-splits that matrix libraries choose between.
_TILES = ((64, 64), (128, 128), (128, 256))
_SPLITS = (1, 2, 4, 8)
_FOUR_BITS = ("fp4", "int4")
_SMALLEST_ROWS = 16  # rows of the matrix instruction that short tiles are padded to


def gemm(op: Op, m: Machine) -> Demands:
    """Demands of one dense matrix product."""
    d = streaming(op, m)
    d.compute = tiled(op, m)
    d.memory, d.cache = ramped(d, m)
    # The first loads are part of a tile's overhead. A cast that finds a scale for each row gives each a thread block.
    d.latency = m.law.get("row_scale_latency", 0.0) * op.shape.get("scales", 0.0) / m.units
    # Libraries on CPUs first copy the weights into the order their tiles read, unless there is one row only.
    packed = m.law["weight_packing"] * stored_bytes(op) / (m.bandwidth * m.bandwidth_efficiency)
    d.latency = d.latency + np.where(op.shape["m"] > 1, packed, 0.0)
    return d


def ramped(d: Demands, m: Machine) -> tuple[Num, Num]:
    """(memory, cache) seconds with the time until enough loads are in flight.

    A kernel whose traffic takes x seconds at the achieved rate takes x + x r / (x + r), r = `matrix_ramp`: one short
    against r never reaches the rate, a long one loses r.
    """
    x, r = d.memory + d.cache, m.law["matrix_ramp"]
    slower = 1 + r / (x + r)
    return d.memory * slower, d.cache * slower


def tiled(op: Op, m: Machine, groups: Num = 1) -> Num:
    """Seconds the busiest unit works on its tiles of a matrix product of m rows, n columns and depth k, per group.

    tiles = ceil(m/tm) ceil(n/tn) split groups; waves = ceil(tiles/units). A wave lasts one tile: the p-norm of
    2 tm tn (k/split) FLOP at the unit's matrix rate and of its operands, (tm + tn) (k/split) elements, at the unit's
    load rate (`unit_loading` times its share of the memory rate, from the cache), plus `tile_overhead`; a split along k
    adds `split_overhead` to join the parts. The best of a few tile shapes and splits is taken. Few rows use few of a tile's:
    padded to the matrix instruction, or not at all on the vector units.
    """
    dtype = str(matrix_dtype(op))
    rows, cols, depth = op.shape["m"], op.shape["n"], op.shape["k"]
    stored = next(t.width for t in op.traffic if t.tensor in STORED)
    inputs = next(t.width for t in op.traffic if t.tensor == "activations")
    # Four bits are two halvings below sixteen.
    rate = m.matrix_rate(dtype) * (m.law["narrow_matrix_efficiency"] if dtype in _FOUR_BITS else 1.0) / m.units
    plain = m.vector * m.vector_efficiency / m.units
    load_rate = m.law["unit_loading"] * m.bandwidth / m.units
    p = m.law["overlap_power"]
    sizes = (rows, cols, depth, groups, rate, plain, load_rate, p, m.units, m.law["tile_overhead"], m.law["split_overhead"])
    # One axis more, in front, for the shapes of tiles.
    tile_m, tile_n = (x.reshape(-1, *(1,) * max(np.ndim(x) for x in sizes)) for x in np.array(_TILES, float).T)
    grid = np.ceil(rows / tile_m) * np.ceil(cols / tile_n) * groups
    used = np.minimum(rows, tile_m)
    padded = np.minimum(np.ceil(used / _SMALLEST_ROWS) * _SMALLEST_ROWS, tile_m)
    multiply = 2 * tile_n * np.minimum(padded / rate, used / plain)
    load = (used * inputs + tile_n * stored) / load_rate
    per_depth = (multiply**p + load**p) ** (1 / p)
    # Only a grid that leaves units idle is split along k.
    useful = grid < m.units
    best: Num = np.inf
    for split in _SPLITS:
        if split > 1 and not np.any(useful):
            break
        waves = np.ceil(grid * split / m.units)
        seconds = waves * (per_depth * depth / split + m.law["tile_overhead"])
        if split > 1:
            seconds = np.where(useful, seconds + m.law["split_overhead"], np.inf)
        best = np.minimum(best, np.min(seconds, axis=0))
    return best
