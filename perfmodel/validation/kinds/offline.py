"""Offline throughput: all requests queued from the start, as many in flight as fit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from perfmodel.serving.closed_loop import Shapes, prompt_work
from perfmodel.validation.kinds import instance
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, rates
from perfmodel.validation.kinds.instance import Instance
from perfmodel.validation.kinds.spread import spread
from perfmodel.validation.kinds.static import counted
from perfmodel.validation.rows import Refused, Row

_MOST_SEQUENCES = 2048.0  # what throughput tests raise an engine's limit of sequences to


def _key(row: Row) -> Hashable:
    if row.text("metric") not in ("throughput", "output_throughput"):
        raise Refused(f"no law for {row.text('metric')} of an offline run")
    return instance.of_row(row)


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    """With b requests always in flight each output token costs tau(b)/b, and each request its prefill."""
    assert isinstance(key, Instance)
    e = instance.estimator(key)
    e.require_fit()
    output = column(rows, "output_len")
    shapes = Shapes(column(rows, "input_len"), output, np.ones(len(rows)), np.ones(len(rows)))
    fits = np.array([e.max_batch(float(t)) for t in shapes.prompt + output])
    batch = np.clip(fits, 1, _MOST_SEQUENCES * key.dp)
    per_request = output * np.asarray(e.decode(batch, shapes.context)) / batch + prompt_work(e, shapes, batch)
    return rates(rows, [counted(r) for r in rows], per_request, np.asarray(spread(key, rows, "offline")))


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


OFFLINE = Kind(
    "offline throughput",
    lambda r: r.text("batch").lower().startswith("max"),
    _predict,
    lambda r: r.text("model"),
    ("engine.trtllm-cpp.host_base", "engine.trtllm-cpp.host_per_sequence"),
)
