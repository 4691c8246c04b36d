"""Linear layers: y[m, n] = x[m, k] W[k, n]."""

from __future__ import annotations

from perfmodel.ops.traffic import Op, TensorKind, Traffic, read, write
from perfmodel.parameters import Weight
from perfmodel.spec.formats import Format
from perfmodel.symbols import Num


def gemm(
    name: str,
    m: Num,
    n: Num,
    k: Num,
    *,
    weight: Format,
    act: Format,
    dtype: str,
    tensor: TensorKind = "weights",
    weights: Num | None = None,
) -> list[Op]:
    """A dense matrix multiplication [2 m n k FLOP], with the cast of its input where it computes narrower.

    Reads the weights once (n k elements, or `weights` where the stored matrix is larger or shared) and the
    input, and writes the output. FLOPs: Williams et al., "Roofline", CACM 52(4), 2009; one multiply and one add.
    """
    matrix_width = weight.width if dtype != act.matrix else act.width
    narrow = dtype != act.matrix
    elements = n * k if weights is None else weights
    flops: dict[str, Num] = {dtype: 2 * m * n * k}
    if not narrow and weight.width < act.width:
        # Weight-only formats are expanded on the vector units: convert and scale, below 8 bits after a shift and a mask.
        flops["vector"] = (2 if weight.bits >= 8 else 4) * elements
    op = Op(
        name,
        "gemm",
        flops,
        (
            read(tensor, elements, weight.width),
            read("activations", m * k, matrix_width if narrow else act.width),
            write("activations", m * n, act.width),
        ),
        {"m": m, "n": n, "k": k} | ({"scales": m} if narrow and not weight.group else {}),
        reference="2mnk",
    )
    return [quantise(f"{name}.quantise", m * k, act, matrix_width), op] if narrow else [op]


def linear(
    name: str, m: Num, weights: list[Weight], parts: Num, split: str, *, weight: Format, act: Format, dtype: str
) -> list[Op]:
    """A GEMM over stored matrices fused along their output rows, cut over `parts` devices.

    split: ``column`` cuts the outputs, ``row`` the inputs (Shoeybi et al., arXiv:1909.08053, section 3).
    """
    rows = sum((w.rows for w in weights), start=0)
    cols = weights[0].cols
    n, k = (rows / parts, cols) if split == "column" else (rows, cols / parts)
    return gemm(name, m, n, k, weight=weight, act=act, dtype=dtype)


def quantise(name: str, elements: Num, act: Format, narrow_width: float) -> Op:
    """Cast of activations to a narrower format: read, find the scale, write."""
    traffic: tuple[Traffic, ...] = (
        read("activations", elements, act.width),
        write("activations", elements, narrow_width),
    )
    return Op(name, "elementwise", {"vector": 3 * elements}, traffic, {"elements": elements})
