"""Recurrent scans: matrix work without tiles to choose, and traffic."""

from __future__ import annotations

from perfmodel.kernels.base import Demands, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op


def scan(op: Op, m: Machine) -> Demands:
    """Demands of one chunked or recurrent scan."""
    d = streaming(op, m)
    units = [u for u in op.flops if u not in ("vector", "exp")]
    d.compute = sum((op.flops[u] / m.matrix_rate(u) for u in units), start=0.0)
    return d
