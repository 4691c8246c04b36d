"""Techniques as choices of a plan: tried beside none, lossy ones only where they are allowed, and each with its price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfmodel.errors import SpecError
from perfmodel.planner.run import plan
from perfmodel.spec import deployment

JOB = """
model: llama-3.1-8b
workload:
  lengths: {{input: 6000, output: 600}}
  rate: {rate} /s
  objectives: {{ttft: {{p95: 2 s}}, tpot: {{p95: 60 ms}}}}
fleet: [{{node: l40s-server-4, max_nodes: 16, price: 4 USD/h}}]
choices: {{tp: [1], {choices}}}
"""


def planned(folder: Path, choices: str, rate: float = 24.0) -> Any:
    path = folder / "job.yaml"
    path.write_text(JOB.format(choices=choices, rate=rate))
    return plan(path, explain=False).data


def test_a_lossy_technique_needs_leave(tmp_path: Path) -> None:
    both = "techniques: [['speculation:acceptance=0.7', 'kv-eviction:budget=512']], allow: [fp8]"
    for choices in ("techniques: ['kv-quantization:bits=4']", both):
        with pytest.raises(SpecError, match="lossy; add `allow") as caught:
            planned(tmp_path, choices)
        assert caught.value.line == 8
    with pytest.raises(SpecError, match="did you mean 'kv-quantization'"):
        planned(tmp_path, "techniques: [kv-quantisation]")


def test_fewer_bits_carry_more_with_fewer_nodes_and_say_so(tmp_path: Path) -> None:
    plain = planned(tmp_path, "kv_dtype: auto")
    narrow = planned(tmp_path, 'techniques: ["kv-quantization:bits=4,group=64"], allow: [kv-quantization]')
    identity = planned(tmp_path, 'techniques: ["kv-quantization:bits=16"]')
    assert narrow["cost_usd_per_hour"] < plain["cost_usd_per_hour"]
    assert identity["cost_usd_per_hour"] == pytest.approx(plain["cost_usd_per_hour"])
    assert narrow["pools"][0]["techniques"] == ["kv-quantization:bits=4,group=64"]
    assert any("kv-quantization" in text for text in narrow["lossy"])
    assert plain["pools"][0]["techniques"] == []


def test_what_runs_names_its_techniques(tmp_path: Path) -> None:
    data = planned(tmp_path, "techniques: [], allow: ['kv-quantization:bits=4,group=64']")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert deployment.read(path).pools[0].techniques == ("kv-quantization:bits=4,group=64",)
