"""Timing that can be trusted: warm-up, medians over samples, their spread, another try where a sample set is noisy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_WARM_UP = 3
_SAMPLES = 9
_SHORTEST = 1e-3  # seconds of one sample: shorter calls are repeated inside it
_TRIES = 3
NOISY = 0.2  # interquartile range over median above which a result is not to be trusted


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and the interquartile range of its samples relative to the median."""

    seconds: float
    spread: float
    samples: int

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on one device.

    now: seconds, monotonic. wait: returns when everything issued has finished. flush: evicts the caches. `elapsed`, where
    given, replaces now and wait by the device's own events: seconds that n calls took.
    """

    now: Callable[[], float] = time.perf_counter
    wait: Callable[[], None] = lambda: None
    flush: Callable[[], None] = lambda: None
    elapsed: Callable[[Callable[[], None], int], float] | None = None

    def measure(self, call: Callable[[], None], budget: float) -> Timing:
        """Time a call for about `budget` seconds; the least noisy of up to three sets of samples."""
        for _ in range(_WARM_UP):
            call()
        self.wait()
        once = max(self._sample(call, 1), 1e-9)
        repeats = max(1, int(np.ceil(min(_SHORTEST / once, budget / _SAMPLES / once))))
        best: Timing | None = None
        deadline = self.now() + budget
        for _ in range(_TRIES):
            timing = self._samples(call, repeats)
            if best is None or timing.spread < best.spread:
                best = timing
            if not best.noisy or self.now() > deadline:
                break
        assert best is not None
        return best

    def _samples(self, call: Callable[[], None], repeats: int) -> Timing:
        taken = []
        for _ in range(_SAMPLES):
            self.flush()
            taken.append(self._sample(call, repeats) / repeats)
        low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75))
        return Timing(float(middle), float((high - low) / middle), len(taken))

    def _sample(self, call: Callable[[], None], repeats: int) -> float:
        if self.elapsed is not None:
            return self.elapsed(call, repeats)
        start = self.now()
        for _ in range(repeats):
            call()
        self.wait()
        return self.now() - start
