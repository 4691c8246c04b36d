"""Shared prefixes and search trees: bytes counted one by one, trees built node by node."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators
from perfmodel.techniques.registry import technique, techniques

MODEL, GPU = "llama-3-8b", "h100-sxm"
KV = 131072
PLAIN = Estimator(MODEL, GPU)


def built(*texts: str) -> Estimator:
    return Estimator(MODEL, GPU, techniques=texts)


def layer_ops(e: Estimator, batch: float, context: float) -> list[Op]:
    """Operators of one decode pass at that context, each once."""
    return [op for op, _, _ in operators(e.lower(e._phase(batch, 1, context - 1, True)).schedule)]


def read_kv(e: Estimator, batch: float, context: float) -> float:
    return sum(float(t.bytes) for op in layer_ops(e, batch, context) for t in op.traffic
               if t.tensor == "kv" and t.direction == "read")  # fmt: skip


def test_shared_tokens_are_stored_and_read_once_per_group() -> None:
    """64 sequences of 6000 tokens, 4096 of them shared by groups of 16: 64 x 1904 + 4 x 4096 tokens."""
    e = built("shared-prefix:tokens=4096,group=16")
    tokens = 64 * 1904 + 4 * 4096
    assert e.memory(64, 6000).kv == pytest.approx(tokens * KV)
    assert read_kv(e, 64, 6000) == pytest.approx(tokens * KV / 32)
    capacity = built("shared-prefix:tokens=4096,group=16,together=false")
    assert capacity.memory(64, 6000).kv == pytest.approx(tokens * KV)
    assert read_kv(capacity, 64, 6000) == pytest.approx(64 * 6000 * KV / 32)
    assert capacity.decode(64, 6000) == pytest.approx(PLAIN.decode(64, 6000), rel=1e-9)
    assert e.decode(64, 6000) < PLAIN.decode(64, 6000)


def test_queries_over_the_prefix_form_a_matrix() -> None:
    ops = {op.name: op for op in layer_ops(built("shared-prefix:tokens=4096,group=16"), 64, 6000)}
    prefix, own, merge = ops["shared_attention_0"], ops["attention"], ops["merge_0"]
    assert (prefix.shape["n"], prefix.shape["q"], prefix.shape["kv_len"]) == (4, 16, 4096)
    assert (own.shape["n"], own.shape["q"], own.shape["kv_len"]) == (64, 1, 1904)
    # All pairs are still computed, 4 x 32 heads x 128 FLOPs each, and two FP32 outputs of each query are merged.
    assert prefix.flops["bf16"] + own.flops["bf16"] == pytest.approx(64 * 6000 * 4 * 32 * 128)
    assert merge.bytes() == pytest.approx(3 * 64 * 32 * 128 * 4)


def test_pieces_of_a_prefix_leave_partial_outputs() -> None:
    """4096 tokens in chunks of 64: 64 partial outputs of 64 x 32 x 128 FP32 elements, written, read and joined with the rest."""
    whole, cut = (
        {op.name: op for op in layer_ops(built(f"shared-prefix:tokens=4096,group=16{more}"), 64, 6000)} for more in ("", ",chunk=64")
    )
    outputs = 64 * 32 * 128 * 4
    assert cut["merge_0"].bytes() == pytest.approx((64 + 65) * outputs)
    assert cut["shared_attention_0"].shape["pieces"] == 64
    assert cut["shared_attention_0"].bytes() == whole["shared_attention_0"].bytes()
    machine = PLAIN.machine
    start = {k: float(roofline.op_cost(x["shared_attention_0"], machine).busy["compute"]) for k, x in (("whole", whole), ("cut", cut))}
    # 4 groups x 8 KV heads x one tile of 64 rows x 64 pieces: 2048 items for 132 units instead of 32.
    assert start["cut"] > start["whole"] > 0
    short = {op.name: op for op in layer_ops(built("shared-prefix:tokens=32,group=16,chunk=64"), 64, 6000)}
    assert short["merge_0"].bytes() == pytest.approx(3 * outputs)


def test_groups_no_larger_than_the_batch() -> None:
    e = built("shared-prefix:tokens=1000,group=64")
    assert e.memory(8, 2000).kv == pytest.approx((8 * 1000 + 1000) * KV, rel=0.01)
    assert read_kv(e, 1, 2000) == pytest.approx(2000 * KV / 32)


def test_contexts_inside_the_prefix_stand_beside_longer_ones() -> None:
    """Of 1024 tokens all are shared, so the private kernel has no work there, and an array of contexts stays finite."""
    e = built("shared-prefix:tokens=4096,group=16")
    contexts = np.array([1024.0, 4096.0, 6000.0])
    together = np.asarray(e.decode(16, contexts))
    assert np.all(np.isfinite(together))
    assert np.all(np.diff(together) >= 0)
    assert together[2] == pytest.approx(e.decode(16, 6000))


def test_capacity_counts_the_prefix_once() -> None:
    """Largest n with n x 1904 + ceil-free n / 16 x 4096 tokens in the pool."""
    e = built("shared-prefix:tokens=4096,group=16")
    per_sequence = (6000 - 4096 + 4096 / 16) * KV
    assert e.max_batch(6000) == pytest.approx(e.kv_free / per_sequence, abs=1)
    assert e.memory(e.max_batch(6000), 6000).fits


@settings(max_examples=10, deadline=None)
@given(group=st.integers(1, 64), tokens=st.integers(0, 4000))
def test_more_sharing_is_never_worse(group: int, tokens: int) -> None:
    one, two = (built(f"shared-prefix:tokens={tokens},group={g},together=false") for g in (group, group + 1))
    assert two.memory(64, 4000).kv <= one.memory(64, 4000).kv * (1 + 1e-12)
    assert one.decode(64, 4000) == pytest.approx(PLAIN.decode(64, 4000), rel=1e-9)


def test_identity_and_commutation() -> None:
    for none in ("shared-prefix:tokens=4000", "shared-prefix:group=8", "tree-search:prompt=100", "tree-search"):
        e = built(none)
        assert e.decode(16, 4096) == pytest.approx(PLAIN.decode(16, 4096), rel=1e-12)
        assert e.memory(16, 4096) == PLAIN.memory(16, 4096)
    pair = ("shared-prefix:tokens=2000,group=8", "kv-quantization:bits=4,residual=128")
    one, other = built(*pair), built(*pair[::-1])
    assert one.decode(32, 4096) == pytest.approx(other.decode(32, 4096), rel=1e-12)
    assert one.memory(32, 4096).kv == pytest.approx(other.memory(32, 4096).kv, rel=1e-12)
    # 2000 shared and 1968 own tokens at 4 bits, 128 own ones at 16.
    assert one.memory(32, 4096).kv == pytest.approx((4 * 2000 / 4 + 32 * (1968 / 4 + 128)) * KV)


@pytest.mark.parametrize(("width", "fanout", "steps"), [(8, 2, 5), (16, 4, 3), (27, 3, 4)])
def test_distinct_nodes_of_a_tree_one_by_one(width: int, fanout: int, steps: int) -> None:
    """Every branch is a path of child numbers; distinct prefixes of the paths are the nodes that are stored."""
    nodes = set()
    for branch in range(width):
        path: tuple[int, ...] = ()
        left = width
        place = branch
        for _ in range(steps):
            left = max(left // fanout, 1)
            path += (place // left,)
            place %= left
            nodes.add(path)
    step, prompt = 64, 256
    tokens = prompt + steps * step
    e = built(f"tree-search:width={width},prompt={prompt},fanout={fanout},step={step}")
    assert e.memory(width, tokens).kv == pytest.approx((prompt + len(nodes) * step) * KV)
    cascade = built(f"tree-search:width={width},prompt={prompt},fanout={fanout},step={step},together=true")
    assert read_kv(cascade, width, tokens) == pytest.approx((prompt + len(nodes) * step) * KV / 32)


def test_given_share_of_distinct_tokens() -> None:
    """ETS: a 1.8 times smaller cache at the same width means 1.8 times fewer distinct tokens."""
    wide, kept = (built(f"tree-search:width=64,prompt=512,distinct={d}") for d in (0.36, 0.2))
    own = 64 * 2048 * KV
    assert wide.memory(64, 2560).kv == pytest.approx(512 * KV + 0.36 * own)
    assert wide.memory(64, 2560).kv - 512 * KV == pytest.approx(1.8 * (kept.memory(64, 2560).kv - 512 * KV))
    assert kept.max_batch(2560) > wide.max_batch(2560)


def test_a_reward_model_reads_every_step() -> None:
    e = built("tree-search:width=8,prompt=256,step=100,reward=llama-3.2-1b")
    judge = Estimator("llama-3.2-1b", GPU)
    assert e.decode(8, 1000) == pytest.approx(PLAIN.decode(8, 1000) + judge._many(8, 100, 999, is_decode=True) / 100)
    assert e.memory(1, 16).weights > PLAIN.memory(1, 16).weights + 2.4e9


def test_refusals() -> None:
    with pytest.raises(SpecError, match="give step"):
        technique("tree-search:width=4,fanout=2")
    with pytest.raises(SpecError, match="at least 1/4"):
        technique("tree-search:width=4,distinct=0.1")
    with pytest.raises(SpecError, match="cannot be combined"):
        techniques(["tree-search:width=4", "shared-prefix:tokens=10,group=2"])
