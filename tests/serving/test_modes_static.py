"""Static batching in closed form against a simulation that takes every step of every batch."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.serving.modes import policy_instance
from perfmodel.serving.queueing import Mix
from perfmodel.serving.static_batch import StaticInstance

AMPLE = 1e9


@pytest.fixture(scope="module")
def lengths():
    rng = np.random.default_rng(1)
    inputs = np.floor(np.exp(rng.uniform(np.log(20), np.log(3000), 4000)))
    return inputs, rng.integers(1, 301, 4000).astype(float)


@pytest.fixture(scope="module")
def mix(lengths):
    inputs, outputs = lengths
    return Mix(inputs[:1000], outputs[:1000], np.full(1000, 1e-3))


def simulate(clock, arrival, inputs, outputs, most, max_wait, pads):
    """(TTFT, TPOT, end-to-end seconds, batch sizes). A batch closes when it is full or its oldest has waited enough."""
    n = arrival.size
    first, end, sizes = np.zeros(n), np.zeros(n), []
    now, i = 0.0, 0
    while i < n:
        now = max(now, arrival[i])
        full_at = arrival[i + most - 1] if i + most - 1 < n else np.inf
        now = max(now, min(full_at, arrival[i] + max_wait))
        j = i + 1
        while j < n and j - i < most and arrival[j] <= now:
            j += 1
        prompts, answers = inputs[i:j], outputs[i:j]
        width = np.full(j - i, prompts.max()) if pads else prompts
        now += clock.step(0, 0.0, [(float(w), 0.0) for w in width])
        first[i:j] = now
        # Step k = 1, 2, … decodes everyone (pads) or those whose answer is longer; an answer of k tokens ends before it.
        k = np.arange(1, int(answers.max()))
        live = answers[:, None] > (0 if pads else k) + np.zeros(k.size)
        context = (live * (width[:, None] + k)).sum(axis=0)
        steps = [clock.decode(int(b), float(x)) for b, x in zip(live.sum(axis=0), context, strict=True)]
        ends = now + np.concatenate([[0.0], np.cumsum(steps)])
        end[i:j] = ends[answers.astype(int) - 1]
        now = ends[-1]
        sizes.append(j - i)
        i = j
    tpot = np.where(outputs > 1, (end - first) / np.maximum(outputs - 1, 1), np.nan)
    return first - arrival, tpot, end - arrival, np.array(sizes)


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize(("most", "max_wait", "load"), [(8, 1.0, 0.3), (32, 0.0, 0.7), (64, 1.0, 0.5)])
def test_percentiles_equal_a_simulation(clock, lengths, mix, pads, most, max_wait, load):
    inputs, outputs = (x[: 2000 if most == 8 else 4000] for x in lengths)
    instance = StaticInstance(clock, AMPLE, most, max_wait, pads)
    rate = load * instance.highest_rate(mix)
    s = instance.state(rate, mix)
    assert s.feasible
    arrival = np.cumsum(np.random.default_rng(7).exponential(1 / rate, inputs.size))
    ttft, tpot, e2e, sizes = simulate(clock, arrival, inputs, outputs, most, max_wait, pads)
    assert s.mean_batch == pytest.approx(sizes.mean(), rel=0.1)
    for metric, measured in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)):
        assert s.quantile(metric, 0.5) == pytest.approx(np.nanpercentile(measured, 50), rel=0.1)
        assert s.quantile(metric, 0.95) == pytest.approx(np.nanpercentile(measured, 95), rel=0.2)
    # Both limits together, each at the median of its own law: how much they depend on each other.
    several = ~np.isnan(tpot)
    seen = np.mean((ttft <= np.median(ttft))[several] & (tpot <= np.nanmedian(tpot))[several])
    assert instance.jointly_met(s.quantile("ttft", 0.5), s.quantile("tpot", 0.5), s, mix) == pytest.approx(seen, abs=0.08)


def test_gaps_of_a_lone_request_are_its_steps(clock):
    one = Mix(np.array([500.0]), np.array([50.0]), np.ones(1))
    instance = StaticInstance(clock, AMPLE, 8)
    s = instance.state(1e-4, one)
    steps = [clock.decode(1, 500.0 + k) for k in range(1, 50)]
    assert s.quantile("longest_gap", 0.5) == pytest.approx(steps[-1], rel=1e-6)
    assert s.quantile("itl", 0.5) == pytest.approx(np.median(steps), rel=1e-3)
    assert instance.met("itl", steps[0] * 0.99, s, one) == 0.0


def test_throughput_is_that_of_full_batches(clock, lengths, mix):
    inputs, outputs = lengths
    instance = StaticInstance(clock, AMPLE, 16)
    n = 1600
    now = 0.0
    for i in range(0, n, 16):
        p, o = inputs[i : i + 16], outputs[i : i + 16]
        now += clock.step(0, 0.0, [(float(p.max()), 0.0)] * 16)
        now += sum(clock.decode(16, 16 * (p.max() + k)) for k in range(1, int(o.max())))
    assert instance.highest_rate(mix) == pytest.approx(n / now, rel=0.03)


def test_a_lone_request_waits_for_company_and_then_takes_its_own_time(clock):
    one = Mix(np.array([500.0]), np.array([50.0]), np.ones(1))
    instance = StaticInstance(clock, AMPLE, 8, max_wait=2.0)
    s = instance.state(1e-4, one)
    prefill = clock.step(0, 0.0, [(500.0, 0.0)])
    assert s.quantile("ttft", 0.5) == pytest.approx(2.0 + prefill, rel=1e-3)
    steps = sum(clock.decode(1, 500.0 + k) for k in range(1, 50))
    assert s.quantile("tpot", 0.5) == pytest.approx(steps / 49, rel=1e-3)


def test_variance_of_the_answers_alone_costs_throughput(clock):
    """Equal means: the longest of 16 answers of 10 or 290 tokens is 290, of equal ones 150."""
    equal = Mix(np.full(2, 500.0), np.full(2, 150.0), np.full(2, 0.5))
    spread = Mix(np.full(2, 500.0), np.array([10.0, 290.0]), np.full(2, 0.5))
    instance = StaticInstance(clock, AMPLE, 16)
    assert instance.highest_rate(spread) < 0.6 * instance.highest_rate(equal)


def test_bursts_lengthen_waits(clock, mix):
    instance = StaticInstance(clock, AMPLE, 8)
    rate = 0.6 * instance.highest_rate(mix)
    s = instance.state(rate, mix)
    assert instance.ttft_quantile(0.95, s, mix, 5.0) > 1.2 * instance.ttft_quantile(0.95, s, mix)
    limit = instance.ttft_quantile(0.9, s, mix)
    assert instance.ttft_met(limit, s, mix, 5.0) < instance.ttft_met(limit, s, mix) == pytest.approx(0.9, abs=0.01)
    assert instance.ttft_met(np.full(1000, limit), s, mix) == pytest.approx(0.9, abs=0.01)


def test_limits_are_named(clock, estimator, mix):
    assert "KV cache" in StaticInstance(clock, 1000.0, 8).state(1.0, mix).reason
    instance = policy_instance(estimator, mix, AMPLE, "static", max_batch=8)
    assert "keep up" in instance.state(1.1 * instance.highest_rate(mix), mix).reason
    assert not instance.refused(instance.state(0.8 * instance.highest_rate(mix), mix), mix)
    assert "bursts" in instance.refused(instance.state(1e-3, mix), mix, 16.0)
    assert "15 %" in instance.refused(instance.state(0.9 * instance.highest_rate(mix), mix), mix)
    # Memory reserves the longest request for every slot.
    assert StaticInstance(clock, 3.5 * 3300.0, 8).slots(mix) == 3
