"""What the tests of cache techniques share: built estimators, the attention kernel of a pass, bytes per column."""

from __future__ import annotations

from functools import lru_cache

from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, cache_residency
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators


@lru_cache(maxsize=256)
def estimator(*specs: str, model: str = "llama-3.1-8b", tp: int = 1) -> Estimator:
    return Estimator(model, "h100-sxm", tp=tp, techniques=specs)


def kernel(e: Estimator, phase: Phase) -> Op:
    """The attention of one layer (the last kind)."""
    return [op for op, _, _ in operators(e.lower(phase).schedule) if op.kind == "attention"][-1]


def named(e: Estimator, phase: Phase, name: str) -> Op:
    return next(op for op, _, _ in operators(e.lower(phase).schedule) if op.name == name)


def bytes_per_column(specs: tuple[str, ...], tokens: float, tp: int = 1) -> float:
    """Stored bytes of a sequence per element column: Llama-3.1-8B caches 32 layers x 2 x 8 heads x 128 of them."""
    e = estimator(*specs, tp=tp)
    found = cache_residency(e.model, e.par, e.formats, 1, tokens)
    return float(sum(r.bytes for r in found)) / (32 * 2 * 8 / tp * 128)
