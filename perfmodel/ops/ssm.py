"""Recurrent mixers: Mamba-1, Mamba-2, gated delta net and lightning attention.

All keep a fixed state per sequence. New tokens update it one by one when there is one of them (decode) and in
chunks of matrix products when there are many (prefill). The chunk length of the public kernels is 256 for
Mamba-2 (arXiv:2405.21060, section 6) and 64 for the delta rule (arXiv:2412.06464, section 3.3).
"""

from __future__ import annotations

from perfmodel.ops.elementwise import norm, pointwise
from perfmodel.ops.gemm import linear
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.parameters import mixer_weights
from perfmodel.spec.model import GatedDeltaNet, Lightning, Mamba1, Mamba2
from perfmodel.symbols import Num, minimum

Recurrent = Mamba1 | Mamba2 | GatedDeltaNet | Lightning


def recurrent_mixer(m: Recurrent, s: Shard) -> list[Op]:
    """Input projection, short convolution, state update over the new tokens, output projection."""
    f, tp = s.formats, s.par.tp
    weights = {w.name: w for w in mixer_weights(m, s.hidden)}
    stored, dtype = f.stored("ssm"), f.compute("ssm")

    def project(names: list[str], split: str) -> list[Op]:
        chosen = [weights[n] for n in names]
        return linear("+".join(names), s.tokens, chosen, tp, split, weight=stored, act=f.act, dtype=dtype)

    match m.kind:
        case "mamba2":
            ops = project(["in_proj"], "column")
        case "mamba1":
            ops = project(["in_proj"], "column")
        case "deltanet":
            ops = project(["in_proj_qkvz"], "column") + project(["in_proj_ba"], "column")
        case "lightning":
            ops = project(["qkv_proj", "gate"], "column")
    if "conv1d" in weights:
        conv = weights["conv1d"]
        elements = s.tokens * conv.rows / tp
        ops.append(pointwise("conv1d", elements, f.act.width, flops=2 * m.conv, exp=1))  # type: ignore[union-attr]
    if m.kind == "mamba1":
        ops += project(["x_proj"], "row") + project(["dt_proj"], "column")
    for i, group in enumerate(s.groups):
        ops.append(_scan(m, s, group, f"scan_{i}" if len(s.groups) > 1 else "scan"))
    inner = weights["out_proj"].cols / tp
    ops.append(norm("gated_norm", s.tokens, inner, f.act.width, residual=True))
    return ops + project(["out_proj"], "row")


def _scan(m: Recurrent, s: Shard, group: Group, name: str) -> Op:
    """State update and read-out of one group.

    A head with state P x N and matrix-product chunks of length c costs per token, counting the causal half of
    what happens within the chunk (arXiv:2405.21060, section 6):  c (g N + P) + 4 P N, where g is the share of heads
    with a key of their own (Mamba-2 computes C B^T once per group). The delta rule forms K K^T and Q K^T, solves a
    triangular system for both corrected keys and values, and corrects the values by the state:
    c (3 N + 2 P) + 6 P N (arXiv:2412.06464, section 3.3). One by one a token costs 6 P N on the vector units.
    """
    heads, p, n, chunk, groups = _state_shape(m)
    shared = groups / heads
    heads = heads / s.par.tp
    # Context parallelism hands the state from rank to rank; each scans its own tokens.
    tokens = s.local(group)
    state = group.n * heads * p * n
    recurrent = group.decode or m.kind == "mamba1"
    if recurrent:
        flops: dict[str, Num] = {"vector": 6 * tokens * heads * p * n}
    else:
        length = minimum(chunk, group.q)
        delta = m.kind == "deltanet"
        per_token = length * (3 * n + 2 * p) + 6 * p * n if delta else length * (shared * n + p) + 4 * p * n
        flops = {str(s.formats.act.matrix): tokens * heads * per_token, "vector": 6 * tokens * heads * (p + shared * n)}
    a = s.formats.act.width
    return Op(
        name,
        "scan",
        flops,
        (
            read("state", state, s.formats.state_width),
            write("state", state, s.formats.state_width),
            read("activations", tokens * heads * (2 * p + 2 * shared * n), a),
            write("activations", tokens * heads * p, a),
        ),
        {"elements": state, "n": group.n, "q": group.q},
        launches=1 if recurrent else 5,
        reference="arXiv:2405.21060",
    )


def _state_shape(m: Recurrent) -> tuple[Num, Num, Num, int, Num]:
    """(heads, P, N, chunk length, distinct keys among the heads) of the recurrent state."""
    match m.kind:
        case "mamba2":
            return m.heads, m.head_dim, m.state, 256, m.groups
        case "mamba1":
            return m.inner, 1, m.state, 1, 1
        case "deltanet":
            return m.value_heads, m.value_dim, m.key_dim, 64, m.value_heads
        case "lightning":
            return m.heads, m.head_dim, m.head_dim, 256, m.heads


def recurrent_state(
    m: Recurrent, sequences: Num, par_tp: Num, state_width: Num, conv_width: Num, block: str
) -> list[Residency]:
    """State matrix per head, and the convolution's last inputs."""
    heads, p, n, *_ = _state_shape(m)
    stored = [Residency("state", f"{block}.state", sequences * heads * p * n / par_tp, state_width)]
    conv = {w.name: w for w in mixer_weights(m, 1)}.get("conv1d")
    if conv is not None:
        stored.append(Residency("state", f"{block}.conv", sequences * conv.rows * (conv.cols - 1) / par_tp, conv_width))
    return stored
