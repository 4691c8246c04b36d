"""Cross-validation with whole groups held out: a model, an (n, k) pair, a head shape."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from perfmodel import calibration
from perfmodel.validation.kinds import kind_of
from perfmodel.validation.kinds.base import Kind
from perfmodel.validation.rows import Row
from perfmodel.validation.run import predict_rows
from perfmodel.validation.score import Scored

FOLDS = 5

Folds = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Kind -> fold -> parameter values fitted to the rows of the other folds."""


def fold_of(row: Row, kind: Kind) -> int:
    """The fold of a row: by a digest of what its kind holds out together, so it does not depend on the other rows."""
    digest = hashlib.sha256(repr(kind.held_out(row)).encode()).digest()
    return digest[0] % FOLDS


def training(rows: Sequence[Row], kind: Kind, fold: int) -> list[Row]:
    """Rows outside one fold."""
    return [r for r in rows if fold_of(r, kind) != fold]


def cross_validated(rows: Sequence[Row], folds: Folds) -> list[Scored]:
    """Every row predicted by the parameters fitted without its fold; kinds without a fit by those of the catalogue."""
    batches: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        kind = kind_of(row)
        fitted = kind is not None and kind.name in folds
        batches[(kind.name, fold_of(row, kind)) if kind is not None and fitted else ("", 0)].append(i)
    found: list[Scored | None] = [None] * len(rows)
    for (kind_name, fold), members in batches.items():
        with calibration.replaced(folds.get(kind_name, {}).get(fold, {})):
            for i, scored in zip(members, predict_rows([rows[i] for i in members]), strict=True):
                found[i] = scored
    return [s for s in found if s is not None]
