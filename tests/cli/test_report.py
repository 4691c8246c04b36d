"""`plan` writes a plan.json that `report` and `replay` read: the same requests on the same pools see the same latencies."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PLANS = {"colocated": "roles: [colocated]\n  tp: [1, 2]", "split": "roles: [prefill, decode]\n  tp: [1]"}
REQUESTS, RATE = 4_000, 20.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace of Poisson arrivals and skewed lengths, and two plan files that read it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "traces").mkdir()
    rng = np.random.default_rng(5)
    arrival = np.cumsum(rng.exponential(1 / RATE, REQUESTS))
    inputs, outputs = (np.clip(rng.lognormal(m, s, REQUESTS), 4, 8000).astype(int) for m, s in ((6.8, 0.8), (4.6, 0.5)))
    rows = [f"{a:.6f},{i},{o}" for a, i, o in zip(arrival, inputs, outputs, strict=True)]
    (folder / "traces" / "t.csv").write_text("\n".join(["arrival_s,input_len,output_len", *rows]) + "\n")
    for name, choices in PLANS.items():
        (folder / f"{name}.yaml").write_text(f"""\
model: llama-3.1-8b
workload:
  trace: {{file: traces/t.csv, columns: {{arrival_s: arrival_s, input: input_len, output: output_len}}}}
  rate: mean
  objectives: {{ttft: {{p95: 1 s}}, tpot: {{p95: 40 ms}}}}
fleet:
  - {{node: hgx-h100-8, max_nodes: 2, price: 20 USD/h}}
choices:
  buckets: 2
  {choices}
objective: devices
""")
    return folder


@pytest.fixture(scope="module")
def planned(home: Path) -> dict[str, Path]:
    from perfmodel.planner.run import plan
    from perfmodel.report import page

    return {name: page.write(plan(home / f"{name}.yaml", explain=False), home / name).with_name("plan.json") for name in PLANS}


@pytest.mark.parametrize("name", PLANS)
def test_replay_of_a_plan_sees_what_the_plan_saw(name: str, home: Path, planned: dict[str, Path], cli: Callable[..., Any]) -> None:
    """Requests are drawn to pools by other random numbers, so a few per cent remain."""
    seen = cli("replay", home / "traces" / "t.csv", "--plan", planned[name], "--json").json["percentiles"]
    for check in json.loads(planned[name].read_text())["percentiles"]:
        assert seen[check["metric"]][check["percentile"]] == pytest.approx(check["replayed_s"], rel=0.05), check


@pytest.mark.parametrize("name", PLANS)
def test_a_report_of_a_plan_says_what_the_plan_said(
    name: str, planned: dict[str, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    stored = json.loads(planned[name].read_text())
    before = planned[name].read_bytes()
    done = cli("report", planned[name], "--out", tmp_path, "--json")
    assert (done.code, [line for line in done.err.splitlines() if line.startswith("warning")]) == (0, [])
    (again,) = done.json["plans"]
    for old, new in zip(stored["percentiles"], again["percentiles"], strict=True):
        times = ("limit_s", "promised_s", "replayed_s", "worst_s")
        assert {k: new[k] for k in times if old[k] is not None} == pytest.approx({k: old[k] for k in times if old[k] is not None})
    numbers = ("replicas", "batch", "kv_share", "highest_rate_per_replica")
    for old, new in zip(stored["pools"], again["pools"], strict=True):
        assert (new["role"], new["offer"]) == (old["role"], old["offer"])
        assert [new[k] for k in numbers] == pytest.approx([old[k] for k in numbers])
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "as stored" in page
    assert stored["optimal_over"] in page
    assert planned[name].read_bytes() == before
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_that_moved_asks_for_its_trace(home: Path, planned: dict[str, Path], tmp_path: Path, cli: Callable[..., Any]) -> None:
    moved = tmp_path / "elsewhere" / "plan.json"
    moved.parent.mkdir()
    shutil.copy(planned["colocated"], moved)
    lost = cli("report", moved)
    assert lost.code == 2
    assert "traces/t.csv" in lost.err
    assert "--trace FILE" in lost.err
    assert cli("report", moved, "--trace", home / "traces" / "t.csv").code == 0
    assert (moved.parent / "report.html").exists()
    twice = cli("report", moved, "--trace", home / "traces" / "t.csv", "--trace", home / "traces" / "t.csv")
    assert twice.code == 2
    assert "2 times" in twice.err


@pytest.mark.parametrize(("factor", "code", "words"), [(1.2, 0, "another version, calibration or trace"), (9.0, 2, "another trace?")])
def test_another_trace_is_noticed(
    factor: float, code: int, words: str, home: Path, planned: dict[str, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Longer prompts cannot have the same first tokens, and far longer ones cannot be served at all."""
    header, *rows = (home / "traces" / "t.csv").read_text().splitlines()
    longer = [f"{a},{int(factor * int(i))},{o}" for a, i, o in (row.split(",") for row in rows)]
    (tmp_path / "t.csv").write_text("\n".join([header, *longer]))
    done = cli("report", planned["colocated"], "--out", tmp_path, "--trace", tmp_path / "t.csv")
    assert done.code == code
    assert words in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("request"), ["no `request`"]),
        (lambda d: d["request"].pop("folder"), ["missing key 'request.folder'"]),
        (lambda d: d["plans"][0].pop("nodes"), ["missing key 'plans.0.nodes'"]),
        (lambda d: d["plans"][0].pop("binding"), ["'binding'", "perfmodel plan"]),
        (lambda d: d["plans"][0]["pools"][0].pop("offer"), ["offer"]),
        (lambda d: d["plans"][0]["pools"][0].update(offer="dgx"), ["dgx"]),
        (lambda d: d["plans"][0]["pools"][0].update(requests_per_s_by_bucket="many"), ["requests_per_s_by_bucket"]),
        (lambda d: d["plans"][0]["pools"][0].update(requests_per_s_by_bucket=[1.0]), ["1 range", "another trace"]),
        (lambda d: d["plans"][0]["deployment"]["pools"][0].update(tp=3), ["tp"]),
        (lambda d: d["request"]["content"].update(model="lama-3.1-8b"), ["did you mean 'llama-3.1-8b'"]),
        (lambda d: d["request"]["content"].update(flet=[]), ["flet"]),
        (lambda d: d.update(request=3), ["no `request`"]),
        (lambda d: d.update(plans=3), ["plans"]),
    ],
)
def test_a_bad_plan_is_one_line(
    change: Callable[[Any], Any], words: list[str], planned: dict[str, Path], cli: Callable[..., Any]
) -> None:
    data = json.loads(planned["colocated"].read_text())
    change(data)
    bad = planned["colocated"].with_name("bad.json")
    bad.write_text(json.dumps(data, indent=1))
    result = cli("report", bad)
    assert result.code == 2, result.err
    assert all(word in result.err for word in words), result.err
    assert result.err.count("error:") == 1
    assert "Traceback" not in result.err
    assert result.out == ""


FLEETS = """\
services:
  - name: chat
    model: llama-3.1-8b
    workload:
      {lengths: {input: 2000, output: 200}, rate: 60 /s, objectives: {ttft: {p95: 2 s}, tpot: {p95: 60 ms}, e2e: {p95: 30 s}}}
  - name: code
    model: qwen2.5-7b
    workload: {lengths: {input: 3000, output: 100}, rate: 20 /s, objectives: {ttft: {p95: 2 s}, tpot: {p95: 40 ms}}}
regions: {near: {rtt: 10 ms}, far: {rtt: 120 ms, electricity: 0.1 USD/kWh}}
fleet:
  - {node: hgx-h100-8, max_nodes: 4, price: 24 USD/h, region: near, mtbf: 2000 h, mttr: 24 h}
  - node: l40s-server-8
    max_nodes: 8
    region: far
    terms: {on-demand: {price: 7 USD/h}, spot: {price: 3 USD/h, interruptions: 0.02 /h}}
startup: {provisioning: 120 s, weights: 1 GB/s, engine_init: 60 s}
resilience: {survive: [node], availability: 0.999}
choices: {tp: [1], weight_dtype: [bf16]}
objective: cost
"""


def test_services_regions_and_terms_come_back(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Two services on spot nodes 120 ms away: both are there again, first tokens with the way to the client."""
    (tmp_path / "job.yaml").write_text(FLEETS)
    out = tmp_path / "out"
    stored = cli("plan", tmp_path / "job.yaml", "--quick", "--out", out, "--json").json
    assert {n["term"] for n in stored["nodes"]} == {"spot"}
    done = cli("report", out / "plan.json", "--json")
    assert not [line for line in done.err.splitlines() if line.startswith("warning")]
    services = done.json["plans"][0]["services"]
    assert [s["name"] for s in services] == ["chat", "code"]
    for old, new in zip(stored["services"], services, strict=True):
        assert [c["replayed_s"] for c in new["percentiles"]] == pytest.approx([c["replayed_s"] for c in old["percentiles"]])
        assert min(c["replayed_s"] for c in new["percentiles"] if c["metric"] == "ttft") > 0.12
    assert "e2e" in {c["metric"] for c in services[0]["percentiles"]}
    page = html.unescape((out / "report.html").read_text())
    for words in ("TPOT p95 of code against throughput", "in far (spot)", "qwen2.5-7b", "Load ×1: 80 requests/s", "end to end p95"):
        assert words in page
