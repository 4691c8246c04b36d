"""The closed forms against the event simulation, against exact limits, and under perturbed inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.serving import goodput, renewal
from perfmodel.serving.clock import StepClock
from perfmodel.serving.cycle import Load, solve
from perfmodel.serving.latency import gamma_cdf
from perfmodel.serving.preemption import pressure
from perfmodel.serving.queueing import Instance, Mix
from perfmodel.serving.replay import simulate
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Limit, Trace

ROOT = Path(__file__).parents[2]
AMPLE = 1e9


@pytest.fixture(scope="module")
def traces() -> dict[str, Requests]:
    return {
        name: read_trace(Trace(file=f"examples/traces/{file}.csv.gz"), ROOT)
        for name, file in (("conv", "azure-conv-2023"), ("code", "azure-code-2023"), ("moon", "mooncake-conversation"))
    }


@pytest.fixture(scope="module")
def mixes(traces: dict[str, Requests]) -> dict[str, Mix]:
    return {name: Mix.of(r.input, r.output) for name, r in traces.items()}


@pytest.fixture(scope="module")
def clocks(mixes: dict[str, Mix]) -> dict[tuple[str, str], StepClock]:
    small, large = Estimator("llama-3.1-8b", "h100-sxm"), Estimator("llama-3.1-70b", "hgx-h100-8", tp=8)
    return {(n, t): StepClock(e, mixes[t].context) for n, e in (("8b", small), ("70b", large)) for t in mixes}


@pytest.fixture(scope="module")
def clock(clocks: dict[tuple[str, str], StepClock]) -> StepClock:
    return clocks["8b", "conv"]


@pytest.fixture(scope="module")
def mix(mixes: dict[str, Mix]) -> Mix:
    return mixes["conv"]


def requests(trace: Requests, rate: float, n: int, seed: int, cv: float = 1.0) -> Requests:
    """A trace's lengths with gamma gaps of a coefficient of variation, scaled to exactly the rate."""
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(1 / cv**2, cv**2, n)
    pick = rng.integers(0, len(trace), n)
    return Requests(np.cumsum(gaps) * n / gaps.sum() / rate, trace.input[pick], trace.output[pick])


CELLS = [
    ("8b", "colocated", "conv", 1, 0.3), ("8b", "colocated", "conv", 1, 0.8), ("8b", "colocated", "code", 1, 0.5),
    ("70b", "colocated", "conv", 1, 0.65), ("70b", "colocated", "code", 1, 0.3), ("70b", "prefill", "conv", 1, 0.5),
    ("70b", "prefill", "moon", 1, 0.2), ("8b", "decode", "conv", 1, 0.5), ("8b", "colocated", "conv", 2, 0.2),
    ("70b", "colocated", "code", 2, 0.5), ("70b", "prefill", "code", 2, 0.5), ("8b", "decode", "code", 4, 0.3),
    ("8b", "colocated", "conv", 0.5, 0.5), ("70b", "colocated", "conv", 0.7, 0.65), ("70b", "prefill", "code", 0.7, 0.5),
    ("70b", "colocated", "moon", 1, 0.4), ("8b", "colocated", "code", 4, 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("model", "role", "trace", "cv", "load"), CELLS)
def test_percentiles_follow_the_simulation(model, role, trace, cv, load, clocks, traces, mixes):
    """p50 within 10 % and p95 within 20 %; docs/serving.md has the whole grid and what lies outside."""
    one, mix = Instance(clocks[model, trace], role, AMPLE), mixes[trace]
    rate = load * goodput.highest_rate(one, mix)
    s, dispersion = one.state(rate, mix), float(cv**2)
    out = simulate(one.clock, AMPLE, requests(traces[trace], rate, 6000 + 4000 * (cv > 1), 3, cv), role)
    for metric, skip, quantile in (("ttft", "decode", one.ttft_quantile), ("tpot", "prefill", one.tpot_quantile)):
        if role != skip:
            seen = getattr(out, metric)[600:]
            for p, rel in ((0.5, 0.10), (0.95, 0.20)):
                assert quantile(p, s, mix, dispersion) == pytest.approx(float(np.nanquantile(seen, p)), rel=rel)


@pytest.mark.parametrize("instances", [2, 4])
def test_requests_dealt_out_in_turn_wait_less(instances, clocks, traces, mixes):
    """Every n-th request of a Poisson stream: gaps of squared CV 1/n, and shorter waits than a stream split at random."""
    one, mix = Instance(clocks["70b", "conv"], "colocated", AMPLE), mixes["conv"]
    rate = 0.7 * goodput.highest_rate(one, mix)
    every = requests(traces["conv"], instances * rate, 5000 * instances, 5)
    dealt = Requests(every.arrival[::instances], every.input[::instances], every.output[::instances])
    seen = simulate(one.clock, AMPLE, dealt).ttft[500:]
    s = one.state(rate, mix)
    for p, rel in ((0.5, 0.10), (0.95, 0.20)):
        found = one.ttft_quantile(p, s, mix, 1 / instances)
        assert found == pytest.approx(float(np.quantile(seen, p)), rel=rel)
    assert found < 0.95 * one.ttft_quantile(0.95, s, mix, 1.0)


def test_littles_law_holds_in_the_simulation(clock, traces):
    r = requests(traces["conv"], 5.0, 3000, seed=3)
    out = simulate(clock, 4e5, r)
    start = r.arrival + out.ttft
    # Time-average number in decode = arrivals per second x mean time in decode.
    span = float(out.finish.max() - r.arrival[0])
    probes = np.linspace(float(r.arrival[0]), float(out.finish.max()), 20_001)
    inside = np.searchsorted(np.sort(start), probes) - np.searchsorted(np.sort(out.finish), probes)
    assert float(inside.mean()) == pytest.approx(len(r) / span * float((out.finish - start).mean()), rel=0.01)
    assert np.all(out.finish >= start - 1e-9)


def test_batch_follows_the_simulation_under_bursts(clocks, traces, mixes):
    """Bursts keep more sequences decoding at once than Little's law at the undisturbed step says."""
    one, mix = Instance(clocks["8b", "code"], "colocated", AMPLE), mixes["code"]
    rate = 0.3 * goodput.highest_rate(one, mix)
    s = one.state(rate, mix)
    r = requests(traces["code"], rate, 12_000, 5, cv=4)
    out = simulate(one.clock, AMPLE, r)
    batch = rate * float(np.mean(np.nan_to_num(out.tpot) * (r.output - 1)))
    assert batch > 1.5 * s.batch
    assert one.law(s, mix, 16.0).batch == pytest.approx(batch, rel=0.25)


def test_without_load_a_request_takes_its_own_steps(clock, mix):
    one = Instance(clock, "colocated", AMPLE)
    s = one.state(1e-5, mix)
    alone = np.array([clock.step(0, 0.0, [(float(q), 0.0)]) for q in mix.input])
    order = np.argsort(alone)
    share = np.cumsum(mix.weight[order])
    for p in (0.5, 0.95):
        assert one.ttft_quantile(p, s, mix) == pytest.approx(float(alone[order][np.searchsorted(share, p)]), rel=0.02)
    # A lone sequence decodes at the step of one.
    mean = float(mix.weight @ one.law(s, mix).decoding.tpot)
    assert mean == pytest.approx(float(mix.weight @ [clock.decode(1, c) for c in mix.contexts]), rel=0.02)


def test_equal_prompts_one_at_a_time_wait_as_in_m_d_1():
    """Work of a full token budget each, no overhead: Lindley's recursion W' = max(W + S - gap, 0) finds the same waits."""
    service, rate = 0.1, 6.0
    none = np.zeros(2)
    load = Load(rate, np.array([service]), np.ones(1), 0.0, 0.0, service, 1.0, np.array([0.0, 1.0]), none)
    cycle = solve(load, renewal.gamma(rate, 1.0, 0.01))
    gaps = np.random.default_rng(6).exponential(1 / rate, 200_000)
    waits = np.empty(gaps.size)
    wait = 0.0
    for i, gap in enumerate(gaps.tolist()):
        wait = max(wait + service - gap, 0.0)
        waits[i] = wait
    assert float(waits.mean()) == pytest.approx(rate * service**2 / (2 * (1 - rate * service)), rel=0.03)  # Pollaczek-Khinchine
    assert cycle.idle == pytest.approx(float((waits == 0).mean()), abs=0.02)
    assert cycle.idle == pytest.approx(1 - rate * service, abs=0.02)


@pytest.mark.parametrize("dispersion", [0.25, 0.5, 0.8, 1.0, 4.0, 16.0])
def test_phases_have_the_rate_and_dispersion_asked_for(dispersion):
    found = renewal.gamma(7.0, dispersion, 0.01)
    assert float(found.share @ found.until) == pytest.approx(1 / 7, rel=1e-6)
    assert found.dispersion == pytest.approx(dispersion, rel=1e-4)
    assert np.all(found.share >= 0)
    # Long after an arrival (dispersion - 1)/2 more have come than the rate says, as a count of gamma gaps shows.
    gaps = np.random.default_rng(2).gamma(1 / dispersion, dispersion / 7, (4000, 800))
    counted = (np.cumsum(gaps, axis=1) < 20.0).sum(axis=1)
    assert np.all(np.cumsum(gaps, axis=1)[:, -1] > 20.0)
    excess = float(counted.mean()) - 7 * 20.0
    assert float(found.excess(np.array([20.0]))[0]) == pytest.approx(excess, abs=4 * float(counted.std()) / 4000**0.5 + 0.05)


@settings(max_examples=6, deadline=None)
@given(load=st.floats(0.1, 0.6), more=st.floats(1.15, 1.4))
def test_percentiles_grow_with_load(load, more, clock, mix):
    one = Instance(clock, "colocated", AMPLE)
    most = goodput.highest_rate(one, mix)
    low, high = one.state(load * most, mix), one.state(load * more * most, mix)
    for p in (0.5, 0.95):
        assert one.ttft_quantile(p, low, mix) <= one.ttft_quantile(p, high, mix) * 1.005
        assert one.tpot_quantile(p, low, mix) <= one.tpot_quantile(p, high, mix) * 1.005


def test_percentiles_grow_with_bursts(clock, mix):
    one = Instance(clock, "colocated", AMPLE)
    s = one.state(6.0, mix)
    for quantile in (one.ttft_quantile, one.tpot_quantile):
        values = [quantile(0.95, s, mix, d) for d in (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)]
        assert values == sorted(values)


def test_equal_means_but_uneven_lengths_move_the_tail(clock):
    """Prompts of 1,000 tokens, or nine of 600 and one of 4,600: the same mean, a longer p95."""
    even = Mix(np.array([1000.0]), np.array([100.0]), np.ones(1))
    uneven = Mix(np.array([600.0, 4600.0]), np.array([100.0, 100.0]), np.array([0.9, 0.1]))
    one = Instance(clock, "colocated", AMPLE)
    assert even.mean(even.input) == uneven.mean(uneven.input)
    states = [(one.state(8.0, m), m) for m in (even, uneven)]
    ttft = [one.ttft_quantile(0.95, s, m) for s, m in states]
    assert ttft[1] > 1.5 * ttft[0]
    gaps = [goodput.longest_gap_quantile(one, 0.95, s, m) for s, m in states]
    assert gaps[1] > 1.5 * gaps[0]


def test_cached_tokens_shorten_prefill_but_are_attended(clock):
    long, cached = np.array([4000.0]), np.array([3000.0])
    whole, part, short = (
        Instance(clock, "prefill", AMPLE).work(Mix(i, np.ones(1), np.ones(1), c), 0.0)[0]
        for i, c in ((long, None), (long, cached), (np.array([1000.0]), None))
    )
    assert short < part < whole
    assert part == pytest.approx(clock.step(0, 0.0, [(1000.0, 3000.0)]), rel=0.01)


def test_attainment_is_joint_over_lengths(clock):
    """Two kinds of requests, each of which surely misses one limit: none meets both, though half meet each."""
    mix = Mix(np.array([100.0, 6000.0]), np.array([2.0, 2000.0]), np.array([0.5, 0.5]))
    one = Instance(clock, "colocated", AMPLE)
    s = one.state(0.02, mix)
    slow = float(clock.decode(1, 4000.0))
    only_ttft = goodput.attainment(one, s, mix, goodput.Goals(ttft=0.05))
    both = goodput.attainment(one, s, mix, goodput.Goals(ttft=0.05, tpot=10 * slow))
    assert only_ttft == pytest.approx(0.5, abs=0.03)
    assert both <= only_ttft + 1e-9
    grown = goodput.attainment(one, s, mix, goodput.Goals(ttft=Limit(0.05, 1e-3)))
    assert grown > 0.95


def test_capacity_is_where_attainment_crosses_its_share(clock, mix):
    one = Instance(clock, "colocated", AMPLE)
    goals = goodput.Goals(ttft=0.15, tpot=0.015)
    rate = goodput.capacity(one, mix, goals)
    at = [goodput.attainment(one, one.state(rate * k, mix), mix, goals) for k in (0.97, 1.03)]
    assert at[0] >= 0.95 > at[1]
    assert goodput.capacity(one, mix, goodput.Goals(ttft=1e-4)) == 0.0
    assert goodput.capacity(one, mix, goodput.Goals(ttft=0.15, tpot=0.015, share=0.8)) > rate
    s = one.state(rate, mix)
    assert goodput.goodput(one, s, mix, goals) == pytest.approx(0.95 * rate, rel=0.02)


@pytest.mark.parametrize(
    ("model", "trace", "cv"), [("70b", "conv", 1), ("8b", "conv", 2), ("8b", "code", 1), ("70b", "code", 2), ("8b", "moon", 1)]
)
def test_gaps_between_tokens_and_attainment_follow_the_simulation(model, trace, cv, clocks, mixes, traces):
    """ITL p50 and p99, the longest gap of a request, and the share that meets limits which a tenth misses each."""
    one, mix, dispersion = Instance(clocks[model, trace], "colocated", AMPLE), mixes[trace], float(cv**2)
    rate = 0.5 * goodput.highest_rate(one, mix)
    s, r = one.state(rate, mix), requests(traces[trace], rate, 6000, 17, cv)
    out = simulate(one.clock, AMPLE, r)
    for p in (0.5, 0.99):
        assert goodput.itl_quantile(one, p, s, mix, dispersion) == pytest.approx(out.gaps.percentile(p), rel=0.25)
    longest = float(np.quantile(out.longest_gap[600:][r.output[600:] > 1], 0.95))
    assert goodput.longest_gap_quantile(one, 0.95, s, mix, dispersion) == pytest.approx(longest, rel=0.20)
    ttft, tpot = (float(np.nanquantile(x[600:], 0.9)) for x in (out.ttft, out.tpot))
    met = float(np.mean((out.ttft[600:] <= ttft) & ~(out.tpot[600:] > tpot)))
    assert goodput.attainment(one, s, mix, goodput.Goals(ttft, tpot), dispersion) == pytest.approx(met, abs=0.05)


def test_seconds_outside_the_engine_count_against_ttft(clock, mix):
    one, goals = Instance(clock, "colocated", AMPLE), goodput.Goals(ttft=0.15)
    s = one.state(6.0, mix)
    assert goodput.attainment(one, s, mix, goals, outside=0.05) == goodput.attainment(one, s, mix, goodput.Goals(ttft=0.15 - 0.05))
    free, slowed, bound = (
        goodput.capacity(one, mix, goals, **k) for k in ({}, {"outside": lambda _: 0.05}, {"most": 2.0})
    )
    assert slowed < free
    assert bound == 2.0


@pytest.mark.parametrize("p", [0.9, 0.95])
def test_worst_window_against_sampling(p):
    n, windows = 500, 40
    rng = np.random.default_rng(4)
    worst = np.quantile(rng.random((400, windows, n)), p, axis=2).max(axis=1)
    assert goodput.worst_window(p, n, windows) == pytest.approx(float(np.median(worst)), abs=0.004)


def test_states_outside_the_range_are_refused(clocks, mixes):
    one, mix = Instance(clocks["8b", "conv"], "colocated", 4e5), mixes["conv"]
    s = one.state(5.0, mix)
    assert one.refused(s, mix, 4.0) == ""
    assert "dispersion" in one.refused(s, mix, 170.0)
    assert one.refused(one.state(1e3, mix), mix)
    tight = Instance(one.clock, "colocated", 30_000)
    assert "cache" in tight.refused(tight.state(5.0, mix), mix, 16.0)


def test_a_condensed_mix_keeps_the_means(traces):
    r = traces["code"]
    mix = Mix.of(r.input, r.output)
    assert mix.input.size <= 700
    assert mix.weight.sum() == pytest.approx(1.0)
    assert mix.mean(mix.input) == pytest.approx(float(r.input.mean()), rel=1e-9)
    assert mix.mean(mix.output) == pytest.approx(float(r.output.mean()), rel=1e-9)
    assert mix.mean(mix.input * mix.output) == pytest.approx(float((r.input * r.output).mean()), rel=0.05)


def test_gamma_law_against_sampling():
    rng = np.random.default_rng(8)
    for shape in (0.1, 0.5, 1.0, 4.0, 30.0):
        draws = rng.gamma(shape, 2.0, 200_000)
        for x in np.quantile(draws, [0.5, 0.9, 0.95, 0.99]):
            found = float(gamma_cdf(np.array(x), np.array(shape * 2.0), np.array(shape * 4.0)))
            assert found == pytest.approx(float((draws <= x).mean()), abs=0.005)


def test_tables_follow_the_estimator():
    e = Estimator("llama-3.1-8b", "a100-sxm-80gb")
    clock = StepClock(e, 1000)
    for batch, context in ((1, 700), (17, 900), (100, 1500)):
        assert clock.decode(batch, batch * context) == pytest.approx(float(e.decode(batch, context)), rel=0.02)
    for tokens in (64, 700, 5000):
        assert clock.step(0, 0.0, [(tokens, 0.0)]) == pytest.approx(float(e.prefill(1, tokens)), rel=0.05)
    assert clock.step(32, 32 * 1000, [(1024, 0.0)]) == pytest.approx(float(e.mixed(32, 1000, 1024)), rel=0.10)


@pytest.mark.parametrize("trace", ["code", "conv", "moon"])
def test_prompts_that_share_a_step_take_the_time_of_the_clock(trace, clocks, mixes, traces):
    """Random prompts in one step: its time by the clock and by the straight line with its bend, 3 % on average."""
    one, mix = Instance(clocks["8b", trace], "colocated", AMPLE), mixes[trace]
    s = one.state(0.5 * goodput.highest_rate(one, mix), mix)
    law = one.law(s, mix)
    load, clock, decoding = law.cycle.load, one.clock, round(max(law.batch, 1.0))
    order = np.argsort(mix.input)
    rng = np.random.default_rng(1)
    for count in (1, 2, 3):
        seen = []
        for prompts in rng.choice(traces[trace].input, (400, count)):
            if prompts.sum() <= clock.chunk - decoding:
                work = np.interp(prompts, mix.input[order], load.work[order]).sum()
                whole = clock.step(decoding, decoding * mix.context, [(float(q), 0.0) for q in prompts])
                seen.append((float(load.seconds(np.array(work))), whole))
        assert len(seen) > 15
        form, true = np.mean(seen, axis=0)
        assert form == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("sigmas", [3.0, 1.0])
def test_memory_that_binds_at_times_is_inside_the_range_and_a_full_one_is_not(sigmas, clocks, traces, mixes):
    """Cache for the mean and 3 standard deviations: requests are preempted, and the percentiles hold; with 1, they are refused."""
    mix = mixes["conv"]
    roomy = Instance(clocks["8b", "conv"], "colocated", AMPLE)
    rate = 0.6 * goodput.highest_rate(roomy, mix)
    free = pressure(roomy, rate, mix)
    one = Instance(roomy.clock, "colocated", free.held + sigmas * free.spread)
    s = one.state(rate, mix)
    out = simulate(one.clock, one.kv_tokens, requests(traces["conv"], rate, 6000, 3))
    assert out.preempted > 0
    inside = []
    for seen, quantile in ((out.ttft[600:], one.ttft_quantile), (out.tpot[600:], one.tpot_quantile)):
        for p, rel in ((0.5, 0.10), (0.95, 0.20)):
            inside.append(abs(quantile(p, s, mix) / float(np.nanquantile(seen, p)) - 1) <= rel)
    assert (one.refused(s, mix) == "") == (sigmas > 2)
    assert all(inside) == (sigmas > 2)
