"""Requests that give way: bytes out and back by hand, pieces, overlap, and contexts computed again."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.schedule import operators

MODEL, NODE, KV = "llama-3-8b", "dgx-h100", 131072
PLAIN = Estimator(MODEL, NODE)


def built(*texts: str, node: str = NODE) -> Estimator:
    return Estimator(MODEL, node, techniques=texts)


def moved(e: Estimator, path: str, batch: float, context: float) -> float:
    """Bytes over a path in one decode step, both directions."""
    found = operators(e.lower(e._phase(batch, 1, context - 1, True)).schedule)
    return sum(float(op.bytes(path)) * float(times) for op, times, _ in found)


def test_bytes_out_and_back() -> None:
    """32 sequences of 2000 tokens, each preempted once in 500 tokens: 0.064 caches a step, out and back."""
    cache = 1999 * KV
    assert moved(built("preemption:rate=0.002"), "host", 32, 2000) == pytest.approx(0.064 * 2 * cache)
    assert moved(built("preemption:rate=0.002,kept=0.75"), "host", 32, 2000) == pytest.approx(0.064 * 1.25 * cache)
    assert moved(built("preemption:rate=0.002,how=migrate"), "remote", 32, 2000) == pytest.approx(0.064 * cache)
    narrow = built("preemption:rate=0.002", "kv-quantization:bits=4")
    assert moved(narrow, "host", 32, 2000) == pytest.approx(0.064 * 2 * cache / 4)
    assert moved(narrow, "host", 32, 2000) == moved(built("kv-quantization:bits=4", "preemption:rate=0.002"), "host", 32, 2000)


def test_small_pieces_cost_a_launch_each() -> None:
    """A 16-token block of keys or values of one layer is 32 KiB: 2 x 1999 x 131072 / 32768 copies an event."""
    e = built("preemption:rate=0.002,piece=32768")
    copies = 0.064 * 2 * 1999 * KV / 32768
    by_hand = copies * float(e.machine.kernel_latency)
    assert e.decode(32, 2000) - PLAIN.decode(32, 2000) == pytest.approx(by_hand, rel=1e-6)
    assert built("preemption:rate=0.002").decode(32, 2000) < e.decode(32, 2000)
    # A host that needs 5 us to ask for a piece is slower than the launches; one that needs less is not faster.
    slow = built("preemption:rate=0.002,piece=32768,issue=5e-6")
    assert slow.decode(32, 2000) - PLAIN.decode(32, 2000) == pytest.approx(copies * 5e-6, rel=1e-6)
    assert built("preemption:rate=0.002,piece=32768,issue=1e-7").decode(32, 2000) == e.decode(32, 2000)


def test_overlap_hides_what_a_step_can() -> None:
    shares = [built(f"preemption:rate=0.002,overlap={x}").decode(32, 2000) for x in (0, 0.25, 0.5, 1)]
    assert shares == sorted(shares, reverse=True)
    alone = PLAIN.decode(32, 2000)
    assert shares[-1] == pytest.approx(alone, rel=1e-6)
    # Copies longer than the step cannot hide in it.
    often = built("preemption:rate=0.05,overlap=1").decode(32, 2000)
    least = 0.05 * 32 * 2 * 1999 * KV / PLAIN.machine.host_link
    assert often >= least > alone


def test_recomputing_is_a_prefill_per_event() -> None:
    e = built("preemption:rate=0.001,how=recompute")
    assert e.decode(16, 3000) == pytest.approx(PLAIN.decode(16, 3000) + 0.016 * PLAIN.prefill(1, 3000), rel=1e-9)


def test_identity_and_monotony() -> None:
    none = built("preemption")
    grid = np.array([1, 40, 200])
    assert none.decode(grid, 900) == pytest.approx(PLAIN.decode(grid, 900), rel=1e-12)
    assert none.memory(8, 900) == PLAIN.memory(8, 900)
    rates = [built(f"preemption:rate={r}").decode(32, 4000) for r in (0, 1e-4, 1e-3, 1e-2)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert built("preemption:rate=0.01").prefill(1, 500) == pytest.approx(PLAIN.prefill(1, 500), rel=1e-12)


def test_migration_needs_a_network() -> None:
    with pytest.raises(SpecError, match="no network"):
        built("preemption:rate=0.01,how=migrate", node="apple-m2-ultra")
