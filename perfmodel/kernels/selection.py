"""Scoring of summaries of a cache, to choose what attention reads."""

from __future__ import annotations

from perfmodel.kernels.base import Demands, matrix_dtype, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op


def selection(op: Op, m: Machine) -> Demands:
    """A stream of summaries, scored on the vector units, or on the matrix units at the rate of a plain product."""
    d = streaming(op, m)
    dtype = matrix_dtype(op)
    if dtype is not None:
        d.compute = op.flops[dtype] / m.matrix_rate(dtype)
    return d
