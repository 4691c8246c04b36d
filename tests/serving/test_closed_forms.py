"""The closed forms against the event simulation, and the tables of both against the estimator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix, _gamma_cdf
from perfmodel.serving.replay import simulate
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Columns, Trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clock() -> StepClock:
    return StepClock(Estimator("llama-3.1-8b", "a100-sxm-80gb"), 1000)


@pytest.fixture(scope="module")
def azure() -> Requests:
    columns = Columns(input="input_len", output="output_len")
    return read_trace(Trace(file="examples/traces/azure-conv-2023.csv.gz", columns=columns), ROOT)


def requests(azure: Requests, rate: float, n: int, seed: int, cv2: float = 1.0) -> Requests:
    """Azure lengths with gamma inter-arrival times of the given squared coefficient of variation."""
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(1 / cv2, cv2 / rate, n)
    pick = rng.integers(0, len(azure), n)
    return Requests(np.cumsum(gaps), azure.input[pick], azure.output[pick])


def test_a_request_that_never_fits_is_an_error(clock: StepClock) -> None:
    with pytest.raises(ValueError, match="larger than the KV cache"):
        simulate(clock, 100, Requests(np.zeros(1), np.array([500.0]), np.array([5.0])))


def test_littles_law_holds_in_the_simulation(clock: StepClock, azure: Requests) -> None:
    r = requests(azure, 5.0, 3000, seed=3)
    out = simulate(clock, 4e5, r)
    start = r.arrival + out.ttft
    # Time-average number in decode = arrivals per second x mean time in decode.
    span = float(out.finish.max() - r.arrival[0])
    probes = np.linspace(float(r.arrival[0]), float(out.finish.max()), 20_001)
    inside = np.searchsorted(np.sort(start), probes) - np.searchsorted(np.sort(out.finish), probes)
    assert float(inside.mean()) == pytest.approx(len(r) / span * float((out.finish - start).mean()), rel=0.01)
    assert np.all(out.finish >= start - 1e-9)


@pytest.mark.parametrize(("rate", "p50", "p95"), [(2.0, 0.15, 0.15), (5.0, 0.15, 0.30), (6.5, 0.30, 0.45)])
def test_closed_forms_follow_the_simulation(rate: float, p50: float, p95: float, clock: StepClock, azure: Requests) -> None:
    order = np.argsort(azure.input, kind="stable")[np.linspace(0, len(azure) - 1, 400).astype(int)]
    mix = Mix(azure.input[order], azure.output[order], np.full(400, 1 / 400))
    instance = Instance(clock, "colocated", 4e5)
    s = instance.state(rate, mix)
    assert s.feasible
    out = simulate(clock, 4e5, requests(azure, rate, 6000, seed=4))
    assert instance.ttft_quantile(0.5, s, mix) == pytest.approx(out.percentile("ttft", 0.5), rel=p50)
    assert instance.tpot_quantile(0.5, s, mix) == pytest.approx(out.percentile("tpot", 0.5), rel=0.10)
    assert instance.ttft_quantile(0.95, s, mix) == pytest.approx(out.percentile("ttft", 0.95), rel=p95)
    assert instance.tpot_quantile(0.95, s, mix) == pytest.approx(out.percentile("tpot", 0.95), rel=p95)


def test_percentiles_grow_with_load_and_with_bursts(clock: StepClock, azure: Requests) -> None:
    mix = Mix(azure.input[:400], azure.output[:400], np.full(400, 1 / 400))
    instance = Instance(clock, "colocated", 4e5)
    states = [instance.state(rate, mix) for rate in (1.0, 3.0, 6.0)]
    for q in (instance.ttft_quantile, instance.tpot_quantile):
        values = [q(0.95, s, mix) for s in states]
        assert values == sorted(values)
    assert instance.ttft_quantile(0.95, states[2], mix, 4.0) > instance.ttft_quantile(0.95, states[2], mix, 1.0)
    calm = simulate(clock, 4e5, requests(azure, 6.0, 3000, 5)).percentile("ttft", 0.95)
    burst = simulate(clock, 4e5, requests(azure, 6.0, 3000, 5, cv2=16.0)).percentile("ttft", 0.95)
    assert burst > calm


def test_mean_wait_is_pollaczek_khinchine(clock: StepClock) -> None:
    """Deterministic work S at rate l: W = l S^2 / (2 (1 - l S)), and Lindley's recursion finds the same."""
    mix = Mix(np.array([2000.0]), np.array([1.0]), np.ones(1))
    instance = Instance(clock, "prefill", 1e9)
    work = float(instance.state(1e-6, mix).work[0])
    rate = 0.6 / work
    s = instance.state(rate, mix)
    assert instance.mean_wait(s, mix) == pytest.approx(rate * work**2 / (2 * (1 - 0.6)), rel=1e-6)
    gaps = np.random.default_rng(6).exponential(1 / rate, 200_000)
    wait, total = 0.0, 0.0
    for gap in gaps:
        wait = max(0.0, wait + work - gap)
        total += wait
    assert instance.mean_wait(s, mix) == pytest.approx(total / gaps.size, rel=0.05)


def test_gamma_law_against_sampling() -> None:
    rng = np.random.default_rng(8)
    for shape in (0.5, 1.0, 4.0, 30.0):
        draws = rng.gamma(shape, 2.0, 200_000)
        for x in np.quantile(draws, [0.5, 0.9, 0.95, 0.99]):
            found = float(_gamma_cdf(np.array(x), np.array(shape * 2.0), np.array(shape * 4.0)))
            assert found == pytest.approx(float((draws <= x).mean()), abs=0.012)


def test_tables_follow_the_estimator(clock: StepClock) -> None:
    e = clock.estimator
    for batch, context in ((1, 700), (17, 900), (100, 1500)):
        assert clock.decode(batch, batch * context) == pytest.approx(float(e.decode(batch, context)), rel=0.02)
    for tokens in (64, 700, 5000):
        assert clock.step(0, 0.0, [(tokens, 0.0)]) == pytest.approx(float(e.prefill(1, tokens)), rel=0.05)
    assert clock.step(32, 32 * 1000, [(1024, 0.0)]) == pytest.approx(float(e.mixed(32, 1000, 1024)), rel=0.10)
