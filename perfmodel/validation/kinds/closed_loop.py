"""Serving at fixed concurrency: time per output token and time to first token of clients in a closed loop."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from perfmodel.serving.closed_loop import Loop, Shapes, colocated, disaggregated
from perfmodel.validation import client
from perfmodel.validation.kinds import instance, pools
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, times
from perfmodel.validation.kinds.instance import Instance
from perfmodel.validation.kinds.pools import Pools
from perfmodel.validation.kinds.spread import spread
from perfmodel.validation.rows import Refused, Row

_METRICS = ("ttft", "tpot", "itl_derived")


def _key(row: Row) -> Hashable:
    if row.text("metric") not in _METRICS:
        raise Refused(f"no law for {row.text('metric')} at concurrency")
    return pools.of_row(row)._replace(clients=0) if row.text("decode_cfg") else instance.of_row(row)


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    if isinstance(key, Pools):
        asked = replace(shapes(rows), clients=np.array([pools.of_row(r).clients for r in rows]))
        prefill, decode = instance.estimator(key.prefill), instance.estimator(key.decode)
        loop = disaggregated(prefill, decode, asked, key.prefill_workers, key.decode_workers)
        return outcomes(key.decode, rows, loop)
    assert isinstance(key, Instance)
    return outcomes(key, rows, colocated(instance.estimator(key), shapes(rows)))


def shapes(rows: Sequence[Row]) -> Shapes:
    """Lengths and clients of some rows. Raises Refused where one is missing."""
    clients = np.array([r.number("batch", 0.0 if r.text("decode_cfg") else None) for r in rows])
    assumed = client.assumed().requests_per_client
    rounds = np.array([r.number("requests_per_client", assumed) for r in rows])
    if np.any(rounds < 1):
        raise Refused("fewer than one request per client")
    return Shapes(column(rows, "input_len"), column(rows, "output_len"), clients, rounds)


def outcomes(key: Instance, rows: list[Row], loop: Loop) -> list[Outcome]:
    """Predictions of each row's own metric."""
    first = np.array([r.text("metric") == "ttft" for r in rows])
    sigma = np.where(first, spread(key, rows, "ttft"), spread(key, rows, "tpot"))
    return times(rows, np.where(first, loop.ttft, loop.tpot), sigma)


def _claims(row: Row) -> bool:
    """Whether a row was served at fixed concurrency: it says so, or its file has the columns of serving rows."""
    served = row.text("phase") in ("prefill", "decode", "e2e") and bool(row.text("model"))
    if row.text("protocol"):
        return served and row.text("protocol") == "closed-loop"
    return (
        served and ("dp" in row.cells or "decode_cfg" in row.cells) and not row.text("batch").lower().startswith("max")
    )


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


CLOSED_LOOP = Kind(
    "closed-loop serving",
    _claims,
    _predict,
    lambda r: r.text("model"),
    ("engine.*.host_per_sequence", "engine.*.request_latency", "engine.*.queue_steps", "law.queued_launch"),
    rows_to_fit=250,
)
