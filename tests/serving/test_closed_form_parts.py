"""Laws that the closed forms are made of, each against a simulation or a sample of its own."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.serving import renewal
from perfmodel.serving.cycle import Load, solve
from perfmodel.serving.latency import _mates, beta_cdf


def test_decode_steps_after_a_first_token_follow_sampled_gates():
    """Prompts of one or five budgets in gates, first come first served, step by step: mean and variance of n decode steps."""
    rate, tau, chunk, rng = 0.5, 0.02, 0.3, np.random.default_rng(4)
    work = np.array([chunk, 5 * chunk])
    load = Load(rate, work, np.array([0.5, 0.5]), tau, 0.0, chunk, 0.0, np.array([0.0, 1.0]), np.zeros(2))
    cycle = solve(load, renewal.gamma(rate, 1.0, 0.01))
    times: list[float] = []
    ends: dict[float, list[int]] = {x: [] for x in work}  # steps at whose end a prompt of so much work had its first token
    gate = np.zeros(0)
    while len(times) < 120_000:
        steps = max(round(gate.sum() / chunk), 1)
        for place, own in zip(np.cumsum(gate), gate, strict=True):
            ends[own].append(len(times) + round(place / chunk))
        each = tau + (chunk if gate.size else 0.0)
        times += [each] * steps
        gate = rng.choice(work, rng.poisson(rate * steps * each))
    total = np.concatenate([[0.0], np.cumsum(times)])
    for own, after in ends.items():
        at = int(np.argmin(np.abs(cycle.own - own)))
        for k in (1, 4, 8):
            seen = np.array([total[i + 2**k] - total[i] for i in after if i + 2**k < total.size])
            assert cycle.mean[k, at] == pytest.approx(float(seen.mean()), rel=0.2), (own, k)
            assert cycle.variance[k, at] == pytest.approx(float(seen.var()), rel=0.4), (own, k)


def test_mates_are_those_of_a_busy_period():
    """E[N^2]/E[N] - 1 by serving random work until nothing is left, 100,000 times."""
    rate, work, rng = 0.5, np.array([0.2, 2.0]), np.random.default_rng(9)
    load = Load(rate, work, np.array([0.6, 0.4]), 0.0, 0.0, 1.0, 1.0, np.array([0.0, 1.0]), np.zeros(2))
    left, served = np.ones(100_000), np.zeros(100_000)
    while left.any():
        busy = left > 0
        served += busy
        arrived = rng.poisson(rate * rng.choice(work, left.size, p=load.weight)) * busy
        left = np.maximum(left - 1, 0) + arrived
    assert _mates(load) == pytest.approx(float((served**2).mean() / served.mean() - 1), rel=0.03)


def test_beta_law_against_sampling():
    rng = np.random.default_rng(8)
    for a, b in ((0.2, 0.3), (0.5, 8.0), (2.0, 3.0), (20.0, 400.0)):
        draws = 5 * rng.beta(a, b, 200_000)
        mean, variance = 5 * a / (a + b), 25 * a * b / (a + b) ** 2 / (a + b + 1)
        for x in np.quantile(draws, [0.2, 0.5, 0.95]):
            found = float(beta_cdf(np.array(x), np.array(mean), np.array(variance), np.array(5.0)))
            assert found == pytest.approx(float((draws <= x).mean()), abs=0.005)
    # A variance that only the two ends can have: 30 % at the far one.
    assert float(beta_cdf(np.array(2.5), np.array(1.5), np.array(5.25), np.array(5.0))) == pytest.approx(0.7, abs=0.01)
