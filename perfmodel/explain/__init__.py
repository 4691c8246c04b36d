"""Where a number comes from: formulas, the numbers put in, the seconds on each resource, and what would change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfmodel import memory
from perfmodel.estimator import Estimator
from perfmodel.explain.step import explain_step
from perfmodel.explain.text import render


@dataclass(frozen=True)
class Explanation:
    """The prefill and the decode step in the middle of one request shape, as data and as text for a terminal."""

    _data: dict[str, Any]

    def data(self) -> dict[str, Any]:
        """Plain JSON-able data in base SI."""
        return self._data

    def text(self) -> str:
        """At most 110 columns wide."""
        return render(self._data)


def explain(estimator: Estimator, batch: int, isl: int, osl: int, prefix: int = 0) -> Explanation:
    """Explain `batch` sequences of `isl` prompt tokens, `prefix` of them cached, that each produce `osl` tokens.

    The decode step is the one at the middle context, as in `estimate`; there is none when `osl` is 1.
    """
    e = estimator
    steps = {"prefill": explain_step(e, batch, isl - prefix, prefix, is_decode=False)}
    if osl > 1:
        steps["decode"] = explain_step(e, batch, 1, isl + (osl - 2) // 2, is_decode=True)
    return Explanation(
        {
            "configuration": _configuration(e, batch, isl, osl, prefix),
            "steps": steps,
            "memory": _memory(e, batch, isl + osl),
        }
    )


def _configuration(e: Estimator, batch: int, isl: int, osl: int, prefix: int) -> dict[str, Any]:
    f, m = e.formats, e.machine
    return {
        "model": e.model.name, "hardware": m.name, "device": m.device.name, "engine": e.engine_name,
        "tp": int(e.par.tp), "pp": int(e.par.pp), "dp": int(e.par.dp), "ep": int(e.par.ep), "cp": int(e.par.cp),
        "weights": f.weight.name, "experts": f.expert.name, "activations": f.act.name, "kv": f.kv.name,
        "batch": batch, "isl": isl, "osl": osl, "prefix": prefix,
        "bandwidth": m.bandwidth, "matrix": dict(m.matrix), "vector": m.vector, "exp": m.exp,
        "provenance": m.provenance,
    }  # fmt: skip


def _memory(e: Estimator, batch: int, tokens: int) -> dict[str, Any]:
    used = e.memory(batch, tokens)
    longest = memory.longest_context(e.model, e.par, e.formats, e.kv_free, batch)
    return {
        "weights": float(used.weights), "kv": float(used.kv), "activations": float(used.activations),
        "other": float(used.other), "total": float(used.total), "capacity": float(used.capacity),
        "fits": bool(used.fits), "free": float(e.kv_free), "tokens": tokens,
        "max_batch": e.max_batch(tokens), "longest_context": longest, "max_positions": e.model.max_positions,
    }  # fmt: skip
