"""What would have to change: effects of the machine's numbers and of the model's sizes, and the batch at the ridge.

Effects of the machine are found by evaluating the step again on a machine with one number changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from perfmodel import roofline, vectorize
from perfmodel.breakdown import step_phase
from perfmodel.estimator import Estimator
from perfmodel.machine import Machine
from perfmodel.vectorize import Expression

_SMALL = 1.01


def _faster(m: Machine, *fields: str, by: float) -> Machine:
    return replace(m, **{name: getattr(m, name) * by for name in fields})


def _quicker_host(m: Machine, by: float) -> Machine:
    return replace(m, law=m.law | {k: m.law[k] / by for k in ("host_base", "host_per_sequence", "eager_issue")})


# What a better machine has `by` times more (rates) or less (latencies) of.
_CHANGES: dict[str, Callable[[Machine, float], Machine]] = {
    "memory bandwidth": lambda m, by: _faster(m, "bandwidth", by=by),
    "matrix peak": lambda m, by: replace(m, matrix={k: v * by for k, v in m.matrix.items()}),
    "vector and exp peak": lambda m, by: _faster(m, "vector", "exp", by=by),
    "link bandwidth": lambda m, by: _faster(m, "link", "host_link", by=by),
    "link latency": lambda m, by: _faster(m, "link_latency", by=1 / by),
    "network bandwidth": lambda m, by: _faster(m, "network", by=by),
    "launch and memory latency": lambda m, by: _faster(m, "kernel_latency", "memory_latency", by=1 / by),
    "host time": _quicker_host,
}


def machine_effects(e: Estimator, batch: int, new: int, context: int, *, is_decode: bool) -> list[dict[str, Any]]:
    """Per parameter: elasticity of the step's time to an improvement, and the step's seconds when it is twice as good.

    elasticity = ln(t'/t) / ln(1.01); parameters that do nothing are left out.
    """
    schedule = e.lower(step_phase(e, batch, new, context, is_decode=is_decode)).schedule

    def seconds(m: Machine) -> float:
        return float(e._finish(roofline.cost(schedule, m), batch, new, is_decode, m))

    now = seconds(e.machine)
    found = []
    for name, change in _CHANGES.items():
        elasticity = math.log(seconds(change(e.machine, _SMALL)) / now) / math.log(_SMALL)
        if abs(elasticity) > 5e-4:
            twice = seconds(change(e.machine, 2.0))
            found.append({"parameter": name, "elasticity": elasticity, "seconds_at_twice": twice})
    return sorted(found, key=lambda effect: effect["elasticity"])


def symbol_effects(
    counts: list[Expression], values: dict[str, float], *, is_decode: bool
) -> dict[str, dict[str, float]]:
    """Elasticity of the step's FLOPs and bytes with respect to batch, tokens and widths, from the derivatives."""
    exprs = vectorize.totals(counts)
    names = ["B", "C", "w", "w_e", "kv", "a"] if is_decode else ["B", "Q", "C", "w", "w_e", "kv", "a"]
    effects: dict[str, dict[str, float]] = {}
    for quantity in ("flops", "bytes"):
        derivatives = vectorize.compile([vectorize.elasticity(exprs[quantity], n) for n in names])(values)[:, 0]
        effects[quantity] = {n: float(x) for n, x in zip(names, derivatives, strict=True) if abs(x) > 5e-4}
    return effects


def ridge(
    e: Estimator, rows: list[dict[str, Any]], counts: list[Expression], values: dict[str, float], *, is_decode: bool
) -> dict[str, Any]:
    """Where matrix time equals memory time at datasheet rates: the batch (decode) or the new tokens (prefill).

    Solves sum over dtypes of FLOPs / peak = bytes / bandwidth, for the whole pass and for the linear layers alone.
    `at` is None when no value up to ten million does; `now` is matrix time over memory time as the step is;
    `more` the matrix and memory seconds that one more sequence (or token) adds, between this many and twice as many.
    """
    name = "B" if is_decode else "Q"
    linear = [c for c in counts if c.kind in ("gemm", "grouped_gemm")]
    result: dict[str, Any] = {"symbol": name, "value": values[name], "dtypes": _ridges(e.machine, rows)}
    for scope, chosen in (("pass", counts), ("linear", linear)):
        exprs = vectorize.totals(chosen)
        units = [q for q in exprs if q.startswith("flops.") and q not in ("flops.vector", "flops.exp")]
        matrix = sum(exprs[q] / e.machine.peak(q.removeprefix("flops.")) for q in units)
        moved = exprs["bytes"] / e.machine.bandwidth
        both = vectorize.compile([matrix, moved])(values | {name: np.array([1.0, 2.0]) * values[name]})
        result[scope] = {
            "at": vectorize.crossing(matrix - moved, name, values),
            "now": float(both[0, 0] / both[1, 0]),
            "more": ((both[:, 1] - both[:, 0]) / values[name]).tolist(),
            "closed_form": vectorize.is_polynomial(matrix - moved, name),
        }
    return result


def _ridges(m: Machine, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """FLOP per byte at which peak and bandwidth balance, by matrix dtype in use: datasheet and achieved rates."""
    used = {row["dtype"] for row in rows if row["dtype"]}
    achieved = float(m.matrix_efficiency) / float(m.bandwidth_efficiency)
    return {
        dtype: {"peak": m.peak(dtype), "datasheet": m.peak(dtype) / m.bandwidth,
                "achieved": m.peak(dtype) / m.bandwidth * achieved}
        for dtype in sorted(used)
    }  # fmt: skip
