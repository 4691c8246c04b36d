"""llama.cpp's file types: which block format each tensor of a GGUF file is stored in.

A file type such as Q4_K_M names a mixture: most matrices in its base format, the value and down projections of some
layers in a better one, the head in Q6_K. Source: `llama_tensor_get_type` of llama.cpp's quantiser and the block sizes
of ggml-common.h (bits per weight = 8 x bytes of a block / weights of a block).
"""

from __future__ import annotations

from typing import NamedTuple

# Bits per weight of a block format, scales included.
BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q5_1": 6.0, "q5_0": 5.5,
    "q4_k": 4.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.25, "q3_k": 3.4375, "iq3_s": 3.4375,
    "iq3_xxs": 3.0625, "q2_k": 2.625, "iq2_xs": 2.3125, "iq2_xxs": 2.0625, "mxfp4": 4.25,
}  # fmt: skip


class FileType(NamedTuple):
    """Formats of one file type. `better` holds in a `share` of the layers for the named matrices."""

    base: str
    better: str = ""
    matrices: tuple[str, ...] = ()
    share: float = 0.0
    head: str = "q6_k"
    experts: str = ""

    def bits(self, tensor: str, part: str, inner: int) -> float:
        """Mean bits per weight of a matrix over the layers; `inner`: its input width.

        Q4_K_M keeps half of the value and down projections in Q6_K, else Q4_K: (4.5 + 6.5625) / 2.

        >>> FILE_TYPES["q4_k_m"].bits("down_proj", "weights", 14336)
        5.53125
        """
        if part in ("embedding", "head"):
            return BITS[_fitting(self.head, inner)]
        if part == "experts" and self.experts:
            return BITS[self.experts]
        low = BITS[_fitting(self.base, inner)]
        if tensor not in self.matrices:
            return low
        return low + self.share * (BITS[_fitting(self.better, inner)] - low)


def _fitting(name: str, inner: int) -> str:
    """The format itself, or what replaces it where rows are no whole number of its blocks of 256 weights."""
    return name if inner % 256 == 0 else _REPLACED.get(name, name)


_REPLACED = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
_DOWN = ("down_proj", "v_proj")
_WIDER = ("down_proj", "v_proj", "o_proj")
FILE_TYPES = {
    "q2_k": FileType("q2_k", "q3_k", _WIDER, 1.0),
    "q3_k_s": FileType("q3_k"),
    "q3_k_m": FileType("q3_k", "q4_k", _WIDER, 1.0),
    "q3_k_l": FileType("q3_k", "q5_k", _WIDER, 1.0),
    "q4_k_s": FileType("q4_k", "q5_k", _DOWN, 0.125),
    "q4_k_m": FileType("q4_k", "q6_k", _DOWN, 0.5),
    "q5_k_s": FileType("q5_k"),
    "q5_k_m": FileType("q5_k", "q6_k", _DOWN, 0.5),
    "q6_k": FileType("q6_k"),
    "q8_0": FileType("q8_0", head="q8_0"),
    "mxfp4": FileType("q8_0", head="q8_0", experts="mxfp4"),
    **{name: FileType(name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "iq3_xxs", "iq2_xxs")},
    **{name: FileType(name, head=name) for name in ("f32", "f16", "bf16")},
}
_SPELLED = {"q4_k": "q4_k_m", "q5_k": "q5_k_m", "q3_k": "q3_k_m", "q2_k_s": "q2_k", "fp16": "f16", "fp32": "f32"}


def file_type(name: str) -> FileType | None:
    """The file type of a name such as `Q4_K_M`, or of a weight format that only llama.cpp has; None: no such file."""
    key = name.strip().lower()
    return FILE_TYPES.get(_SPELLED.get(key, key))
