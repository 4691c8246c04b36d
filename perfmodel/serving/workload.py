"""Requests: read from a trace, cut to the window that matters, grouped into buckets of similar input length."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.serving.requests import Requests
from perfmodel.spec.workload import Trace
from perfmodel.spec.workload import Workload as WorkloadSpec

_SAMPLES = 600


@dataclass(frozen=True)
class Workload:
    """Requests of the window that is planned for, their rate, and how bursty they arrive."""

    requests: Requests
    rate: float
    """Requests per second, load factor included."""
    span: float
    """Seconds the requests cover."""
    dispersion: float
    """Squared coefficient of variation of inter-arrival times (1: Poisson)."""
    load: float = 1.0
    described: str = ""

    def sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input, output, weight) of a deterministic stratified sample that keeps the joint lengths."""
        order = np.lexsort((self.requests.output, self.requests.input))
        picks = np.unique(np.linspace(0, len(order) - 1, min(_SAMPLES, len(order))).round().astype(int))
        chosen = order[picks]
        weight = np.full(chosen.size, 1.0 / chosen.size)
        return self.requests.input[chosen].astype(float), self.requests.output[chosen].astype(float), weight


def read_trace(trace: Trace, base: Path) -> Requests:
    """Read a CSV trace. Raises SpecError with the file and line of the first row that cannot be used."""
    path = Path(trace.file) if Path(trace.file).is_absolute() else base / trace.file
    try:
        with _open(path) as stream:
            return _parse(stream, trace, str(path))
    except OSError as error:
        raise SpecError(f"cannot read the trace: {error.strerror or error}", file=str(path)) from None
    except UnicodeDecodeError:
        raise SpecError("the trace is not text (CSV, or CSV compressed as .gz)", file=str(path)) from None


def _open(path: Path) -> IO[str]:
    return (
        gzip.open(path, "rt", encoding="utf-8", newline="")
        if path.suffix == ".gz"
        else path.open(newline="", encoding="utf-8")
    )


def _parse(stream: IO[str], trace: Trace, file: str) -> Requests:
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for line, text in enumerate(stream, start=1):  # noqa: B007 - the place of an error
            if not text.startswith("#"):
                yield text

    rows = csv.reader(lines())
    header = next(rows, None)
    if header is None:
        raise SpecError("the trace is empty", file=file)
    wanted = trace.columns
    places = {}
    arrival, input_, output = wanted.arrival_s or "arrival_s", wanted.input or "input", wanted.output or "output"
    for name in (arrival, input_, output, *wanted.where):
        if name not in header:
            raise SpecError(
                f"no column {name!r}{did_you_mean(name, header)}; columns: {', '.join(header)}", file=file, line=line
            )
        places[name] = header.index(name)
    kept: list[tuple[float, float, float]] = []
    for row in rows:
        if not row:
            raise SpecError("empty row", file=file, line=line)
        if len(row) != len(header):
            raise SpecError(f"{len(row)} values where the header has {len(header)} columns", file=file, line=line)
        if any(row[places[k]] != v for k, v in wanted.where.items()):
            continue
        kept.append(_request(row, places, arrival, input_, output, file, line))
    if not kept:
        raise SpecError("the trace has no requests" + (f" where {wanted.where}" if wanted.where else ""), file=file)
    table = np.array(kept)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Requests(table[:, 0] - table[0, 0], table[:, 1], table[:, 2])


def _request(row: list[str], places: dict[str, int], *columns: Any) -> tuple[float, float, float]:
    *names, file, number = columns
    values = []
    for name, least in zip(names, (0.0, 1.0, 1.0), strict=True):
        text = row[places[name]]
        try:
            value = float(text)
        except ValueError:
            raise SpecError(f"column {name!r} holds {text!r}, not a number", file=file, line=number) from None
        if not math.isfinite(value) or value < least:
            raise SpecError(f"column {name!r} holds {text}, below {least:g}", file=file, line=number)
        values.append(value)
    return values[0], values[1], values[2]


def build(spec: WorkloadSpec, base: Path, load: float, seed: int) -> Workload:
    """The workload to plan for: the peak window, the whole trace, or a given rate, times the load factor."""
    if spec.lengths is not None:
        return _fixed(spec.lengths.input, spec.lengths.output, spec.rate.value * load, load, seed)
    assert spec.trace is not None
    whole = read_trace(spec.trace, base)
    span = float(whole.arrival[-1]) if len(whole) > 1 else 0.0
    if span <= 0:
        raise SpecError(
            "all requests arrive at the same time: no rate can be read from the trace", file=spec.trace.file
        )
    requests, described = whole, f"{len(whole)} requests over {span:.0f} s"
    if spec.rate.kind == "peak":
        requests, span, start = _busiest(whole, span, spec.rate.window)
        described = f"busiest {span:.0f} s of {len(whole)} requests, from {start:.0f} s, {len(requests)} requests"
    rate = len(requests) / span
    dispersion = _dispersion(requests.arrival)
    if spec.rate.kind == "given":
        # A given rate keeps the trace's lengths and burstiness and stretches its clock.
        factor = rate / spec.rate.value
        requests = Requests(requests.arrival * factor, requests.input, requests.output)
        span, rate = span * factor, spec.rate.value
    if load != 1:
        described += f", {'superposed' if load > 1 else 'thinned'} x{load:g}"
        requests = superpose(requests, span, load, seed)
        # Superposing k independent copies (or thinning) moves the process towards Poisson.
        dispersion = 1 + (dispersion - 1) / load if load > 1 else 1 + (dispersion - 1) * load
    return Workload(requests, rate * load, span, dispersion, load, described)


def _fixed(input_: int, output: int, rate: float, load: float, seed: int) -> Workload:
    n = 2000
    arrival = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))
    requests = Requests(arrival - arrival[0], np.full(n, float(input_)), np.full(n, float(output)))
    return Workload(
        requests, rate, n / rate, 1.0, load, f"Poisson arrivals of {input_} input and {output} output tokens"
    )


def _busiest(whole: Requests, span: float, seconds: float) -> tuple[Requests, float, float]:
    window = min(seconds, span)
    ends = np.searchsorted(whole.arrival, whole.arrival + window, side="left")
    counts = ends - np.arange(len(whole))
    # A window must lie inside the trace, or its tail would count as silence.
    counts = np.where(whole.arrival + window <= span + 1e-9, counts, 0)
    first = int(np.argmax(counts))
    chosen = whole.take(slice(first, int(ends[first])))
    return (
        Requests(chosen.arrival - chosen.arrival[0], chosen.input, chosen.output),
        window,
        float(whole.arrival[first]),
    )


def _dispersion(arrival: np.ndarray) -> float:
    gaps = np.diff(arrival)
    return float(np.var(gaps) / np.mean(gaps) ** 2) if gaps.size > 1 and np.mean(gaps) > 0 else 1.0


def superpose(requests: Requests, span: float, load: float, seed: int) -> Requests:
    """`load` copies of the requests, each shifted by a random part of the span and wrapped around.

    A fractional part keeps each request of one more copy with that probability.
    """
    rng = np.random.default_rng(seed)
    parts = []
    copies = int(load)
    for copy in range(copies + (load > copies)):
        shift = 0.0 if copy == 0 else rng.uniform(0, span)
        keep = slice(None) if copy < copies else rng.random(len(requests)) < load - copies
        chosen = requests.take(keep)
        parts.append(Requests((chosen.arrival + shift) % span, chosen.input, chosen.output))
    arrival = np.concatenate([p.arrival for p in parts])
    order = np.argsort(arrival, kind="stable")
    merged = [np.concatenate([getattr(p, f) for p in parts])[order] for f in ("input", "output")]
    return Requests(arrival[order], merged[0], merged[1])


@dataclass(frozen=True)
class Bucket:
    """Requests of similar input length: what a router can see on arrival."""

    low: float
    high: float
    share: float
    input: np.ndarray
    output: np.ndarray

    @property
    def label(self) -> str:
        return f"{self.low:.0f}-{self.high:.0f} tokens"


def buckets(workload: Workload, count: int) -> list[Bucket]:
    """Split by input length so that each bucket carries about the same number of input tokens."""
    inputs, outputs, _ = workload.sample()
    order = np.argsort(inputs, kind="stable")
    work = np.cumsum(inputs[order])
    cuts = np.searchsorted(work, np.linspace(0, work[-1], count + 1)[1:-1])
    # A router cannot tell equal lengths apart, so a bucket ends after the last request of a length.
    edges = np.searchsorted(inputs[order], inputs[order][np.minimum(cuts, order.size - 1)], side="right")
    result = []
    for part in np.split(order, np.unique(edges)):
        if part.size:
            i, o = inputs[part], outputs[part]
            result.append(Bucket(float(i.min()), float(i.max()), part.size / inputs.size, i, o))
    return result
