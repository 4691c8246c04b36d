"""Softmax attention with grouped queries, full or sliding-window."""

from __future__ import annotations

from dataclasses import replace

from perfmodel.ops.cached import cache_site, cached_attention, edited
from perfmodel.ops.collective import collective
from perfmodel.ops.elementwise import pointwise, store
from perfmodel.ops.gemm import linear
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.parameters import mixer_weights
from perfmodel.spec.model import Attention
from perfmodel.symbols import Num, is_one, maximum

KERNELS = ("attention", "latent_attention")
_SHARED_OUT = ("pairs", "unpack", "rebuild", "copied", "lag")  # of a kernel's shape, among the ranks that share its context


def softmax_attention(
    name: str,
    group: Group,
    *,
    heads: Num,
    kv_heads: Num,
    qk_dim: Num,
    v_dim: Num,
    kv_elements: Num,
    kv_width: Num,
    act_width: Num,
    dtype: str,
    window: Num | None = None,
    causal: bool = True,
) -> Op:
    """softmax(q K^T) V without materialising the scores (Dao et al., arXiv:2205.14135).

    FLOPs: 2 heads (qk_dim + v_dim) per query-key pair; one exponential and about four vector operations per
    pair and head. Reads every visible cached element once (`kv_elements` per token), q once, writes the output.
    """
    pairs = group.pairs(window, causal)
    visible = group.visible(window)
    return Op(
        name,
        "attention",
        {dtype: 2 * heads * (qk_dim + v_dim) * pairs, "exp": heads * pairs, "vector": 4 * heads * pairs},
        (
            read("kv", visible * kv_elements, kv_width),
            read("activations", group.tokens * heads * qk_dim, act_width),
            write("activations", group.tokens * heads * v_dim, act_width),
        ),
        {"n": group.n, "q": group.q, "kv_len": visible / group.n, "heads": heads, "kv_heads": kv_heads,
         "head_dim": qk_dim, "v_dim": v_dim, "pairs": pairs},
        reference="arXiv:2205.14135",
        contextual=True,
    )  # fmt: skip


def attention(a: Attention, s: Shard) -> list[Op]:
    """All operators of one attention layer on one device: projections, rotary and cache write, attention, output."""
    f = s.formats
    weights = {w.name: w for w in mixer_weights(a, s.hidden)}
    heads = a.heads / s.par.tp
    # KV heads replicate when tp exceeds them.
    kv_heads = maximum(a.kv_heads / s.par.tp, 1)
    dtype, stored = f.compute("attention"), f.stored("attention")
    factored = "q_a_proj" in weights
    # The factor that all heads share is small and replicated on every tensor-parallel rank.
    qkv = [weights["q_a_proj" if factored else "q_proj"]]
    q_rows = qkv[0].rows if factored else qkv[0].rows / s.par.tp
    kv_rows: Num = 0
    if not a.shares_kv:
        qkv += [weights["k_proj"], weights["v_proj"]]
        kv_rows = 2 * kv_heads * a.head_dim
    # Fused projection: q is cut by tp, k and v by the KV heads that remain.
    fused = qkv[0]._replace(rows=q_rows + kv_rows)
    ops = linear("qkv_proj", s.tokens, [fused], 1, "column", weight=stored, act=f.act, dtype=dtype)
    if factored:
        ops += linear("q_b_proj", s.tokens, [weights["q_b_proj"]], s.par.tp, "column", weight=stored, act=f.act, dtype=dtype)
    rotated = s.tokens * heads * a.head_dim
    if not a.shares_kv:
        ops.append(store("rope_and_cache", "kv", s.tokens * kv_rows, f.act.width, f.kv.width, extra=rotated))
    if a.qk_norm != "none":
        normed = s.tokens * (heads + kv_heads) * a.head_dim
        ops.append(pointwise("qk_norm", normed, f.act.width, flops=5))
    for i, group in enumerate(s.groups):
        ops += _contextual(a, s, group, i, heads, kv_heads)
    if a.output_gate:
        ops.append(pointwise("output_gate", rotated, f.act.width, reads=2, flops=2, exp=1))
    ops += linear("o_proj", s.tokens, [weights["o_proj"]], s.par.tp, "row", weight=stored, act=f.act, dtype=dtype)
    return ops


def _contextual(a: Attention, s: Shard, group: Group, i: int, heads: Num, kv_heads: Num) -> list[Op]:
    """Attention of one group, with the exchange that context parallelism needs."""
    f = s.formats
    suffix = f"_{i}" if len(s.groups) > 1 else ""
    # Engines cast the queries to the format of an 8-bit floating-point cache and multiply there.
    multiplied = f.kv if f.kv.matrix == "fp8" else f.act
    op = softmax_attention(
        f"attention{suffix}", group, heads=heads, kv_heads=kv_heads, qk_dim=a.head_dim, v_dim=a.head_dim,
        kv_elements=2 * kv_heads * a.head_dim, kv_width=f.kv.width, act_width=f.act.width,
        dtype=str(multiplied.matrix), window=a.window, causal=s.causal,
    )  # fmt: skip
    ops = [op]
    if f.techniques:
        site = replace(cache_site(a, s.block, s.hidden, s.layers, s.par, f), new=0 if group.decode else group.q)
        cached = op.shape["kv_len"] if group.decode else op.shape["kv_len"] - group.q
        ops = cached_attention(op, group, edited(f, site, cached, owned=not a.shares_kv), site, suffix)
    return context_parallel(ops, s, group, 2 * kv_heads * a.head_dim, heads * (a.head_dim + 1), suffix)


def context_parallel(ops: list[Op], s: Shard, group: Group, kv_elements: Num, partial: Num, suffix: str) -> list[Op]:
    """Divide one attention over cp devices and add the exchange.

    Prefill (ring attention, arXiv:2310.01889): pairs divide by cp with a balanced (zigzag) order, and each device
    passes on the keys and values of the other cp - 1. Decode: the cached context divides, and partial outputs with
    their softmax statistics are gathered (arXiv:2311.01282). Of an edited cache, what is fetched, scanned or attended
    elsewhere divides with the cached tokens; queries go to every rank's share.
    """
    cp = s.par.cp
    if is_one(cp):
        return ops
    found = []
    for op in ops:
        if op.kind in KERNELS:
            op = _cut(op, group, cp)
        elif op.kind in ("selection", "elsewhere") or (op.kind == "copy" and op.traffic[0].tensor == "kv"):
            op = _portion(op, cp)
        found.append(op)
    if group.decode:
        exchange = collective(f"cp_gather{suffix}", "all_gather", group.tokens * partial * cp, 4, cp, stride=s.par.tp)
    else:
        passed = group.n * (group.c + group.q) * (cp - 1) / cp * kv_elements
        exchange = collective(f"ring_kv{suffix}", "p2p", passed, s.formats.act.width, cp, stride=s.par.tp)
    return [*found, replace(exchange, contextual=True)]


def _cut(op: Op, group: Group, cp: Num) -> Op:
    """One rank's part of an attention kernel: in decode of the keys, in prefill of the queries."""
    flops = {unit: count / cp for unit, count in op.flops.items()}
    shape = {**op.shape, **{key: op.shape[key] / cp for key in _SHARED_OUT if key in op.shape}}
    length, divided = ("kv_len", "kv") if group.decode else ("q", "activations")
    shape[length] = op.shape[length] / cp
    traffic = tuple(replace(t, elements=t.elements / cp) if t.tensor == divided else t for t in op.traffic)
    return replace(op, flops=flops, traffic=traffic, shape=shape)


def _portion(op: Op, cp: Num) -> Op:
    """One rank's part of another operator over cached tokens."""
    shape = {**op.shape, "elements": op.shape["elements"] / cp} if "elements" in op.shape else op.shape
    flops = {unit: count / cp for unit, count in op.flops.items()}
    return replace(op, flops=flops, shape=shape, traffic=tuple(replace(t, elements=t.elements / cp) for t in op.traffic))


def attention_cache(a: Attention, tokens: Num, sequences: Num, par_tp: Num, width: Num, block: str) -> list[Residency]:
    """Stored keys and values of one layer on one device, whole attention span."""
    if a.shares_kv:
        return []
    kv_heads = maximum(a.kv_heads / par_tp, 1)
    return [Residency("kv", f"{block}.kv", tokens * 2 * kv_heads * a.head_dim, width)]
