"""Cache and weight bytes with the arithmetic written out, and what still fits against the forward formula."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import calibration, catalog, memory
from perfmodel.machine import machine
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.spec.formats import get_format

BF16 = Formats(*[get_format("bf16")] * 4)
FP8_KV = Formats(*[get_format("bf16")] * 3, get_format("fp8"))
ONE = Parallelism()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # keys and values x layers x KV heads x head dimension x bytes
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 2),
        ("llama-3.1-70b", 2 * 80 * 8 * 128 * 2),
        ("llama-2-7b", 2 * 32 * 32 * 128 * 2),
        ("mixtral-8x7b", 2 * 32 * 8 * 128 * 2),
        ("gpt-j-6b", 2 * 28 * 16 * 256 * 2),
        ("opt-13b", 2 * 40 * 40 * 128 * 2),
        ("falcon-7b", 2 * 32 * 1 * 64 * 2),
        ("gemma-2-27b", 2 * 46 * 16 * 128 * 2),
        ("gpt-oss-120b", 2 * 36 * 8 * 64 * 2),
        # one latent and one rotary key for all heads x layers x bytes
        ("deepseek-v3", 61 * (512 + 64) * 2),
        # the same and 128 index key elements of one byte
        ("deepseek-v3.2", 61 * ((512 + 64) * 2 + 128)),
        # 12 of 48 layers attend, with 2 KV heads of 256
        ("qwen3-next-80b-a3b", 2 * 12 * 2 * 256 * 2),
        # 4 of 32 layers attend
        ("jamba-v0.1", 2 * 4 * 8 * 128 * 2),
        ("mamba2-2.7b", 0),
    ],
)
def test_cached_bytes_of_a_token_by_hand(name: str, expected: int) -> None:
    assert memory.kv_bytes_per_token(catalog.load_model(name), BF16) == expected


def test_hand_numbers_as_published() -> None:
    """128 KiB, 320 KiB and 68.6 KiB a token; DeepSeek-V3's is 70.272 KB (arXiv:2505.09343, table 1)."""
    found = [
        memory.kv_bytes_per_token(catalog.load_model(n), BF16) for n in ("llama-3.1-8b", "llama-3.1-70b", "deepseek-v3")
    ]
    assert found == [131_072, 327_680, 70_272]


def test_eight_bit_cache_is_half() -> None:
    model = catalog.load_model("llama-3.1-8b")
    assert memory.kv_bytes_per_token(model, FP8_KV) == 65_536


@pytest.mark.parametrize(("tp", "share"), [(1, 1), (4, 1 / 4), (8, 1 / 8), (16, 1 / 8), (64, 1 / 8)])
def test_kv_heads_replicate_beyond_their_number(tp: int, share: float) -> None:
    """Llama-3.1-70B has 8 KV heads: more ranks than that hold copies."""
    model = catalog.load_model("llama-3.1-70b")
    assert memory.cache_bytes(model, Parallelism(tp=tp), BF16, 3, 100) == 3 * 100 * 327_680 * share


def test_latent_is_replicated_over_tensor_ranks_and_divided_over_others() -> None:
    model = catalog.load_model("deepseek-v3")

    def bytes_of(**degrees: int) -> float:
        return float(memory.cache_bytes(model, Parallelism(**degrees), BF16, 8, 1000))

    whole = 8 * 1000 * 70_272
    assert bytes_of() == bytes_of(tp=8) == whole
    assert bytes_of(dp=8) == bytes_of(cp=8) == whole / 8
    assert bytes_of(pp=61) == pytest.approx(whole / 61)


def test_sequences_are_padded_to_the_fullest_data_parallel_rank() -> None:
    model = catalog.load_model("llama-3.1-8b")
    assert memory.cache_bytes(model, Parallelism(dp=4), BF16, 9, 100) == 3 * 100 * 131_072


def test_cache_comes_in_whole_blocks() -> None:
    """100 tokens in blocks of 16 are 7 blocks."""
    assert memory.cache_bytes(catalog.load_model("llama-3.1-8b"), ONE, BF16, 1, 100, block=16) == 112 * 131_072


@pytest.mark.parametrize(
    ("name", "full", "local", "window", "per_layer"),
    [
        ("gemma-2-27b", 23, 23, 4096, 2 * 16 * 128 * 2),
        ("gemma-3-27b", 10, 52, 1024, 2 * 16 * 128 * 2),
        ("gpt-oss-120b", 18, 18, 128, 2 * 8 * 64 * 2),
        ("mistral-7b", 0, 32, 4096, 2 * 8 * 128 * 2),
    ],
)
def test_windowed_layers_keep_their_window(name: str, full: int, local: int, window: int, per_layer: int) -> None:
    """At 20,000 tokens a full layer keeps all, a local one its window; short of the window both keep all."""
    model = catalog.load_model(name)
    assert memory.cache_bytes(model, ONE, BF16, 1, 20_000) == (full * 20_000 + local * window) * per_layer
    assert memory.cache_bytes(model, ONE, BF16, 1, window) == (full + local) * window * per_layer


def test_a_window_may_straddle_one_block_more_than_it_fills() -> None:
    """4096 tokens from anywhere in blocks of 16 touch up to 257 blocks."""
    kept = memory.cache_bytes(catalog.load_model("mistral-7b"), ONE, BF16, 1, 32_000, block=16)
    assert kept == 257 * 16 * 131_072


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # layers x (heads x head dimension x state, FP32, and 3 convolution inputs in bf16)
        ("mamba2-2.7b", 64 * (80 * 64 * 128 * 4 + 3 * (5120 + 2 * 128) * 2)),
        # 36 delta-rule layers of 32 value heads, 128 x 128 states; convolution over q, k (16 heads each) and v
        ("qwen3-next-80b-a3b", 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)),
        # 28 Mamba-1 layers of 8192 channels, state 16
        ("jamba-v0.1", 28 * (8192 * 16 * 4 + 3 * 8192 * 2)),
        ("llama-3.1-8b", 0),
    ],
)
def test_recurrent_state_of_a_sequence_by_hand(name: str, expected: int) -> None:
    assert memory.state_bytes_per_sequence(catalog.load_model(name), BF16) == expected


def test_state_does_not_grow_with_tokens() -> None:
    model = catalog.load_model("mamba2-2.7b")
    assert memory.cache_bytes(model, ONE, BF16, 4, 10) == memory.cache_bytes(model, ONE, BF16, 4, 1_000_000)


def test_weights_of_a_quantised_model_by_hand() -> None:
    """Llama-3.1-8B in FP8 with table and head (128256 * 4096 each) and 65 norms left in bf16."""
    model = catalog.load_model("llama-3.1-8b")
    fp8 = get_format("fp8")
    formats = Formats(fp8, fp8, get_format("bf16"), get_format("bf16"), unquantized=("embedding", "head"))
    kept = 2 * 128_256 * 4096 + 65 * 4096
    assert memory.weight_bytes(model, ONE, formats) == (8_030_261_248 - kept) + 2 * kept


@settings(max_examples=40)
@given(
    name=st.sampled_from(["llama-3.1-8b", "deepseek-v3", "gemma-3-27b", "gpt-oss-120b", "jamba-v0.1", "mistral-7b"]),
    free=st.floats(1e7, 5e11),
    sequences=st.integers(1, 64),
)
def test_longest_context_is_the_last_that_fits(name: str, free: float, sequences: int) -> None:
    model = catalog.load_model(name)
    longest = memory.longest_context(model, ONE, BF16, free, sequences)

    def used(tokens: int) -> float:
        return float(memory.cache_bytes(model, ONE, BF16, sequences, tokens))

    if name == "mistral-7b" and used(4096) <= free:
        assert longest == model.max_positions  # bounded by its windows, so any length fits
        return
    assert longest == 0 or used(longest) <= free * (1 + 1e-12)
    assert used(longest + 1) > free * (1 - 1e-12)


def test_longest_context_inside_a_window() -> None:
    """Mistral-7B, 31 sequences: 131,072 bytes a token up to the window of 4096, so 443 tokens need one byte more than this."""
    assert memory.longest_context(catalog.load_model("mistral-7b"), ONE, BF16, 31 * 443 * 131_072 - 1, 31) == 442


def test_a_state_space_model_has_no_longest_context() -> None:
    model = catalog.load_model("mamba2-2.7b")
    state = memory.state_bytes_per_sequence(model, BF16)
    assert memory.longest_context(model, ONE, BF16, 4.5 * state, 4) == sys.maxsize
    assert memory.longest_context(model, ONE, BF16, 3.5 * state, 4) == 0


def test_resident_parts_add_up_and_decide() -> None:
    """Llama-3.1-8B on an 80 GB H100: 16.09 GB of weights leave room for 400,000 cached tokens and not for 500,000.

    The driver keeps 0.47 GiB of the 81,559 MiB it reports; the rope table is 131,072 positions x 128 x 2 B.
    """
    model, m, engine = catalog.load_model("llama-3.1-8b"), machine("h100-sxm"), calibration.engine("vllm")
    driven = m.with_engine(engine)

    def held(tokens: int) -> memory.Memory:
        return memory.resident(model, ONE, BF16, driven, engine, sequences=100, tokens=tokens // 100)

    small, large = held(400_000), held(500_000)
    assert small.weights == 2 * 8_030_261_248 + 131_072 * 128 * 2
    assert small.kv == 400_000 * 131_072
    assert small.total == small.weights + small.kv + small.activations + small.overhead + small.graphs
    assert small.capacity == pytest.approx(0.9 * (81_559 * 2**20 - 0.47 * 2**30), rel=1e-4)
    assert small.fits
    assert not large.fits


def test_room_for_the_cache_is_what_the_rest_leaves() -> None:
    model, engine = catalog.load_model("llama-3.1-8b"), calibration.engine("vllm")
    m = machine("h100-sxm").with_engine(engine)
    free = memory.kv_capacity(model, ONE, BF16, m, engine)
    tokens = int(free / 131_072 / 256 / 16) * 16
    held = memory.resident(model, ONE, BF16, m, engine, sequences=256, tokens=tokens)
    assert held.fits
    assert not memory.resident(model, ONE, BF16, m, engine, sequences=256, tokens=tokens + 16).fits
