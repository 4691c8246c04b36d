"""Latent attention against arithmetic by hand on a device of round numbers, and against published rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perfmodel import calibration
from perfmodel.kernels.latent import latent_attention as law
from perfmodel.machine import Machine, machine
from perfmodel.ops.mla import absorbed_core, expanded_core
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.roofline import op_cost
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import LatentAttention
from perfmodel.symbols import Num

pytestmark = pytest.mark.filterwarnings("ignore")
_BF16, _FP8 = get_format("bf16"), get_format("fp8")
_DEEPSEEK = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
# 100 units of 10 TFLOP/s each; 1 us to start a block of 64 rows of 576 + 512 elements.
_ROUND = {
    "attention_item_start": 0.5e-6, "attention_latency": 3e-6, "latent_efficiency": 1.0, "latent_narrow_efficiency": 0.5,
    "latent_small_rows": 64.0, "latent_portable": 0.0, "latent_portable_rows": 16.0, "latent_portable_splits": 4.0,
    "portable_efficiency": 0.5, "attention_tile": 128.0, "cache_ratio": 2.0, "cache_share": 1.0,
}  # fmt: skip


def device(**law_values: float) -> Machine:
    m = machine("h100-sxm")
    return replace(
        m, units=100.0, matrix={"bf16": 1e15, "fp8": 2e15}, attention_efficiency=1.0, matrix_efficiency=1.0, bandwidth=1e12, cache=1e9,
        bandwidth_efficiency=1.0, memory_latency=0.0, law=m.law | _ROUND | law_values,
    )  # fmt: skip


def decode(sequences: Num, context: Num, heads: Num, kv: str = "bf16", new: int = 1) -> Op:
    group = Group(sequences, new, context - new, decode=True)
    return absorbed_core("attention", _DEEPSEEK, group, heads, get_format(kv), _BF16)


def prefill(sequences: Num, tokens: Num, heads: Num) -> Op:
    return expanded_core("attention", _DEEPSEEK, Group(sequences, tokens, 0), heads, _BF16, _BF16)


def test_heads_share_tiles_of_64_rows_and_waves_of_units() -> None:
    # A tile of 64 rows over 6400 latents: 64 * 6400 * 2 (576 + 512) = 891.3 MFLOP, 89.13 us at 10 TFLOP/s. 100 sequences
    # fill 100 units once, whether 1 or 64 heads share the tile; 65 heads need two tiles, 101 sequences two waves.
    def compute(sequences: int, heads: int) -> float:
        return float(law(decode(sequences, 6400, heads), device()).compute)

    assert compute(100, 1) == pytest.approx(89.13e-6, rel=1e-3)
    assert compute(100, 64) == pytest.approx(89.13e-6, rel=1e-3)
    assert compute(100, 65) == pytest.approx(178.26e-6, rel=1e-3)
    assert compute(101, 64) == pytest.approx(178.26e-6, rel=1e-3)


def test_one_sequence_is_split_over_all_units() -> None:
    # 6400 latents are 100 blocks of 64: 0.891 us each. Partial outputs: 64 heads * 100 splits * 512 * 4 B, written and
    # read: 26.2 MB at 2 TB/s = 13.1 us, beside queries and outputs of 139 kB (0.07 us).
    demands = law(decode(1, 6400, 64), device())
    assert float(demands.compute) == pytest.approx(0.891e-6, rel=1e-3)
    assert float(demands.cache) == pytest.approx(13.18e-6, rel=1e-3)
    # A single block cannot be split: 64 rows * 64 latents on one unit, even if only one latent is there.
    assert float(law(decode(1, 64, 64), device()).compute) == pytest.approx(0.891e-6, rel=1e-3)
    assert float(law(decode(1, 1, 1), device()).compute) == pytest.approx(0.891e-6, rel=1e-3)


def test_portable_kernels_split_little_and_charge_full_tiles() -> None:
    # 64 heads in tiles of 16 rows: 4 tiles * 4 splits on 16 of 100 units, each 64 charged rows * 1600 latents =
    # 222.8 MFLOP, 22.28 us, doubled by the efficiency of one half. The 6400 * 576 * 2 B come from memory once, 7.37 us,
    # and three times more from the cache, at twice the rate, with 26.2 MB / 25 of partial outputs and 0.14 MB of others.
    portable = law(decode(1, 6400, 64), device(latent_portable=1.0))
    assert float(portable.compute) == pytest.approx(44.56e-6, rel=1e-3)
    assert float(portable.memory) == pytest.approx(7.37e-6, rel=1e-3)
    assert float(portable.cache) == pytest.approx((3 * 7.37e6 + 1.05e6 + 0.14e6) / 2e12, rel=1e-3)
    # One tile of 64 rows and no split: one unit does it all, 89.13 us doubled, and needs no reduction after it.
    whole = law(decode(1, 6400, 64), device(latent_portable=1.0, latent_portable_rows=64.0, latent_portable_splits=1.0))
    assert float(whole.compute) == pytest.approx(178.26e-6, rel=1e-3)
    assert float(whole.latency) == pytest.approx(1e-6)


def test_starts_follow_the_tiles() -> None:
    # 3 us once, and 1 us for each of the tiles a unit works on: 1 of 64 rows up to 100 sequences, 10 for 1000 of them.
    assert float(law(decode(100, 64, 16), device()).latency) == pytest.approx(4e-6)
    assert float(law(decode(1000, 64, 16), device()).latency) == pytest.approx(13e-6)
    # With small tiles of 16 rows 32 heads are two tiles, 64 heads one: the same ten starts against five of the others.
    small = device(latent_small_rows=16.0)
    heads = np.array([16.0, 32.0, 64.0])
    assert np.asarray(law(decode(500, 64, heads), small).latency) == pytest.approx([8e-6, 13e-6, 8e-6])
    # Expanded: 128 rows of 192 + 128 elements are 0.588 of an absorbed block; 1000 sequences * 10 heads = 100 a unit.
    assert float(law(prefill(1000, 128, 10), device()).latency) == pytest.approx(3e-6 + 58.8e-6, rel=1e-3)


def test_the_longest_prefill_tile_binds_where_units_idle() -> None:
    # One head of 1280 tokens: 10 tiles; the last one is 128 rows * 1280 keys * 2 * 320 = 104.9 MFLOP: 10.49 us.
    assert float(law(prefill(1, 1280, 1), device()).compute) == pytest.approx(10.49e-6, rel=2e-3)
    # A thousand heads: an even share, 1000 * 1280 * 1281 / 2 * 640 FLOP at 1000 TFLOP/s = 524.7 us.
    assert float(law(prefill(1, 1280, 1000), device()).compute) == pytest.approx(524.7e-6, rel=1e-3)


def test_fp8_multiplies_faster_only_where_the_device_can() -> None:
    wide, narrow = decode(100, 6400, 64), decode(100, 6400, 64, "fp8")
    # 2000 TFLOP/s at half the efficiency.
    assert float(law(narrow, device()).compute) == pytest.approx(float(law(wide, device()).compute))
    without = replace(device(), matrix={"bf16": 1e15})
    assert float(law(narrow, without).compute) == pytest.approx(float(law(wide, without).compute))
    assert float(law(narrow, device()).memory) == pytest.approx(float(law(wide, device()).memory) / 2)


def test_scalars_columns_and_rows_agree() -> None:
    m = machine("b200-sxm")
    contexts, heads = np.array([1.0, 700.0, 65536.0]), np.array([128.0, 32.0, 1.0])
    shaken = m.perturbed(column=True)
    table = np.asarray(op_cost(decode(8, contexts, heads), shaken).seconds)
    assert table.shape == (len(m.sigma) + 1, 3)
    single = [float(op_cost(decode(8, c, h), m).seconds) for c, h in zip(contexts, heads, strict=True)]
    assert table[0] == pytest.approx(single)
    assert np.all(np.isfinite(table))


def test_published_rates_of_flashmla() -> None:
    # "up to 3000 GB/s in memory-bound and 660 TFLOPS in compute-bound configuration on H800 SXM5" (FlashMLA's README).
    m = machine("h800-sxm")
    few, many = decode(128, 32768, 16), decode(128, 32768, 128)
    assert few.bytes() / float(op_cost(few, m).seconds) == pytest.approx(3000e9, rel=0.2)
    assert many.flops["bf16"] / float(op_cost(many, m).seconds) == pytest.approx(660e12, rel=0.25)


def test_sequences_without_splits_take_one_time_until_the_units_are_full() -> None:
    # TensorRT-LLM 1.0 on A100, 131072 latents: 15517 us for 1 sequence (32 heads), 15993 us for 4 (16 heads); 256 such
    # sequences of 65536 tokens with 128 heads 53388 us, 512 tiles on 108 units (AIConfigurator, Apache-2.0).
    m = machine("a100-sxm-80gb").with_engine(calibration.engine("trtllm"))
    one, four, many = (
        float(op_cost(decode(n, c, h), m).seconds) for n, c, h in ((1, 131072, 32), (4, 131072, 16), (256, 65536, 128))
    )
    assert four == pytest.approx(one, rel=0.02)
    assert one == pytest.approx(15517e-6, rel=0.25)
    assert many == pytest.approx(53388e-6, rel=0.3)
