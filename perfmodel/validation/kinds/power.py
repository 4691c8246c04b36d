"""Power of a device that serves a static batch: mean over prefill, over decode, or over a whole run."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from perfmodel import calibration, catalog, graph
from perfmodel.cost import device_power, step_shares
from perfmodel.estimator import Estimator
from perfmodel.validation.kinds.base import Kind, Outcome, batched
from perfmodel.validation.rows import Predicted, Refused, Row

_WATTS = {"w": 1.0, "kw": 1e3}
_SHARES = {"": 1.0, "1": 1.0, "fraction": 1.0, "frac_tdp": 1.0, "%": 0.01}


def _key(row: Row) -> Hashable:
    if not row.text("model"):
        raise Refused("model not stated")
    engine = calibration.known_engine(row.text("engine")) or "vllm"
    return row.hardware, catalog.load_model(row.text("model")).name, int(row.number("tp", 1)), engine, row.text("dtype")


def _price(key: Any, rows: list[Row]) -> list[Outcome]:
    hardware, model, tp, engine, dtype = key
    e = Estimator(model, hardware, tp=tp, engine=engine, weight_dtype=dtype or None)
    return [_answer(e, row) for row in rows]


def _answer(e: Estimator, row: Row) -> Outcome:
    """Watts of one device (of the instance where metric or unit say `total`), or a share of the board limit."""
    try:
        watts = _watts(e, row)
    except Refused as reason:
        return reason
    if watts is None:
        return Refused("power limit of the board not in the catalogue")
    name = row.text("unit").lower()
    unit = re.split(r"[\s/_]", name)[0] if name.startswith(("w", "kw")) else name
    if unit in _WATTS:
        total = "total" in name or "total" in row.text("metric")
        value = watts * (e.par.devices if total else 1) / _WATTS[unit]
    elif unit in _SHARES:
        value = watts / e.machine.tdp / _SHARES[unit]
    else:
        return Refused(f"unknown unit {row.text('unit')!r} of a power")
    spread = float(np.exp(calibration.P90 * calibration.law().residual["power"]))
    return Predicted(float(value), float(value / spread), float(value * spread))


def _watts(e: Estimator, row: Row) -> float | None:
    """Mean watts of one device; prefill and decode of a run by their share of its time, both as we estimate them."""
    phase = row.text("phase", "e2e")
    if phase not in ("prefill", "decode", "e2e"):
        raise Refused(f"no power of phase {phase!r}")
    batch, new = row.number("batch", 1), row.number("input_len")
    parts: list[tuple[float, float | None]] = []
    if phase != "decode":
        seconds = float(e.prefill(batch, new))
        parts.append((seconds, device_power(e, *step_shares(e, graph.prefill(batch, new), seconds))))
    if phase != "prefill":
        out = row.number("output_len", 1)
        context = new + out / 2
        seconds = float(e.decode(batch, context))
        watts = device_power(e, *step_shares(e, graph.decode(batch, context - 1), seconds))
        parts.append((seconds * max(out - 1, 1), watts))
    known = [(seconds, watts) for seconds, watts in parts if watts is not None]
    return sum(s * w for s, w in known) / sum(s for s, _ in known) if known else None


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


POWER = Kind(
    "power",
    lambda r: "power" in r.text("metric"),
    _predict,
    lambda r: (r.text("model"), r.text("tp")),
    ("power.default.power_active", "power.default.power_compute", "power.default.power_memory"),
)
