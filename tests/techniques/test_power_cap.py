"""Clocks and power caps: rates, watts and joules against the law by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.cost import decode_energy, device_power, pass_energy
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import prefill
from perfmodel.techniques.power_cap import PowerCap


def _with(*texts: str, hardware: str = "a100-sxm-80gb") -> Estimator:
    return Estimator("llama-3-8b", hardware, techniques=list(texts))


def test_defaults_change_nothing() -> None:
    plain, same = _with(), _with("power-cap")
    assert same.machine == plain.machine
    assert same.decode(8, 2048) == pytest.approx(plain.decode(8, 2048))
    assert same.memory(8, 2048).total == plain.memory(8, 2048).total


def test_clock_scales_compute_and_not_memory() -> None:
    plain, slow = _with(), _with("power-cap:clock=0.7")
    assert slow.machine.matrix["bf16"] == pytest.approx(0.7 * 312e12)
    assert slow.machine.bandwidth == plain.machine.bandwidth
    # A long prefill is compute: 1 / 0.7 longer. A decode step is memory: hardly.
    assert slow.prefill(1, 16384) / plain.prefill(1, 16384) == pytest.approx(1 / 0.7, rel=0.05)
    assert 1 <= slow.decode(1, 2048) / plain.decode(1, 2048) < 1.1
    assert slow.memory(8, 2048).total == plain.memory(8, 2048).total


def test_power_by_hand() -> None:
    """Half the clock, voltage 0.5 + 0.25: dynamic power 0.5 x 0.75^2 = 0.28125 of the rated one."""
    assert PowerCap().dynamic(0.5) == pytest.approx(0.28125)
    slow = _with("power-cap:clock=0.5")
    # Memory: 3.9 pJ/bit x 8 x 2.039 TB/s = 63.6 W of 0.72 x 400 = 288 W stay, the rest falls by 0.75^2.
    moved = (63.6 + (288 - 63.6) * 0.75**2) / 288
    # idle 0.12 + 0.28125 x (0.165 + 1.2 x 0.4) + moved x 0.72 x 0.5, of 400 W.
    assert device_power(slow, 0.4, 0.5) == pytest.approx(400 * (0.12 + 0.28125 * (0.165 + 1.2 * 0.4) + 0.36 * moved), rel=1e-3)


def test_a_byte_costs_the_chip_what_published_models_say() -> None:
    """Energy models of GPUs put a bit from memory to the second cache at 21.1 pJ, of which the memory itself draws 3.9: 18 %.

    Of the calibrated power of an A100's memory at its full rate the same 3.9 pJ are 22 %: what is left at no voltage.
    """
    bare = PowerCap(floor=0.0)
    assert bare.moved(1e-9, _with().machine) == pytest.approx(3.9 / 21.1, rel=0.25)
    assert bare.moved(1.0, _with().machine) == pytest.approx(1.0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 0.99))
def test_a_cap_is_kept(cap: float) -> None:
    e = _with(f"power-cap:cap={cap}")
    clock = e.machine.matrix["bf16"] / 312e12
    assert device_power(e, 1.0, 1.0) == pytest.approx(400 * cap)
    assert 0.1 <= clock <= 1
    # The load the cap was sized for: 0.6 of the matrix peak draws the board's limit at the rated clock.
    assert device_power(e, 0.6, 0.0) == pytest.approx(min(cap, 1.0) * 400, rel=2e-3)


def test_tighter_caps_are_slower_and_cheaper_per_token() -> None:
    caps = [_with(f"power-cap:cap={x}") for x in (0.9, 0.6, 0.4)]
    times = [e.prefill(1, 8192) for e in caps]
    assert times == sorted(times)
    joules = [decode_energy(e, 16, 4096) for e in caps]
    assert joules == sorted(joules, reverse=True)  # type: ignore[type-var]


def test_oversubscription_shares_the_budget() -> None:
    assert device_power(_with("polca-30"), 1.0, 1.0) == pytest.approx(400 / 1.3)


def test_energy_is_power_times_time_on_all_devices() -> None:
    e = Estimator("llama-2-70b", "a100-sxm-80gb", tp=4)
    # 4 devices at their limit of 400 W for two seconds of 16 k tokens (far beyond 60 % of the peak).
    seconds = 2 * 70e9 * 16384 / 4 / 312e12
    assert pass_energy(e, prefill(1, 16384), seconds) == pytest.approx(4 * 400 * seconds)
    # A decode step draws between idle (48 W) and the limit on each device.
    joules = decode_energy(e, 8, 2048)
    assert joules is not None
    assert 4 * 48 * e.decode(8, 2048) / 8 < joules <= 4 * 400 * e.decode(8, 2048) / 8


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Infeasible, match="holds no clock"):
        _with("power-cap:cap=0.11")
    with pytest.raises(SpecError, match="clock"):
        _with("power-cap:clock=2")


def test_caps_and_splits_commute() -> None:
    texts = ("power-cap:clock=0.5", "phase-split:units=0.5")
    one, other = _with(*texts), _with(*texts[::-1])
    assert one.decode(8, 2048) == pytest.approx(other.decode(8, 2048))
