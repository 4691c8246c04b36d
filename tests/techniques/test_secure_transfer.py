"""Encrypted and slower paths: seconds per byte by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.kernels.transfer import host_copy_seconds
from perfmodel.techniques.registry import technique


def _with(*texts: str, **setting: Any) -> Estimator:
    return Estimator("llama-3-8b", "h100-sxm", techniques=list(texts), **setting)


def _per_byte(e: Estimator) -> float:
    return float(host_copy_seconds(e.machine, 2e9) - host_copy_seconds(e.machine, 1e9)) / 1e9


@pytest.mark.parametrize("text", ["secure-transfer", "network-overhead"])
def test_defaults_change_nothing(text: str) -> None:
    plain, same = _with(tp=2), _with(text, tp=2)
    assert same.machine == plain.machine
    assert same.memory(8, 2048).total == plain.memory(8, 2048).total


def test_encryption_on_demand_adds_to_the_copy() -> None:
    # Nothing ahead: the copy's own seconds and 1 / (4 x 5 GB/s).
    e = _with("secure-transfer:rate=5e9,threads=4")
    assert _per_byte(e) == pytest.approx(_per_byte(_with()) + 1 / 20e9)


def test_all_ahead_is_bound_by_the_slower_of_the_two() -> None:
    assert _per_byte(_with("secure-transfer:rate=5e9,threads=1,ahead=1")) == pytest.approx(1 / 5e9)
    assert _per_byte(_with("secure-transfer:rate=5e9,threads=100,ahead=1")) == pytest.approx(_per_byte(_with()))


@settings(max_examples=20, deadline=None)
@given(st.floats(1e8, 1e11), st.integers(1, 64), st.floats(0, 1))
def test_it_never_beats_the_plain_link(rate: float, threads: int, ahead: float) -> None:
    plain = _with().machine
    found = technique({"kind": "secure-transfer", "rate": rate, "threads": threads, "ahead": ahead}).machine(plain)
    assert found.host_link <= plain.host_link
    better = technique({"kind": "secure-transfer", "rate": rate, "threads": threads, "ahead": 1.0}).machine(plain)
    assert better.host_link >= found.host_link


def test_work_that_stays_on_the_device_is_untouched() -> None:
    assert _with("confidential-h100").decode(8, 4096) == pytest.approx(_with().decode(8, 4096))


def test_slower_links_and_staging() -> None:
    plain = _with(tp=4).prefill(1, 8192)
    slow = _with("network-overhead:link=0.1", tp=4).prefill(1, 8192)
    late = _with("network-overhead:link_latency=1e-4", tp=4)
    staged = _with("network-overhead:staged=true", tp=4).prefill(1, 8192)
    assert plain < slow
    assert plain < staged == pytest.approx(_with("secure-transfer:peers=staged", tp=4).prefill(1, 8192))
    # An all-reduce needs one hop at least, 65 a step.
    assert late.decode(1, 1024) > _with(tp=4).decode(1, 1024) + 65 * 1e-4


def test_a_slower_drive_takes_as_much_longer() -> None:
    # All 32 layers, 13.96 GB, come from a drive of 6.5 GB/s, on which nothing is hidden; at a quarter of its rate they take four times as long.
    def step(*more: str) -> float:
        e = Estimator("llama-3.1-8b", "rtx-4090-workstation-1", techniques=["weight-offload:tier=drive,ahead=false", *more])
        return float(e.decode(1, 64))

    plain = float(Estimator("llama-3.1-8b", "rtx-4090-workstation-1").decode(1, 64))
    assert step("network-overhead:drive=0.25") - plain == pytest.approx(4 * (step() - plain), rel=0.02)
    assert step() - plain == pytest.approx(2 * 6_979_321_856 / 6.5e9, rel=0.1)
