"""Presets of published systems that change requests, sessions, trees and rounds: their arithmetic by hand."""

from __future__ import annotations

import math

import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.spec.technique import Preset


def built(*techniques: str, model: str = "llama-2-7b", **degrees: int) -> Estimator:
    return Estimator(model, "hgx-a100-8", techniques=techniques, **degrees)


def test_cache_craft_computes_a_quarter() -> None:
    # 4000 - 0.88 x 4000 x (1 - 0.15) = 1008, the 75 % less of its abstract
    assert built("cache-craft").request(4000).new == pytest.approx(1008)


def test_pensieve_computes_a_turn_and_what_both_tiers_lost() -> None:
    # of 1000 tokens of history 400 are on the device and 0.95 x 600 = 570 in host memory
    request = built("pensieve").request(1060)
    assert request.new == pytest.approx(90)
    assert request.loads[0].tokens == pytest.approx(570)


def test_continuum_trades_memory_for_prefills() -> None:
    found = 1 - math.exp(-4 / 2)  # pinned for twice the mean pause
    e = built("continuum")
    assert e.request(11_000).new == pytest.approx(1000 + (1 - found) * 10_000)
    # found x 2 s of every pause beside 4 s of running: 1.432 caches for each sequence that runs
    assert float(e.memory(8, 4000).kv) == pytest.approx(float(built().memory(8, 4000).kv) * (1 + found * 2 / 4))


def test_ets_stores_distinct_nodes() -> None:
    # 200 tokens of the prompt once and 0.167 x 256 x 504 of the branches, of 256 x 704 tokens
    share = (200 + 0.167 * 256 * 504) / (256 * 704)
    assert float(built("ets").memory(256, 704).kv) == pytest.approx(share * float(built().memory(256, 704).kv), rel=1e-6)


def test_fastswitch_moves_less_and_beside_the_pass() -> None:
    plain, fast, slow = built(), built("fastswitch"), built("fastswitch:kept=0,overlap=0,piece=262144")
    steps = [e.decode(32, 2000) for e in (plain, fast, slow)]
    assert steps[0] < steps[1] < steps[2]
    # one cache of 2000 x 0.5 MiB a step in and out over 25 GB/s or so: 84 ms; half of the way out is spared
    assert 0.06 < steps[2] - steps[0] < 0.25


def test_smartspec_drafts_less_where_batches_are_large() -> None:
    plain, smart = built(), built("smartspec")
    assert smart.decode(1, 512) < plain.decode(1, 512)
    for batch in (1, 8, 64, 256):
        assert smart.decode(batch, 512) <= plain.decode(batch, 512) * (1 + 1e-9)
    with pytest.raises(SpecError, match="a draft must speak the model's tokens"):
        built("smartspec", model="llama-3-8b")


def test_pipeinfer_keeps_the_stages_busy() -> None:
    own = "weight-quantization:bits=3.9"
    plain, standard, flowing = (
        built(own, *more, model="llama-2-70b", pp=4)
        for more in ((), ("pipeinfer:aside=false,in_flight=1",), ("pipeinfer",))
    )
    assert flowing.decode(1, 128) < standard.decode(1, 128) < plain.decode(1, 128)
    with pytest.raises(SpecError, match="give --pp 2 or more"):
        built("pipeinfer", model="llama-2-70b")


def test_chunkattention_stores_a_prompt_once() -> None:
    # 32 x 512 private tokens and 2048 shared ones of 32 x 2560
    plain, e = built(), built("chunkattention")
    assert float(e.memory(32, 2560).kv) == pytest.approx(float(plain.memory(32, 2560).kv) * (32 * 512 + 2048) / (32 * 2560))
    assert e.decode(32, 2560) < plain.decode(32, 2560)


def test_sources_must_exist() -> None:
    given = {"title": "x", "technique": "kv-quantization", "parameters": {"bits": 2}, "sources": {}}
    with pytest.raises(ValueError, match=r"no source 'asumed' \(did you mean 'assumed'\?\)"):
        Preset(**given, number_sources={"bits": "asumed"})
    with pytest.raises(ValueError, match=r"'bit', which is no parameter \(did you mean 'bits'\?\)"):
        Preset(**given, number_sources={"bit": "assumed"})
