"""Norms, activations, rotary embedding and other operators whose cost is their traffic."""

from __future__ import annotations

from perfmodel.ops.traffic import Op, TensorKind, read, write
from perfmodel.symbols import Num


def norm(name: str, tokens: Num, width: Num, bytes_: Num, *, residual: bool = True, passes: Num = 1) -> Op:
    """RMSNorm or LayerNorm over `width`, fused with the residual addition as serving engines do.

    Reads x and the residual, writes the new residual and the normed x [4 tokens*width elements]. Without the
    residual x is read `passes` times: twice where a kernel does not keep the row between its sum and its scaling.
    """
    elements = tokens * width
    return Op(
        name,
        "elementwise",
        {"vector": (6 if residual else 5) * elements},
        (
            read("activations", (2 if residual else passes) * elements, bytes_),
            write("activations", (2 if residual else 1) * elements, bytes_),
        ),
        {"elements": elements, "rows": tokens},
        reference="arXiv:1910.07467",
    )


def activation(name: str, tokens: Num, inter: Num, bytes_: Num, *, gated: bool) -> Op:
    """Activation function; gated forms read gate and up and write their product, a thread block for each token."""
    elements = tokens * inter
    rows = {"rows": tokens} if gated else {}
    return Op(
        name,
        "elementwise",
        {"vector": (4 if gated else 3) * elements, "exp": elements},
        (read("activations", (2 if gated else 1) * elements, bytes_), write("activations", elements, bytes_)),
        {"elements": elements} | rows,
        reference="arXiv:2002.05202",
    )


def pointwise(
    name: str, elements: Num, bytes_: Num, *, reads: Num = 1, writes: Num = 1, flops: Num = 1, exp: Num = 0
) -> Op:
    """Any map over `elements` that reads and writes whole multiples of them."""
    return Op(
        name,
        "elementwise",
        {"vector": flops * elements, "exp": exp * elements},
        (read("activations", reads * elements, bytes_), write("activations", writes * elements, bytes_)),
        {"elements": elements},
    )


def rotary(name: str, tokens: Num, width: Num, bytes_: Num) -> Op:
    """Rotary embedding of `width` query and key elements of each token, in place."""
    elements = tokens * width
    return Op(
        name,
        "elementwise",
        {"vector": 4 * elements},
        (read("activations", elements, bytes_), write("activations", elements, bytes_)),
        {"elements": elements, "rows": tokens},
        reference="arXiv:2104.09864",
    )


def softmax(name: str, rows: Num, width: Num, bytes_: Num) -> Op:
    """Softmax over `width` as a kernel of its own: one pass for maximum and sum, one to divide (arXiv:1805.02867)."""
    elements = rows * width
    return Op(
        name,
        "elementwise",
        {"vector": 4 * elements, "exp": 2 * elements},
        (read("activations", 2 * elements, bytes_), write("activations", elements, bytes_)),
        {"elements": elements, "rows": rows},
        reference="arXiv:1805.02867",
    )


def store(name: str, tensor: TensorKind, elements: Num, act_bytes: Num, stored_bytes: Num, extra: Num = 0) -> Op:
    """Rotate and write `elements` into a cache, `extra` further activations being rotated in place."""
    return Op(
        name,
        "elementwise",
        {"vector": 4 * (elements + extra)},
        (
            read("activations", elements + extra, act_bytes),
            write("activations", extra, act_bytes),
            write(tensor, elements, stored_bytes),
        ),
        {"elements": elements + extra},
        reference="arXiv:2104.09864",
    )


def embedding(tokens: Num, width: Num, weight_bytes: Num, act_bytes: Num) -> Op:
    """Table look-up of one row per token."""
    return Op(
        "embedding",
        "gather",
        {},
        (read("weights", tokens * width, weight_bytes), write("activations", tokens * width, act_bytes)),
        {"elements": tokens * width},
    )


def sampler(rows: Num, vocab: Num) -> Op:
    """Softmax and a draw over the vocabulary in FP32: three passes over the logits."""
    elements = rows * vocab
    return Op(
        "sampler",
        "elementwise",
        {"vector": 4 * elements, "exp": elements},
        (read("logits", 3 * elements, 4), write("logits", elements, 4)),
        {"elements": elements},
        launches=3,
    )
