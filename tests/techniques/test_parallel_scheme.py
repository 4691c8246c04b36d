"""Exchanges of context and tensor parallelism: bytes and steps by hand."""

from __future__ import annotations

from typing import Any

import pytest

from perfmodel.collectives import path
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, decode
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators

PROMPT, STEP = Group(1, 8192, 0), Group(4, 1, 8191, decode=True)
KV = 2 * 8 * 128 * 2  # bytes per token and layer of 8 KV heads of 128 in bf16


def _with(*texts: str, **setting: Any) -> Estimator:
    return Estimator("llama-3-8b", "h100-sxm", techniques=list(texts), **setting)


def _exchanges(e: Estimator, group: Group) -> list[tuple[Op, float]]:
    found = operators(e.lower(Phase((group,))).schedule)
    names = ("ring", "cp_", "kv_gather", "to_", "tree")
    return [(op, float(t) / 32) for op, t, _ in found if op.kind in ("collective", "p2p") and op.name.startswith(names)]


def _sent(e: Estimator, group: Group) -> float:
    """Bytes a device sends in one layer."""
    return sum(t * float(op.bytes("fabric")) for op, t in _exchanges(e, group))


def _attention(e: Estimator, group: Group) -> Op:
    found = operators(e.lower(Phase((group,))).schedule)
    return next(op for op, _, _ in found if op.name == "attention")


def test_defaults_change_nothing() -> None:
    for setting in ({"cp": 4}, {}):
        plain, same = _with(**setting), _with("parallel-scheme", **setting)
        assert same.prefill(1, 8192) == pytest.approx(plain.prefill(1, 8192))
        assert same.decode(4, 8192) == pytest.approx(plain.decode(4, 8192))
        assert same.memory(4, 8192).total == plain.memory(4, 8192).total


@pytest.mark.parametrize("scheme", ["ring", "gather", "chain"])
def test_all_but_the_own_keys_arrive(scheme: str) -> None:
    e = _with(f"parallel-scheme:prefill={scheme}", cp=4)
    assert _sent(e, PROMPT) == pytest.approx(3 / 4 * 8192 * KV)


def test_ulysses_moves_queries_keys_values_and_outputs() -> None:
    e = _with("parallel-scheme:prefill=ulysses", cp=4)
    # 2048 tokens a device: 32 + 16 heads in, 32 out, of 128 in bf16; three quarters leave the device.
    assert _sent(e, PROMPT) == pytest.approx(3 / 4 * 2048 * (48 + 32) * 128 * 2)
    # The share of the heads: a quarter of the keys, the same products.
    ring = _attention(_with(cp=4), PROMPT)
    mine = _attention(e, PROMPT)
    assert mine.flops["bf16"] == pytest.approx(ring.flops["bf16"])
    assert mine.bytes("hbm", "kv") == pytest.approx(ring.bytes("hbm", "kv") / 4)


def test_even_chunks_leave_most_to_the_last() -> None:
    even, balanced = (_attention(_with(f"parallel-scheme:even={x}", cp=4), PROMPT) for x in ("true", "false"))
    # The last 2048 rows attend 6144 + (1 .. 2048): of all 8192 x 8193 / 2 pairs, and four times that of the mean.
    last = 2048 * 6144 + 2048 * 2049 / 2
    assert even.flops["bf16"] / balanced.flops["bf16"] == pytest.approx(4 * last / (8192 * 8193 / 2))


def test_unfused_chunks_of_a_chain_end_at_their_own_tokens() -> None:
    whole, chain = (_attention(_with("unfused-attention", f"parallel-scheme:prefill={x}", cp=4), PROMPT)
                    for x in ("gather", "chain"))  # fmt: skip
    # Rectangles of 2048 x (2048 + 4096 + 6144 + 8192) scores of 8192 x 8192.
    assert chain.flops["bf16"] / whole.flops["bf16"] == pytest.approx(2048 * 20480 / 8192**2)


def test_tree_joins_partial_outputs_and_ring_passes_keys() -> None:
    tree, ring = (_with(f"parallel-scheme:decode={x}", cp=4) for x in ("tree", "ring"))
    # All-reduce of 4 x 32 maxima and of 4 x 32 x 129 sums in FP32: 2 x 3/4 of the message.
    assert _sent(tree, STEP) == pytest.approx(2 * 3 / 4 * 4 * 32 * (1 + 129) * 4)
    assert _sent(ring, STEP) == pytest.approx(3 / 4 * 4 * 8192 * KV)
    assert tree.decode(4, 131072) < ring.decode(4, 131072)


def test_overlap_hides_and_never_lengthens() -> None:
    for scheme in ("ring", "chain", "ulysses"):
        plain, hidden = (_with(f"parallel-scheme:prefill={scheme},overlap={x}", cp=8) for x in ("false", "true"))
        assert hidden.prefill(1, 65536) < plain.prefill(1, 65536)


def test_a_star_is_two_hops_where_latency_binds() -> None:
    slow = "network-overhead:link_latency=0.01"
    star, library = _with("parallel-scheme:all_reduce=star", slow, tp=8), _with(slow, tp=8)
    _, hop = path(star.machine, 8)
    # 65 all-reduces (embedding, 32 x 2) and the gather of the logits, which is no all-reduce: 2 messages of one hop each.
    assert star.decode(1, 512) > 65 * 2 * hop
    assert star.decode(1, 512) < 65 * 2 * hop * 1.2
    assert star.decode(1, 512) < library.decode(1, 512)
    # Where bytes bind the hub is the bottleneck.
    assert _with("parallel-scheme:all_reduce=star", tp=8).prefill(1, 8192) > _with(tp=8).prefill(1, 8192)


def test_what_is_not_divided_is_refused() -> None:
    with pytest.raises(SpecError, match="--cp"):
        _with("parallel-scheme:prefill=ring")
    with pytest.raises(SpecError, match="--tp"):
        _with("parallel-scheme:all_reduce=star")
    with pytest.raises(SpecError, match="heads"):
        Estimator("llama-3.2-3b", "h100-sxm", cp=5, techniques=["parallel-scheme:prefill=ulysses"])


def test_a_context_attended_elsewhere_is_still_gathered() -> None:
    for texts in (("in-storage-attention",), ("in-storage-attention", "parallel-scheme:decode=tree")):
        e = Estimator("llama-3-8b", "hgx-h100-8", tp=2, cp=2, techniques=texts)
        names = [op.name for op, _, _ in operators(e.lower(decode(8, 4096)).schedule)]
        assert "cp_gather" in names
        assert not any(name == "attention" for name in names)
        assert e.decode(8, 4096) > 0
