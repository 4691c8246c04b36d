"""One step, operator by operator: counts, seconds and what binds each. Plain numbers, for tables and figures."""

from __future__ import annotations

from typing import Any

from perfmodel import graph, roofline
from perfmodel.estimator import Estimator
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators


def step_phase(e: Estimator, batch: float, new: float, context: float, *, is_decode: bool) -> graph.Phase:
    """What one device is given in one pass: with pipeline stages, one micro-batch of the step."""
    return e._phase(float(batch), new if is_decode else float(new), float(context), is_decode)


def op_table(e: Estimator, phase: graph.Phase) -> list[dict[str, Any]]:
    """One row per operator of a pass on one device, in order.

    name, part (kind of layer), kind, times (runs in a pass); of one run: flops on the matrix units [FLOP], vector
    [operations], bytes of device memory, link_bytes, launches, seconds, busy [seconds by resource]; intensity
    [FLOP/byte, None without matrix work]; ridge [FLOP/byte of its dtype]; achieved [FLOP/s]; bound_by (the resource
    busy longest); share of the pass's device seconds over all runs.
    """
    rows = [_row(op, float(times), part, e.machine) for op, times, part in operators(e.lower(phase).schedule)]
    total = sum(row["times"] * row["seconds"] for row in rows)
    for row in rows:
        row["share"] = row["times"] * row["seconds"] / total
    return rows


def _row(op: Op, times: float, part: str, m: Machine) -> dict[str, Any]:
    cost = roofline.op_cost(op, m)
    seconds = float(cost.seconds)
    matrix = {unit: float(n) for unit, n in op.flops.items() if unit not in ("vector", "exp")}
    flops, moved = sum(matrix.values()), float(op.bytes())
    busy = {resource: float(s) for resource, s in cost.busy.items() if float(s) > 0}
    dtype = next(iter(matrix), None)
    return {
        "name": op.name,
        "part": part,
        "kind": op.kind,
        "times": times,
        "dtype": dtype,
        "flops": flops,
        "vector": float(op.flops.get("vector", 0.0) + op.flops.get("exp", 0.0)),
        "bytes": moved,
        "link_bytes": float(op.bytes("fabric")),
        "intensity": flops / moved if flops and moved else None,
        "ridge": m.peak(dtype) / m.bandwidth if dtype else None,
        "launches": float(cost.launches),
        "seconds": seconds,
        "busy": busy,
        "bound_by": max(busy, key=lambda r: busy[r]) if busy else None,
        "achieved": flops / seconds if seconds else 0.0,
    }
