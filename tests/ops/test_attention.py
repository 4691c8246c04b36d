"""Query-key pairs against a double loop, and attention operators against arithmetic written out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.ops.attention import attention
from perfmodel.ops.mla import latent_attention
from perfmodel.ops.shard import Formats, Group, Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Attention, Indexer, LatentAttention

BF16 = Formats(*[get_format("bf16")] * 4)
LLAMA_8B = Attention(heads=32, kv_heads=8, head_dim=128)
# DeepSeek-V3, arXiv:2412.19437, section 4.2.
DEEPSEEK = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)


def counted_pairs(n: int, q: int, c: int, window: int | None) -> int:
    """Pairs (query, key) with the key at or before the query and less than a window away, one by one."""
    pairs = 0
    for query in range(c, c + q):
        for key in range(c + q):
            pairs += key <= query and (window is None or query - key < window)
    return n * pairs


@settings(max_examples=150)
@given(
    n=st.integers(1, 4),
    q=st.integers(1, 24),
    c=st.integers(0, 40),
    window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_causal_pairs_by_brute_force(n: int, q: int, c: int, window: int | None) -> None:
    assert Group(n, q, c).pairs(window, causal=True) == counted_pairs(n, q, c, window)


@settings(max_examples=80)
@given(q=st.integers(1, 24), c=st.integers(0, 40), window=st.one_of(st.none(), st.integers(1, 50)))
def test_visible_keys_by_brute_force(q: int, c: int, window: int | None) -> None:
    """Keys that at least one query sees are read once."""
    seen = {key for query in range(c, c + q) for key in range(query + 1) if window is None or query - key < window}
    assert Group(1, q, c).visible(window) == len(seen)


@settings(max_examples=80)
@given(parts=st.lists(st.integers(1, 200), min_size=1, max_size=6), window=st.one_of(st.none(), st.integers(1, 300)))
def test_chunks_evaluate_the_pairs_of_one_prefill(parts: list[int], window: int | None) -> None:
    done, pairs = 0, 0.0
    for part in parts:
        pairs += Group(1, part, done).pairs(window, causal=True)
        done += part
    assert pairs == Group(1, done, 0).pairs(window, causal=True)


def test_full_rectangle_without_causality() -> None:
    assert Group(2, 3, 4).pairs(None, causal=False) == 2 * 3 * 7


def by_name(ops: list[Op]) -> dict[str, Op]:
    return {op.name: op for op in ops}


def shard(group: Group, hidden: int, **degrees: int) -> Shard:
    return Shard(hidden, (group,), Parallelism(**degrees), BF16)


def test_llama_decode_layer_by_hand() -> None:
    """Llama-3.1-8B, 4 sequences, 1000 keys each with the new one."""
    ops = by_name(attention(LLAMA_8B, shard(Group(4, 1, 999, decode=True), 4096)))
    assert ops["qkv_proj"].flops["bf16"] == 2 * 4 * 4096 * (32 + 2 * 8) * 128
    assert ops["o_proj"].flops["bf16"] == 2 * 4 * 4096 * 32 * 128
    core = ops["attention"]
    assert core.flops["bf16"] == 2 * 2 * 32 * 128 * 4 * 1000  # Q K^T and P V
    assert core.bytes(tensor="kv") == 4 * 1000 * 2 * 8 * 128 * 2  # 1000 keys and values of 8 heads, bf16
    assert ops["rope_and_cache"].bytes(tensor="kv") == 4 * 2 * 8 * 128 * 2  # one new token each


def test_kv_heads_replicate_beyond_their_number() -> None:
    """Eight KV heads on 16 ranks: one each, so twice as many in all as there are."""
    eight = by_name(attention(LLAMA_8B, shard(Group(1, 1, 99, decode=True), 4096, tp=8)))["attention"]
    sixteen = by_name(attention(LLAMA_8B, shard(Group(1, 1, 99, decode=True), 4096, tp=16)))["attention"]
    assert sixteen.bytes(tensor="kv") == eight.bytes(tensor="kv") == 100 * 2 * 128 * 2
    assert sixteen.flops["bf16"] == eight.flops["bf16"] / 2


def test_shared_kv_is_read_but_neither_projected_nor_stored() -> None:
    ops = by_name(attention(LLAMA_8B.model_copy(update={"shares_kv": True}), shard(Group(1, 1, 99, decode=True), 4096)))
    assert ops["qkv_proj"].flops["bf16"] == 2 * 4096 * 32 * 128
    assert "rope_and_cache" not in ops
    assert ops["attention"].bytes(tensor="kv") == 100 * 2 * 8 * 128 * 2


def test_absorbed_latent_attention_by_hand() -> None:
    """DeepSeek-V3 decode, 2 sequences of 1000 keys, per layer (arXiv:2405.04434, appendix C).

    Into latent space 2 * 128 heads * 128 * 512 a token, out of it the same with v_dim = 128; per head and pair
    2 * (512 + 64) for scores and 2 * 512 for values. One latent of 576 is read, whatever the heads.
    """
    ops = by_name(latent_attention(DEEPSEEK, shard(Group(2, 1, 999, decode=True), 7168)))
    assert ops["q_absorb"].flops["bf16"] == 2 * 2 * 128 * 128 * 512
    assert ops["v_up"].flops["bf16"] == 2 * 2 * 128 * 512 * 128
    assert ops["attention"].flops["bf16"] == 2 * 128 * (2 * 512 + 64) * 2 * 1000
    assert ops["attention"].bytes(tensor="kv") == 2 * 1000 * (512 + 64) * 2


def test_expanded_latent_attention_by_hand() -> None:
    """DeepSeek-V3 prefill of 300 tokens on 700 cached: keys and values of all 1000 are rebuilt from the latent.

    Pairs: 300 * 700 + 300 * 301 / 2 = 255,150; per head and pair 2 * (128 + 64) for scores and 2 * 128 for values.
    """
    ops = by_name(latent_attention(DEEPSEEK, shard(Group(1, 300, 700), 7168)))
    assert ops["kv_b_proj"].flops["bf16"] == 2 * 1000 * 512 * 128 * (128 + 128)
    assert ops["attention"].flops["bf16"] == 2 * 128 * (192 + 128) * 255_150
    assert "q_absorb" not in ops


def test_absorbing_pays_for_one_token_and_not_for_a_prompt() -> None:
    def flops(group: Group) -> float:
        return sum(op.flops.get("bf16", 0.0) for op in latent_attention(DEEPSEEK, shard(group, 7168)))

    assert flops(Group(1, 1, 4095, decode=True)) < flops(Group(1, 1, 4095)) / 10
    prompt = Group(1, 4096, 0)
    absorbed = Shard(7168, (Group(1, 4096, 0, decode=True),), Parallelism(), BF16)
    assert flops(prompt) < sum(op.flops.get("bf16", 0.0) for op in latent_attention(DEEPSEEK, absorbed))


def test_latent_is_replicated_and_heads_are_cut() -> None:
    one = by_name(latent_attention(DEEPSEEK, shard(Group(1, 1, 999, decode=True), 7168)))
    eight = by_name(latent_attention(DEEPSEEK, shard(Group(1, 1, 999, decode=True), 7168, tp=8)))
    assert eight["attention"].flops["bf16"] == one["attention"].flops["bf16"] / 8
    assert eight["attention"].bytes(tensor="kv") == one["attention"].bytes(tensor="kv")
    assert eight["q_a_proj+kv_a_proj"].flops == one["q_a_proj+kv_a_proj"].flops


def test_sparse_attention_reads_the_selected_latents_and_all_indexer_keys() -> None:
    """DeepSeek-V3.2: 64 index heads of 128 over all 10,000 keys in FP8, then 2,048 latents (arXiv:2512.02556)."""
    sparse = DEEPSEEK.model_copy(update={"indexer": Indexer(heads=64, head_dim=128, top_k=2048)})
    ops = by_name(latent_attention(sparse, shard(Group(1, 1, 9999, decode=True), 7168)))
    assert ops["attention"].bytes(tensor="kv") == 2048 * 576 * 2
    assert ops["attention"].flops["bf16"] == 2 * 128 * (2 * 512 + 64) * 2048
    assert ops["indexer.scores_0"].flops["fp8"] == 2 * 64 * 128 * 10_000
    assert ops["indexer.scores_0"].bytes(tensor="kv") == 10_000 * 128


@pytest.mark.parametrize("mixer", [LLAMA_8B, DEEPSEEK])
@pytest.mark.parametrize("group", [Group(2, 512, 1024), Group(6, 1, 4095, decode=True)])
def test_context_parallel_ranks_share_the_attention_of_one(mixer: Attention | LatentAttention, group: Group) -> None:
    """Four ranks together evaluate as many pairs as one, and read as much cache in decode (each its share)."""
    build = attention if isinstance(mixer, Attention) else latent_attention
    one, four = (by_name(build(mixer, shard(group, 4096, cp=cp))) for cp in (1, 4))  # type: ignore[operator]
    assert 4 * four["attention"].flops["bf16"] == one["attention"].flops["bf16"]
    assert 4 * four["attention"].shape["pairs"] == one["attention"].shape["pairs"]
    if group.decode:
        assert 4 * four["attention"].bytes(tensor="kv") == one["attention"].bytes(tensor="kv")
    else:
        assert 4 * four["o_proj"].flops["bf16"] == one["o_proj"].flops["bf16"]


def test_ring_passes_what_the_other_ranks_need() -> None:
    """Prefill of 1024 on 4 ranks: each needs the keys and values of the other 768 tokens, 8 heads of 128, bf16."""
    ring = by_name(attention(LLAMA_8B, shard(Group(1, 1024, 0), 4096, cp=4)))["ring_kv"]
    assert ring.bytes("fabric") == 768 * 2 * 8 * 128 * 2


def test_ring_of_expanded_latents_passes_expanded_keys_and_values() -> None:
    """Each rank rebuilds its own quarter (2 * 256 * 512 * 128 * 256 FLOP) and so must pass 128 * 256 + 64 elements a token."""
    ops = by_name(latent_attention(DEEPSEEK, shard(Group(1, 1024, 0), 7168, cp=4)))
    assert ops["kv_b_proj"].flops["bf16"] == 2 * 256 * 512 * 128 * 256
    assert ops["ring_kv"].bytes("fabric") == 768 * (128 * (128 + 128) + 64) * 2
