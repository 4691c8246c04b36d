"""perfmodel replay: from a trace and a plan to percentiles and rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ONE = ("--model", "llama-3.1-8b", "--hw", "h100-sxm")
DEPLOYMENT = """\
model: llama-3.1-8b
routing: least-loaded
pools:
- {role: prefill, hardware: h100-sxm, replicas: 2}
- {role: decode, hardware: h100-sxm, replicas: 1}
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """300 requests at 8 per second, with times that a server measured: TTFT 100 ms, TPOT 10 ms."""
    path = tmp_path_factory.mktemp("replay") / "trace.csv"
    rng = np.random.default_rng(1)
    at = np.cumsum(rng.exponential(1 / 8, 300))
    rows = [(f"{t:.4f}", rng.integers(50, 2000), rng.integers(2, 200)) for t in at]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["arrival_s", "input", "output", "ttft_ms", "e2e_s"])
        writer.writerows((t, i, o, 100, 0.1 + 0.01 * (int(o) - 1)) for t, i, o in rows)
    return path


@pytest.fixture
def deployment(tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT)
    return path


def test_rows_add_up_to_the_percentiles(cli, trace, tmp_path):
    out = tmp_path / "requests.csv"
    result = cli("replay", trace, *ONE, "--limit-ttft", "60 ms", "--limit-tpot", "9 ms", "--out", out, "--json")
    assert result.code == 0, result.err
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 300
    for metric in ("ttft", "tpot", "e2e"):
        values = [float(r[f"{metric}_s"]) for r in rows]
        assert result.json["percentiles"][metric]["p95"] == pytest.approx(np.percentile(values, 95), abs=2e-6)
    met = np.mean([float(r["ttft_s"]) <= 0.06 and float(r["tpot_s"]) <= 0.009 for r in rows])
    assert 0.1 < met < 1
    assert result.json["attainment"] == pytest.approx(met)
    assert met == np.mean([r["met"] == "1" for r in rows])
    assert result.json["goodput_per_s"] == pytest.approx(met * 300 / result.json["duration_s"])
    for r in rows:
        decoding = float(r["e2e_s"]) - float(r["ttft_s"])
        assert decoding == pytest.approx(float(r["tpot_s"]) * (int(r["output"]) - 1), abs=2e-4)


def test_a_page_names_what_matters(cli, trace):
    text = cli("replay", trace, *ONE, "--replicas", 2, "--limit-ttft", "1 s + 0.3 ms/token").out
    for word in ("TTFT", "TPOT", "longest gap", "p99 in the worst 300 s", "2 devices", "KV peak", "per device", "300 us/token"):
        assert word in text


def test_a_plan_file_and_its_json_give_the_same(cli, trace, deployment, tmp_path):
    one = cli("replay", trace, "--plan", deployment, "--json").json
    assert one["devices"] == 3
    assert [p["instances"] for p in one["pools"]] == [2, 1]
    assert one["pools"][1]["prefilling"] == 0
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"deployment": one["deployment"], "cost_usd_per_hour": 3.0}))
    two = cli("replay", trace, "--plan", plan, "--json").json
    assert one["percentiles"] == two["percentiles"]


def test_a_seed_repeats_and_another_one_differs(cli, trace):
    def ttft(seed):
        data = cli("replay", trace, *ONE, "--replicas", 3, "--routing", "random", "--seed", seed, "--json").json
        return data["percentiles"]["ttft"]["p99"]

    assert ttft(3) == ttft(3)
    assert ttft(3) != ttft(4)


def test_more_load_lengthens_everything(cli, trace):
    def run(*options):
        return cli("replay", trace, *ONE, *options, "--json").json

    base, double, fast = run(), run("--load", 3, "--scale", "compress"), run("--rate", "24 /s")
    for metric in ("ttft", "tpot"):
        assert double["percentiles"][metric]["p90"] > base["percentiles"][metric]["p90"]
    # The trace has 300 requests within its span, 8.0 per second more or less: three times that is 24.
    assert fast["percentiles"]["tpot"]["p50"] == pytest.approx(double["percentiles"]["tpot"]["p50"], rel=0.1)


def test_measured_times_stand_beside_predicted_ones(cli, trace, tmp_path):
    out = tmp_path / "rows.csv"
    data = cli("replay", trace, *ONE, "--compare", "--out", out, "--json").json
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert all(float(r["measured_ttft_s"]) == 0.1 for r in rows)
    assert float(rows[7]["measured_e2e_s"]) == pytest.approx(0.1 + 0.01 * (int(rows[7]["output"]) - 1))
    assert "measured_tpot_s" not in rows[0]
    assert data["errors"]["ttft"]["p50"] == pytest.approx(data["percentiles"]["ttft"]["p50"] / 0.1 - 1, rel=1e-3)
    assert "Predicted against measured" in cli("replay", trace, *ONE, "--compare").out


def test_prefix_caching_and_tiers_of_a_trace_with_blocks(cli):
    trace = ROOT / "examples" / "traces" / "mooncake-conversation.csv.gz"
    base = ("replay", trace, "--model", "llama-3.1-8b", "--hw", "h200-sxm", "--replicas", 2, "--rate", "peak(300 s)", "--json")
    none = cli(*base).json
    hbm = cli(*base, "--prefix-caching").json
    dram = cli(*base, "--prefix-caching", "--tier", "dram 500 GB 50 GB/s").json
    assert none["hit_rate"] == 0
    assert 0 < hbm["hit_rate"] < dram["hit_rate"]
    assert none["requests"] == hbm["requests"]
    assert hbm["percentiles"]["ttft"]["p50"] < none["percentiles"]["ttft"]["p50"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((), "--plan FILE, or --model and --hw"),
        (("--model", "llama-3.1-8b"), "--plan FILE, or --model and --hw"),
        ((*ONE, "--routing", "least-load"), "least-loaded"),
        ((*ONE, "--policy", "chunkd"), "chunked"),
        ((*ONE, "--prefix-caching", "--tier", "dram"), "'dram 512 GB 50 GB/s'"),
        ((*ONE, "--prefix-caching", "--tier", "dram 5 GB 5 parsec"), "parsec"),
        ((*ONE, "--limit-ttft", "fast"), "--limit-ttft"),
        ((*ONE, "--column", "input"), "ROLE=NAME"),
        ((*ONE, "--column", "input=inptu"), "did you mean 'input'"),
        ((*ONE, "--compare", "--load", "2"), "--compare needs the trace as it was measured"),
        ((*ONE, "--rate", "peek"), "peek"),
        ((*ONE, "--replicas", "0"), "replicas"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(cli, trace, options, word):
    result = cli("replay", trace, *options)
    assert result.code == 2
    assert word in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


def test_a_trace_without_measured_times_cannot_be_compared(cli, tmp_path):
    path = tmp_path / "bare.csv"
    path.write_text("arrival_s,input,output\n0,100,10\n1,100,10\n")
    result = cli("replay", path, *ONE, "--compare")
    assert result.code == 2
    assert "no measured times" in result.err
    assert str(path) in result.err


def test_what_does_not_fit_is_infeasible(cli, trace):
    result = cli("replay", trace, "--model", "llama-3.1-70b", "--hw", "h100-sxm")
    assert result.code == 3
    assert "--tp" in result.err
