"""The stopwatch: medians of a clock we control, and refusal of one we disturb."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from perfmodel.errors import SpecError
from perfmodel.validation.microbench.harness import NOISY, Stopwatch


class Clock:
    """Time that passes only in calls: `step` seconds each, as the iterator says."""

    def __init__(self, *steps: float) -> None:
        self.time, self.steps = 0.0, itertools.cycle(steps)

    def __call__(self) -> float:
        return self.time

    def work(self) -> None:
        self.time += next(self.steps)


def test_the_median_ignores_a_straggler() -> None:
    clock = Clock(*[2e-3] * 8, 50e-3)
    timing = Stopwatch(now=clock).measure(clock.work, budget=1.0)
    assert timing.seconds == pytest.approx(2e-3)
    assert not timing.noisy


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock(1e-6)
    timing = Stopwatch(now=clock).measure(clock.work, budget=1.0)
    assert timing.seconds == pytest.approx(1e-6)
    # Nine samples of a millisecond each, after a few calls to warm up.
    assert clock.time == pytest.approx(9e-3, rel=0.05)


def test_noise_is_seen_and_tried_again() -> None:
    noisy = Clock(1e-3, 2e-3, 3e-3)
    timing = Stopwatch(now=noisy).measure(noisy.work, budget=1.0)
    assert timing.spread > NOISY
    calm_later = Clock(*([1e-3, 3e-3] * 7), *[1e-3] * 60)
    assert not Stopwatch(now=calm_later).measure(calm_later.work, budget=1.0).noisy


def test_a_disturbed_run_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from perfmodel.validation import microbench

    # Every look at this clock finds up to two seconds gone, which drowns what the calls take.
    steps = random.Random(1)
    ticks = itertools.accumulate(steps.uniform(0.01, 2.0) for _ in itertools.count())
    restless = ticks.__next__

    with pytest.raises(SpecError, match="too noisy: .* results vary by more than 20%"):
        microbench.run(None, budget=300.0, out=tmp_path / "rows.csv", stopwatch=Stopwatch(now=restless), progress=False)
    assert not (tmp_path / "rows.csv").exists()
