"""Small plan files of one 8-billion-parameter model, for tests that change one thing at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from perfmodel.planner.run import PlanRun, plan

L40S = [{"node": "l40s-server-4", "price": "4 USD/h"}]
BOTH: dict[str, Any] = {"ttft": {"p95": "1 s"}, "tpot": {"p95": "40 ms"}}
CHOICES: dict[str, Any] = {"tp": [1], "buckets": 1}


def ask(
    folder: Path, objectives: dict[str, Any] | None = None, *, trace: dict[str, Any] | None = None, rate: str = "60 /s",
    explain: bool = False, replay_all: bool = False, **changes: Any,
) -> PlanRun:  # fmt: skip
    """Plan 1,024 input and 256 output tokens at a rate, or the trace that `write` left in the folder."""
    source: dict[str, Any] = {"lengths": {"input": 1024, "output": 256}} if trace is None else {"trace": {"file": "t.csv", **trace}}
    spec = {
        "model": "llama-3.1-8b", "fleet": L40S, "choices": CHOICES,
        "workload": {**source, "rate": rate, "objectives": objectives or BOTH}, **copy.deepcopy(changes),
    }  # fmt: skip
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return plan(path, explain=explain, replay_all=replay_all)


def cost(run: PlanRun) -> float:
    return float(run.data["cost_usd_per_hour"])


def busy(run: PlanRun) -> int:
    """Devices in use: finer than whole nodes."""
    return int(run.data["devices_busy"])


def write(folder: Path, rows: Iterable[Iterable[Any]], header: str = "arrival_s,input,output") -> None:
    lines = (",".join(str(x) for x in row) for row in rows)
    (folder / "t.csv").write_text(header + "\n" + "\n".join(lines) + "\n")


def poisson(n: int, rate: float, seed: int = 3) -> np.ndarray:
    """Arrivals [s], to the tenth of a millisecond."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n)).round(4)
