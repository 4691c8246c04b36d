"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds one latent per token."""

from __future__ import annotations

from dataclasses import replace

from perfmodel.ops.attention import context_parallel, softmax_attention
from perfmodel.ops.cached import cache_site, cached_attention, edited
from perfmodel.ops.elementwise import norm, store
from perfmodel.ops.gemm import gemm, linear
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.parameters import Weight, mixer_weights
from perfmodel.spec.formats import Format
from perfmodel.spec.model import Indexer, LatentAttention
from perfmodel.symbols import Num, minimum


def latent_attention(a: LatentAttention, s: Shard) -> list[Op]:
    """Absorbed (decode): queries meet the latent directly. Expanded (prefill): keys and values are rebuilt.

    Absorbed, per token and head: 2 d_n r_kv to move q into latent space, pairs (2 (r_kv + d_r) + 2 r_kv), 2 r_kv d_v out.
    Expanded re-expands the cached latent in every pass: 2 (C + Q) r_kv H (d_n + d_v).
    """
    f, tp = s.formats, s.par.tp
    weights = {w.name: w for w in mixer_weights(a, s.hidden)}
    stored, dtype = f.stored("latent"), f.compute("latent")
    heads = a.heads / tp

    def project(names: list[str], parts: Num, split: str) -> list[Op]:
        chosen = [weights[n] for n in names]
        return linear("+".join(names), s.tokens, chosen, parts, split, weight=stored, act=f.act, dtype=dtype)

    ops: list[Op] = []
    if "q_a_proj" in weights:
        # Down-projections are small and replicated on every tensor-parallel rank.
        ops += project(["q_a_proj", "kv_a_proj"], 1, "column")
        ops.append(norm("latent_norms", s.tokens, a.q_rank + a.kv_rank, f.act.width, residual=False))
        ops += project(["q_b_proj"], tp, "column")
    else:
        ops += project(["q_proj"], tp, "column") + project(["kv_a_proj"], 1, "column")
        ops.append(norm("latent_norms", s.tokens, a.kv_rank, f.act.width, residual=False))
    latent = a.kv_rank + a.rope_dim
    rotated = s.tokens * heads * a.rope_dim
    ops.append(store("rope_and_cache", "kv", s.tokens * latent, f.act.width, f.kv.width, extra=rotated))
    if a.indexer is not None:
        ops += _indexer(a.indexer, s, weights)
    for i, group in enumerate(s.groups):
        ops += _contextual(a, s, group, i, heads)
    ops += project(["o_proj"], tp, "row")
    return ops


def absorbed_core(
    name: str, a: LatentAttention, group: Group, heads: Num, kv: Format, act: Format, causal: bool = True
) -> Op:
    """Queries of kv_rank + rope_dim elements meet the latent, which serves as keys and, less its rope part, as values.

    One latent per token is read, whatever the heads: 2 (2 r_kv + d_r) FLOPs per head and pair. An fp8 cache is
    multiplied in fp8 where the device can.
    """
    latent = a.kv_rank + a.rope_dim
    core = softmax_attention(
        name, group, heads=heads, kv_heads=1, qk_dim=latent, v_dim=a.kv_rank, kv_elements=latent, kv_width=kv.width,
        act_width=act.width, dtype=str(kv.matrix if kv.matrix == "fp8" else act.matrix),
        window=a.indexer.top_k if a.indexer is not None else None, causal=causal,
    )  # fmt: skip
    return replace(core, kind="latent_attention", shape={**core.shape, "absorbed": 1})


def expanded_core(
    name: str, a: LatentAttention, group: Group, heads: Num, kv: Format, act: Format, causal: bool = True
) -> Op:
    """Every head has keys of nope_dim + rope_dim and values of v_dim: 2 (d_n + d_r + d_v) FLOPs per head and pair."""
    qk = a.nope_dim + a.rope_dim
    core = softmax_attention(
        name, group, heads=heads, kv_heads=heads, qk_dim=qk, v_dim=a.v_dim, kv_elements=heads * (qk + a.v_dim),
        kv_width=kv.width, act_width=act.width, dtype=str(kv.matrix), causal=causal,
    )  # fmt: skip
    return replace(core, kind="latent_attention", shape={**core.shape, "absorbed": 0})


def _contextual(a: LatentAttention, s: Shard, group: Group, i: int, heads: Num) -> list[Op]:
    f = s.formats
    suffix = f"_{i}" if len(s.groups) > 1 else ""
    absorbed = s.absorbed or group.decode or a.indexer is not None
    width = f.stored("latent").width
    ops: list[Op] = []
    if absorbed:
        ops.append(per_head(f"q_absorb{suffix}", s.local(group), heads, a.nope_dim, a.kv_rank, width, f.act))
        core = absorbed_core(f"attention{suffix}", a, group, heads, f.kv, f.act, s.causal)
    else:
        expanded = heads * (a.nope_dim + a.v_dim)
        rebuilt = group.n * (group.c + group.q) / (1 if group.decode else s.par.cp)
        rebuild = gemm(
            f"kv_b_proj{suffix}", rebuilt, expanded, a.kv_rank, weight=f.stored("latent"), act=f.act,
            dtype=f.compute("latent"),
        )  # fmt: skip
        ops += [replace(op, contextual=True) for op in rebuild]
        core = expanded_core(f"attention{suffix}", a, group, heads, f.act, f.act, s.causal)
    # Ranks that rebuild only their own share of keys and values must pass on what they rebuilt.
    passed = a.kv_rank + a.rope_dim if absorbed else heads * (a.nope_dim + a.v_dim) + a.rope_dim
    attended = [core]
    if f.techniques and absorbed:
        site = replace(cache_site(a, s.block, s.hidden, s.layers, s.par, f), new=0 if group.decode else group.q)
        cached = core.shape["kv_len"] if group.decode else core.shape["kv_len"] - group.q
        attended = cached_attention(core, group, edited(f, site, cached), site, suffix)
    ops += context_parallel(attended, s, group, passed, heads * (a.kv_rank + 1), suffix)
    if absorbed:
        ops.append(per_head(f"v_up{suffix}", s.local(group), heads, a.kv_rank, a.v_dim, width, f.act))
    return ops


def per_head(name: str, tokens: Num, heads: Num, k: Num, n: Num, width: Num, act: Format) -> Op:
    """Batched GEMM with one small matrix of `width` bytes an element per head; multiplied in the activation format."""
    return Op(
        name,
        "gemm",
        {str(act.matrix): 2 * tokens * heads * k * n},
        (
            read("weights", heads * k * n, width),
            read("activations", tokens * heads * k, act.width),
            write("activations", tokens * heads * n, act.width),
        ),
        {"m": tokens, "n": n * heads, "k": k},
        reference="arXiv:2405.04434",
    )


def _indexer(x: Indexer, s: Shard, weights: dict[str, Weight]) -> list[Op]:
    """Scores of every cached token by small heads, then a top-k (DeepSeek-V3.2 report, arXiv:2512.02556)."""
    f = s.formats
    stored, dtype = f.stored("latent"), f.compute("latent")
    ops = linear("indexer.q_proj", s.tokens, [weights["indexer.q_proj"]], 1, "column",
                 weight=stored, act=f.act, dtype=dtype)  # fmt: skip
    small = [weights["indexer.k_proj"], weights["indexer.weights_proj"]]
    ops += linear("indexer.k_proj", s.tokens, small, 1, "column", weight=stored, act=f.act, dtype=dtype)
    ops.append(store("indexer.cache", "kv", s.tokens * x.head_dim, f.act.width, 1))
    for i, group in enumerate(s.groups):
        pairs = group.pairs(None, s.causal)
        ops.append(
            Op(
                f"indexer.scores_{i}",
                "attention",
                {"fp8": 2 * x.heads * x.head_dim * pairs, "vector": 3 * x.heads * pairs + 8 * pairs},
                (
                    read("kv", group.visible(None) * x.head_dim, 1),
                    write("activations", pairs, 4),
                    read("activations", pairs, 4),
                ),
                {"n": group.n, "q": group.q, "kv_len": group.c + group.q, "heads": x.heads, "kv_heads": 1,
                 "head_dim": x.head_dim, "v_dim": 0, "pairs": pairs},
                launches=3,
                reference="arXiv:2512.02556",
                contextual=True,
            )
        )  # fmt: skip
    return ops


def latent_cache(
    a: LatentAttention, tokens: Num, sequences: Num, par_tp: Num, width: Num, block: str
) -> list[Residency]:
    """The latent is replicated on every tensor-parallel rank; sparse attention also keeps its indexer keys."""
    stored = [Residency("kv", f"{block}.latent", tokens * (a.kv_rank + a.rope_dim), width)]
    if a.indexer is not None:
        stored.append(Residency("kv", f"{block}.indexer", tokens * a.indexer.head_dim, minimum(width, 1)))
    return stored
