"""What one step is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel import calibration


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
        spread = float(np.exp(calibration.P90 * self.sigma))
        return max(self.seconds / spread, self.lower), self.seconds * spread
