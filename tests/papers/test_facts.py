"""Facts of a setting's machine, by hand."""

from __future__ import annotations

import pytest

from perfmodel.papers.metrics import Measured
from perfmodel.papers.run import Runner
from perfmodel.spec.paper import Paper


def _machine(hardware: str) -> Measured:
    paper = Paper.model_validate({
        "id": "p", "title": "P", "family": "f", "relation": "core", "mechanism": "m", "settings": {"a": {"hardware": hardware}},
    })  # fmt: skip
    return Runner(paper).setting("a", {}, Measured)


def test_long_copies_from_the_host_reach_three_quarters_of_pcie() -> None:
    m = _machine("a40-xeon-1")
    # One gigabyte over 31.5 GB/s x 0.75 and a latency of microseconds.
    assert m.achieved_host_link == pytest.approx(0.75 * m.host_link, rel=0.001)


def test_processors_read_three_quarters_of_their_memory_rate_and_share_a_host() -> None:
    # One T4 has all of 128 GB/s; eight A10G divide 409.6 GB/s: 51.2 GB/s each.
    assert _machine("t4-server").achieved_host_bandwidth == pytest.approx(0.75 * 128e9)
    assert _machine("a10g-server-8").achieved_host_bandwidth == pytest.approx(0.75 * 51.2e9)


def test_vector_units_reach_their_share_of_the_peak() -> None:
    m = _machine("a100-sxm-80gb")
    # 108 units x 64 lanes x 2 operations x 1.41 GHz = 19.5 TFLOP/s, and the class reaches some share of it.
    assert m.peak_vector == pytest.approx(108 * 64 * 2 * 1.41e9, rel=0.005)
    assert 0.3 * m.peak_vector < m.achieved_vector < m.peak_vector


def test_processors_reach_part_of_their_memory_s_rate() -> None:
    m = _machine("a40-xeon-1")
    assert 0.5 * m.host_bandwidth < m.achieved_host_bandwidth < m.host_bandwidth == 204.8e9
