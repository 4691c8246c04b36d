"""Storage and arithmetic of a run, chosen from the checkpoint and what the machine multiplies."""

from __future__ import annotations

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.shard import Formats
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Model


def choose_formats(
    model: Model, m: Machine, weight: str | None = None, act: str | None = None, kv: str | None = None
) -> Formats:
    """Storage and arithmetic of a run: the checkpoint's own unless overridden.

    Activations follow the weights (W8A8, W4A4) where the matrix units multiply that format; else they stay at 16 bits
    and the weights are expanded on the fly.
    """
    stored = get_format(weight or model.dtype)
    expert = get_format(weight or model.expert_dtype or model.dtype)
    base = act if act is not None and get_format(act).width >= 2 else "bf16" if model.dtype != "fp16" else "fp16"
    wide = get_format(base)
    # 16-bit formats stand in for each other (bf16 on Volta, fp16 on a TPU); FP32 was asked for and stays.
    if wide.width == 2 and wide.matrix not in m.matrix and m.matrix:
        wide = get_format(next((name for name in ("bf16", "fp16") if name in m.matrix), "fp32"))
    narrowest = min((stored, expert), key=lambda f: f.width)
    wants = act is None or get_format(act).width < 2
    quantise = wants and narrowest.matrix is not None and narrowest.width < wide.width and m.native(narrowest.matrix)
    if act is not None and get_format(act).width < 2 and not quantise:
        raise SpecError(
            f"activations cannot be {act}: {m.device.name} multiplies {', '.join(m.matrix) or 'no matrix formats'}, "
            f"and the weights are {narrowest.name}; give a --weight-dtype of that width or leave --act-dtype out"
        )
    cache = get_format(kv) if kv not in (None, "auto") else get_format(model.kv_dtype) if model.kv_dtype else wide
    quantised = stored.width < wide.width or expert.width < wide.width
    kept = model.unquantized if quantised else ()
    return Formats(stored, expert, wide, cache, kept, bool(quantise))
