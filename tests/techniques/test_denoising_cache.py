"""Caches between denoising steps: passes, tokens and bytes by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.denoising import Generation, denoise
from perfmodel.estimator import Estimator


def _dit(*texts: str, steps: int = 50) -> Generation:
    return denoise(Estimator("dit-xl-2", "a100-sxm-80gb", techniques=list(texts)), 8, 256, steps)


def _text(*texts: str, steps: int = 128) -> Generation:
    return denoise(Estimator("llada-8b", "a100-sxm-80gb", techniques=list(texts)), 1, 1024, steps)


def test_defaults_change_nothing() -> None:
    assert _dit("denoising-cache").seconds == _dit().seconds
    assert _text("dkv-cache").seconds == _text().seconds
    assert _dit("denoising-cache").cached_bytes == _text("dkv-cache").cached_bytes == 0


def test_steps_that_run_and_steps_that_do_not() -> None:
    found = _dit("denoising-cache:skipped=0.5,first=5,last=5")
    # Of 50 steps 10 always run and half of the other 40.
    assert [float(p.times) for p in found.passes] == [30, 20]
    assert [p.layers for p in found.passes] == [1, 0]
    # One residual of 8 x 256 x 1152 in 16 bits.
    assert found.cached_bytes == 8 * 256 * 1152 * 2


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.95))
def test_speed_up_is_bounded_by_the_steps_left(skipped: float) -> None:
    """At most 1 / (1 - skipped): embedding, head, estimator and the sum stay."""
    gain = _dit().seconds / _dit(f"denoising-cache:skipped={skipped},estimator=2").seconds
    assert 1 < gain < 1 / (1 - skipped)


def test_reused_layers_save_their_share_and_are_stored() -> None:
    half = _dit("denoising-cache:reused=0.5")
    assert 0.5 < half.seconds / _dit().seconds < 0.7
    assert half.cached_bytes == 14 * 8 * 256 * 1152 * 2


def test_an_estimator_costs_time() -> None:
    assert _dit("denoising-cache:skipped=0.3,estimator=8").seconds > _dit("denoising-cache:skipped=0.3").seconds


def test_passes_of_a_cached_language_model() -> None:
    found = _text("dkv-cache:answer=256,delay=2,refresh=8")
    # 16 passes over all 1024, and 112 over the 128 masked on average and two steps' worth of 256 / 128.
    assert [(float(p.times), float(p.new), float(p.cached)) for p in found.passes] == [(16, 1024, 0), (112, 132, 892)]
    # Keys and values of 32 layers x 32 heads x 128 in bf16.
    assert found.cached_bytes == 1024 * 32 * 2 * 32 * 128 * 2


def test_a_refresh_from_a_layer_on_saves_the_first_ones() -> None:
    whole, part = _text("dkv-cache:window=64,refresh=4"), _text("dkv-cache:window=64,refresh=4,refreshed=0.5")
    assert part.seconds < whole.seconds < _text().seconds
    assert sum(float(p.times) * p.layers for p in part.passes) == pytest.approx(128)


def test_rarer_refreshes_are_faster_and_never_below_the_first() -> None:
    times = [_text(f"dkv-cache:window=64,refresh={x}").seconds for x in (2, 4, 16, 64, 0)]
    assert times == sorted(times, reverse=True)
    never = _text("dkv-cache:window=64,refresh=0")
    assert float(never.passes[0].times) == 1
    assert never.lower < never.seconds
