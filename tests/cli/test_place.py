"""perfmodel place experts | pipeline | offload | adapters: what they print, read and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXPERTS = ("experts", "--model", "mixtral-8x7b", "--hw", "hgx-h100-8", "--ep", "4", "--batch", "4096")
PIPELINE = ("pipeline", "--model", "llama-3.1-8b", "--isl", "256", "--osl", "32")
OFFLOAD = ("offload", "--model", "opt-30b", "--hw", "t4-server")
ADAPTERS = ("adapters", "--model", "llama-3.1-8b", "--hw", "l40s-server-4", "--slots", "3")


@pytest.fixture
def place(cli: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: cli("place", *arguments)


def test_group_lists_its_verbs(place: Callable[..., Any]) -> None:
    outcome = place()
    assert outcome.code == 0
    assert all(f"\n  {verb} " in outcome.out for verb in ("experts", "pipeline", "offload", "adapters"))
    assert "did you mean 'experts'" in place("expert").err


def test_experts_from_loads(place: Callable[..., Any], tmp_path: Path) -> None:
    """Two layers, one even and one with a hot expert: 4 of 11 shares against a mean of 11/4 on four ranks."""
    file = tmp_path / "loads.csv"
    file.write_text("1,1,1,1,1,1,1,1\n4,1,1,1,1,1,1,1\n")
    result = place(*EXPERTS, "--loads", file, "--slots", "3", "--samples", "20000", "--json")
    assert result.code == 0, result.err
    even, hot = result.json["layers"]
    assert even["before"]["imbalance"] == pytest.approx(1.0, abs=0.02)
    assert hot["before"]["imbalance"] > 1.3 > hot["after"]["imbalance"]
    assert hot["after"]["tokens_per_s"] > hot["before"]["tokens_per_s"]
    assert hot["bound_s"] <= hot["after"]["objective_s"] <= hot["before"]["objective_s"]
    assert {e for rank in hot["ranks"] for e in rank} == set(range(8))
    assert max(map(len, hot["ranks"])) <= 3


def test_experts_page_and_coactivation(place: Callable[..., Any], tmp_path: Path) -> None:
    loads, pairs = tmp_path / "loads.json", tmp_path / "pairs.json"
    loads.write_text("[2, 1, 1, 1, 1, 1, 1, 2]")
    pairs.write_text(json.dumps([[0.0 if i == j else 0.1 for j in range(8)] for i in range(8)]))
    page = place(*EXPERTS, "--loads", loads, "--coactivation", pairs, "--nodes", "2")
    assert page.code == 0, page.err
    assert all(word in page.out for word in ("contiguous", "bound", "gap", "binding", "experts by rank", "2 nodes"))


@pytest.mark.parametrize(
    ("content", "words"),
    [("1,2,x,4,5,6,7,8\n", "loads.csv:1: a cell"), ("1,2\n", "2 expert loads"), ("1,2\n1\n", "loads.csv:2"), ("", "no numbers")],
)
def test_bad_loads_name_the_place(place: Callable[..., Any], tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "loads.csv"
    file.write_text(content)
    outcome = place(*EXPERTS, "--loads", file)
    assert (outcome.code, words in outcome.err) == (2, True), outcome.err


def test_experts_need_a_popularity_and_room(place: Callable[..., Any]) -> None:
    assert "either --zipf or --loads" in place(*EXPERTS).err
    outcome = place(*EXPERTS, "--zipf", "1", "--slots", "1")
    assert outcome.code == 3
    assert "2 slots per rank" in outcome.err


def test_pipeline_page_and_solvers(place: Callable[..., Any]) -> None:
    devices = ("--devices", "l40s, t4", "--link", "ethernet-100g")
    page = place(*PIPELINE, *devices)
    assert page.code == 0, page.err
    assert all(word in page.out for word in ("bottleneck", "gap", "uniform", "in proportion to memory", "without one t4"))
    found = place(*PIPELINE, *devices, "--json").json
    assert found["stages"][-1]["last_layer"] == 32
    assert found["seconds_per_request"] <= min(v for v in found["alternatives"].values() if v is not None)


def test_pipeline_latency_in_the_order_given(place: Callable[..., Any]) -> None:
    found = place(*PIPELINE, "--devices", "t4,l40s", "--goal", "latency", "--ordered", "--json").json
    assert [s["device"] for s in found["stages"]] == ["l40s"]


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--devices", "l40ss"), 2, "did you mean 'l40s'"),
        (("--devices", "l40s", "--link", "10 Gb/s"), 2, "unknown unit"),
        (("--devices", "l40s,t4", "--between", "1:3=ethernet-10g"), 2, "hosts 1 to 2"),
        (("--devices", "l40s,t4", "--between", "1-2"), 2, "1:3=ethernet-100g"),
        (("--devices", "t4", "--batch", "1"), 3, "narrower checkpoint"),
    ],
)
def test_pipeline_refusals(place: Callable[..., Any], extra: tuple[str, ...], code: int, words: str) -> None:
    outcome = place(*PIPELINE, *extra)
    assert (outcome.code, words in outcome.err) == (code, True), outcome.err


def test_offload_page_and_policy(place: Callable[..., Any]) -> None:
    page = place(*OFFLOAD, "--attention", "host", "--policy", "20,80,0,100,0,100:48x3")
    assert page.code == 0, page.err
    assert all(word in page.out for word in ("the policy given", "binds:", "no overlap", "1 GB more on the host"))
    # FlexGen's policy for the whole host does not fit here, and is only priced.
    less = place(*OFFLOAD, "--attention", "host", "--json", "--host-memory", "40 GB", "--policy", "20,80,0,100,0,100:48x3").json
    assert less["given"]["held_bytes"]["host"] > 40e9
    assert less["best"]["tokens_per_s"] < less["given"]["tokens_per_s"]
    assert less["best"]["held_bytes"]["host"] <= 40e9 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--policy", "20,80"), 2, "write it like"),
        (("--policy", "90,80,0,100,0,100:4x1"), 2, "add up to 1"),
        (("--disk", "1 GB", "--host-memory", "1 GB"), 3, "more disk"),
        (("--host-attention", "12 GFLOP/s"), 2, "bandwidth"),
    ],
)
def test_offload_refusals(place: Callable[..., Any], extra: tuple[str, ...], code: int, words: str) -> None:
    outcome = place(*OFFLOAD, *extra)
    assert (outcome.code, words in outcome.err) == (code, True), outcome.err


def test_adapters_from_a_table(place: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "adapters.csv"
    file.write_text("adapter,requests,rank\nsql,60,16\nchat,30,64\nlegal,5,8\nmail,5,8\n")
    arguments = (*ADAPTERS, "--table", file, "--rate", "2", "--request-time", "1 s")
    found = place(*arguments, "--json").json
    kept = {a["name"] for a in found["adapters"] if a["on_device"]}
    assert {"sql", "chat"} <= kept
    assert sum(a["rate"] for a in found["adapters"]) == pytest.approx(2.0)
    page = place(*arguments)
    assert all(word in page.out for word in ("meet their adapter", "gap", "one more slot", "none kept"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("adaptor,rate\na,1\n", "no column 'adapter' (did you mean 'adaptor'?)"),
        ("adapter,rate\na,-1\n", ":2: rate"),
        ("adapter,rate,rank\na,1,2.5\n", ":2: rank"),
        ("adapter,requests\na,1\n", "needs --rate"),
        ("adapter,rate\na,1\na,1\n", "listed twice"),
        ("adapter,rate\n", "no rows"),
    ],
)
def test_bad_tables_name_the_place(place: Callable[..., Any], tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "adapters.csv"
    file.write_text(content)
    outcome = place(*ADAPTERS, "--table", file)
    assert (outcome.code, words in outcome.err) == (2, True), outcome.err


def test_more_under_way_than_slots_is_infeasible(place: Callable[..., Any]) -> None:
    outcome = place(*ADAPTERS, "--count", "50", "--rate", "20")
    assert outcome.code == 3
    assert "slots per replica" in outcome.err
