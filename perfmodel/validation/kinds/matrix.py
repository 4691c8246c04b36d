"""Dense matrix products: the framework's linear module, activation quantisation inside."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from perfmodel import calibration
from perfmodel.machine import Machine
from perfmodel.ops.gemm import gemm
from perfmodel.spec.formats import Format, get_format
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, engine_machine, seconds_with_spread, times
from perfmodel.validation.kinds.elementwise import host_seconds, timed
from perfmodel.validation.rows import Row

# Operators and libraries whose names say that the product alone was timed: its input came quantised.
_ALONE = ("gemm_nt", "smooth_quant_gemm", "cublaslt")
# vLLM's block-scaled modules, which launch their kernels from Python one by one.
_BY_PYTHON = "BlockScaledMMKernel"
# What benchmarks call a format -> ours: SmoothQuant, and weights alone with a scale per group.
_FORMATS = {"sq": "int8", "int8_wo": "q8_0", "int4_wo": "int4_g64"}


def _key(row: Row) -> Hashable:
    """The operator names the launch regime where the engine has several."""
    op, engine = row.text("op"), row.text("engine")
    alone = any(word in f"{op} {engine}".lower() for word in _ALONE) or engine.lower().startswith("deepgemm")
    regime = op if calibration.known_engine(op) else engine
    return row.hardware, regime, row.text("dtype"), alone, op.endswith(_BY_PYTHON)


def _price(key: Any, rows: list[Row]) -> list[Outcome]:
    hardware, regime, dtype, alone, by_python = key
    m = timed(engine_machine(hardware, regime))
    weight = get_format(_FORMATS.get(dtype, dtype))
    act = weight if weight.width >= 2 else get_format("bf16")
    runs = weight.matrix if weight.matrix is not None and m.native(weight.matrix) else act.matrix
    ops = gemm("gemm", column(rows, "m"), column(rows, "n"), column(rows, "k"), weight=weight, act=act, dtype=str(runs))
    added, residual = host_seconds(m, "matmul", 1), "gemm"
    if weight.width < act.width:
        added, residual = added + _module(m, weight, narrow=runs != act.matrix), "gemm_narrow"
    seconds, sigma = seconds_with_spread(ops[-1:] if alone else ops, m, residual, added)
    # Products of one shape in one kernel (m rows each) share its launch.
    groups = np.array([r.number("groups", 1) for r in rows])
    seconds = seconds + (groups - 1) * np.maximum(seconds - m.kernel_latency, 0.0)
    return times(rows, np.maximum(seconds, m.law["module_issue"] if by_python else 0.0), sigma)


def _module(m: Machine, weight: Format, *, narrow: bool) -> float:
    """Seconds of a linear module with narrow weights beside its kernels: what its timer sees, and input scales."""
    added = m.law.get("module_latency", 0.0)
    if narrow:
        added += m.law["scale_latency"] + (0.0 if weight.group else m.law.get("tensor_scale_latency", 0.0))
    return float(added)


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _held_out(row: Row) -> Hashable:
    return row.text("n"), row.text("k")


GEMM = Kind(
    "gemm",
    lambda r: r.text("phase") == "gemm" and bool(r.text("m")),
    _predict,
    _held_out,
    (
        "law.tile_overhead", "law.split_overhead", "law.unit_loading", "law.matrix_ramp",
        "device.*.matrix_efficiency", "device.*.narrow_matrix_efficiency", "device.*.bandwidth_efficiency",
        "device.*.kernel_latency",
    ),
)  # fmt: skip
