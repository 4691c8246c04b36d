"""What the kinds share: batches of rows of one configuration, prices with bands, rows in their own unit."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from perfmodel import calibration
from perfmodel.errors import PerfmodelError
from perfmodel.machine import Machine, machine
from perfmodel.ops.traffic import Op
from perfmodel.roofline import op_cost
from perfmodel.validation.rows import Predicted, Refused, Row

Outcome = Predicted | Refused


_bands = True


@contextlib.contextmanager
def without_bands() -> Iterator[None]:
    """Leave the p10-p90 intervals empty for a while: a fit needs expected values only."""
    global _bands
    before, _bands = _bands, False
    try:
        yield
    finally:
        _bands = before


def bands_wanted() -> bool:
    """Whether predictions need a p10-p90 interval now."""
    return _bands


@dataclass(frozen=True)
class Kind:
    """A kind of measured row.

    claims: whether a row is of this kind. predict: an outcome per row, in order. held_out: what must be left out
    together when a fit is cross-validated (a model, an (n, k) pair). parameters: names of the parameters that a fit to
    rows of this kind may move, as in `calibration.replaced`, with `*` for the classes, devices or engines of the rows.
    """

    name: str
    claims: Callable[[Row], bool]
    predict: Callable[[Sequence[Row]], list[Outcome]]
    held_out: Callable[[Row], Hashable]
    parameters: tuple[str, ...] = ()
    rows_to_fit: int = 1200
    """Rows that take part in a fit at most, evenly spread: as good as all, and a fraction of the time."""


def engine_machine(hardware: str, engine: str) -> Machine:
    """The machine as an engine or library drives it; an unknown engine gets the shared law alone."""
    return _engine_machine(hardware, calibration.known_engine(engine))


@lru_cache(maxsize=256)
def _engine_machine(hardware: str, engine: str | None) -> Machine:
    base = machine(hardware)
    return base.with_engine(calibration.engine(engine)) if engine else base


calibration.on_change(_engine_machine.cache_clear)


def batched(
    rows: Sequence[Row], key: Callable[[Row], Hashable], price: Callable[[Hashable, list[Row]], list[Outcome]]
) -> list[Outcome]:
    """Predict rows in batches of equal key. A key or price that raises refuses its rows with that reason."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    outcomes: list[Outcome] = [Refused("not reached")] * len(rows)
    for i, row in enumerate(rows):
        try:
            groups[key(row)].append(i)
        except Refused as reason:
            outcomes[i] = reason
        except PerfmodelError as error:
            outcomes[i] = Refused(str(error).splitlines()[0])
    for chosen, members in groups.items():
        try:
            found = price(chosen, [rows[i] for i in members])
        except Refused as reason:
            found = [reason] * len(members)
        except PerfmodelError as error:
            found = [Refused(str(error).splitlines()[0])] * len(members)
        except Exception as error:  # a file from elsewhere must not end in a traceback; the count shows the defect
            found = [Refused(f"defect in this law: {type(error).__name__}: {error}")] * len(members)
        for i, outcome in zip(members, found, strict=True):
            outcomes[i] = outcome
    return outcomes


def seconds_with_spread(
    ops: Sequence[Op], m: Machine, residual: str, added: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of operators run one after another and their spread [sigma of the logarithm].

    Shapes may be arrays (one element per row). The spread joins every uncertain parameter's effect with what the law
    leaves unexplained for this kind of kernel (`residual` of law.yaml). `added`: seconds before the operators.
    """
    expected = sum((np.asarray(op_cost(op, m).seconds, float) for op in ops), start=np.asarray(added))
    if not _bands:
        return expected, np.zeros(expected.shape)
    shaken = m.perturbed(column=True)
    rows = sum((np.asarray(op_cost(op, shaken).seconds, float) for op in ops), start=np.asarray(added))
    rows = np.broadcast_to(rows, (len(m.sigma) + 1, *expected.shape)) if expected.ndim else rows
    steps = np.log(rows[1:] / rows[0])
    left = calibration.law().residual[residual]
    return expected, np.maximum(np.sqrt(np.sum(steps**2, axis=0) + left**2), m.least_sigma)


def times(rows: Sequence[Row], seconds: np.ndarray, sigma: np.ndarray) -> list[Outcome]:
    """Predictions of times in each row's unit."""
    seconds, sigma = np.broadcast_to(seconds, len(rows)), np.broadcast_to(sigma, len(rows))
    return [
        _predicted(float(t) / r.unit, float(s)) for r, t, s in zip(rows, seconds, sigma, strict=True)
    ]  # fmt: skip


def rates(rows: Sequence[Row], work: Sequence[float], seconds: np.ndarray, sigma: np.ndarray) -> list[Outcome]:
    """Predictions of rates: `work` (bytes, FLOP, tokens) over seconds, in each row's unit."""
    seconds, sigma = np.broadcast_to(seconds, len(rows)), np.broadcast_to(sigma, len(rows))
    return [
        _predicted(w / float(t) / r.unit, float(s))
        for r, w, t, s in zip(rows, work, seconds, sigma, strict=True)
    ]  # fmt: skip


def _predicted(value: float, sigma: float) -> Predicted:
    spread = float(np.exp(calibration.P90 * sigma))
    return Predicted(value, value / spread, value * spread)


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One numeric column of a batch. Raises Refused where a cell is missing."""
    return np.array([r.number(name) for r in rows])


def with_law(m: Machine, **values: float) -> Machine:
    """The machine with some shared parameters replaced (a launch regime)."""
    return replace(m, law=m.law | values)
