"""Renewal arrivals of a given dispersion as a mixture of exponential gaps, so that a Markov chain can carry them.

A gamma gap of shape a < 1 is an exponential gap whose mean is itself random: theta = B theta_max with B ~ Beta(a, 1 - a) and
theta_max = 1/(a rate) (a product of gamma laws; Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 1, 17.6).
The mixture is cut into phases: what is shorter than a step counts as together, what is longer keeps its first three moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_MIDDLE = 0.5  # phases of the middle reach from the short gaps half way to the longest, in logarithms
_POISSON = 1.02
"""Dispersion up to which arrivals are taken as Poisson. More regular ones (dealt out in turn) wait less: an upper bound."""


@dataclass(frozen=True, eq=False)
class Renewal:
    """Gaps that are exponential of rate mu[k] with probability share[k]."""

    mu: np.ndarray
    share: np.ndarray

    @property
    def dispersion(self) -> float:
        """Squared coefficient of variation of the gaps."""
        return float(2 * np.dot(self.share, self.mu**-2.0) / np.dot(self.share, 1 / self.mu) ** 2 - 1)

    def roots(self, transform: np.ndarray) -> np.ndarray:
        """Eigenvalues of -diag(mu) + F mu share' for each value F of a work transform [phase, F]."""
        if self.mu.size == 1:
            return np.asarray(self.mu[0] * (transform - 1))[None]
        generator = -np.diag(self.mu)[None] + transform[:, None, None] * np.outer(self.mu, self.share)
        return np.asarray(np.linalg.eigvals(generator).T)

    def excess(self, seconds: np.ndarray) -> np.ndarray:
        """Mean arrivals in the time after an arrival beyond rate x time: the company a request has from its own burst.

        Tends to (dispersion - 1)/2 (Cox, Renewal Theory, 1962, section 4.2).
        """
        if self.mu.size == 1:
            return np.zeros_like(seconds)
        root = self.roots(np.ones(1))[:, 0].real
        root = root[root < -1e-9 * self.mu.max()]
        right = self.mu / (self.mu + root[:, None])
        left = self.share / (self.mu + root[:, None])
        part = (right @ self.share) * (left @ self.mu) / (right * left).sum(1)
        return np.asarray(((np.exp(np.multiply.outer(seconds, root)) - 1) * part / root).sum(-1))


def gamma(rate: float, dispersion: float, short: float) -> Renewal:
    """Gamma gaps of mean 1/rate and squared coefficient of variation `dispersion`; `short`: seconds below which order is all."""
    if dispersion <= _POISSON:
        return Renewal(np.array([rate]), np.ones(1))
    from scipy.special import betainc

    a, longest = 1 / dispersion, dispersion / rate

    def moment(k: int, below: float) -> float:
        """E[B^k; B <= below] of B ~ Beta(a, 1 - a)."""
        whole = float(np.prod([(a + i) / (1 + i) for i in range(k)]))
        return whole * (float(betainc(a + k, 1 - a, below)) if below < 1 else 1.0)

    first = min(short / longest, 0.1)
    second = min(max(1.5 * first, first**_MIDDLE), 0.5)
    share = np.array([moment(0, first), moment(0, second) - moment(0, first)])
    # Gaps of the middle lie evenly in their logarithm; the long ones make up for what is left of the moments.
    mean = np.array([moment(1, first) / share[0], math.sqrt(first * second)])
    m = np.array([moment(k, 1.0) - share @ mean**k for k in range(4)])
    c0, c1 = np.linalg.solve(np.array([[m[0], m[1]], [m[1], m[2]]]), -m[2:])
    half = np.sqrt(c1 * c1 / 4 - c0)
    points = np.array([-c1 / 2 - half, -c1 / 2 + half])
    weights = np.linalg.solve(np.array([np.ones(2), points]), m[:2])
    shares = np.concatenate([share, weights])
    return Renewal(1 / (np.concatenate([mean, points]) * longest), shares / shares.sum())
