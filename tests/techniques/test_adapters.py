"""Adapters: bytes, FLOPs and room of low-rank and expert adapters by hand."""

from functools import lru_cache

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode
from perfmodel.schedule import operators


@lru_cache(maxsize=32)
def built(*techniques: str, model: str = "llama-2-7b", device: str = "a100-sxm-80gb") -> Estimator:
    return Estimator(model, device, techniques=techniques)


def adapters(e: Estimator, batch: float, what) -> float:
    found = ((op, n) for op, n, _ in operators(e.lower(decode(batch, 255)).schedule) if ".lora_" in op.name)
    return sum(float(what(op)) * n for op, n in found)


def test_one_adapter_by_hand():
    # Llama-2-7B, rank 16 on q, k, v (one fused product of 12,288 outputs) and o: 16 x (4,096 + 12,288 + 8,192) elements
    # a layer are read in 16 bits, 32 layers: 25.2 MB; 2 FLOPs an element and token.
    e = built("lora-adapters:rank=16,adapters=1")
    elements = 16 * (4096 + 12288 + 8192) * 32
    assert adapters(e, 4, lambda op: op.bytes("hbm", "weights")) == pytest.approx(2 * elements)
    assert adapters(e, 4, lambda op: sum(op.flops.values())) == pytest.approx(2 * 4 * elements)
    # Stored unfused, as checkpoints are: 4 x 8,192 x 16 x 32 elements = 33.6 MB.
    extra = float(e.memory(1, 1).weights - built().memory(1, 1).weights)
    assert extra == pytest.approx(4 * 8192 * 16 * 32 * 2)


def test_distinct_adapters_of_a_batch():
    # 8 sequences over 100 adapters reach 100 (1 - 0.99^8) = 7.73 of them; given 50, no more than there are sequences.
    one = adapters(built("lora-adapters:adapters=1"), 8, lambda op: op.bytes("hbm", "weights"))
    many = adapters(built("lora-adapters:adapters=100"), 8, lambda op: op.bytes("hbm", "weights"))
    assert many / one == pytest.approx(100 * (1 - 0.99**8), rel=1e-9)
    given = adapters(built("lora-adapters:adapters=100,distinct=50"), 8, lambda op: op.bytes("hbm", "weights"))
    assert given / one == pytest.approx(8)


def test_cold_adapters_cross_the_link():
    e = built("lora-adapters:adapters=1000,distinct=8,cold=0.25,resident=100,rank=64")
    fetched = sum(float(t.bytes) * n for op, n, _ in operators(e.lower(decode(8, 255)).schedule) for t in op.traffic
                  if t.path == "host")
    assert fetched == pytest.approx(0.25 * 8 * 64 * (4096 + 12288 + 8192) * 32 * 2)
    # A hundred of them on the device: 100 x 134.2 MB, the rest in host memory.
    assert float(e.memory(1, 1).weights - built().memory(1, 1).weights) == pytest.approx(100 * 4 * 8192 * 64 * 32 * 2)
    assert e.max_batch(2048) < built().max_batch(2048)


def test_no_adapters_change_nothing_and_more_cost_more():
    b = np.array([1.0, 16, 64])
    assert built("lora-adapters:adapters=0").decode(b, 512) == pytest.approx(built().decode(b, 512))
    times = [built(f"lora-adapters:adapters=100,rank={r},matrices={w}").decode(16, 512)
             for r, w in ((8, "attention"), (64, "attention"), (64, "all"))]
    assert times[0] < times[1] < times[2]
    with pytest.raises(SpecError, match="no ffn matrices"):
        built("lora-adapters:matrices=ffn", model="qwen3-30b-a3b", device="h100-sxm")


def test_expert_adapters_store_only_what_they_replace():
    # Qwen3-30B-A3B: one expert is 3 x 2,048 x 768 elements; 5 fine-tunes x 8 experts x 48 layers x 2 B = 18.1 GB.
    name = {"model": "qwen3-30b-a3b", "device": "h200-sxm"}
    e, plain = built("expert-adapters:adapters=5,replaced=8", **name), built(**name)
    extra = float(e.memory(1, 1).weights - plain.memory(1, 1).weights)
    assert extra == pytest.approx(5 * 8 * 48 * 3 * 2048 * 768 * 2)
    assert e.decode(32, 512) > plain.decode(32, 512)
    # Touched: 128 (1 - (1 - 1/16)^(32 x 120/128)) + 5 x 8 (1 - (1 - 1/16)^(32/5)) over 128 (1 - (1 - 1/16)^32).
    def read(x):
        return sum(float(op.bytes("hbm", "experts")) * n for op, n, _ in operators(x.lower(decode(32, 255)).schedule))

    base, miss = 128, 1 - 1 / 16
    expected = (base * (1 - miss**30) + 40 * (1 - miss**6.4)) / (base * (1 - miss**32))
    assert read(e) / read(plain) == pytest.approx(expected, rel=1e-9)
    assert built("expert-adapters", **name).decode(32, 512) == pytest.approx(plain.decode(32, 512))
    with pytest.raises(SpecError, match="lora-adapters"):
        built("expert-adapters:adapters=2")
