"""The workload to plan for: requests of the window that matters, at the rate asked for, in buckets a router can tell apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.serving import arrivals, prefix, sharing, synthesis
from perfmodel.serving.buckets import Bucket, bucket_of, buckets, representatives
from perfmodel.serving.requests import Requests
from perfmodel.serving.trace import read_trace
from perfmodel.spec import yaml
from perfmodel.spec.fitted import FittedWorkload
from perfmodel.spec.workload import RateSpec
from perfmodel.spec.workload import Workload as WorkloadSpec

__all__ = ["Bucket", "Workload", "bucket_of", "buckets", "build", "read_fitted", "read_trace"]

_SAMPLES = 900
_HISTORY_S = 1800.0  # before the window: 98 % of Mooncake's turns come within it of the turn before
_FIXED = 2000  # requests where lengths are fixed
_TICKS = 4  # of a coarse clock: the shortest window whose counts owe little to where its ticks fall
_EVERYTHING = 1e18  # tokens: a cache that evicts nothing


@dataclass(frozen=True)
class Workload:
    """Requests of the window that is planned for, their rate, and how bursty they arrive."""

    requests: Requests
    rate: float
    """Requests per second, load factor and headroom included."""
    span: float
    """Seconds the requests cover."""
    dispersion: float
    """Squared coefficient of variation of inter-arrival times (1: Poisson), as scaled. Where a coarse clock's ticks were spread
    it is the index of dispersion over four ticks: the gaps inside a tick are made, not logged."""
    load: float = 1.0
    described: str = ""
    before: Requests | None = None
    """Where prompts share blocks: what came before the window (negative arrivals), since a prefix cache is warm when it opens."""

    image: tuple[int, int] | None = None
    """Pixels of the images that requests carry (label `images`), height and width; None: none carries any."""

    @property
    def tick(self) -> float:
        """Seconds of the coarse clock that the trace was logged by; 0: a fine one."""
        return self.requests.tick

    def index_of_dispersion(self, window: float) -> float:
        """Variance over mean of the requests in windows of so many seconds; nan where the span has fewer than 10."""
        return arrivals.index_of_dispersion(self.requests.arrival, window)

    def peak_to_mean(self, window: float = 1.0) -> float:
        """Requests of the fullest window of so many seconds over the mean."""
        return arrivals.peak_to_mean(self.requests.arrival, window)

    def cached(self) -> np.ndarray | None:
        """Prompt tokens of each request that an ideal cache holds on arrival: nothing evicted, shared by all instances.

        None where the trace has no block ids.
        """
        return _cached(self.requests, self.before)

    def sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input, output, weight) of a deterministic stratified sample: joint lengths and both means kept, the longest tenth of
        prompts with a third of the points."""
        return self._sample

    @cached_property
    def _sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r = self.requests
        order = np.argsort(r.input, kind="stable")
        cut = round(0.9 * order.size)
        found = []
        for part, share in ((order[:cut], 2 / 3), (order[cut:], 1 / 3)):
            if part.size:
                points = representatives(r.input[part], np.stack([r.input[part], r.output[part]]), round(share * _SAMPLES))
                found.append((points[0], points[1], np.full(points.shape[1], part.size / order.size / points.shape[1])))
        inputs, outputs, weight = (np.concatenate(x) for x in zip(*found, strict=True))
        return inputs, outputs, weight


def build(spec: WorkloadSpec, base: Path, load: float, seed: int, *, at_once: bool = False) -> Workload:
    """The workload to plan for: the peak or another window, the whole trace, or a given rate, times load and headroom.

    `scale` says how the rate is multiplied (`arrivals.scaled`). Not said, a given rate compresses the trace's clock to it,
    and the load is superposed above 1 and thinned below. at_once: a whole trace may also be one batch, all sent at the same
    time, whose rate is infinite; else SpecError, as for a trace that cannot be read.
    """
    if spec.lengths is not None:
        return _fixed(spec.lengths.input, spec.lengths.output, spec.rate.value * load * (1 + spec.headroom), load, seed)
    whole, file = _source(spec, base, seed)
    span = float(whole.arrival[-1]) if len(whole) > 1 else 0.0
    if span <= 0 and at_once and spec.rate.kind == "mean" and load == 1:
        return Workload(whole, float("inf"), 0.0, 1.0, load, f"{len(whole)} requests at once")
    if span <= 0:
        raise SpecError("all requests arrive at the same time: no rate can be read from the trace", file=file)
    chosen, span, described = _window(whole, span, spec.rate)
    spread = whole.tick > 0 and (spec.trace is None or spec.trace.spread_ticks)
    if whole.tick:
        kept = "and spread evenly over each tick" if spread else "whose ticks are kept as bursts"
        described += f", logged by a clock of {whole.tick:.3g} s {kept}"
    shared = sharing.popular(whole) if whole.blocks is not None else None
    rate = int(np.count_nonzero(chosen.arrival >= 0)) / span
    for multiple, how in _steps(spec, rate, load):
        uneven = arrivals.peak_to_mean(chosen.arrival[chosen.arrival >= 0], 1.0)
        chosen, span = arrivals.scaled(chosen, span, multiple, how, seed, shared)
        rate *= multiple
        described += _consequence(multiple, how, uneven, chosen)
    if spec.headroom:
        described += f", {spec.headroom:.0%} headroom included"
    now = chosen.arrival >= 0
    if not now.any():
        raise SpecError(f"at {load:g} times its rate the trace has no requests left", file=file)
    requests = _first_turns(chosen.take(now))
    before = chosen.take(~now) if whole.blocks is not None and not now.all() else None
    return Workload(requests, rate, span, _dispersion(requests, spread), load, described, before)


def read_fitted(path: Path) -> FittedWorkload:
    """A workload file written by `perfmodel trace fit`. Raises SpecError with file and line."""
    document = yaml.read(path)
    if isinstance(document.data, dict) and document.data.get("version", 1) != 1:
        raise SpecError(f"version {document.data['version']!r} is not read here: fit the log again", file=str(path),
                        line=document.line(("version",)))  # fmt: skip
    return yaml.validate(document, FittedWorkload)


def _source(spec: WorkloadSpec, base: Path, seed: int) -> tuple[Requests, str]:
    if spec.fitted is not None:
        path = Path(spec.fitted) if Path(spec.fitted).is_absolute() else base / spec.fitted
        return synthesis.synthesise(read_fitted(path), seed=seed), str(path)
    assert spec.trace is not None
    return read_trace(spec.trace, base), spec.trace.file


def _window(whole: Requests, span: float, rate: RateSpec) -> tuple[Requests, float, str]:
    """(requests with the window's start as 0 and some history before it, seconds, description)."""
    if rate.kind in ("mean", "given"):
        return whole, span, f"{len(whole)} requests over {span:.0f} s"
    if rate.kind == "peak":
        start, length = arrivals.busiest(whole.arrival, span, rate.window)
        what = f"busiest {length:.0f} s"
    else:
        start, length = arrivals.percentile_window(whole.arrival, span, rate.window, rate.share)
        what = f"{length:.0f} s at the {100 * rate.share:g}th percentile of rates"
    first = start if whole.blocks is None else max(start - _HISTORY_S, 0.0)
    low, high = np.searchsorted(whole.arrival, [first, start + length], side="left")
    chosen = whole.take(slice(int(low), int(high)))
    chosen = replace(chosen, arrival=chosen.arrival - start)
    inside = int(np.count_nonzero(chosen.arrival >= 0))
    return chosen, length, f"{what} of {len(whole)} requests, from {start:.0f} s, {inside} requests"


def _steps(spec: WorkloadSpec, rate: float, load: float) -> list[tuple[float, arrivals.Scale]]:
    """Multiples of the rate, in order, and how each is made."""
    given = spec.rate.value / rate if spec.rate.kind == "given" else 1.0
    wanted = load * (1 + spec.headroom)
    if spec.scale is not None:
        return [(given * wanted, spec.scale)] if given * wanted != 1 else []
    steps: list[tuple[float, arrivals.Scale]] = [(given, "compress"), (wanted, "superpose" if wanted > 1 else "thin")]
    return [step for step in steps if step[0] != 1]


def _consequence(multiple: float, how: arrivals.Scale, before: float, chosen: Requests) -> str:
    """What a multiple did to the bursts. `before`: requests of the fullest second over the mean."""
    now = chosen.arrival[chosen.arrival >= 0]
    if how == "compress":
        cv = arrivals.squared_cv(now) ** 0.5
        return (f", clock compressed x{multiple:.4g} (as bursty as before: CV of gaps {cv:.3g}, "
                f"a second holds what {multiple:.3g} s did)")  # fmt: skip
    after = arrivals.peak_to_mean(now, 1.0) if now.size else before
    change = f"the fullest second holds {after:.2g} x the mean, before {before:.2g} x"
    if how == "superpose":
        return f", superposed x{multiple:.4g} (smoother: {change})"
    return f", thinned x{multiple:.4g} ({change})"


def _dispersion(requests: Requests, spread: bool) -> float:
    index = arrivals.index_of_dispersion(requests.arrival, _TICKS * requests.tick) if spread else float("nan")
    return arrivals.squared_cv(requests.arrival) if np.isnan(index) else index


def _first_turns(requests: Requests) -> Requests:
    """Turns whose predecessor lies outside the window arrive by the clock."""
    if requests.think is None:
        return requests
    return replace(requests, think=np.where(sharing.previous_turn(requests) < 0, np.nan, requests.think))


def _cached(requests: Requests, before: Requests | None) -> np.ndarray | None:
    if requests.blocks is None:
        return None
    everything = requests if before is None else Requests.join([before, requests])
    found = prefix.uses(everything).cached(_EVERYTHING, len(everything))
    return np.asarray(found[len(everything) - len(requests) :])


def _fixed(input_: int, output: int, rate: float, load: float, seed: int) -> Workload:
    arrival = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, _FIXED))
    requests = Requests(arrival - arrival[0], np.full(_FIXED, float(input_)), np.full(_FIXED, float(output)))
    described = f"Poisson arrivals of {input_} input and {output} output tokens"
    return Workload(requests, rate, _FIXED / rate, 1.0, load, described)
