"""Errors of predictions, by group: |predicted/measured - 1| in the row's own unit, and what the band covers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfmodel.validation.rows import TIMES, Predicted, Refused, Row


@dataclass(frozen=True)
class Scored:
    """A row with what came of it."""

    row: Row
    measured: float
    outcome: Predicted | Refused
    kind: str


@dataclass(frozen=True)
class Score:
    """Errors of one group as fractions; a refused row counts as an error of 1 in mape, median_ape and p90_ape."""

    rows: int
    predicted: int
    refused: dict[str, int]
    mape: float
    median_ape: float
    p90_ape: float
    bias: float
    """Median signed error of the predicted rows."""
    mean_abs_log: float
    time_weighted_ape: float
    """Errors of rows that are times, weighted by the measured seconds: what their sum could be off by."""
    spearman: float
    """Rank correlation of predicted and measured; NaN below three rows."""
    coverage: float
    """Share of predicted rows inside their p10-p90 interval."""
    width: float
    """Median of (p90 - p10) / expected."""
    pinball: float
    """Mean pinball loss of p10 and p90 relative to the measured value."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: NaN becomes None."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in self.__dict__.items()}


def score(rows: Sequence[Scored]) -> Score:
    """Score a group of at least one row."""
    good = [(s.measured, s.outcome) for s in rows if isinstance(s.outcome, Predicted)]
    refused = Counter(str(s.outcome) for s in rows if not isinstance(s.outcome, Predicted))
    lost = len(rows) - len(good)
    measured = np.array([m for m, _ in good])
    value, low, high = (np.array(x) for x in zip(*(p for _, p in good), strict=True)) if good else (np.array([]),) * 3
    signed = value / measured - 1
    nan = float("nan")
    errors = np.concatenate([np.abs(signed), np.ones(lost)])
    times = [(s.measured * TIMES[u], _error(s)) for s in rows if (u := s.row.text("unit")) in TIMES and s.measured > 0]
    return Score(
        len(rows), len(good), dict(refused.most_common()),
        float(errors.mean()), float(np.median(errors)), float(np.quantile(errors, 0.9)),
        float(np.median(signed)) if good else nan,
        float(np.mean(np.abs(np.log(value / measured)))) if good else nan,
        sum(t * e for t, e in times) / sum(t for t, _ in times) if times else nan,
        spearman(value, measured) if len(good) > 2 else nan,
        float(np.mean((measured >= low) & (measured <= high))) if good else nan,
        float(np.median((high - low) / value)) if good else nan,
        float(np.mean((_pinball(measured, low, 0.1) + _pinball(measured, high, 0.9)) / measured / 2)) if good else nan,
    )  # fmt: skip


def _error(s: Scored) -> float:
    return abs(s.outcome.value / s.measured - 1) if isinstance(s.outcome, Predicted) else 1.0


def _pinball(measured: np.ndarray, quantile: np.ndarray, p: float) -> np.ndarray:
    return np.maximum(p * (measured - quantile), (1 - p) * (quantile - measured))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two lists; NaN where one of them is constant."""
    ra, rb = _ranks(a), _ranks(b)
    if ra.std() == 0 or rb.std() == 0:
        return float("nan")
    return float(np.corrcoef(ra, rb)[0, 1])


def by(rows: Sequence[Scored], keys: Sequence[str]) -> list[tuple[dict[str, str], Score]]:
    """Scores of every combination of the named columns (`file` and `kind` included), in order."""
    groups: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for s in rows:
        groups[tuple(_cell(s, k) for k in keys)].append(s)
    return [(dict(zip(keys, values, strict=True)), score(members)) for values, members in sorted(groups.items())]


def _cell(s: Scored, name: str) -> str:
    special: dict[str, Callable[[], str]] = {"file": lambda: s.row.file, "kind": lambda: s.kind}
    return special[name]() if name in special else s.row.text(name)
