"""Placement and weight techniques together: the order in which they are named does not matter, and physics stays."""

from itertools import combinations

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator

DENSE = [
    "kv-offload:share=0.5,hit=0.2", "in-storage-attention:drives=2", "near-memory:place=both,count=16", "weight-offload:share=0.5",
    "lora-adapters:adapters=10", "weight-quantization:bits=4,fused=false", "activation-sparsity:ffn=0.5,attention=0.5",
    "kv-quantization:bits=4", "kv-eviction:budget=256",
]  # fmt: skip
MIXTURE = [
    "moe-offload:slots=4,cpu=balanced,accuracy=0.5", "expert-placement:imbalance=1.2,redundant=1",
    "expert-adapters:adapters=3", "weight-quantization:bits=4", "lora-adapters:adapters=10", "kv-offload",
]  # fmt: skip
PAIRS = [*(("llama-3.1-8b", "a100-sxm-80gb", 1, p) for p in combinations(DENSE, 2)),
         *(("deepseek-v2-lite", "hgx-a100-8", 2, p) for p in combinations(MIXTURE, 2))]  # fmt: skip


@pytest.mark.parametrize(("model", "device", "ep", "pair"), PAIRS)
def test_any_two_combine_or_say_why(model, device, ep, pair):
    found = []
    for order in (pair, pair[::-1]):
        try:
            e = Estimator(model, device, tp=ep, ep=ep, techniques=order)
        except SpecError as error:
            found.append(str(error))
            continue
        parts = e.parts(8, 1, 2047, is_decode=True)
        assert parts.lower <= parts.seconds * (1 + 1e-9)
        found.append((*np.atleast_1d(e.decode(np.array([1.0, 8.0]), 1024)), e.prefill(1, 512), e.max_batch(1024)))
    if isinstance(found[0], str):
        assert all("cannot be combined" in why for why in found)
    else:
        assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_full_and_half_duplex_links():
    # 64 sequences fetch and 8,192 new tokens leave: the directions of a link have lanes of their own, those of a drive do not.
    e = Estimator("llama-3.1-8b", "a100-sxm-80gb", techniques=["kv-offload"])
    busy = e.parts(64, 128, 4096, is_decode=False).busy
    assert busy["host_link"] > 0
    assert busy["host_link_out"] > 0
    drive = Estimator("llama-3.1-8b", "a100-sxm-80gb", techniques=["kv-offload:tier=drive"])
    assert "drive_out" not in drive.parts(4, 128, 4096, is_decode=False).busy
