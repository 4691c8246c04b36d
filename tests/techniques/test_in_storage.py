"""Attention in drives: InstInfer's equation by hand, and the batch that flash allows."""

from functools import lru_cache

import numpy as np
import pytest

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode
from perfmodel.schedule import operators

# OPT-13B: 40 layers x 2 x 5,120 x 2 B = 819,200 B of keys and values per token.
TOKEN = 819_200


@lru_cache(maxsize=32)
def built(text: str = "", *more: str) -> Estimator:
    return Estimator("opt-13b", "rtx-a6000", techniques=[t for t in (text, *more) if t])


def in_drive(e: Estimator, batch: float, context: float) -> float:
    """Seconds of all attentions in the drives."""
    found = (op for op, _, _ in operators(e.lower(decode(batch, context - 1)).schedule) if op.on == "csd")
    return 40 * float(sum(roofline.op_cost(op, e.machine).seconds for op in found))


def test_drives_read_the_cache_at_their_internal_rate():
    # 2,048 tokens x 819,200 B = 1.678 GB; four drives of 11.2 GB/s: 37.4 ms; 40 calls of 100 us more: 41.4 ms.
    # 2 FLOPs an element make 0.839 G x 2 = 1.68 GFLOP over 4 x 50 GFLOP/s = 8.4 ms: not the limit.
    e = built("in-storage-attention:drives=4,flops=50e9")
    assert in_drive(e, 1, 2048) == pytest.approx(2048 * TOKEN / 44.8e9 + 40 * 1e-4, rel=1e-3)
    # A tenth of the FLOP/s and arithmetic binds: (1.68 G + 4 vector and 1 exp per head and pair) / 20 GFLOP/s.
    pairs = 40 * 40 * 2048
    slow = built("in-storage-attention:drives=4,flops=5e9")
    assert in_drive(slow, 1, 2048) == pytest.approx((2048 * TOKEN + 5 * pairs) / 20e9 + 40 * 1e-4, rel=1e-3)


def test_scattered_rows_read_whole_pages():
    # A key of one head is 128 x 2 B = 256 B, a page 4,096 B: 16 rows. An eighth chosen at random touches 1 - (7/8)^16 = 0.882
    # of the pages, 7.05 times what is wanted; in whole pages an eighth is an eighth.
    page = built("in-storage-attention:drives=4,flops=1e12,selected=0.125,aligned=false")
    whole = built("in-storage-attention:drives=4,flops=1e12,selected=0.125")
    ratio = (in_drive(page, 8, 8192) - 40e-4) / (in_drive(whole, 8, 8192) - 40e-4)
    assert ratio == pytest.approx((1 - 0.875**16) / 0.125, rel=1e-6)
    given = built("in-storage-attention:drives=4,flops=1e12,selected=0.125,amplification=3")
    assert (in_drive(given, 8, 8192) - 40e-4) / (in_drive(whole, 8, 8192) - 40e-4) == pytest.approx(3, rel=1e-6)


def test_softmax_may_be_the_limit():
    # 14.2 M exponentials a second: 40 heads x 40 layers x 2,048 pairs = 3.28 M -> 231 ms on one drive.
    e = built("in-storage-attention:exps=14.2e6")
    assert in_drive(e, 1, 2048) == pytest.approx(40 * 40 * 2048 / 14.2e6 + 40e-4, rel=1e-3)


def test_the_batch_limit_is_flash():
    # 2 TB a drive: 4 x 2e12 / (2,048 x 819,200) = 4,768 sequences; beside them a device of 48 GB would hold about ten.
    e = built("in-storage-attention:drives=4")
    assert e.max_batch(2048) == int(4 * 2e12 / (2048 * TOKEN))
    assert built().max_batch(2048) < 20
    assert float(e.memory(64, 2048).kv) == 0


def test_only_queries_outputs_and_new_keys_cross_the_way():
    e = built("in-storage-attention:drives=4")
    ops = [(op, n) for op, n, _ in operators(e.lower(decode(8, 2047)).schedule) if op.kind == "copy"]
    size = {op.name: float(sum(t.bytes for t in op.traffic if t.path.startswith("csd")) * n) for op, n in ops}
    assert size["queries_to_csd"] == pytest.approx(8 * 5120 * 2 * 40)
    assert size["outputs_from_csd"] == pytest.approx(8 * 40 * (128 + 2) * 2 * 40)
    assert size["kv_store_csd_0"] == pytest.approx(8 * TOKEN, rel=1e-6)


def test_more_drives_and_fewer_tokens_are_faster():
    times = [built(f"in-storage-attention:drives={n}").decode(16, 4096) for n in (1, 2, 4, 8)]
    assert np.all(np.diff(times) < 0)
    assert built("in-storage-attention:selected=0.1").decode(16, 4096) < built("in-storage-attention").decode(16, 4096)
    assert built("in-storage-attention", "kv-quantization:bits=4").decode(16, 4096) < times[0]


def test_what_cannot_be():
    with pytest.raises(SpecError, match="no drive that computes"):
        built("in-storage-attention:drive=nvme-gen4")
    with pytest.raises(SpecError, match="cannot be combined"):
        built("in-storage-attention", "kv-offload")
