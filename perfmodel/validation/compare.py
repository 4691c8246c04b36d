"""Score predictions against measured rows: decode steps of serving engines, and single kernels."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perfmodel import catalog
from perfmodel.machine import machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Group
from perfmodel.roofline import op_cost
from perfmodel.serving.batching import closed_loop_step
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Moe

# The rows name number formats by width; the engines' formats behind them.
_WEIGHTS = {"fp4": "nvfp4", "fp8": "fp8", "": None}
_SHORTEST_PREFILL_US = 20.0

Row = dict[str, str]


@dataclass(frozen=True)
class Score:
    """Errors of one group of rows: |predicted/measured - 1| and the median signed error."""

    group: str
    rows: int
    median: float
    mean: float
    bias: float


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a (compressed) CSV with comment lines."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(line for line in stream if not line.startswith("#"))


def score(group: str, predicted: list[float], measured: list[float]) -> Score:
    """Errors of one group."""
    ratio = np.array(predicted) / np.array(measured) - 1
    return Score(group, ratio.size, float(np.median(abs(ratio))), float(np.mean(abs(ratio))), float(np.median(ratio)))


def scores(rows: Iterator[Row], predict: Callable[[Row], tuple[str, float, float] | None]) -> list[Score]:
    """Group the predictions of a file; `predict` names the group and gives (predicted, measured)."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        found = predict(row)
        if found is not None:
            groups[found[0]].append(found[1:])
    return [score(name, *(list(x) for x in zip(*pairs, strict=True))) for name, pairs in sorted(groups.items())]


def serving_step(row: Row) -> tuple[str, float, float]:
    """Milliseconds per output token of an engine that serves `concurrency` clients in a closed loop."""
    model = catalog.load_model(row["model"])
    # These checkpoints carry their own format whatever the row calls it.
    native = model.dtype not in ("bf16", "fp16") and (row["dtype"] != "fp4" or model.dtype == "nvfp4")
    mixed = model.expert_dtype is not None
    weight = None if native or mixed else _WEIGHTS[row["dtype"]]
    seconds = closed_loop_step(
        row["model"], row["hardware"], int(row["input_len"]), int(row["output_len"]), float(row["concurrency"]),
        tp=int(row["tp"]), dp=int(row["dp"]), ep=int(row["ep"]), engine=row["engine"], weight_dtype=weight,
    )  # fmt: skip
    moe = any(isinstance(b.ffn, Moe) for b in model.blocks.values())
    device = machine(row["hardware"]).device.architecture
    return f"{'mixture of experts' if moe else 'dense'}, {device}", seconds * 1e3, float(row["tpot_ms"])


def bf16_gemm(row: Row) -> tuple[str, float, float]:
    """Microseconds of one bf16 matrix product."""
    bf16 = get_format("bf16")
    m = machine(row["hardware"])
    op = gemm("gemm", float(row["m"]), float(row["n"]), float(row["k"]), weight=bf16, act=bf16, dtype="bf16")[0]
    return m.device.architecture, float(op_cost(op, m).seconds) * 1e6, float(row["time_us"])


def attention(row: Row, *, decode: bool) -> tuple[str, float, float] | None:
    """Microseconds of one attention kernel; prefill kernels under 20 us time their launch and are left out."""
    measured = float(row["time_us"])
    if not decode and measured < _SHORTEST_PREFILL_US:
        return None
    batch, context = float(row["batch"]), float(row["context_len"])
    group = Group(batch, 1, context - 1, decode=True) if decode else Group(batch, context, 0)
    heads, kv_heads, dim = float(row["n_heads"]), float(row["n_kv_heads"]), float(row["head_dim"])
    m = machine(row["hardware"])
    op = softmax_attention(
        "attention", group, heads=heads, kv_heads=kv_heads, qk_dim=dim, v_dim=dim, kv_elements=2 * kv_heads * dim,
        kv_width=2, act_width=2, dtype="bf16",
    )  # fmt: skip
    return m.device.architecture, float(op_cost(op, m).seconds) * 1e6, measured


def table(folder: Path) -> list[tuple[str, Score]]:
    """Every file of measured rows that the project carries, scored by kind and device generation."""
    kinds: list[tuple[str, str, Callable[[Row], tuple[str, float, float] | None]]] = [
        ("time per output token, serving", "serving_tpot.csv.gz", serving_step),
        ("GEMM, bf16", "gemm_bf16.csv.gz", bf16_gemm),
        ("decode attention, bf16", "attention_decode.csv.gz", lambda r: attention(r, decode=True)),
        ("prefill attention, bf16", "attention_prefill.csv.gz", lambda r: attention(r, decode=False)),
    ]
    return [(kind, s) for kind, file, predict in kinds for s in scores(read_rows(folder / file), predict)]
