"""A small planning job and its parts, for tests that check the program by other means."""

from __future__ import annotations

from pathlib import Path

import highspy
import numpy as np

from perfmodel.planner.columns import Column, Enumerator
from perfmodel.planner.offer import Offer, offers
from perfmodel.serving.workload import buckets, build
from perfmodel.spec import yaml
from perfmodel.spec.plan import PlanFile

TWO_NODES = """
model: llama-3.1-8b
workload:
  trace: {{file: two.csv, columns: {{input: input_len, output: output_len}}}}
  rate: mean
  objectives: {{ttft: {{p95: 1 s}}, tpot: {{p95: 40 ms}}}}
fleet:
  - {{node: l40s-server-4, max_nodes: 3, price: {l40s} USD/h}}
  - {{node: hgx-a100-8, max_nodes: 2, price: 12 USD/h}}
choices: {{roles: {roles}, tp: [1, 2]}}
objective: {objective}
"""


def write_plan(folder: Path, objective: str = "cost", roles: str = "[colocated]", l40s: float = 4.0, rate: float = 30) -> Path:
    """A plan file with a two-length trace of `rate` requests/s."""
    rng = np.random.default_rng(7)
    n = 1500
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    long = rng.random(n) < 0.3
    rows = [f"{a:.4f},{3000 if b else 300},{80 if b else 160}" for a, b in zip(arrival, long, strict=True)]
    (folder / "two.csv").write_text("arrival_s,input_len,output_len\n" + "\n".join(rows) + "\n")
    path = folder / f"plan-{objective}.yaml"
    path.write_text(TWO_NODES.format(objective=objective, roles=roles, l40s=l40s))
    return path


def program_parts(path: Path, keep: int) -> tuple[list[Column], list[Offer], list[float], str]:
    spec = yaml.validate(yaml.read(path), PlanFile)
    workload = build(spec.workload, path.parent, 1, 1)
    groups = buckets(workload, 2)
    fleet = offers(spec.fleet, spec.objective, str(path), {})
    found = Enumerator(spec.model, fleet, spec.choices, spec.workload.objectives, workload, groups, {})
    columns = found.select()
    # A few of each node type keep brute force small; the widest first.
    chosen = []
    for offer in fleet:
        mine = sorted((c for c in columns if c.offer is offer), key=lambda c: (-len(c.buckets), c.layout.tp))
        chosen += mine[:keep]
    return chosen, fleet, [workload.rate * b.share for b in groups], spec.objective


def feasible(columns: list[Column], counts: tuple[int, ...], rates: list[float]) -> bool:
    """Whether some split of the load fits these instances: an LP written from the rows' meaning, not from our builder."""
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    names = [(c, k) for c, column in enumerate(columns) for k in column.buckets if counts[c]]
    for _ in names:
        h.addVar(0, highspy.kHighsInf)
    for k, rate in enumerate(rates):
        mine = [i for i, (_, bucket) in enumerate(names) if bucket == k]
        h.addRow(rate, rate, len(mine), mine, [1.0] * len(mine))
    for c, column in enumerate(columns):
        for demand, room in (
            (column.prefill_s, column.state.utilisation),
            (column.decode_s, column.state.batch),
            (column.kv_token_s, column.kv_limit),
        ):
            mine = [i for i, (owner, _) in enumerate(names) if owner == c]
            h.addRow(-highspy.kHighsInf, room * counts[c] * (1 + 1e-9), len(mine), mine, [demand[names[i][1]] for i in mine])
    h.run()
    return bool(h.getModelStatus() == highspy.HighsModelStatus.kOptimal)
