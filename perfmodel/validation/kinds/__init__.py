"""One file per kind of measured row: which rows are of that kind, and what the cost model says of them."""

from __future__ import annotations

from collections.abc import Sequence

from perfmodel.validation.kinds import attention, copies, elementwise, matrix, mla, moe, network, power, serving
from perfmodel.validation.kinds.base import Kind, Outcome
from perfmodel.validation.rows import Refused, Row

# The first kind that claims a row predicts it.
KINDS: tuple[Kind, ...] = (
    network.DISPATCH, moe.MOE, mla.MLA, matrix.GEMM, attention.DECODE, attention.PREFILL,
    elementwise.ELEMENTWISE, elementwise.LAYER, network.COLLECTIVE, network.P2P, copies.COPY, copies.STORAGE, power.POWER,
    serving.CLOSED_LOOP, serving.OFFLINE, serving.STATIC,
)  # fmt: skip


def kind_of(row: Row) -> Kind | None:
    """The kind of a row; None where no kind claims it."""
    return next((k for k in KINDS if k.claims(row)), None)


def predict(rows: Sequence[Row]) -> list[Outcome]:
    """A prediction or a refusal for every row, in order."""
    outcomes: list[Outcome] = [Refused(f"no law for {r.text('phase')} / {r.text('metric')}") for r in rows]
    for kind in KINDS:
        mine = [i for i, r in enumerate(rows) if kind_of(r) is kind]
        if mine:
            for i, outcome in zip(mine, kind.predict([rows[i] for i in mine]), strict=True):
                outcomes[i] = outcome
    return outcomes
