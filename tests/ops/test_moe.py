"""Experts reached and ranks visited, against enumeration and simulation; mixture layers by hand."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.ops.moe import distinct_ranks, moe_ffn, slowest, touched
from perfmodel.ops.shard import Formats, Group, Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.parameters import ffn_weights
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Moe

BF16 = Formats(*[get_format("bf16")] * 4)
MIXTRAL = Moe(experts=8, top_k=2, inter=14336)
DEEPSEEK = Moe(experts=256, top_k=8, inter=2048, shared_inter=2048, groups=8, top_groups=4)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 1, 3), (4, 2, 2), (5, 2, 3), (6, 3, 2)])
def test_touched_by_enumeration(experts: int, top_k: int, tokens: int) -> None:
    """Mean size of the union over every way the tokens can choose."""
    choices = [set(c) for c in combinations(range(experts), top_k)]
    unions = [set[int]()]
    for _ in range(tokens):
        unions = [u | c for u in unions for c in choices]
    assert touched(experts, top_k, tokens) == pytest.approx(np.mean([len(u) for u in unions]), rel=1e-12)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 4), (128, 8, 10), (256, 8, 64)])
def test_touched_by_simulation(experts: int, top_k: int, tokens: int) -> None:
    rng = np.random.default_rng(7)
    draws = 400
    chosen = np.argsort(rng.random((draws, tokens, experts)), axis=2)[:, :, :top_k].reshape(draws, -1)
    sizes = np.array([len(np.unique(row)) for row in chosen])
    error = sizes.std() / np.sqrt(draws)
    assert abs(touched(experts, top_k, tokens) - sizes.mean()) < 4 * error


def test_touched_ends() -> None:
    assert touched(8, 2, 1) == pytest.approx(2)
    assert touched(8, 8, 1) == 8
    assert touched(256, 8, 1e6) == pytest.approx(256)


def enumerated_ranks(m: Moe, ranks: int) -> float:
    """Mean number of ranks over every choice of `top_k` experts within every choice of `top_groups` groups."""
    per_rank, per_group = m.experts // ranks, m.experts // m.groups
    visits = []
    for groups in combinations(range(m.groups), m.top_groups):
        eligible = [e for g in groups for e in range(g * per_group, (g + 1) * per_group)]
        visits += [len({e // per_rank for e in chosen}) for chosen in combinations(eligible, m.top_k)]
    return float(np.mean(visits))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "moe",
    [
        Moe(experts=8, top_k=2, inter=1),
        Moe(experts=8, top_k=3, inter=1),
        Moe(experts=16, top_k=4, inter=1),
        Moe(experts=16, top_k=4, inter=1, groups=4, top_groups=2),
        Moe(experts=16, top_k=3, inter=1, groups=8, top_groups=3),
        Moe(experts=8, top_k=2, inter=1, groups=2, top_groups=1),
        Moe(experts=8, top_k=2, inter=1, groups=4, top_groups=4),
    ],
    ids=lambda m: f"{m.experts}of{m.top_k}-groups{m.groups}of{m.top_groups}",
)
def test_distinct_ranks_by_enumeration(moe: Moe, ranks: int) -> None:
    assert distinct_ranks(moe, ranks) == pytest.approx(enumerated_ranks(moe, ranks), rel=1e-12)


def test_group_limited_routing_bounds_the_nodes_a_token_visits() -> None:
    """DeepSeek-V3 sends a token to at most 4 of 8 nodes (arXiv:2412.19437, section 2.1.2).

    Of 128 eligible experts in 4 groups, 8 are chosen: a group is missed with probability C(96, 8) / C(128, 8).
    """
    assert distinct_ranks(DEEPSEEK, 8) == pytest.approx(4 * (1 - comb(96, 8) / comb(128, 8)))
    unlimited = DEEPSEEK.model_copy(update={"top_groups": 8})
    assert distinct_ranks(unlimited, 8) == pytest.approx(8 * (1 - comb(224, 8) / comb(256, 8)))


@settings(max_examples=60)
@given(ranks=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]))
def test_visited_ranks_never_exceed_ranks_or_choices(ranks: int) -> None:
    assert 1 - 1e-12 <= distinct_ranks(DEEPSEEK, ranks) <= min(ranks, DEEPSEEK.top_k) + 1e-12


def test_busiest_rank_against_simulation() -> None:
    """Leading-order formula: within 8 % of the mean largest load of 8 ranks at 512 pairs each."""
    rng = np.random.default_rng(3)
    loads = rng.multinomial(8 * 512, [1 / 8] * 8, size=2000).max(axis=1).mean()
    assert slowest(512.0, 8) == pytest.approx(loads, rel=0.08)
    assert slowest(512.0, 1) == 512


def by_name(ops: list[Op]) -> dict[str, Op]:
    return {op.name: op for op in ops}


def layer(moe: Moe, hidden: int, tokens: int, **degrees: int) -> dict[str, Op]:
    return by_name(moe_ffn(moe, Shard(hidden, (Group(tokens, 1, 10, decode=True),), Parallelism(**degrees), BF16)))


def test_mixtral_layer_by_hand() -> None:
    """Mixtral 8x7B, 4 tokens: 8 pairs on 8 (1 - 0.75^4) = 5.46875 experts."""
    ops = layer(MIXTRAL, 4096, 4)
    assert ops["router"].flops["bf16"] == 2 * 4 * 4096 * 8
    assert ops["experts.gate_up_proj"].flops["bf16"] == 2 * 8 * 4096 * 2 * 14336
    assert ops["experts.down_proj"].flops["bf16"] == 2 * 8 * 4096 * 14336
    read = sum(op.bytes(tensor="experts") for op in ops.values())
    assert read == pytest.approx(5.46875 * 3 * 4096 * 14336 * 2)


def test_shared_expert_gate_is_multiplied() -> None:
    """Qwen2-MoE: one more row beside the router's, so every stored matrix of the layer is used."""
    gated = Moe(experts=60, top_k=4, inter=1408, shared_inter=5632, shared_gate=True)
    ops = layer(gated, 2048, 7)
    assert ops["router+shared_gate"].flops["bf16"] == 2 * 7 * 2048 * 61
    stored = sum(w.elements for w in ffn_weights(gated, 2048) if w.matrix and w.part != "experts")
    assert sum(op.bytes(tensor="weights") for op in ops.values()) == stored * 2


def test_dense_branch_beside_the_experts() -> None:
    """Arctic: a dense feed-forward in the same layer (2 * 3 * tokens * hidden * inter)."""
    arctic = Moe(experts=128, top_k=2, inter=4864, dense_inter=4864)
    ops = layer(arctic, 7168, 5)
    dense = ops["dense.gate_up_proj"].flops["bf16"] + ops["dense.down_proj"].flops["bf16"]
    assert dense == 2 * 3 * 5 * 7168 * 4864


@pytest.mark.parametrize(("degrees", "devices"), [({"tp": 4}, 4), ({"dp": 4}, 4), ({"tp": 2, "dp": 2}, 4)])
def test_expert_flops_divide_over_tensor_and_data_ranks(degrees: dict[str, int], devices: int) -> None:
    """Without expert parallelism every expert is cut over all devices, and the work of all tokens with it."""
    one = layer(MIXTRAL, 4096, 64)
    many = layer(MIXTRAL, 4096, 64 // degrees.get("dp", 1), **degrees)
    assert many["experts.down_proj"].flops["bf16"] * devices == pytest.approx(one["experts.down_proj"].flops["bf16"])


def test_expert_parallel_device_holds_its_share_of_the_touched_experts() -> None:
    """ep = 8 over 8 data-parallel ranks of 64 tokens: 256/8 experts each, whole; 512 * 8 / 8 pairs and the excess of the busiest."""
    ops = layer(DEEPSEEK, 7168, 64, dp=8, ep=8)
    expected = touched(256, 8, 512) / 8
    assert ops["experts.down_proj"].bytes(tensor="experts") == pytest.approx(expected * 7168 * 2048 * 2)
    assert ops["experts.down_proj"].flops["bf16"] == pytest.approx(2 * slowest(512.0, 8) * 7168 * 2048)


def test_dispatch_sends_a_token_once_to_each_other_rank() -> None:
    """64 tokens of 7168 bf16 to the distinct ranks visited, one in eight of which is the sender's own."""
    ops = layer(DEEPSEEK, 7168, 64, dp=8, ep=8)
    expected = 64 * 7168 * 2 * distinct_ranks(DEEPSEEK, 8) * 7 / 8
    assert ops["dispatch"].bytes("fabric") == pytest.approx(expected)
    assert ops["combine"].bytes("fabric") == pytest.approx(expected)


def test_without_expert_parallelism_all_tokens_are_gathered() -> None:
    """dp = 4, ep = 1: an all-gather of 4 * 16 tokens, of which each rank sends 3/4."""
    ops = layer(MIXTRAL, 4096, 16, dp=4)
    assert ops["dispatch"].shape["all_gather"] == 64 * 4096 * 2
    assert ops["dispatch"].bytes("fabric") == 64 * 4096 * 2 * 3 / 4
    assert ops["combine"].shape["reduce_scatter"] == 64 * 4096 * 2


def test_tensor_parallel_experts_exchange_nothing() -> None:
    """All ranks already hold all tokens; the layer's all-reduce adds up the outputs."""
    assert not {"dispatch", "combine"} & set(layer(DEEPSEEK, 7168, 64, tp=8, ep=8))
