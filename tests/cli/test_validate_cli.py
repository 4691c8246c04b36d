"""`perfmodel validate`, `calibrate` and `ingest` as a shell sees them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perfmodel import calibration

KEYS = {
    "rows", "predicted", "refused", "mape", "median_ape", "p90_ape", "bias", "mean_abs_log", "time_weighted_ape", "spearman",
    "coverage", "width", "pinball",
}  # fmt: skip
HEAD = "hardware,phase,metric,value,unit,dtype,m,n,k,flag\n"
# 2 x 4096^3 FLOP in 200 us is 687 TFLOP/s of 989.
ROWS = (
    "H100-SXM-80GB,gemm,kernel_time,200,us,bf16,4096,4096,4096,\n"
    "H100-SXM-80GB,gemm,kernel_time,15,us,bf16,16,4096,4096,\n"
    "H100-SXM-80GB,gemm,kernel_time,1,us,bf16,16,4096,4096,faster_than_light\n"
    "Cray-1,gemm,kernel_time,15,us,bf16,16,4096,4096,\n"
)


@pytest.fixture(autouse=True)
def _forget_files() -> Iterator[None]:
    yield
    calibration.forget_files()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(HEAD + ROWS, encoding="utf-8")
    return path


def test_json_has_groups_and_overall(cli: Callable[..., Any], file: Path) -> None:
    data = cli("validate", file, "--json").json
    assert set(data) == {"groups", "overall"}
    assert set(data["overall"]) == KEYS
    assert [g["hardware"] for g in data["groups"]] == ["Cray-1", "H100-SXM-80GB"]
    assert all(set(g) == KEYS | {"file", "hardware", "phase", "metric"} for g in data["groups"])
    assert data["overall"]["rows"] == 3  # the flagged row is left out
    assert data["overall"]["predicted"] == 2
    assert data["overall"]["refused"] == {"unknown hardware 'Cray-1'": 1}
    assert data["groups"][0]["mape"] == 1.0
    assert data["groups"][0]["bias"] is None
    assert data["groups"][1]["mape"] < 0.4
    flagged = cli("validate", file, "--json", "--flagged").json
    assert flagged["overall"]["rows"] == 4


def test_text_names_the_refused(cli: Callable[..., Any], file: Path) -> None:
    out = cli("validate", file).out
    assert "Refused: 1 row" in out
    assert "unknown hardware 'Cray-1'" in out
    assert "nan" not in out


def test_predictions_are_written_row_by_row(cli: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    cli("validate", file, "--out", tmp_path / "p.csv", "--json")
    with (tmp_path / "p.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["line"] for r in rows] == ["2", "3", "5"]
    assert float(rows[0]["p10"]) < float(rows[0]["predicted"]) < float(rows[0]["p90"])
    assert float(rows[0]["error"]) == pytest.approx(float(rows[0]["predicted"]) / 200 - 1, abs=1e-3)
    assert rows[2]["refused"] == "unknown hardware 'Cray-1'"


def test_a_report_page_is_written(cli: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    done = cli("validate", file, "--report", tmp_path / "page")
    assert done.code == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Predicted against measured" in page
    assert "unknown hardware" in page
    assert json.loads((tmp_path / "page" / "scores.json").read_text(encoding="utf-8"))["overall"]["rows"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "hardwar"], "--by hardwar: no such column (did you mean 'hardware'?)"),
        (["--requests-per-client", "0"], "--requests-per-client"),
        (["--leave-out", "phase"], "--leave-out"),
    ],
)
def test_bad_options_are_one_line(cli: Callable[..., Any], file: Path, arguments: list[str], said: str) -> None:
    done = cli("validate", file, *arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_foreign_table_is_one_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    done = cli("validate", path)
    assert done.code == 2
    assert "x.csv:1: no column hardware" in done.err


def test_calibrate_writes_a_file_that_estimate_takes(cli: Callable[..., Any], tmp_path: Path) -> None:
    shapes = [(m, n) for m in (16, 512, 2048, 8192) for n in (2048, 4096, 8192)]
    # A device that reaches 40 % of its 989 TFLOP/s and half its 3.35 TB/s, and takes 5 us to start.
    lines = [
        f"h100-sxm,gemm,kernel_time,{max(2 * m * n * 4096 / (0.4 * 989e12), 2 * n * 4096 / 1.67e12) * 1e6 + 5},us,bf16,{m},{n},4096,"
        for m, n in shapes
    ]
    rows = tmp_path / "rows.csv"
    rows.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    done = cli("calibrate", rows, "--hw", "h100-sxm", "--out", tmp_path / "h100.yaml")
    assert done.code == 0, done.err
    assert "held back" in done.out
    request = ("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--isl", 4096, "--json")
    before = cli(*request).json
    after = cli(*request, "--calibration-file", tmp_path / "h100.yaml").json
    assert after["ttft_s"] > 1.3 * before["ttft_s"]


def test_calibrate_without_rows_says_what_to_give(cli: Callable[..., Any], file: Path) -> None:
    assert "name one file of measurements or more" in cli("calibrate").err
    assert "--hw is missing" in cli("calibrate", file).err
    done = cli("calibrate", file, "--hw", "l40s")
    assert done.code == 2
    assert "0 usable rows of l40s" in done.err


def test_ingest_prints_rows_or_writes_them(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"avg_latency": 2.0, "latencies": [2.0], "percentiles": {}}), encoding="utf-8")
    given = ("--hw", "h100-sxm", "--model", "llama-3.1-8b", "--batch", 4, "--input-len", 128, "--output-len", 32)
    assert "e2e_latency,2.0,s" in cli("ingest", path, *given).out
    cli("ingest", path, *given, "--out", tmp_path / "rows.csv")
    assert cli("validate", tmp_path / "rows.csv", "--json").json["overall"]["predicted"] == 1
    assert "does not say the hardware; give --hw" in cli("ingest", path).err


def test_closed_loops_tell_what_the_clients_matter(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The prompts of the start wait for each other: longer runs dilute them, so the mean TTFT falls and TPOT hardly moves."""
    path = tmp_path / "rows.csv"
    head = "hardware,phase,metric,value,unit,model,engine,batch,input_len,output_len,tp,dp\n"
    row = "H100-SXM-80GB,{},{},{},ms,meta-llama/Llama-3.1-8B,vllm,32,1024,128,1,1\n"
    path.write_text(head + row.format("prefill", "ttft", 400) + row.format("decode", "tpot", 12), encoding="utf-8")
    out = cli("validate", path).out
    change = float(out.split("ttft ")[-1].split("%")[0])
    assert -40 < change < -2
    short = cli("validate", path, "--json", "--requests-per-client", 1).json["groups"]
    long = cli("validate", path, "--json", "--requests-per-client", 100).json["groups"]
    first = {g["metric"]: g["bias"] for g in short}, {g["metric"]: g["bias"] for g in long}
    assert first[0]["ttft"] > first[1]["ttft"]
