"""Feed-forward layers: dense, and mixtures of experts with tensor or expert parallelism."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from perfmodel.ops.collective import collective
from perfmodel.ops.elementwise import activation
from perfmodel.ops.gemm import linear
from perfmodel.ops.shard import Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.parameters import ffn_weights
from perfmodel.spec.formats import Format
from perfmodel.spec.model import Mlp, Moe
from perfmodel.symbols import Num, is_one, log, maximum, minimum, symbol, symbolic


def dense_ffn(inter: Num, gated: bool, s: Shard, *, part: str = "dense_ffn", prefix: str = "") -> list[Op]:
    """Up (and gate), activation, down; cut over tp: columns, then rows."""
    f, tp = s.formats, s.par.tp
    stored, dtype = f.stored(part), f.compute(part)
    weights = ffn_weights(Mlp.model_construct(kind="mlp", inter=inter, gated=gated, bias=False), s.hidden)
    inward, down = weights[:-1], weights[-1:]
    name = "gate_up_proj" if gated else "up_proj"
    return [
        *linear(prefix + name, s.tokens, inward, tp, "column", weight=stored, act=f.act, dtype=dtype),
        activation(f"{prefix}activation", s.tokens, inter / tp, f.act.width, gated=gated),
        *linear(f"{prefix}down_proj", s.tokens, down, tp, "row", weight=stored, act=f.act, dtype=dtype),
    ]


def touched(experts: Num, top_k: Num, tokens: Num) -> Num:
    """Expected number of distinct experts that `tokens` tokens reach under even routing.

    Each token picks top_k of E without repeats, so one expert is missed by a token with probability
    1 - k/E: E (1 - (1 - k/E)^T).  E = 8, k = 2, T = 4: 8 (1 - 0.75^4) = 5.46875.
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def distinct_ranks(moe: Moe, ranks: float) -> float:
    """Expected number of distinct expert-parallel ranks (or nodes) one token visits, group-limited or not.

    A rank with r of the E eligible experts is missed with probability C(E - r, k)/C(E, k). With group-limited
    routing only the experts of `top_groups` groups are eligible; a rank holds part of a group or several.
    E = 8, k = 2, 4 ranks: 4 (1 - C(6,2)/C(8,2)) = 4 (1 - 15/28) = 1.857.
    """

    def missed(eligible: float, held: float) -> float:
        odds = 1.0
        for i in range(moe.top_k):
            odds *= max(eligible - held - i, 0.0) / (eligible - i)
        return odds

    per_rank = moe.experts / ranks
    if moe.groups == 1 or moe.top_groups == moe.groups:
        return ranks * (1 - missed(moe.experts, per_rank))
    group_size = moe.experts / moe.groups
    eligible = moe.top_groups * group_size
    if per_rank <= group_size:
        return ranks * (moe.top_groups / moe.groups) * (1 - missed(eligible, per_rank))
    groups_held = round(per_rank / group_size)
    hit = 0.0
    for j in range(1, min(groups_held, moe.top_groups) + 1):
        others = moe.groups - groups_held
        if moe.top_groups - j > others:
            continue
        ways = math.comb(groups_held, j) * math.comb(others, moe.top_groups - j) / math.comb(moe.groups, moe.top_groups)
        hit += ways * (1 - missed(eligible, j * group_size))
    return ranks * hit


def slowest(mean: Num, ranks: Num) -> Num:
    """Expected tokens on the busiest of `ranks` under even random routing: mean + sqrt(2 mean ln(ranks)).

    The leading term of the largest of `ranks` Poisson counts; equals the mean for one rank.
    """
    return mean + (2 * mean * log(maximum(ranks, 1))) ** 0.5


def moe_ffn(m: Moe, s: Shard) -> list[Op]:
    """Router, dispatch, the experts that were touched, combine, shared experts.

    Experts are divided over ep ranks and each is cut over moe_tp = tp dp cp / ep devices. Tokens of all
    data- and context-parallel ranks meet in the experts; dispatch and combine move them when dp * cp > 1.
    """
    f, par = s.formats, s.par
    ranks = par.ep
    spread = par.dp * par.cp
    tokens = s.tokens * spread
    weights = {w.name: w for w in ffn_weights(m, s.hidden)}
    # The gate of the shared experts is one more row beside the router's.
    scores = [weights[name] for name in ("router", "shared_gate") if name in weights]
    ops = linear("+".join(w.name for w in scores), s.tokens, scores, 1, "column",
                 weight=f.stored("router"), act=f.act, dtype=f.compute("router"))  # fmt: skip
    if not is_one(spread):
        ops.append(_exchange("dispatch", m, s, f.expert.width if f.quantise else f.act.width))
    routed = slowest(tokens * m.top_k / ranks, ranks)
    dtype = f.compute("experts")
    ops += routed_experts(
        Routed(routed, touched(m.experts, m.top_k, tokens) / ranks, minimum(tokens, routed), experts=m.experts / ranks),
        s.hidden, m.inter / par.moe_tp, gated=m.gated, weight=f.expert, act=f.act, dtype=dtype,
        narrow=f.expert.width if dtype != f.act.matrix else None,
    )  # fmt: skip
    if not is_one(spread):
        ops.append(_exchange("combine", m, s, f.act.width))
    if m.shared_inter:
        ops += dense_ffn(m.shared_inter, m.gated, s, part="shared", prefix="shared.")
    if m.dense_inter:
        ops += dense_ffn(m.dense_inter, m.gated, s, prefix="dense.")
    return ops


class Routed(NamedTuple):
    """What routing gives one device: `pairs` of a token and an expert it holds, on `active` of its experts."""

    pairs: Num
    active: Num
    tokens: Num
    """Tokens that enter the layer on this device."""
    slots: Num | None = None
    """Rows of the intermediate results: `pairs`, or more where kernels keep a row for choices of other devices."""
    even: Num = 0
    """1: every active expert has exactly as many tokens as any other."""
    experts: Num | None = None
    """Experts this device holds, for text as served, where some are more popular (see kernels/grouped.py)."""


def routed_experts(
    r: Routed, hidden: Num, inter: Num, *, gated: bool, weight: Format, act: Format, dtype: str,
    narrow: Num | None = None, portable: bool | None = None,
) -> list[Op]:  # fmt: skip
    """The passes of a fused layer of experts, and its two grouped products.

    Passes: top-k and sort, the casts (where activations are multiplied `narrow` bytes wide), the activation function,
    and the weighted sum of each token's rows. Products: gate and up, then down, a row per pair. inter: of one expert on
    this device. portable: the kernels measured (see kernels/grouped.py); None: the device's default. FLOPs 2 pairs n k
    each; block-sparse products of Gale et al., arXiv:2211.15841.
    """
    pairs, tokens = r.pairs, r.tokens
    slots = pairs if r.slots is None else r.slots
    active = maximum(r.active, 1)
    parts = 2 if gated else 1
    width = act.width if narrow is None else narrow
    # Weight-only formats need kernels that expand them.
    kernels: dict[str, Num] = {"expands": narrow is None and weight.width < act.width}
    if portable is not None:
        kernels["portable"] = portable
    if r.experts is not None:
        kernels["experts"] = r.experts

    def product(name: str, n: Num, k: Num) -> Op:
        return Op(
            name,
            "grouped_gemm",
            {dtype: 2 * pairs * n * k},
            (
                read("experts", r.active * n * k, weight.width),
                read("activations", pairs * k, width),
                write("activations", slots * n, act.width),
            ),
            {"m": pairs / active, "n": n, "k": k, "groups": active, "even": r.even, **kernels},
            reference="arXiv:2211.15841",
        )

    inner = slots * inter
    passes = [
        read("activations", parts * inner, act.width),
        write("activations", inner, act.width),
        read("activations", slots * hidden, act.width),
        write("activations", tokens * hidden, act.width),
    ]
    if narrow is not None:
        cast = tokens * hidden + pairs * inter
        passes += [read("activations", cast, act.width), write("activations", cast, width)]
    name = "experts.gate_up_proj" if gated else "experts.up_proj"
    return [
        Op(
            "experts.passes",
            "expert_passes",
            {"vector": (4 if gated else 3) * inner + 2 * slots * hidden, "exp": inner},
            tuple(passes),
            {"elements": tokens * hidden, **kernels},
            launches=2,
            reference="arXiv:2211.15841",
        ),
        product(name, parts * inter, hidden),
        product("experts.down_proj", hidden, inter),
    ]


def _exchange(name: str, m: Moe, s: Shard, width: Num) -> Op:
    """All-to-all of token activations to (or from) the distinct ranks a token visits (DeepEP; arXiv:2412.19437, 3.2).

    With ep = 1 every device of the group needs every token: an all-gather (and a reduce-scatter back).
    """
    par = s.par
    if is_one(par.ep):
        kind = "all_gather" if name == "dispatch" else "reduce_scatter"
        message = s.tokens * par.dp * par.cp * s.hidden
        return collective(name, kind, message, width, par.dp * par.cp, stride=par.tp)  # type: ignore[arg-type]
    visited = symbol("R") if symbolic(par.ep) else np.vectorize(partial(distinct_ranks, m), otypes=[float])(par.ep)
    away = visited * (1 - 1 / par.ep)
    # Each tensor-parallel rank sends its share of the tokens it holds copies of.
    sent = s.tokens * s.hidden * away / par.tp
    message = s.tokens * s.hidden * visited / par.tp
    op = collective(name, "all_to_all", message, width, par.ep, sent=sent, stride=par.moe_tp)
    return replace(op, shape={**op.shape, "held": s.tokens * s.hidden * width / par.tp}, routing=m)
