"""Cached prefixes: tokens conserved, fetches by hand, the best mix of fetching and computing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_files import ask

import perfmodel
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.batching import serving_summary
from perfmodel.serving.replay.deploy import deploy
from perfmodel.serving.requests import Requests
from perfmodel.spec.deployment import Deployment, PoolSpec
from perfmodel.techniques.base import Request
from perfmodel.techniques.registry import technique

MODEL, NODE = "llama-3-8b", "dgx-h100"
KV = 131072  # bytes per token: 2 x 32 layers x 8 heads x 128 x 2 bytes
PLAIN = Estimator(MODEL, NODE)


def built(text: str) -> Estimator:
    return Estimator(MODEL, NODE, techniques=[text])


@settings(max_examples=20, deadline=None)
@given(
    prompt=st.integers(2, 100_000), device=st.floats(0, 0.5), host=st.floats(0, 0.5), repair=st.floats(0, 1),
    checkpoint=st.sampled_from([0, 16, 512]),
)  # fmt: skip
def test_computed_and_reused_make_the_prompt(
    prompt: int, device: float, host: float, repair: float, checkpoint: int
) -> None:
    cache = technique({"kind": "prefix-cache", "device": device, "host": host, "repair": repair, "checkpoint": checkpoint})
    r = cache.request(Request(float(prompt), 7.0))
    assert r.new + r.cached == pytest.approx(prompt + 7)
    assert r.new >= 1
    found = (r.cached - 7) / (1 - repair) if repair < 0.99 else 0.0
    assert found <= (device + host) * prompt + 1e-6 * prompt
    assert sum(x.tokens for x in r.loads) <= host * prompt * (1 + 1e-9)
    if checkpoint and repair == 0:
        assert (prompt - r.new) % checkpoint == pytest.approx(0, abs=1e-6)


def test_found_on_the_device_is_a_prefill_behind_a_context() -> None:
    prompts = np.array([1000, 4000, 16000])
    assert built("prefix-cache:device=0.75").prefill(2, prompts) == pytest.approx(PLAIN.prefill(2, prompts / 4, prompts * 0.75))


def test_fetching_by_hand() -> None:
    """8000 of 10,000 tokens over a 400 Gb/s network: no faster than their bytes over the rate."""
    fetched = built("prefix-cache:remote=0.8")
    least = 8000 * KV / PLAIN.machine.network
    suffix = PLAIN.prefill(1, 2000, 8000)
    assert fetched.prefill(1, 10_000) >= max(least, suffix) * (1 - 1e-9)
    waits = built("prefix-cache:remote=0.8,ahead=false").prefill(1, 10_000)
    layers, m = 32, PLAIN.machine
    by_hand = suffix + 8000 * KV / (m.network * float(m.network_efficiency)) + layers * float(m.network_latency)
    assert waits == pytest.approx(by_hand, rel=1e-6)
    # A quarter of the bytes; the codec gives 20 GB/s of what is cached and works beside the network.
    small = built("prefix-cache:remote=0.8,ratio=0.25,codec=2e11").prefill(1, 10_000)
    assert small <= fetched.prefill(1, 10_000)
    slow = built("prefix-cache:remote=0.8,ratio=0.25,codec=2e9").prefill(1, 10_000)
    assert slow == pytest.approx(8000 * KV / 2e9, rel=0.02)


def test_small_pieces_waste_the_host_link() -> None:
    whole = built("prefix-cache:host=0.95,ahead=false").prefill(1, 10_000)
    # 9500 tokens in pieces of 4 KiB are 304,000 copies, each a launch.
    pieces = built("prefix-cache:host=0.95,ahead=false,page=4096").prefill(1, 10_000)
    copies = 9500 * KV / 4096 * float(PLAIN.machine.kernel_latency)
    assert pieces - PLAIN.prefill(1, 500, 9500) == pytest.approx(copies, rel=1e-6)
    assert pieces > whole


def test_choice_between_fetching_and_computing() -> None:
    """A slow drive is left alone, a fast link is used, and in between both work at once."""
    prompts = np.array([1000, 8000, 64_000])
    for tier in ("host", "drive", "remote"):
        fetched, chosen = built(f"prefix-cache:{tier}=0.9"), built(f"prefix-cache:{tier}=0.9,choose=true")
        assert np.all(chosen.prefill(1, prompts) <= np.minimum(fetched.prefill(1, prompts), PLAIN.prefill(1, prompts)) + 1e-12)
    slow = built("prefix-cache:remote=0.9,codec=5e9,choose=true")
    whole = built("prefix-cache:remote=0.9,codec=5e9").prefill(1, 2000)
    assert slow.prefill(1, 2000) < 0.8 * min(PLAIN.prefill(1, 2000), whole)


def test_repair_computes_its_share_and_fetches_everything() -> None:
    """CacheBlend: 15 % of 8000 chunk tokens are computed with the 2000 new ones, all 8000 are fetched."""
    r = technique("prefix-cache:host=0.8,repair=0.15").request(Request(10_000.0))
    assert r.new == pytest.approx(2000 + 1200)
    assert r.cached == pytest.approx(6800)
    assert [x.tokens for x in r.loads] == [pytest.approx(8000)]
    times = [built(f"prefix-cache:host=0.8,repair={x}").prefill(1, 10_000) for x in (0, 0.15, 0.5, 1)]
    assert times == sorted(times)
    assert times[-1] >= PLAIN.prefill(1, 10_000) * (1 - 1e-9)
    assert technique("prefix-cache:host=0.8,repair=0.15").effects() == "lossy"
    assert technique("prefix-cache:host=0.8").effects() == "exact"


def test_quantised_caches_are_fetched_as_they_are_stored() -> None:
    wide = built("prefix-cache:remote=0.95,ahead=false").prefill(1, 50_000)
    both = [
        Estimator(MODEL, NODE, techniques=order).prefill(1, 50_000)
        for order in (
            ["prefix-cache:remote=0.95,ahead=false", "kv-quantization:bits=4,unpack=0"],
            ["kv-quantization:bits=4,unpack=0", "prefix-cache:remote=0.95,ahead=false"],
        )
    ]
    assert both[0] == both[1]
    m = PLAIN.machine
    saved = 47_500 * KV * 0.75 / (m.network * float(m.network_efficiency))
    assert wide - both[0] == pytest.approx(saved, rel=0.05)


def test_recurrent_states_are_fetched_once_and_resume_at_checkpoints() -> None:
    hybrid = "nemotron-h-8b"
    plain = Estimator(hybrid, NODE)
    cached = Estimator(hybrid, NODE, techniques=["prefix-cache:remote=0.99,checkpoint=4096,ahead=false"])
    # 0.99 x 10,000 = 9900 tokens reach down to the checkpoint at 8192.
    suffix = plain.prefill(1, 10_000 - 8192, 8192)
    from perfmodel.graph import cache_residency

    held = sum(float(r.bytes) for r in cache_residency(plain.model, plain.par, plain.formats, 1, 8192))
    states = sum(float(r.bytes) for r in cache_residency(plain.model, plain.par, plain.formats, 1, 1) if r.tensor == "state")
    rate = plain.machine.network * float(plain.machine.network_efficiency)
    assert states > 0
    assert cached.prefill(1, 10_000) - suffix >= held / rate
    assert cached.prefill(1, 4000) == pytest.approx(plain.prefill(1, 4000))


def test_nothing_found_changes_nothing() -> None:
    none = built("prefix-cache")
    assert none.prefill(3, np.array([100, 5000]), 40) == pytest.approx(PLAIN.prefill(3, np.array([100, 5000]), 40), rel=1e-12)
    assert none.decode(8, 900) == pytest.approx(PLAIN.decode(8, 900), rel=1e-12)
    assert none.memory(8, 900) == PLAIN.memory(8, 900)


def test_look_up_and_answered_requests() -> None:
    e = built("prefix-cache:answered=0.3,lookup=0.02")
    assert e.prefill(1, 100) == pytest.approx(PLAIN.prefill(1, 100) + 0.02)
    assert e.request(100).answered == pytest.approx(0.3)
    two = Estimator(MODEL, NODE, techniques=["prefix-cache:answered=0.5", "session-cache:turn=10"])
    assert two.request(100).answered == pytest.approx(0.5)


def test_estimates_know_of_the_cache() -> None:
    e = built("prefix-cache:device=0.5")
    parts = e.parts(1, 4000, 0, is_decode=False)
    assert parts.seconds == pytest.approx(e.prefill(1, 4000))
    assert parts.lower <= parts.seconds <= parts.upper


def test_shares_beyond_the_prompt_are_refused() -> None:
    with pytest.raises(SpecError, match=r"add up to 1\.2"):
        technique("prefix-cache:device=0.6,host=0.6")


HIT = "prefix-cache:device=0.5"


def test_hits_are_not_counted_twice() -> None:
    with pytest.raises(SpecError, match="--prefix and prefix-cache both"):
        perfmodel.estimate(MODEL, NODE, isl=2000, prefix=1000, techniques=[HIT])
    with pytest.raises(SpecError, match="prefix-cache and session-cache cannot be combined"):
        Estimator(MODEL, NODE, techniques=[HIT, "session-cache:turn=10,device=0.5"])
    for caching in (True, False):
        pool = {"hardware": NODE, "replicas": 1, "techniques": (HIT,)}
        d = Deployment(model=MODEL, pools=(PoolSpec(**pool),), prefix_caching=caching)
        one = Requests(np.zeros(1), np.array([2000]), np.array([10]))
        with pytest.raises(SpecError, match="prefix_caching: true.*leave prefix-cache out"):
            deploy(d, one)


def test_a_plan_finds_prefixes_itself(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"choices.techniques.0.*prefix_caching: true.*leave session-cache out"):
        ask(tmp_path, choices={"tp": [1], "techniques": ["session-cache:turn=10,device=0.5"], "allow": ["session-cache"]})


def test_a_loaded_instance_computes_what_is_not_found() -> None:
    plain, found = (serving_summary(e, 4000, 20, rate=4.0, concurrency=None, ttft=None, tpot=None) for e in (PLAIN, built(HIT)))
    # half of the prompt is computed, at more than half of the cost since it attends all of it
    assert 0.4 < found["prefill_utilisation"] / plain["prefill_utilisation"] < 0.75


def test_answered_requests_do_not_reach_the_model() -> None:
    given = {"concurrency": None, "ttft": None, "tpot": None}
    # 8 a second of which half is answered elsewhere load the model as 4 a second
    half = serving_summary(built("prefix-cache:answered=0.5"), 1000, 50, rate=8.0, **given)
    plain = serving_summary(PLAIN, 1000, 50, rate=4.0, **given)
    assert half["rate_per_s"] == 8.0
    for name in ("decode_batch", "prefill_utilisation", "output_tokens_per_s"):
        assert half[name] == pytest.approx(plain[name])
