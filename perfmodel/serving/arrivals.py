"""The arrival process of requests: its burstiness, its busiest windows, and how its rate is multiplied.

Dispersion has two measures. The squared coefficient of variation of the gaps between arrivals, CV^2 (1: Poisson), sees the
shortest time scale and single long silences. The index of dispersion of counts, IDC(w) = variance/mean of the requests in
windows of w seconds (1: Poisson at every w), sees one time scale at a time; queues feel it at about their own relaxation
time. For a renewal process IDC(w) tends to CV^2 as w grows (Cox and Lewis, The Statistical Analysis of Series of Events,
1966, section 4.5); for real traffic, whose bursts follow each other, it does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.serving import sharing
from perfmodel.serving.requests import Requests

Scale = Literal["superpose", "thin", "compress"]
WINDOWS = (1.0, 10.0, 60.0)
_MOST_REQUESTS = 10_000_000  # superposed; about a gigabyte
_LEAST_WINDOWS = 10  # fewer counts have no variance worth the name


def squared_cv(arrival: np.ndarray) -> float:
    """Squared coefficient of variation of the gaps between arrivals; 1 where there are fewer than two gaps.

    >>> squared_cv(np.array([0.0, 1.0, 2.0, 3.0])), squared_cv(np.array([0.0, 0.0, 2.0]))
    (0.0, 1.0)
    """
    gaps = np.diff(arrival)
    return float(np.var(gaps) / np.mean(gaps) ** 2) if gaps.size > 1 and np.mean(gaps) > 0 else 1.0


def dealt(dispersion: float, instances: float, by_chance: float) -> float:
    """Squared CV of the gaps that one of n instances sees of a stream with squared CV `dispersion`.

    Dealt in turn, n gaps add up to one: c/n; by load is about as even. By chance, a request comes here with probability 1/n and a
    geometric number of gaps adds up: 1 + (c - 1)/n. by_chance: share of the requests dealt so; linear between both.

    >>> dealt(1.0, 4, 0.0), dealt(1.0, 4, 1.0), dealt(9.0, 4, 1.0)
    (0.25, 1.0, 3.0)
    """
    return (dispersion + by_chance * (instances - 1)) / instances


def counts(arrival: np.ndarray, window: float) -> np.ndarray:
    """Requests in consecutive windows of so many seconds from 0, the last of which may be cut short."""
    return np.bincount((arrival / window).astype(int))


def index_of_dispersion(arrival: np.ndarray, window: float) -> float:
    """IDC: variance over mean of the counts in whole windows of so many seconds; nan for fewer than 10 windows."""
    found = counts(arrival, window)[: int(arrival[-1] // window)]
    return float(found.var() / found.mean()) if found.size >= _LEAST_WINDOWS else float("nan")


def peak_to_mean(arrival: np.ndarray, window: float) -> float:
    """Requests of the fullest window over the mean of all."""
    found = counts(arrival, window)
    return float(found.max() / found.mean())


def busiest(arrival: np.ndarray, span: float, window: float) -> tuple[float, float]:
    """(start, length) in seconds of the fullest window that begins with a request and lies inside the span."""
    length = min(window, span)
    found = np.searchsorted(arrival, arrival + length, side="left") - np.arange(arrival.size)
    # A window must lie inside the trace, or its tail would count as silence.
    first = int(np.argmax(np.where(arrival + length <= span + 1e-9, found, 0)))
    return float(arrival[first]), length


def percentile_window(arrival: np.ndarray, span: float, window: float, share: float) -> tuple[float, float]:
    """(start, length) of the window whose rate is exceeded in a share 1 - `share` of all windows.

    Windows start every tenth of a window. Of equally full ones the earliest.
    """
    length = min(window, span)
    starts = np.arange(0, span - length + 1e-9, length / 10)
    found = np.searchsorted(arrival, starts + length, side="left") - np.searchsorted(arrival, starts, side="left")
    wanted = np.quantile(found, share, method="higher")
    return float(starts[int(np.argmax(found == wanted))]), length


def scaled(
    requests: Requests, span: float, multiple: float, how: Scale, seed: int, shared: np.ndarray | None = None
) -> tuple[Requests, float]:
    """(requests, span) at a multiple of their rate. Negative arrivals are history: they keep their place before 0.

    superpose: further copies are other users' requests, each shifted by a random part of the span and wrapped around; a
    fraction is a copy thinned to it. Counts add up, so IDC(w) stays, the peaks shrink relative to the mean, and the gaps tend
    to Poisson's. Copies share the blocks in `shared` (`sharing.popular`) and no others.
    thin: drops sessions (requests where there are none) at random; IDC(w) - 1 shrinks in proportion.
    compress: divides all times, think times too; CV^2 stays, and IDC(w) becomes what IDC(w x multiple) was.
    Raises SpecError for a multiple that cannot be made so.
    """
    if how == "compress":
        think = None if requests.think is None else requests.think / multiple
        return replace(requests, arrival=requests.arrival / multiple, think=think, tick=requests.tick / multiple), span / multiple
    if how == "thin":
        if multiple > 1:
            raise SpecError(f"thin drops requests, so it cannot reach {multiple:.3g} times the trace's rate; write superpose "
                            "or compress")  # fmt: skip
        return thin(requests, multiple, np.random.default_rng(seed)), span
    if multiple < 1:
        raise SpecError(f"superpose adds copies, so it cannot reach {multiple:.3g} times the trace's rate; write thin or "
                        "compress")  # fmt: skip
    return superpose(requests, span, multiple, seed, shared), span


def thin(requests: Requests, share: float, rng: np.random.Generator) -> Requests:
    """A share of the requests, whole sessions each, drawn at random."""
    if requests.session is None:
        return requests.take(rng.random(len(requests)) < share)
    kept = rng.random(int(requests.session.max(initial=-1)) + 1) < share
    alone = rng.random(len(requests)) < share
    return requests.take(np.where(requests.session >= 0, np.append(kept, False)[requests.session], alone))


def superpose(requests: Requests, span: float, load: float, seed: int, shared: np.ndarray | None = None) -> Requests:
    """`load` copies of the requests as `scaled` describes; a fractional part is one more copy, thinned to it."""
    if len(requests) * load > _MOST_REQUESTS:
        many = f"{load:.4g} times {len(requests):,} requests"
        raise SpecError(f"{many} are more than {_MOST_REQUESTS:,}: take a shorter window, or compress")
    rng = np.random.default_rng(seed)
    parts = []
    for copy in range(int(np.ceil(load))):
        share = load - copy
        chosen = thin(requests, share, rng) if share < 1 else requests
        parts.append(chosen if copy == 0 else _shifted(chosen, rng.uniform(0, span), span))
    return Requests.join(sharing.copies_apart(parts, shared))


def _shifted(requests: Requests, shift: float, span: float) -> Requests:
    """Arrivals moved and wrapped around the span, history left in place."""
    moved = requests.arrival + shift
    wrapped = (moved >= span) & (requests.arrival >= 0)
    arrival = np.where(requests.arrival < 0, requests.arrival, moved % span)
    session = requests.session
    if session is not None:
        # A session's last turns would come before its first: they are a session of their own.
        session = np.where(wrapped & (session >= 0), session + int(session.max(initial=0)) + 1, session)
    return replace(requests, session=session).at(arrival)
