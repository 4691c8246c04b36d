"""`estimate --plan`: the pool of a plan says what is not said on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEPLOYMENT: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "engine": "sglang",
    "pools": [
        {"role": "prefill", "hardware": "hgx-h100-8", "tp": 2, "replicas": 2},
        {"role": "decode", "hardware": "hgx-h100-8", "tp": 4, "weight_dtype": "fp8", "replicas": 1},
    ],
}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"objective_value": 1.0, "deployment": DEPLOYMENT}))
    return path


def test_a_pool_stands_for_its_options(plan: Path, cli: Callable[..., Any]) -> None:
    by_plan = cli("estimate", "--plan", plan, "--pool", 2, "--batch", 4, "--json").json
    said = ("--model", "llama-3.1-8b", "--hw", "hgx-h100-8", "--tp", 4, "--weight-dtype", "fp8", "--engine", "sglang")
    assert by_plan == cli("estimate", *said, "--batch", 4, "--json").json


def test_an_option_beats_the_pool(plan: Path, cli: Callable[..., Any]) -> None:
    found = cli("estimate", "--plan", plan, "--tp", 1, "--engine", "vllm", "--json").json["configuration"]
    assert (found["tp"], found["engine"], found["model"]) == (1, "vllm", "llama-3.1-8b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pools": DEPLOYMENT["pools"][:1]}, ["no decode pool"]),
        ({"pools": [{"hardware": "hgx-h100-8", "tpp": 2}]}, ["tpp", "did you mean 'tp'"]),
        ({"pools": []}, ["pools"]),
        ({"engine": "vlm"}, ["vllm"]),
    ],
)
def test_a_bad_plan_is_one_line(change: dict[str, Any], words: list[str], plan: Path, cli: Callable[..., Any]) -> None:
    plan.write_text(json.dumps({"deployment": DEPLOYMENT | change}, indent=1))
    result = cli("estimate", "--plan", plan)
    assert result.code == 2
    assert all(word in result.err for word in words)
    assert "Traceback" not in result.err


def test_a_planning_job_is_not_a_plan(cli: Callable[..., Any]) -> None:
    result = cli("estimate", "--plan", Path(__file__).parents[2] / "examples/small-fleet.yaml")
    assert result.code == 2
    assert "perfmodel plan" in result.err


def test_a_pool_that_is_not_there(plan: Path, cli: Callable[..., Any]) -> None:
    result = cli("estimate", "--plan", plan, "--pool", 3)
    assert result.code == 2
    assert "1, 2" in result.err
