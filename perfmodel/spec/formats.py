"""Number formats: bytes per element with their scales, and the arithmetic they run in."""

from __future__ import annotations

from typing import Literal, NamedTuple

from perfmodel.errors import SpecError, did_you_mean


class Format(NamedTuple):
    """A storage format. `group` elements share `scale_bits` of scales and zero points (0: no group)."""

    name: str
    bits: float
    group: int
    scale_bits: float
    matrix: str | None
    """Dtype of the matrix units when activations have the same format; None: weight-only, dequantised."""
    description: str

    @property
    def width(self) -> float:
        """Bytes per element, scales included."""
        return (self.bits + (self.scale_bits / self.group if self.group else 0.0)) / 8


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", 32, 0, 0, "fp32", "IEEE single"),
        Format("tf32", 32, 0, 0, "tf32", "stored as FP32, multiplied with 10-bit mantissa"),
        Format("bf16", 16, 0, 0, "bf16", "bfloat16"),
        Format("fp16", 16, 0, 0, "fp16", "IEEE half"),
        Format("fp8", 8, 0, 0, "fp8", "E4M3 or E5M2, one scale per tensor or channel"),
        Format("fp8_block", 8, 128 * 128, 32, "fp8", "E4M3 with an FP32 scale per 128x128 block (DeepSeek-V3)"),
        Format("int8", 8, 0, 0, "int8", "per-channel or per-token scale"),
        Format("mxfp4", 4, 32, 8, "fp4", "OCP MX: E2M1 with an 8-bit scale per 32"),
        Format("nvfp4", 4, 16, 8, "fp4", "E2M1 with an FP8 scale per 16"),
        Format("int4", 4, 128, 20, None, "AWQ/GPTQ group 128: FP16 scale and 4-bit zero per group"),
        Format("int4_g64", 4, 64, 20, None, "AWQ/GPTQ group 64"),
        Format("int4_g32", 4, 32, 16, None, "symmetric, BF16 scale per 32 (compressed-tensors, Kimi K2.5)"),
        Format("q4_k", 4.5, 0, 0, None, "llama.cpp Q4_K super-block: 144 bytes per 256 weights"),
        Format("q5_k", 5.5, 0, 0, None, "llama.cpp Q5_K super-block: 176 bytes per 256 weights"),
        Format("q6_k", 6.5625, 0, 0, None, "llama.cpp Q6_K super-block: 210 bytes per 256 weights"),
        Format("q8_0", 8, 32, 16, None, "llama.cpp Q8_0: 34 bytes per 32 weights"),
        Format("int2_g32", 2, 32, 32, None, "2-bit with FP16 scale and zero per 32"),
    )
}

ALIASES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "torch.bfloat16": "bf16",
    "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "float8_e4m3fn": "fp8", "fp8-block": "fp8_block", "w8a8": "int8",
    "awq": "int4", "gptq": "int4", "gptq_marlin": "int4", "awq_marlin": "int4", "w4a16": "int4", "fp4": "nvfp4", "q4_k_m": "q4_k",
    "e4m3": "fp8", "mx4": "mxfp4", "int4wo": "int4",
}  # fmt: skip


Quality = Literal["exact", "checkpoint", "lossy"]

# Exponent and significand bits (the leading one left out) of one element; scales are kept apart.
_BITS = {
    "fp32": (8, 23), "tf32": (8, 10), "bf16": (8, 7), "fp16": (5, 10), "fp8": (4, 3), "fp8_block": (4, 3), "int8": (0, 7),
    "mxfp4": (2, 1), "nvfp4": (2, 1), "int4": (0, 3), "int4_g64": (0, 3), "int4_g32": (0, 3), "q4_k": (0, 4),
    "q5_k": (0, 5), "q6_k": (0, 6), "q8_0": (0, 7), "int2_g32": (0, 1),
}  # fmt: skip


def quality(name: str, stored: str) -> Quality:
    """What storing values of the format `stored` as `name` does to them.

    checkpoint: the same format; exact: every value of one element survives, since exponent and significand are at least as
    wide (IEEE 754; OCP 8-bit and MX formats); lossy: some do not.

    >>> quality("fp8", "bf16"), quality("fp32", "bf16"), quality("fp16", "bf16"), quality("fp8", "fp8")
    ('lossy', 'exact', 'lossy', 'checkpoint')
    """
    wanted, have = get_format(name).name, get_format(stored).name
    if wanted == have:
        return "checkpoint"
    holds = all(a >= b for a, b in zip(_BITS[wanted], _BITS[have], strict=True))
    # A format with scales of its own does not take over another's.
    plain = not FORMATS[wanted].group and wanted in ("fp32", "tf32", "bf16", "fp16")
    return "exact" if holds and plain else "lossy"


def get_format(name: str) -> Format:
    """Look a format up by name or common spelling. Raises SpecError naming the nearest."""
    key = str(name).strip().lower()
    key = ALIASES.get(key, key)
    if key not in FORMATS:
        known = [*FORMATS, *ALIASES]
        raise SpecError(f"unknown number format {name!r}{did_you_mean(key, known)}; known: {', '.join(FORMATS)}")
    return FORMATS[key]
