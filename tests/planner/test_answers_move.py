"""Change the question and the plan must move the right way; ask the impossible and be told the nearest possible."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.errors import Infeasible, SpecError
from perfmodel.planner.run import LicenceWarning, plan

BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "input": 1024, "output": 200, "rate": 40.0, "ttft": "800 ms", "tpot": "35 ms", "percentile": "p95",
    "price": {"l40s-server-4": 4.0, "hgx-a100-8": 12.0}, "max_nodes": 20, "objective": "cost", "extra": "",
}  # fmt: skip


def ask(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plan a variation of the base question; fixed lengths unless `trace` rows are given."""
    q = {**BASE, **changes}
    if "trace" in q:
        rows = "\n".join(f"{a},{i},{o}" for a, i, o in q["trace"])
        (folder / "t.csv").write_text(f"arrival_s,input,output\n{rows}\n")
        source = "  trace: {file: t.csv, columns: {input: input, output: output}}\n  rate: mean\n"
    else:
        source = f"  lengths: {{input: {q['input']}, output: {q['output']}}}\n  rate: \"{q['rate']} /s\"\n"
    fleet = "".join(f"  - {{node: {n}, max_nodes: {q['max_nodes']}, price: {p} USD/h}}\n" for n, p in q["price"].items())
    path = folder / "plan.yaml"
    path.write_text(
        f"model: {q['model']}\nworkload:\n{source}"
        f"  objectives: {{ttft: {{{q['percentile']}: {q['ttft']}}}, tpot: {{{q['percentile']}: {q['tpot']}}}}}\n"
        f"fleet:\n{fleet}choices: {{tp: [1, 2]{q['extra']}}}\nobjective: {q['objective']}\n"
    )
    return plan(path, explain=False).data


def poisson(lengths: list[tuple[int, int]], rate: float, n: int = 2400, seed: int = 3) -> list[tuple[float, int, int]]:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    return [(round(float(a), 4), *lengths[i]) for a, i in zip(arrival, rng.integers(0, len(lengths), n), strict=True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask(tmp_path_factory.mktemp("base"))


def replayed(d: dict[str, Any], metric: str) -> float:
    return max(c["replayed_s"] for c in d["percentiles"] if c["metric"] == metric and c["limit_s"] is not None)


def test_the_replay_keeps_every_limit(base: dict[str, Any]) -> None:
    assert all(c["replayed_s"] <= c["limit_s"] for c in base["percentiles"] if c["limit_s"] is not None)
    assert base["rounds"][-1]["missed"] == []


@pytest.mark.parametrize(
    "harder", [{"rate": 80.0}, {"tpot": "20 ms"}, {"percentile": "p99", "tpot": "22 ms"}, {"input": 3000}, {"output": 500}]
)
def test_a_harder_question_is_not_cheaper(harder: dict[str, Any], base: dict[str, Any], tmp_path: Path) -> None:
    assert ask(tmp_path, **harder)["cost_usd_per_hour"] >= base["cost_usd_per_hour"]


def test_much_more_load_costs_much_more(base: dict[str, Any], tmp_path: Path) -> None:
    assert ask(tmp_path, rate=400.0)["cost_usd_per_hour"] > 3 * base["cost_usd_per_hour"]


def test_a_dear_device_is_left_for_the_other(base: dict[str, Any], tmp_path: Path) -> None:
    used = base["nodes"][0]["node"]
    prices = {n: (200.0 if n == used else p) for n, p in BASE["price"].items()}
    other = ask(tmp_path, price=prices)
    assert used not in {n["node"] for n in other["nodes"]}
    assert other["cost_usd_per_hour"] >= base["cost_usd_per_hour"]


def test_lengths_matter_at_equal_means(tmp_path: Path) -> None:
    # 1000 +- 0 against a half-and-half mixture of 100 and 1900, and 200 against 20 and 380: the means are the same.
    even = ask(tmp_path, trace=poisson([(1000, 200)], 150))
    wide = ask(tmp_path, trace=poisson([(100, 380), (1900, 20)], 150))
    assert even["pools"] != wide["pools"]
    assert replayed(wide, "ttft") > replayed(even, "ttft")
    promise = [c["promised_s"] for d in (even, wide) for c in d["percentiles"] if (c["metric"], c["percentile"]) == ("ttft", "p95")]
    assert promise[1] > promise[0]


def test_bursts_raise_the_promised_wait(tmp_path: Path) -> None:
    smooth = [(i / 40, 1024, 200) for i in range(2000)]
    bursts = [(i // 40 * 1.0 + (i % 40) * 1e-3, 1024, 200) for i in range(2000)]
    one, two = ask(tmp_path, trace=smooth), ask(tmp_path, trace=bursts)
    assert one["workload"]["dispersion"] < 0.1 < 5 < two["workload"]["dispersion"]
    assert two["cost_usd_per_hour"] >= one["cost_usd_per_hour"]
    assert replayed(two, "ttft") > replayed(one, "ttft")


def test_fewest_devices_uses_no_more_than_the_cheapest(base: dict[str, Any], tmp_path: Path) -> None:
    fewest = ask(tmp_path, objective="devices")
    assert fewest["devices"] <= base["devices"]
    frugal = ask(tmp_path, objective="power")
    assert frugal["power_w"] <= base["power_w"] * 1.02
    assert frugal["objective"] == "power"


@pytest.mark.parametrize("limit", ["ttft", "tpot"])
def test_impossible_limits_name_the_nearest_possible(limit: str, tmp_path: Path) -> None:
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, **{limit: "1 ms"})
    assert caught.value.exit_code == 3
    assert any(limit in b for b in caught.value.binding)
    # Doing what the message says must work.
    words = str(caught.value.nearest).split()
    value = words[words.index("of") + 1].replace(",", "")
    assert ask(tmp_path, **{limit: f"{value} ms"}, rate=1.0)["pools"]


def test_too_few_nodes_says_how_many(tmp_path: Path) -> None:
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, rate=400.0, max_nodes=1)
    assert "requests/s" in caught.value.reason
    assert caught.value.nearest
    assert any("available" in b for b in caught.value.binding)
    assert ask(tmp_path, rate=400.0, max_nodes=20)["devices"] > 12


def test_a_model_larger_than_the_fleet(tmp_path: Path) -> None:
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, model="llama-3.1-405b")
    assert caught.value.binding == ("memory",)
    assert "GB" in caught.value.reason


def test_geforce_in_a_plan_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        d = ask(tmp_path, price={"rtx-4090-workstation-2": 1.0}, rate=2.0)
    assert any(w.category is LicenceWarning for w in seen)
    assert "licence" in d["warnings"][0]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("objective: cost", "objectve: cost", ["plan.yaml:", "objectve", "objective"]),
        ("tp: [1, 2]", "tp: [0]", ["plan.yaml:", "tp"]),
        ("p95: 800 ms", "95: 800 ms", ["percentile", "p95"]),
        ("p95: 800 ms", "p95: 800 GB", ["800 GB", "time"]),
        ("node: hgx-a100-8", "node: hgx-a10-8", ["did you mean", "hgx-a100-8"]),
        ("node: hgx-a100-8", "node: l40s-server-4", ["twice"]),
        ("price: 12.0 USD/h", "price: -1 USD/h", ["negative"]),
        ("llama-3.1-8b", "lama-3.1-8b", ["did you mean"]),
        ('rate: "40.0 /s"', "rate: peak", ["trace"]),
        ("choices: {", "choices: {techniques: [quest], ", ["technique", "quest"]),
    ],
)
def test_bad_plan_files(before: str, after: str, words: list[str], tmp_path: Path) -> None:
    ask(tmp_path, rate=1.0)
    path = tmp_path / "plan.yaml"
    text = path.read_text().replace('"1.0 /s"', '"40.0 /s"')
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(SpecError) as caught:
        plan(path)
    for word in words:
        assert word in str(caught.value)


def test_missing_price_with_objective_cost(tmp_path: Path) -> None:
    ask(tmp_path, rate=1.0, price={"edge-orin": 1.0, "l40s-server-4": 4.0})
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().replace(", price: 1.0 USD/h", ""))
    with pytest.raises(SpecError, match="no price for edge-orin"):
        plan(path)
