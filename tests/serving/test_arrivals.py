"""Burstiness against published figures and known processes, and what each way of multiplying a rate does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving import arrivals, prefix, sharing
from perfmodel.serving.arrivals import index_of_dispersion, peak_to_mean, scaled, squared_cv
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.serving.trace import read_trace
from perfmodel.spec.workload import Trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def traces() -> dict[str, Requests]:
    names = {"conv": "azure-conv-2023", "code": "azure-code-2023", "mooncake": "mooncake-conversation"}
    return {k: read_trace(Trace(file=f"examples/traces/{f}.csv.gz"), ROOT) for k, f in names.items()}


def plain(arrival: np.ndarray) -> Requests:
    return Requests(arrival, np.ones(arrival.size), np.ones(arrival.size))


def test_published_burstiness_of_the_azure_traces(traces: dict[str, Requests]) -> None:
    # As the traces are usually characterised: code has 1 s peaks of 26 times the mean and gaps of CV 13; chat 2.9 and 1.1.
    assert peak_to_mean(traces["code"].arrival, 1.0) == pytest.approx(26, rel=0.02)
    assert squared_cv(traces["code"].arrival) ** 0.5 == pytest.approx(13, rel=0.02)
    assert peak_to_mean(traces["conv"].arrival, 1.0) == pytest.approx(2.9, rel=0.02)
    assert squared_cv(traces["conv"].arrival) ** 0.5 == pytest.approx(1.1, rel=0.02)


@given(seed=st.integers(0, 50))
@settings(max_examples=5, deadline=None)
def test_known_processes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clockwork, poisson = np.arange(20_000.0), np.cumsum(rng.exponential(1, 50_000))
    assert squared_cv(clockwork) == 0
    assert index_of_dispersion(clockwork, 10) == 0
    assert squared_cv(poisson) == pytest.approx(1, rel=0.05)
    assert index_of_dispersion(poisson, 10) == pytest.approx(1, rel=0.1)
    # Renewal with gamma gaps of CV^2 4: IDC grows from 1 at short windows to CV^2 at long ones.
    bursty = np.cumsum(rng.gamma(0.25, 4.0, 200_000))
    assert squared_cv(bursty) == pytest.approx(4, rel=0.1)
    assert index_of_dispersion(bursty, 0.01) < 1.5
    assert index_of_dispersion(bursty, 300) == pytest.approx(4, rel=0.25)
    assert np.isnan(index_of_dispersion(np.arange(50.0), 10))


def test_windows_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    t = np.sort(np.concatenate([rng.uniform(0, 2000, 300), rng.uniform(900, 1100, 300)]))
    t -= t[0]
    start, length = arrivals.busiest(t, t[-1], 300)
    assert length == 300
    assert ((t >= start) & (t < start + 300)).sum() == max(((t >= a) & (t < a + 300)).sum() for a in t if a + 300 <= t[-1])
    rates = sorted(int(((t >= a) & (t < a + 300)).sum()) for a in np.arange(0, t[-1] - 300, 30))
    for share in (0.5, 0.9):
        start, _ = arrivals.percentile_window(t, t[-1], 300, share)
        found = int(((t >= start) & (t < start + 300)).sum())
        assert np.mean(np.array(rates) <= found) >= share
        assert np.mean(np.array(rates) < found) <= share


def test_superposing_smooths_and_compressing_does_not(traces: dict[str, Requests]) -> None:
    code = traces["code"]
    span = float(code.arrival[-1])
    many, _ = scaled(code, span, 8, "superpose", 1)
    fast, short = scaled(code, span, 8, "compress", 1)
    few, _ = scaled(code, span, 0.25, "thin", 1)
    assert len(many) == 8 * len(code)
    assert short == span / 8
    assert squared_cv(fast.arrival) == pytest.approx(squared_cv(code.arrival))
    assert index_of_dispersion(fast.arrival, 10 / 8) == pytest.approx(index_of_dispersion(code.arrival, 10))
    assert squared_cv(many.arrival) < squared_cv(code.arrival) / 5
    assert peak_to_mean(many.arrival, 1.0) < peak_to_mean(code.arrival, 1.0) / 2
    # Counts of independent copies add up, means and variances alike, so the index at one window stays.
    assert index_of_dispersion(many.arrival, 10) == pytest.approx(index_of_dispersion(code.arrival, 10), rel=0.35)
    # Thinning by p: IDC - 1 becomes p (IDC - 1).
    expected = 1 + 0.25 * (index_of_dispersion(code.arrival, 10) - 1)
    assert index_of_dispersion(few.arrival, 10) == pytest.approx(expected, rel=0.2)


@given(load=st.floats(0.2, 4.0), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_multiple(load: float, seed: int) -> None:
    r = plain(np.sort(np.random.default_rng(seed).uniform(0, 100, 4000)))
    made, _ = scaled(r, 100.0, load, "superpose" if load >= 1 else "thin", seed)
    assert len(made) / 4000 == pytest.approx(load, rel=0.1)
    assert np.all(np.diff(made.arrival) >= 0)
    assert made.arrival[-1] < 100


def test_impossible_multiples() -> None:
    r = plain(np.arange(10.0))
    with pytest.raises(SpecError, match="superpose or compress"):
        scaled(r, 10, 2, "thin", 1)
    with pytest.raises(SpecError, match="thin or compress"):
        scaled(r, 10, 0.5, "superpose", 1)


def test_copies_share_what_is_popular_and_nothing_else() -> None:
    """Twenty users whose prompts begin with block 0; two of them are turns of one conversation."""
    ids = [[0, 10 + k] for k in range(19)] + [[0, 10, 50]]
    start = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    session = np.array([*range(19), 0])
    r = Requests(np.arange(20.0), np.array([20.0] * 19 + [30.0]), np.ones(20), Blocks(np.concatenate(ids), start, 10), session)
    assert sharing.popular(r).tolist() == [0]
    made = arrivals.superpose(r, 20.0, 3, 1)
    assert np.unique(made.blocks.ids).size == 1 + 3 * 20
    assert np.unique(made.session).size >= 3 * 19
    # Each block beyond the prompt's head is held by one copy's users.
    holders = {}
    for i in range(len(made)):
        for block in made.blocks.of(i)[1:].tolist():
            holders.setdefault(block, set()).add(int(made.session[i]))
    # Only conversation 0's two turns share a block; wrapping around the span may have made two sessions of them.
    assert sum(len(s) > 1 for s in holders.values()) <= 3
    assert max(len(s) for s in holders.values()) <= 2


def test_other_users_bring_no_false_hits(traces: dict[str, Requests]) -> None:
    """Ten times the users share their system prompt, so the reusable share may rise a little, not to the 90 % of equal copies."""
    r = traces["mooncake"].take(slice(0, 3000))
    span = float(r.arrival[-1])

    def share(x: Requests) -> float:
        return float(prefix.uses(x).curve()[1][-1] / x.input.sum())

    ten = arrivals.superpose(r, span, 10, 1)
    assert share(r) <= share(ten) < share(r) + 0.1


def test_thinning_keeps_conversations_whole(traces: dict[str, Requests]) -> None:
    r = traces["mooncake"]
    few = arrivals.thin(r, 0.3, np.random.default_rng(1))
    kept = np.isin(r.session, few.session)
    assert kept.sum() == len(few)
    assert len(few) / len(r) == pytest.approx(0.3, rel=0.1)


def test_history_stays_before_the_window() -> None:
    r = plain(np.array([-5.0, -1.0, 0.0, 3.0, 9.0]))
    made = arrivals.superpose(r, 10.0, 2, 1)
    assert (made.arrival < 0).sum() == 4
    assert ((made.arrival >= 0) & (made.arrival < 10)).sum() == 6
