"""Columns made from arithmetic instead of an estimator: realistic in size and shape, and free of everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from perfmodel import catalog
from perfmodel.machine import from_node
from perfmodel.planner.columns import Column, _prune, bucket_sets
from perfmodel.planner.layout import Layout
from perfmodel.planner.offer import Offer
from perfmodel.serving.queueing import Mix, State

INPUTS = np.geomspace(100, 16000, 20)
OUTPUTS = np.linspace(400, 150, 20)
SHARES = np.exp(-0.5 * ((np.log(INPUTS) - np.log(900)) / 1.1) ** 2) / np.exp(
    -0.5 * ((np.log(INPUTS) - np.log(900)) / 1.1) ** 2
).sum()

# name, matrix FLOP/s, bytes/s, bytes, USD/h per device: ten types from small to large.
DEVICES = (
    ("t4", 65e12, 0.32e12, 16e9, 0.35), ("l4", 121e12, 0.30e12, 24e9, 0.70), ("a10g", 125e12, 0.6e12, 24e9, 1.01),
    ("4090", 165e12, 1.0e12, 24e9, 0.50), ("l40s", 362e12, 0.86e12, 48e9, 1.10), ("a100-40", 312e12, 1.55e12, 40e9, 1.40),
    ("a100-80", 312e12, 2.0e12, 80e9, 1.80), ("h100", 989e12, 3.35e12, 80e9, 3.00), ("h200", 989e12, 4.8e12, 141e9, 3.70),
    ("b200", 2250e12, 8.0e12, 180e9, 5.50),
)  # fmt: skip


def offer(name: str, price: float, max_nodes: int | None = None, **more: Any) -> Offer:
    """A node of eight devices; only its counts, prices and port rates matter."""
    node = catalog.load_node("hgx-h100-8").model_copy(update={"name": name})
    return Offer(node, from_node(catalog.load_node("hgx-h100-8")), max_nodes, price / 3600, "test", **more)


def column(
    of: Offer, chosen: tuple[int, ...], *, prefill: Any, decode: Any, tp: int = 1, role: str = "colocated", room: float = 1.0,
    batch: float = 64.0, kv: Any = 0.0, kv_limit: float = 1e9, power: float = 1000.0, moved: Any = 0.0, buckets: int = 0,
) -> Column:  # fmt: skip
    """A column from plain numbers: demands per bucket (or one for all) and capacities of one instance."""
    count = buckets or max(chosen) + 1
    per = lambda x: np.broadcast_to(np.asarray(x, float), (count,)).copy()  # noqa: E731
    state = State(True, "", 1.0, room, batch, 0.03, 0.03, np.zeros(1), 0.5)
    mix = Mix(np.array([1000.0]), np.array([200.0]), np.array([1.0]))
    return Column(
        Layout(of.label, role, tp, 1, "bf16"), of, chosen, cast(Any, None), cast(Any, None), mix, state, "TPOT p95",
        per(prefill) * (role != "decode"), per(decode) * (role != "prefill"), per(kv), kv_limit, per(moved), power,
    )  # fmt: skip


def large(weights: float = 16e9, tpot: float = 0.05) -> tuple[list[Column], list[Offer], list[float]]:
    """Ten node types x eight layouts x twenty buckets; six times the rates take about 10,000 devices."""
    columns: list[Column] = []
    fleet = []
    per_token = 131072.0
    for name, flops, bandwidth, capacity, price in DEVICES:
        o = offer(name, 8 * price)
        fleet.append(o)
        for role, degrees in (("colocated", (1, 2, 4, 8)), ("prefill", (2, 4)), ("decode", (2, 4))):
            for tp in degrees:
                memory = capacity * tp * 0.9 - weights - 2e9 * tp
                if memory <= 0:
                    continue
                speed = tp * 0.9 ** np.log2(tp)
                for chosen in bucket_sets(20):
                    ks = list(chosen)
                    share = SHARES[ks] / SHARES[ks].sum()
                    context = float(share @ (INPUTS[ks] + OUTPUTS[ks] / 2))
                    # The batch at which a step takes the TPOT limit or memory is full, and a prefill share that leaves room for decode.
                    u = {"colocated": 0.45, "prefill": 0.88, "decode": 0.0}[role]
                    step = tpot * (1 - u) if role == "colocated" else tpot
                    room = step * bandwidth * 0.8 * speed - weights
                    batch = min(room / (context * per_token), memory / (context * per_token) * 0.8, 256.0)
                    if batch < 1:
                        continue
                    prefill = 2 * weights / 2 * INPUTS / (flops * 0.55 * speed)
                    decode = OUTPUTS * tpot
                    held = (INPUTS + OUTPUTS / 2) * (decode if role != "prefill" else prefill)
                    columns.append(replace(
                        column(o, chosen, prefill=prefill, decode=decode, tp=tp, role=role, room=u, batch=batch, kv=held,
                               kv_limit=memory / per_token * 0.8, buckets=20, moved=INPUTS * per_token),
                        limited_by="TPOT p95",
                    ))  # fmt: skip
    return _prune(columns, 20), fleet, [float(x) for x in 12000 * SHARES]
