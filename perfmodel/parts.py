"""What one step is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel import calibration
from perfmodel.machine import Machine


@dataclass(frozen=True)
class Parts:
    """One step: expected seconds, bounds, spread (sigma of the logarithm), bottleneck, busy seconds by resource.

    lower: perfect overlap at datasheet rates. upper: no overlap at all, with every parameter at its p90 together.
    """

    seconds: float
    lower: float
    upper: float
    sigma: float
    bottleneck: str
    busy: dict[str, float]
    sensitivity: dict[str, float]

    @property
    def interval(self) -> tuple[float, float]:
        """p10 and p90, inside the bounds."""
        return interval(self.seconds, self.sigma, self.lower)


def interval(seconds: float, sigma: float, lower: float) -> tuple[float, float]:
    """p10 and p90 of a log-normal time whose logarithm spreads by `sigma`, none below `lower`."""
    factor = float(np.exp(calibration.P90 * sigma))
    return max(seconds / factor, lower), seconds * factor


def spread(steps: np.ndarray, phase: str, machine: Machine) -> float:
    """Sigma of the logarithm of a time: the law's residual of the phase and `steps`, the change each parameter's sigma makes."""
    residual = calibration.law().residual[phase]
    return max(float(np.sqrt(np.sum(steps**2) + residual**2)), machine.least_sigma)
