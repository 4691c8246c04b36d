"""Predict every row of measurement files and score them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from perfmodel import calibration
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.validation import client, memory_rows
from perfmodel.validation.kinds import kind_of, predict
from perfmodel.validation.kinds.base import without_bands
from perfmodel.validation.rows import Predicted, Refused, Row, header, read, scored
from perfmodel.validation.score import Scored

_ALWAYS = ("file", "kind", "hardware", "phase", "metric", "engine")


def predict_rows(rows: Sequence[Row], *, zero_shot: bool = False) -> list[Scored]:
    """Predictions of rows. A row without a usable measured value is refused like one without a prediction.

    zero_shot: each device is predicted with the parameters that were fitted without it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unverified sources have no bearing on a comparison with measurements
        outcomes = _zero_shot(rows) if zero_shot else predict(rows)
    found = []
    for row, outcome in zip(rows, outcomes, strict=True):
        kind = kind_of(row)
        try:
            measured = row.measured
        except Refused as reason:
            measured, outcome = float("nan"), reason
        found.append(Scored(row, measured, outcome, kind.name if kind else "unknown"))
    return found


def _zero_shot(rows: Sequence[Row]) -> list:
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        try:
            device = calibration.device_behind(row.hardware)
        except Refused:
            device = ""
        members.setdefault(device, []).append(i)
    outcomes: list = [None] * len(rows)
    for device, chosen in members.items():
        with calibration.replaced(calibration.fitted_without(device)):
            for i, outcome in zip(chosen, predict([rows[i] for i in chosen]), strict=True):
                outcomes[i] = outcome
    return outcomes


def load(paths: Sequence[str | Path], *, flagged: bool = False, requests_per_client: int | None = None) -> list[Row]:
    """Rows of tidy files; those with a flag only when asked. `requests_per_client` overrides what the rows say."""
    rows = [r for path in paths for r in read(path)]
    rows = rows if flagged else scored(rows)
    if requests_per_client is None:
        return rows
    return [replace(r, cells={**r.cells, "requests_per_client": str(requests_per_client)}) for r in rows]


def validate(
    paths: Sequence[str | Path],
    *,
    flagged: bool = False,
    zero_shot: bool = False,
    requests_per_client: int | None = None,
) -> list[Scored]:
    """Predict all rows of some files, engine memory logs included. Raises SpecError for a file that is no table."""
    logs = [p for p in paths if memory_rows.is_memory_file(p)]
    tidy = load([p for p in paths if p not in logs], flagged=flagged, requests_per_client=requests_per_client)
    return [*predict_rows(tidy, zero_shot=zero_shot), *(s for p in logs for s in memory_rows.score_memory(p))]


def client_sensitivity(rows: Sequence[Scored]) -> dict[str, float]:
    """Median relative change of closed-loop predictions, by metric, if clients sent twice as many requests each.

    What a benchmark's clients do is rarely stated; the start, when all prompts come at once, weighs less in longer runs.
    """
    mine = [s for s in rows if s.kind == "closed-loop serving" and isinstance(s.outcome, Predicted)]
    longer = []
    for s in mine:
        sent = s.row.number("requests_per_client", client.assumed().requests_per_client)
        longer.append(replace(s.row, cells={**s.row.cells, "requests_per_client": str(2 * sent)}))
    changes: dict[str, list[float]] = {}
    with without_bands():
        for s, outcome in zip(mine, predict(longer), strict=True):
            if isinstance(s.outcome, Predicted) and isinstance(outcome, Predicted):
                changes.setdefault(s.row.text("metric"), []).append(outcome.value / s.outcome.value - 1)
    return {metric: float(np.median(found)) for metric, found in sorted(changes.items())}


def check_columns(by: str, paths: Sequence[str | Path]) -> list[str]:
    """Names of the columns to group by. Raises SpecError for one that no file has."""
    known = {*_ALWAYS, *(name for p in paths for name in header(p))}
    names = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise SpecError(f"--by {name}: no such column{did_you_mean(name, known)}")
    return names
