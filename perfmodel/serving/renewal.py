"""Renewal arrivals of a given dispersion as exponential phases, so that a Markov chain can carry them.

Gaps more regular than exponential ones (requests dealt out in turn) pass four phases one after the other: one longer, three
alike, of the mean and variance asked for; four alike, dispersion 1/4, is the most regular (Erlang; Cox, 1962, section 1.4).

A gamma gap of shape a < 1 is an exponential gap whose mean is itself random: theta = B theta_max with B ~ Beta(a, 1 - a) and
theta_max = 1/(a rate) (a product of gamma laws; Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 1, 17.6).
The mixture is cut into phases: what is shorter than a step counts as together, what is longer keeps its first three moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_MIDDLE = 0.5  # phases of the middle reach from the short gaps half way to the longest, in logarithms
_POISSON = 0.02
"""Dispersions this close to 1 are taken as Poisson."""
_IN_TURN = 4
"""Phases of regular gaps: gaps more regular than 1/4 count as 1/4, an upper bound of their waits."""
MOST_REGULAR = 1 / _IN_TURN
_LEAST = 1e-7  # work transforms are kept this far from zero, where phases in turn share one eigenvector


@dataclass(frozen=True, eq=False)
class Renewal:
    """Gaps that are exponential of rate mu[k] with probability share[k]; or, `in_turn`, the sum of one of each."""

    mu: np.ndarray
    share: np.ndarray
    """Probability that a gap starts in the phase."""
    in_turn: bool = False

    @property
    def dispersion(self) -> float:
        """Squared coefficient of variation of the gaps."""
        if self.in_turn:
            return float(np.sum(self.mu**-2.0) / np.sum(1 / self.mu) ** 2)
        return float(2 * np.dot(self.share, self.mu**-2.0) / np.dot(self.share, 1 / self.mu) ** 2 - 1)

    @property
    def exit(self) -> np.ndarray:
        """Rate of arrivals in each phase [1/s]."""
        return np.where(np.arange(self.mu.size) == self.mu.size - 1, self.mu, 0.0) if self.in_turn else self.mu

    @property
    def until(self) -> np.ndarray:
        """Mean seconds from each phase to the next arrival."""
        return np.cumsum(1 / self.mu[::-1])[::-1] if self.in_turn else 1 / self.mu

    def roots(self, transform: np.ndarray) -> np.ndarray:
        """Eigenvalues of D0 + F exit share' for each value F of a work transform [phase, F]; D0 moves between the phases."""
        if self.mu.size == 1:
            return np.asarray(self.mu[0] * (transform - 1))[None]
        between = -np.diag(self.mu)
        if self.in_turn:
            between = between + np.diag(self.mu[:-1], 1)
            transform = np.where(np.abs(transform) < _LEAST, _LEAST, transform)
        generator = between[None] + transform[:, None, None] * np.outer(self.exit, self.share)
        return np.asarray(np.linalg.eigvals(generator).T)

    def vectors(self, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right and left eigenvectors, (root - D0)^-1 exit and share' (root - D0)^-1 [root, phase, ...], product not scaled."""
        mu = self.mu.reshape(-1, *(1,) * (root.ndim - 1))
        passed = mu / (mu + root[:, None])
        if not self.in_turn:
            return passed, passed * (self.share / self.mu).reshape(mu.shape)
        return np.flip(np.cumprod(np.flip(passed, 1), axis=1), 1), np.cumprod(passed, axis=1) / mu

    def excess(self, seconds: np.ndarray) -> np.ndarray:
        """Mean arrivals in the time after an arrival beyond rate x time: the company a request has from its own burst.

        Tends to (dispersion - 1)/2, negative for regular arrivals (Cox, Renewal Theory, 1962, section 4.2).
        """
        if self.mu.size == 1:
            return np.zeros_like(seconds)
        root = self.roots(np.ones(1))[:, 0]
        root = root[root.real < -1e-9 * self.mu.max()]
        right, left = self.vectors(root)
        part = (right @ self.share) * (left @ self.exit) / (right * left).sum(1)
        return np.asarray(((np.exp(np.multiply.outer(seconds, root)) - 1) * part / root).sum(-1).real)


def gamma(rate: float, dispersion: float, short: float) -> Renewal:
    """Gamma gaps of mean 1/rate and squared coefficient of variation `dispersion`; `short`: seconds below which order is all."""
    if abs(dispersion - 1) <= _POISSON:
        return Renewal(np.array([rate]), np.ones(1))
    if dispersion < 1:
        # One phase of a share x of the gap, the others alike: x^2 + (1 - x)^2 / others = dispersion.
        others = _IN_TURN - 1
        x = (1 + math.sqrt(max(others * (_IN_TURN * dispersion - 1), 0.0))) / _IN_TURN
        each = np.array([x] + [(1 - x) / others] * others)
        return Renewal(rate / each, np.eye(_IN_TURN)[0], in_turn=True)
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
