"""Hand-off of the cache between pools: bytes by hand, overlap against a simulation of every layer, and what must slow it down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.handoff import handoff

INPUTS = np.array([1000.0, 8000.0, 30000.0])


@pytest.fixture(scope="module")
def dense():
    """llama-3.1-70b on H100 nodes at several tp."""
    return {tp: Estimator("llama-3.1-70b", "h100-sxm", tp=tp) for tp in (4, 8)}


def move(a, b, seconds=None, inputs=INPUTS, **options):
    return handoff(a, b, inputs, np.ones(inputs.size) if seconds is None else seconds, **options)


def test_bytes_of_grouped_queries_by_hand(dense):
    """80 layers x 8 KV heads x 128 x (K, V) x 2 B = 327,680 B a token, however both sides are cut."""
    for p in (4, 8):
        for d in (4, 8):
            np.testing.assert_allclose(move(dense[p], dense[d]).bytes, 327_680 * INPUTS)


def test_message_is_one_block_of_keys_of_one_layer_for_one_rank(dense):
    # 16 tokens x 1 head x 128 x 2 B, and with tp 4 on both sides two heads.
    assert move(dense[8], dense[8]).message_bytes == pytest.approx(4096, rel=0.01)
    assert move(dense[4], dense[4]).message_bytes == pytest.approx(8192, rel=0.01)


def test_link_time_by_hand_with_large_messages(dense):
    """One NIC of 400 Gbit/s per device: each of 8 ranks sends 327,680/8 B a token at 50 GB/s x efficiency."""
    m = dense[8].machine
    assert m.network == pytest.approx(50e9)
    expected = 327_680 / 8 * INPUTS / (50e9 * m.network_efficiency)
    np.testing.assert_allclose(move(dense[8], dense[8], block_tokens=4096).link_s, expected, rtol=1e-6)


def test_small_messages_are_limited_by_posting_them(dense):
    """8,000 tokens = 500 blocks x 80 layers x (K, V) = 80,000 messages a rank, each `transfer_message` seconds."""
    post = dense[8].machine.law["transfer_message"]
    assert move(dense[8], dense[8]).link_s[1] == pytest.approx(80_000 * post, rel=1e-3)


def test_latents_are_sent_to_every_rank_that_keeps_them():
    """DeepSeek-V3: (512 + 64) x 2 B x 61 layers = 70,272 B a token on each of 8 decode ranks; tp 1 data-parallel keeps one."""
    e = Estimator("deepseek-v3", "h200-sxm", tp=8, ep=8)
    alone = Estimator("deepseek-v3", "h200-sxm", tp=1, dp=8, ep=8)
    np.testing.assert_allclose(move(e, e).bytes, 8 * 70_272 * INPUTS)
    np.testing.assert_allclose(move(e, alone).bytes, 70_272 * INPUTS)


def layer_by_layer(layers, chunks, seconds, link):
    """End of the last transfer after the prefill: every unit waits for its computation and for the one before it."""
    units = layers * chunks
    free = 0.0
    for k in range(1, units + 1):
        free = max(free, seconds * k / units) + link / units
    return free - seconds


@settings(max_examples=25, deadline=None)
@given(seconds=st.floats(1e-3, 5.0), tokens=st.integers(100, 40000))
def test_overlap_equals_a_simulation_of_every_layer(dense, seconds, tokens):
    e = dense[8]
    inputs = np.array([float(tokens)])
    h = move(e, e, np.array([seconds]), inputs)
    chunks = int(np.ceil(tokens / e.engine.chunk_tokens))
    naive = layer_by_layer(80, chunks, seconds, float(h.link_s[0]))
    assert h.exposed_s[0] == pytest.approx(naive + e.machine.network_latency, rel=1e-6, abs=1e-9)
    after = move(e, e, np.array([seconds]), inputs, overlapped=False)
    assert after.exposed_s[0] >= h.exposed_s[0]
    assert h.held_token_s[0] == pytest.approx(tokens * (h.exposed_s[0] + e.machine.network_latency))


def test_what_makes_it_faster_and_slower(dense):
    base = move(dense[8], dense[8])
    assert np.all(move(dense[8], dense[8], block_tokens=64).link_s < base.link_s)
    # Fewer ranks on either side: fewer ports for the same bytes.
    assert np.all(move(dense[8], dense[4], block_tokens=4096).link_s > 1.9 * move(dense[8], dense[8], block_tokens=4096).link_s)
    assert np.all(move(dense[4], dense[8]).link_s > base.link_s)
    near = move(dense[4], dense[4], same_node=True, block_tokens=4096)
    assert np.all(near.link_s < move(dense[4], dense[4], block_tokens=4096).link_s / 4)


def test_the_slower_side_of_two_node_types_sets_the_pace(dense):
    a100 = Estimator("llama-3.1-70b", "a100-sxm-80gb", tp=8)
    assert a100.machine.network < dense[8].machine.network
    both = [move(a, b, block_tokens=4096).link_s for a, b in ((dense[8], a100), (a100, dense[8]), (a100, a100))]
    np.testing.assert_allclose(both[0], both[2])
    np.testing.assert_allclose(both[1], both[2])


def test_waits_equal_a_simulation_of_the_link(dense):
    """FIFO queue of Poisson hand-offs; the mean wait of 200,000 of them within 5 %."""
    h = move(dense[8], dense[8])
    rng = np.random.default_rng(1)
    weight = np.array([0.6, 0.3, 0.1])
    rate = 0.6 / float(weight @ h.link_s)
    n = 200_000
    gaps, works = rng.exponential(1 / rate, n), rng.choice(h.link_s, n, p=weight)
    wait, total = 0.0, 0.0
    for gap, work in zip(gaps[1:], works[:-1], strict=True):
        wait = max(wait + work - gap, 0.0)
        total += wait
    u, mean = h.wait(rate, weight)
    assert u == pytest.approx(0.6)
    assert mean == pytest.approx(total / (n - 1), rel=0.05)
    assert h.wait(rate, weight, dispersion=4.0)[1] > mean
    assert h.wait(rate * 2, weight)[1] == float("inf")


def test_what_cannot_be_handed_over_is_refused(dense):
    with pytest.raises(SpecError, match="their caches differ"):
        move(dense[8], Estimator("llama-3.1-8b", "h100-sxm"))
    with pytest.raises(SpecError, match="one --kv-dtype"):
        move(dense[8], Estimator("llama-3.1-70b", "h100-sxm", tp=8, kv_dtype="fp8"))
    with pytest.raises(SpecError, match="16 devices"):
        move(dense[8], dense[8], same_node=True)
    card = Estimator("llama-3.1-8b", "m2-ultra")
    with pytest.raises(SpecError, match="no network"):
        move(card, card)
