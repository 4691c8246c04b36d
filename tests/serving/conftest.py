"""One small instance that every serving test shares."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.requests import Requests


@pytest.fixture(scope="session")
def estimator():
    return Estimator("llama-3.1-8b", "a100-sxm-80gb")


@pytest.fixture(scope="session")
def clock(estimator):
    return StepClock(estimator, 1000.0)


@pytest.fixture(scope="session")
def poisson():
    """Make n requests at a Poisson rate with lengths drawn from two laws."""

    def make(n, rate, seed, inputs=(20, 3000), outputs=(1, 300)):
        rng = np.random.default_rng(seed)
        low, high = np.log(inputs[0]), np.log(inputs[1] + 1)
        arrival = np.cumsum(rng.exponential(1 / rate, n))
        arrival -= arrival[0]
        return Requests(
            arrival,
            np.floor(np.exp(rng.uniform(low, high, n))),
            rng.integers(outputs[0], outputs[1] + 1, n).astype(float),
        )

    return make
