"""Kernels that Huawei publishes with measured times: github.com/hw-native-sys/pto-isa (CANN Open Software License), READMEs."""

from __future__ import annotations

import pytest

from perfmodel.machine import machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Group
from perfmodel.roofline import op_cost
from perfmodel.spec.formats import get_format

pytestmark = pytest.mark.filterwarnings("ignore")

# kernels/manual/common/flash_atten, 910B2: one head of 128, tokens to microseconds of pto-isa's kernel and of the library's.
FLASH = {1024: (20.960, 58.461), 2048: (32.461, 70.801), 4096: (88.902, 118.302), 8192: (292.626, 353.147),
         16384: (909.058, 1118.462), 32768: (3262.645, 3646.173)}  # fmt: skip


def test_a_large_product_on_one_die() -> None:
    """kernels/gemm_performance: 6144 x 6144 x 6144 in FP16 on 24 cores of an Atlas A3, whose die is a 910B1's, in 1.506 ms."""
    fp16 = get_format("fp16")
    (op,) = gemm("x", 6144, 6144, 6144, weight=fp16, act=fp16, dtype="fp16")
    assert float(op_cost(op, machine("ascend-910b1")).seconds) == pytest.approx(1.506e-3, rel=0.05)


@pytest.mark.parametrize("tokens", FLASH)
def test_flash_attention_is_bound_by_the_exponentials(tokens: int) -> None:
    m = machine("ascend-910b2")
    op = softmax_attention("x", Group(1, tokens, 0), heads=1, kv_heads=1, qk_dim=128, v_dim=128, kv_elements=256, kv_width=2,
                           act_width=2, dtype="fp16", causal=False)  # fmt: skip
    found = 1e6 * float(op_cost(op, m).seconds)
    own, library = FLASH[tokens]
    assert found == pytest.approx(own, rel=0.15)
    assert 1e6 * 4 * 128 * tokens**2 / m.peak("fp16") < own  # 4 x 128 FLOP a pair
    assert found < library
