"""A share of the units: rates by hand, and agreement with the serving model of both sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.split import on_part


def _with(*texts: str) -> Estimator:
    return Estimator("llama-3-8b", "h100-sxm", techniques=list(texts))


def test_the_whole_device_changes_nothing() -> None:
    plain, same = _with(), _with("phase-split")
    assert same.machine == plain.machine
    assert same.memory(8, 2048).total == plain.memory(8, 2048).total


def test_half_the_units_halve_the_rates_and_draw_less() -> None:
    half = _with("phase-split:units=0.25").machine
    full = _with().machine
    assert half.matrix["bf16"] == full.matrix["bf16"] / 4
    assert half.units == full.units / 4
    # 33 units x 32 bytes x clock.
    assert half.bandwidth == pytest.approx(min(full.bandwidth, 33 * 32 * full.device.compute.clock))  # type: ignore[union-attr]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 0.8), st.floats(0.5, 1))
def test_it_is_the_side_that_serving_splits(units: float, bandwidth: float) -> None:
    plain, side = _with(), _with(f"phase-split:units={units},bandwidth={bandwidth}")
    assert side.decode(16, 4096) == pytest.approx(on_part(plain, units, bandwidth).decode(16, 4096))


def test_saturated_units_are_worth_more() -> None:
    knee, linear = _with("phase-split:units=0.5,knee=0.5"), _with("phase-split:units=0.5")
    assert knee.machine.matrix["bf16"] == _with().machine.matrix["bf16"]
    assert knee.prefill(1, 8192) < linear.prefill(1, 8192)


def test_memory_is_shared() -> None:
    assert _with("phase-split:units=0.3").memory(8, 2048).total == _with().memory(8, 2048).total


def test_no_unit_is_no_side() -> None:
    with pytest.raises(SpecError, match="units"):
        _with("phase-split:units=0.001")
