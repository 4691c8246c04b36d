"""Tiled matrix products: output tiles and k-splits over the units of a device, dense and grouped by expert."""

from __future__ import annotations

import numpy as np

from perfmodel.kernels.base import Demands, matrix_dtype, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

# Output tiles (rows, columns) and k-splits that matrix libraries choose between.
_TILES = ((64, 64), (64, 128), (128, 128), (128, 256))
_SPLITS = (1, 2, 4, 8)


def gemm(op: Op, m: Machine) -> Demands:
    """Demands of one dense matrix product."""
    d = streaming(op, m)
    d.compute, loading = _tiled(op, m, 1.0)
    d.memory = d.memory / loading
    return d


def grouped_gemm(op: Op, m: Machine) -> Demands:
    """Demands of one product per touched expert in one kernel."""
    d = streaming(op, m)
    groups = op.shape["groups"]
    d.compute, loading = _tiled(op, m, groups)
    d.memory = d.memory / loading
    d.latency = d.latency + m.law["moe_latency"] / 2 + m.law["expert_overhead"] * groups
    return d


def _tiled(op: Op, m: Machine, groups: Num) -> tuple[Num, Num]:
    """(compute seconds, share of the memory rate that the working units can draw) of a tiled matrix product.

    tiles = ceil(m/tm) ceil(n/tn) split per group; waves = ceil(tiles/units); each wave lasts one tile:
    2 tm tn (k/split) / (peak e / units) + overhead. The best of a few tile shapes and k-splits is taken.
    """
    dtype = str(matrix_dtype(op))
    rows, cols, depth = op.shape["m"], op.shape["n"], op.shape["k"]
    flops = op.flops[dtype]
    per_unit = m.matrix_rate(dtype) / m.units
    best: Num = np.inf
    most_tiles: Num = 0.0
    for tile_m, tile_n in _TILES:
        grid = np.ceil(rows / tile_m) * np.ceil(cols / tile_n) * groups
        # Narrow tiles reuse each operand less and run the matrix units below their best.
        reuse = (tile_m * tile_n / (tile_m + tile_n)) / (128 * 256 / (128 + 256))
        per_flop = 2 * tile_m * tile_n / (per_unit * reuse**0.25)
        for split in _SPLITS:
            # Only a grid that leaves units idle is split along k.
            useful = (split == 1) | (grid < m.units)
            if not np.any(useful):
                continue
            tiles = grid * split
            waves = np.ceil(tiles / m.units)
            seconds = waves * (per_flop * depth / split + m.law["tile_overhead"])
            best = np.minimum(best, np.where(useful, seconds, np.inf))
            most_tiles = np.maximum(most_tiles, np.where(useful, tiles, 0.0))
    loading = np.minimum(1.0, most_tiles / (m.units * m.law["units_to_saturate_memory"]))
    # A few rows need no tile: matrix-vector kernels run on the vector units, without padding.
    best = np.minimum(best, flops / (m.vector * m.vector_efficiency))
    return np.maximum(best, flops / m.matrix_rate(dtype)), loading
