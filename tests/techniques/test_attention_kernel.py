"""Attention kernels: score traffic by hand, published ranges, indirection and uneven work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators


def _with(*texts: str, model: str = "llama-3-8b") -> Estimator:
    return Estimator(model, "a100-sxm-80gb", techniques=list(texts))


def _ops(e: Estimator, group: Group, prefix: str = "attention") -> list[Op]:
    return [op for op, _, _ in operators(e.lower(Phase((group,))).schedule) if op.name.startswith(prefix)]


def test_defaults_change_nothing() -> None:
    plain, same = _with(), _with("attention-kernel")
    assert same.decode(8, 4096) == pytest.approx(plain.decode(8, 4096))
    assert same.prefill(1, 4096) == pytest.approx(plain.prefill(1, 4096))
    assert same.memory(8, 4096).total == plain.memory(8, 4096).total


def test_unfused_scores_cross_memory_four_times() -> None:
    scores = _ops(_with("attention-kernel:unfused=true"), Group(2, 1024, 0), "attention_scores")[0]
    # 2 sequences x 32 heads x 1024 x 1024 scores of 2 bytes, S and P each written and read.
    assert scores.bytes() == pytest.approx(4 * 2 * 32 * 1024 * 1024 * 2)


def test_unfused_products_do_not_skip_the_mask() -> None:
    fused = _ops(_with(), Group(1, 1024, 0))[0]
    unfused = _ops(_with("attention-kernel:unfused=true"), Group(1, 1024, 0))[0]
    # Half of the square and half of its diagonal: 1024 x 1025 / 2 pairs.
    assert unfused.flops["bf16"] / fused.flops["bf16"] == pytest.approx(1024**2 / (1024 * 1025 / 2))
    assert unfused.bytes("hbm", "kv") == fused.bytes("hbm", "kv")


def test_published_speedups_of_flashattention() -> None:
    """The first version is 2-4 times as fast as unfused attention, the second 1.7-3.0 times as fast as the first [2307.08691].

    Both within a fifth, from tiles, partial outputs and warps alone; with a mask, which unfused attention does not skip.
    """
    for tokens in (1024, 4096, 16384):
        times = []
        for text in ("attention-kernel:unfused=true", "flashattention-1", "flashattention-2"):
            e = _with(text, model="opt-1.3b")
            group = Group(16384 / tokens, tokens, 0)
            times.append(sum(float(roofline.op_cost(op, e.machine).seconds) for op in _ops(e, group)))
        assert 1.7 / 1.2 < times[1] / times[2] < 3.0
        assert tokens != 4096 or 2 < times[0] / times[1] < 8


def test_warps_that_share_a_tile_add_up_through_shared_memory() -> None:
    kind = "attention-kernel:fast_memory=65536,partial_width=4"
    apart, shared = (_ops(_with(kind + x), Group(1, 1024, 0))[0] for x in ("", ",key_warps=4,shared_rate=1e13"))
    # 16 tiles of 64 keys; with a mask a row meets the mean of 1 and 16 of them, as near as its mean of 512.5 keys says.
    tiles = 15 * 512.5 / 1024 + 1
    assert shared.shape["joined"] == pytest.approx(2 * 4 * 4 * 1024 * 32 * 128 * tiles / 1e13)
    assert shared.bytes() == apart.bytes()
    e = _with()
    assert float(roofline.op_cost(shared, e.machine).seconds) > float(roofline.op_cost(apart, e.machine).seconds)


def test_a_paged_kernel_takes_the_published_part_longer() -> None:
    slow, plain = _with("vllm-paged-kernel"), _with()
    group = Group(64, 1, 8191, decode=True)
    kernels = [_ops(e, group)[0] for e in (slow, plain)]
    found = [roofline.op_cost(op, plain.machine) for op in kernels]
    assert found[0].busy["hbm"] / found[1].busy["hbm"] == pytest.approx(1.23)
    assert 1.15 < found[0].seconds / found[1].seconds < 1.23
    assert found[0].lower == found[1].lower


def test_a_contiguous_kernel_takes_the_published_part_less_and_no_less_than_the_memory() -> None:
    # PagedAttention's kernel takes 1.23 times as long as FasterTransformer's, and the calibrated ones are paged.
    fast, plain, ideal = _with("contiguous-kernel-2022"), _with(), _with("attention-kernel:read_loss=-0.5")
    group = Group(64, 1, 8191, decode=True)
    busy = [roofline.op_cost(_ops(e, group)[0], plain.machine).busy["hbm"] for e in (fast, plain, ideal)]
    assert busy[1] / busy[0] == pytest.approx(1.23, rel=1e-3)
    assert busy[2] == pytest.approx(_ops(plain, group)[0].bytes("hbm", "kv") / plain.machine.bandwidth, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.floats(1, 8), st.floats(0.1, 8))
def test_uneven_work_takes_longer(first: float, more: float) -> None:
    a, b = (_with(f"attention-kernel:imbalance={x}") for x in (first, first + more))
    assert b.decode(32, 8192) > a.decode(32, 8192)


def test_pages_round_the_memory() -> None:
    # 4097 tokens take two pages of 4096: 8192 x 128 KiB.
    assert float(_with("attention-kernel:block=4096").memory(1, 4097).kv) == 8192 * 131072


def test_efficiency_of_a_long_prefill() -> None:
    slow, fast = _with("attention-kernel:efficiency=0.25"), _with("attention-kernel:efficiency=0.5")
    group = Group(1, 32768, 0)
    times = [float(roofline.op_cost(_ops(e, group)[0], e.machine).busy["compute"]) for e in (slow, fast)]
    assert times[0] / times[1] == pytest.approx(2, rel=0.01)


def test_models_without_softmax_attention_are_refused() -> None:
    with pytest.raises(SpecError, match="no softmax attention"):
        Estimator("deepseek-v3", "h200-sxm", tp=8, techniques=["attention-kernel:imbalance=2"])


def test_small_fast_memory_lets_queries_pass_again() -> None:
    op = _ops(_with("attention-kernel:fast_memory=65536"), Group(1, 1024, 0))[0]
    plain = _ops(_with(), Group(1, 1024, 0))[0]
    # Tiles of 65536 / (4 x 128 x 2 bytes) = 64 keys: 16 passes, 15 of them over q, o and o again of 32 heads, half masked.
    assert op.bytes() - plain.bytes() == pytest.approx(15 * 512.5 / 1024 * 1024 * 32 * 3 * 128 * 2)
    wide = _ops(_with("attention-kernel:fast_memory=65536,partial_width=4"), Group(1, 1024, 0))[0]
    assert (wide.bytes() - plain.bytes()) / (op.bytes() - plain.bytes()) == pytest.approx((2 + 4 + 4) / 6)
    large = _ops(_with("attention-kernel:fast_memory=1e9"), Group(1, 1024, 0))[0]
    assert large.bytes() == plain.bytes()


def test_units_load_at_the_kernels_own_rate() -> None:
    """vLLM's rows of A100 in AIConfigurator: 1.34 TB/s in the median; 108 units of 14 GB/s are 1.5 before starts and launch."""
    e, group = _with("vllm-attention-a100"), Group(64, 1, 4095, decode=True)
    op = _ops(e, group)[0]
    assert op.bytes() / float(roofline.op_cost(op, e.machine).seconds) == pytest.approx(1.34e12, rel=0.1)
    assert roofline.op_cost(op, _with().machine).seconds > roofline.op_cost(op, e.machine).seconds


def test_attaching_pages_takes_host_time() -> None:
    plain, mapped = _with(), _with("attention-kernel:mapping=1e-3")
    assert mapped.decode(8, 4096) - plain.decode(8, 4096) == pytest.approx(1e-3 * plain.machine.law["host_slowdown"])


def test_concatenation_writes_and_reads_the_cache_once_more() -> None:
    group = Group(2, 1, 4095, decode=True)
    plain = _ops(_with(), group)[0].bytes("hbm", "kv")
    # 2 sequences x 4096 tokens (with the new one) x 2 x 8 heads x 128 elements x 2 B, written and read beside what is attended.
    assert _ops(_with("attention-kernel:copies=1"), group)[0].bytes("hbm", "kv") - plain == pytest.approx(2 * 2 * 4096 * 4096)


def test_concatenation_leaves_tokens_that_were_rounded_in_groups() -> None:
    group = Group(1, 1, 4095, decode=True)
    narrow = "kv-quantization:bits=4,residual=128"
    more = _ops(_with(narrow, "attention-kernel:copies=1"), group)[0].bytes("hbm", "kv")
    assert more - _ops(_with(narrow), group)[0].bytes("hbm", "kv") == pytest.approx(2 * 128 * 4096)


def test_a_borrowed_cache_is_not_appended_to() -> None:
    group = Group(1, 1, 4095, decode=True)
    e, plain = _with("kv-sharing:group=2", "attention-kernel:copies=1"), _with("kv-sharing:group=2")

    def read(x: Estimator) -> float:
        found = operators(x.lower(Phase((group,))).schedule)
        return float(sum(times * op.bytes("hbm", "kv") for op, times, _ in found if op.name.startswith("attention")))

    # Half of the 32 layers own theirs.
    assert read(e) - read(plain) == pytest.approx(16 * 2 * 4096 * 4096)


def test_repeated_heads_are_copied_once_per_query_head() -> None:
    group = Group(1, 1, 4095, decode=True)
    more = _ops(_with("attention-kernel:repeated=true"), group)[0].bytes("hbm", "kv")
    # Four query heads share a KV head: four copies written and read.
    assert more - _ops(_with(), group)[0].bytes("hbm", "kv") == pytest.approx(4 * 2 * 4096 * 4096)
    alone = _with("attention-kernel:repeated=true", model="llama-2-7b")
    assert alone.decode(4, 2048) == pytest.approx(_with(model="llama-2-7b").decode(4, 2048))


def _seconds(e: Estimator, group: Group) -> float:
    return float(roofline.op_cost(_ops(e, group)[0], e.machine).seconds)


def test_a_copy_streams_however_few_items_the_attention_has() -> None:
    """One short sequence leaves most units of the attention kernel idle, but not those of the kernel that copies before it."""
    group = Group(1, 1, 511, decode=True)
    e = _with("attention-kernel:copies=1")
    m = e.machine
    # 512 tokens of 2 x 8 heads of 128 at 16 bits, read and written.
    by_hand = 2 * 512 * 2 * 8 * 128 * 2 / (m.bandwidth * m.bandwidth_efficiency) + m.kernel_latency
    assert _seconds(e, group) - _seconds(_with(), group) == pytest.approx(by_hand)


def test_concatenating_16_bits_takes_the_time_of_32() -> None:
    """Milliseconds of torch.cat before it loaded 16-bit elements as vectors, pull request 150233: 32 bits, 16 bits."""
    for wide, narrow in ((2.744544, 2.668288), (1.326848, 1.303792), (0.133616, 0.140608)):
        share = (wide / 2) / narrow
        assert share == pytest.approx(0.5, abs=0.03)
    group = Group(8, 1, 8191, decode=True)
    plain, slow = _with("attention-kernel:copies=1"), _with("hf-flash-2024")
    # 8192 tokens of 8 sequences once more, 4096 bytes a token and layer, read and written.
    longer = 2 * 8 * 8192 * 4096 / (plain.machine.bandwidth * plain.machine.bandwidth_efficiency)
    assert _seconds(slow, group) - _seconds(plain, group) == pytest.approx(longer)
    assert _ops(slow, group)[0].bytes("hbm", "kv") == _ops(plain, group)[0].bytes("hbm", "kv")


def test_products_of_a_library_are_not_padded_to_a_tile() -> None:
    """One query row of 32 heads meets 8192 keys in 2 x 2 x 128 FLOPs each: little beside reading them."""
    group = Group(1, 1, 8191, decode=True)
    e = _with("attention-kernel:unfused=true", model="llama-2-7b")
    cost = roofline.op_cost(_ops(e, group)[0], e.machine)
    assert _ops(e, group)[0].flops["fp16"] == pytest.approx(4 * 128 * 32 * 8192)
    assert float(cost.busy["compute"]) < 0.2 * float(cost.busy["hbm"])


def test_only_packed_groups_unpack_once() -> None:
    """QServe's table 1 on an A100: 4 bits unpacked plainly are no faster than 8, though half the bytes; its own kernel is
    1.29 to 1.51 times as fast as 8 bits [2405.04532]."""

    def seconds(bits: int, unpack: float) -> float:
        e = _with("trtllm-attention-0.8", f"kv-quantization:bits={bits},unpack={unpack}", model="llama-2-7b")
        return sum(float(roofline.op_cost(op, e.machine).seconds) for op in _ops(e, Group(64, 1, 1535, decode=True)))

    naive, tricks, eight = seconds(4, 10), seconds(4, 4), seconds(8, 6)
    assert 0.9 < naive / eight < 1.2
    assert 1.2 < eight / tricks < 1.8
    shape = _ops(_with("trtllm-attention-0.8"), Group(64, 1, 1535, decode=True))[0].shape
    assert shape["packs"] == 8
