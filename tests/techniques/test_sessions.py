"""Sessions that pause: probabilities by simulation, memory by Little's law, histories conserved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.techniques.base import Request
from perfmodel.techniques.registry import technique
from perfmodel.techniques.sessions import SessionCache

MODEL, GPU, KV = "llama-3-8b", "h100-sxm", 131072
PLAIN = Estimator(MODEL, GPU)


def built(text: str) -> Estimator:
    return Estimator(MODEL, GPU, techniques=[text])


def test_returns_and_pinned_time_by_simulation() -> None:
    pause, ttl, run = 30.0, 20.0, 12.0
    spec = technique(f"session-cache:turn=100,pause={pause},ttl={ttl},run={run}")
    assert isinstance(spec, SessionCache)
    pauses = np.random.default_rng(2).exponential(pause, 400_000)
    assert spec.returns == pytest.approx((pauses <= ttl).mean(), abs=0.004)
    assert spec.pinned == pytest.approx(np.minimum(pauses, ttl).mean() / run, rel=0.01)


def test_pinned_caches_shrink_the_batch() -> None:
    short, long = (built(f"session-cache:turn=100,pause=30,ttl={t},run=10") for t in (5, 60))
    # ttl 60 and pause 30: 1 - e^-2 = 0.8647 of the sessions return in time; 30 x 0.8647 / 10 = 2.594 wait per one that runs.
    assert long.memory(4, 1600).kv == pytest.approx(4 * (1 + 2.59399) * 1600 * KV, rel=1e-5)
    assert long.max_batch(4000) == pytest.approx(PLAIN.max_batch(4000) / 3.594, abs=1)
    assert long.max_batch(4000) < short.max_batch(4000) < PLAIN.max_batch(4000)
    assert long.prefill(1, 5000) < short.prefill(1, 5000) < PLAIN.prefill(1, 5000)


@settings(max_examples=20, deadline=None)
@given(prompt=st.integers(1, 50_000), turn=st.integers(1, 4000), device=st.floats(0, 1), host=st.floats(0, 1))
def test_history_is_found_fetched_or_computed(prompt: int, turn: int, device: float, host: float) -> None:
    spec = technique({"kind": "session-cache", "turn": turn, "device": device, "host": host})
    r = spec.request(Request(float(prompt)))
    assert r.new + r.cached == pytest.approx(prompt)
    assert r.new >= min(prompt, turn) * (1 - 1e-9)
    fetched = sum(x.tokens for x in r.loads)
    assert fetched == pytest.approx(max(prompt - turn, 0) * (1 - device) * host)


def test_a_turn_by_hand() -> None:
    """200 new tokens behind 9800: all on the device, all in the host's memory, or all computed again."""
    assert built("session-cache:turn=200,device=1").prefill(1, 10_000) == pytest.approx(PLAIN.prefill(1, 200, 9800))
    host = built("session-cache:turn=200,host=1,ahead=false").prefill(1, 10_000)
    least = 9800 * KV / PLAIN.machine.host_link
    assert PLAIN.prefill(1, 200, 9800) + least < host < PLAIN.prefill(1, 200, 9800) + 1.5 * least
    assert host < PLAIN.prefill(1, 10_000)
    queued = built("session-cache:turn=200,pause=10,ttl=0.0,queue=0.3")
    assert queued.prefill(1, 10_000) == pytest.approx(PLAIN.prefill(1, 10_000) + 0.3)


def test_identity() -> None:
    none = built("session-cache")
    assert none.prefill(2, 900) == pytest.approx(PLAIN.prefill(2, 900), rel=1e-12)
    assert none.decode(2, 900) == pytest.approx(PLAIN.decode(2, 900), rel=1e-12)
    assert none.memory(2, 900) == PLAIN.memory(2, 900)


@pytest.mark.parametrize(
    ("text", "says"),
    [("ttl=5,turn=10", "give pause and run"), ("turn=5,device=0.5,pause=3", "one or the other"), ("host=1", "give turn")],
)
def test_refusals(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        technique(f"session-cache:{text}")
