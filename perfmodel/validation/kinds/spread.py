"""How uncertain serving times are: what every parameter contributes, and what the law leaves unexplained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from perfmodel import calibration
from perfmodel.estimator import Estimator
from perfmodel.validation.kinds import base
from perfmodel.validation.kinds.instance import Instance, estimator
from perfmodel.validation.rows import Row

_TYPICAL_BATCH, _TYPICAL_PROMPT = 32.0, 1024.0


def spread(key: Instance, rows: Sequence[Row], kind: str) -> float:
    """Sigma of the logarithm of one kind of time on an instance: `tpot`, `ttft`, `static` or `offline`.

    What parameters contribute is taken at the rows' median batch and prompt, from a decode step or a prefill.
    """
    if not base.bands_wanted():
        return 0.0
    batch = [r.number("batch", _TYPICAL_BATCH) for r in rows if r.text("batch").replace(".", "").isdigit()]
    prompt = float(np.median([r.number("input_len", _TYPICAL_PROMPT) for r in rows]))
    shape = float(np.median(batch)) if batch else _TYPICAL_BATCH
    own = _sensitivity(key, shape, prompt, kind in ("tpot", "offline"))
    return float(np.hypot(own, calibration.law().residual[f"serving_{kind}"]))


@lru_cache(maxsize=1024)
def _sensitivity(key: Instance, batch: float, prompt: float, is_decode: bool) -> float:
    """Root sum of squares of every uncertain parameter's effect on one step."""
    e: Estimator = estimator(key)
    parts = e.parts(batch, 1.0, prompt, is_decode=True) if is_decode else e.parts(1.0, prompt, 0.0, is_decode=False)
    return float(np.sqrt(sum(x**2 for x in parts.sensitivity.values())))


calibration.on_change(_sensitivity.cache_clear)
