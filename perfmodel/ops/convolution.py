"""Layers of a U-Net that other models do not have: convolutions over latents, and attention to a prompt."""

from __future__ import annotations

from dataclasses import replace

from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.gemm import gemm, linear
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op
from perfmodel.parameters import cross_weights, mixer_weights
from perfmodel.spec.model import Convolution, CrossAttention
from perfmodel.symbols import Num, is_one


def convolution(c: Convolution, s: Shard) -> list[Op]:
    """Operators of a residual unit, a projection or a change of resolution on one device.

    A convolution is a product of tokens x (inputs kernel^2) with (inputs kernel^2) x width that forms its windows as it
    goes, [2 tokens inputs kernel^2 width FLOP], and reads each input once (implicit GEMM, arXiv:1410.0759). Over tp
    devices the first of several is cut by outputs, the last by inputs; the sums are reduced after the layer.
    """
    f, tp = s.formats, s.par.tp
    weights = {w.name: w for w in mixer_weights(c, s.hidden)}
    stored, dtype = f.stored("convolution"), f.compute("convolution")
    ops: list[Op] = []
    read = s.tokens * c.inputs
    if c.joins:
        ops.append(pointwise("join", read, f.act.width, flops=0))
    if c.resample == "up":
        ops.append(pointwise("spread", read, f.act.width, reads=0.25, flops=0))
    for i in range(c.convolutions):
        last = i == c.convolutions - 1
        inputs = s.hidden / tp if i else c.inputs
        if i < c.norms:
            # One pass for the statistics of the groups, one to scale and to activate.
            ops.append(pointwise(f"group_norm_{i}", s.tokens * inputs, f.act.width, reads=2, flops=8, exp=1))
        window = 4 if c.resample == "down" else 1
        outputs: Num = s.hidden if last else s.hidden / tp
        seen = inputs if i or not last else c.inputs / tp
        product = gemm(f"conv_{i}", s.tokens, outputs, seen * c.kernel**2, weight=stored, act=f.act, dtype=dtype)
        ops += [_implicit(op, s.tokens * seen * window, c.kernel**2 / window) for op in product]
        if c.condition and i == 0:
            images: Num = sum((g.n for g in s.groups), start=0)
            ops += linear("condition", images, [weights["condition"]], tp, "column", weight=f.stored("other"), act=f.act,
                          dtype=f.compute("other"))  # fmt: skip
    if c.shortcut:
        ops += gemm("shortcut", s.tokens, s.hidden, c.inputs / tp, weight=stored, act=f.act, dtype=dtype)
    if c.convolutions > 1:
        ops.append(pointwise("residual", s.tokens * s.hidden, f.act.width, reads=2))
    return ops


def _implicit(op: Op, inputs: Num, windows: Num) -> Op:
    """The same product whose windows are formed on the way: `inputs` elements are read (or cast), not `windows` times as many."""
    if op.kind == "gemm":
        weights, activations, out = op.traffic
        return replace(op, traffic=(weights, replace(activations, elements=inputs), out))
    flops = {unit: count / windows for unit, count in op.flops.items()}
    traffic = tuple(replace(t, elements=inputs) for t in op.traffic)
    return replace(op, flops=flops, traffic=traffic, shape={**op.shape, "elements": inputs})


def cross_attention(c: CrossAttention, s: Shard) -> list[Op]:
    """Operators of attention to `c.tokens` tokens of a prompt, whose keys and values are projected in every pass."""
    f, tp = s.formats, s.par.tp
    weights = {w.name: w for w in cross_weights(c, s.hidden)}
    stored, dtype = f.stored("attention"), f.compute("attention")
    heads = c.heads / tp
    prompts: Num = sum((g.n for g in s.groups), start=0) * c.tokens
    both = [weights["cross_k_proj"], weights["cross_v_proj"]]
    ops = linear("cross_q_proj", s.tokens, [weights["cross_q_proj"]], tp, "column", weight=stored, act=f.act, dtype=dtype)
    ops += linear("cross_kv_proj", prompts, both, tp, "column", weight=stored, act=f.act, dtype=dtype)
    for i, g in enumerate(s.groups):
        name = "cross_attention" if is_one(len(s.groups)) else f"cross_attention_{i}"
        # Queries attend the prompt alone: `c + q` of a group is what they see.
        prompt = Group(g.n, g.q / s.par.cp, c.tokens - g.q / s.par.cp)
        ops.append(
            softmax_attention(
                name, prompt, heads=heads, kv_heads=heads, qk_dim=c.head_dim, v_dim=c.head_dim,
                kv_elements=2 * heads * c.head_dim, kv_width=f.act.width, act_width=f.act.width,
                dtype=str(f.act.matrix), causal=False,
            )
        )  # fmt: skip
    return ops + linear("cross_o_proj", s.tokens, [weights["cross_o_proj"]], tp, "row", weight=stored, act=f.act, dtype=dtype)
