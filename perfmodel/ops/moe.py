"""Feed-forward layers: dense, and mixtures of experts with tensor or expert parallelism."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from perfmodel.ops.collective import collective
from perfmodel.ops.elementwise import activation, pointwise
from perfmodel.ops.gemm import linear, quantise
from perfmodel.ops.shard import Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.parameters import ffn_weights
from perfmodel.spec.model import Mlp, Moe
from perfmodel.symbols import Num, is_one, log, maximum, symbol, symbolic


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
    """Router, dispatch, experts as grouped GEMMs over the experts that were touched, combine, shared experts.

    Experts are divided over ep ranks and each is cut over moe_tp = tp dp cp / ep devices. Tokens of all
    data- and context-parallel ranks meet in the experts; dispatch and combine move them when dp * cp > 1.
    """
    f, par = s.formats, s.par
    ranks = par.ep
    spread = par.dp * par.cp
    tokens = s.tokens * spread
    per_token = s.tokens * m.experts
    weights = {w.name: w for w in ffn_weights(m, s.hidden)}
    # The gate of the shared experts is one more row beside the router's.
    scores = [weights[name] for name in ("router", "shared_gate") if name in weights]
    ops = linear("+".join(w.name for w in scores), s.tokens, scores, 1, "column",
                 weight=f.stored("router"), act=f.act, dtype=f.compute("router"))  # fmt: skip
    ops.append(pointwise("top_k", per_token, 4, writes=0.1, flops=4, exp=1))
    if not is_one(spread):
        ops.append(_exchange("dispatch", m, s, f.expert.width if f.quantise else f.act.width))
    routed = slowest(tokens * m.top_k / ranks, ranks)
    active = touched(m.experts, m.top_k, tokens) / ranks
    ops += _experts(m, s, routed, active)
    ops.append(pointwise("combine_topk", routed * s.hidden, f.act.width, writes=1 / m.top_k, flops=2))
    if not is_one(spread):
        ops.append(_exchange("combine", m, s, f.act.width))
    if m.shared_inter:
        ops += dense_ffn(m.shared_inter, m.gated, s, part="shared", prefix="shared.")
    if m.dense_inter:
        ops += dense_ffn(m.dense_inter, m.gated, s, prefix="dense.")
    return ops


def _experts(m: Moe, s: Shard, routed: Num, active: Num) -> list[Op]:
    """Grouped GEMMs: `routed` token-expert pairs over `active` touched experts on this device."""
    f, cut = s.formats, s.par.moe_tp
    stored, dtype = f.expert, f.compute("experts")
    inner = m.inter / cut
    columns = (2 if m.gated else 1) * inner
    ops: list[Op] = []
    narrow = dtype != f.act.matrix
    width = stored.width if narrow else f.act.width
    if narrow:
        ops.append(quantise("experts.quantise", routed * s.hidden, f.act, width))

    def grouped(name: str, n: Num, k: Num) -> Op:
        flops: dict[str, Num] = {dtype: 2 * routed * n * k}
        if not narrow and stored.width < f.act.width:
            flops["vector"] = 2 * active * n * k
        return Op(
            name,
            "grouped_gemm",
            flops,
            (
                read("experts", active * n * k, stored.width),
                read("activations", routed * k, width),
                write("activations", routed * n, f.act.width),
            ),
            {"m": routed / maximum(active, 1), "n": n, "k": k, "groups": maximum(active, 1)},
            reference="arXiv:2211.15841",
        )

    name = "experts.gate_up_proj" if m.gated else "experts.up_proj"
    ops.append(grouped(name, columns, s.hidden))
    ops.append(activation("experts.activation", routed, inner, f.act.width, gated=m.gated))
    if narrow:
        ops.append(quantise("experts.quantise_down", routed * inner, f.act, width))
    ops.append(grouped("experts.down_proj", s.hidden, inner))
    return ops


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
