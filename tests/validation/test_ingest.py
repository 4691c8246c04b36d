"""Benchmark outputs of other tools become tidy rows; what they leave out must be given, and foreign files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfmodel.errors import SpecError
from perfmodel.validation.ingest import ingest, write
from perfmodel.validation.rows import read

# 320 requests of 1024 + 256 tokens by 32 clients.
VLLM_SERVE = {
    "date": "20260102-101112", "backend": "vllm", "model_id": "meta-llama/Llama-3.1-8B-Instruct", "num_prompts": 320,
    "request_rate": "inf", "max_concurrency": 32, "duration": 41.0, "completed": 320, "total_input_tokens": 327680,
    "total_output_tokens": 81920, "output_throughput": 1998.0, "mean_ttft_ms": 180.5, "mean_tpot_ms": 15.25,
    "std_tpot_ms": 0.4, "mean_itl_ms": 15.25,
}  # fmt: skip
VLLM_LATENCY = {"avg_latency": 3.25, "latencies": [3.2, 3.3], "percentiles": {"50": 3.25}}
SGLANG = {
    "backend": "sglang", "dataset_name": "random", "request_rate": float("inf"), "max_concurrency": 16,
    "random_input_len": 1024, "random_output_len": 512, "random_range_ratio": 1.0, "duration": 30.0, "completed": 160,
    "total_input_tokens": 163840, "total_output_tokens": 81920, "output_throughput": 2700.0, "mean_ttft_ms": 95.0,
    "mean_tpot_ms": 5.7, "mean_itl_ms": 5.7, "server_info": {"model_path": "Qwen/Qwen3-32B", "tp_size": 4, "version": "0.5.6"},
}  # fmt: skip
SGLANG_BATCH = {
    "run_name": "default", "batch_size": 8, "input_len": 512, "output_len": 64, "prefill_latency": 0.21,
    "median_decode_latency": 0.0125, "total_latency": 1.0,
}  # fmt: skip
AIPERF = {
    "time_to_first_token": {"unit": "ms", "avg": 88.0, "std": 4.0}, "inter_token_latency": {"unit": "ms", "avg": 9.5},
    "input_sequence_length": {"unit": "tokens", "avg": 2000.2}, "output_sequence_length": {"unit": "tokens", "avg": 299.8},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 800.0},
    "input_config": {"endpoint": {"model_names": ["openai/gpt-oss-120b"]}, "loadgen": {"concurrency": 8}},
}  # fmt: skip
# The example of llama-bench's documentation: 512 prompt tokens in 212 ms, 128 tokens in 978 ms.
LLAMA = [
    {"build_number": 1275, "model_type": "llama 7B mostly Q4_K - Medium", "n_prompt": 512, "n_gen": 0,
     "avg_ns": 212365953, "stddev_ns": 985423, "avg_ts": 2410.974041},
    {"build_number": 1275, "model_type": "llama 7B mostly Q4_K - Medium", "n_prompt": 0, "n_gen": 128,
     "avg_ns": 977425219, "stddev_ns": 9268593, "avg_ts": 130.965708},
]  # fmt: skip


def save(folder: Path, data: Any, name: str = "result.json") -> Path:
    path = folder / name
    text = "\n".join(json.dumps(x) for x in data) if name.endswith("jsonl") else json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return path


def test_vllm_serve(tmp_path: Path) -> None:
    rows = ingest(save(tmp_path, VLLM_SERVE), {"hardware": "h100-sxm", "tp": 2})
    assert [(r["phase"], r["metric"], r["value"], r["unit"]) for r in rows] == [
        ("prefill", "ttft", 180.5, "ms"), ("decode", "tpot", 15.25, "ms"), ("e2e", "output_throughput", 1998.0, "tok/s"),
    ]  # fmt: skip
    for row in rows:
        assert (row["input_len"], row["output_len"], row["batch"], row["requests_per_client"]) == (1024, 256, 32, 10)
        assert (row["tp"], row["n_devices"], row["protocol"]) == (2, 2, "closed-loop")


def test_an_open_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="open loop at 4.0 requests/s"):
        ingest(save(tmp_path, {**VLLM_SERVE, "request_rate": 4.0}), {"hardware": "h100-sxm"})


def test_vllm_latency_needs_its_configuration(tmp_path: Path) -> None:
    path = save(tmp_path, VLLM_LATENCY)
    with pytest.raises(SpecError, match="does not say the hardware; give --hw"):
        ingest(path, {})
    given = {"hardware": "h100-sxm", "model": "llama-3.1-8b", "batch": 8, "input_len": 512, "output_len": 128}
    (row,) = ingest(path, given)
    assert (row["metric"], row["value"], row["unit"], row["protocol"]) == ("e2e_latency", 3.25, "s", "static")


def test_sglang_serving_lines_carry_their_degrees(tmp_path: Path) -> None:
    data = [{**SGLANG, "request_rate": "inf"}, {**SGLANG, "request_rate": "inf", "max_concurrency": 32}]
    rows = ingest(save(tmp_path, data, "online.jsonl"), {"hardware": "h200-sxm"})
    assert len(rows) == 6
    assert {(r["tp"], r["model"], r["engine_version"]) for r in rows} == {(4, "Qwen/Qwen3-32B", "0.5.6")}
    assert [r["batch"] for r in rows] == [16, 16, 16, 32, 32, 32]


def test_sglang_one_batch(tmp_path: Path) -> None:
    rows = ingest(save(tmp_path, [SGLANG_BATCH], "one.jsonl"), {"hardware": "h100-sxm", "model": "llama-3.1-8b"})
    assert [(r["metric"], r["value"], r["batch"]) for r in rows] == [("ttft", 210.0, 8), ("tpot", 12.5, 8)]


def test_aiperf_averages(tmp_path: Path) -> None:
    rows = ingest(save(tmp_path, AIPERF), {"hardware": "b200-sxm"})
    assert {r["model"] for r in rows} == {"openai/gpt-oss-120b"}
    assert {(r["batch"], r["input_len"], r["output_len"]) for r in rows} == {(8, 2000, 300)}
    assert [r["value"] for r in rows] == [88.0, 9.5, 800.0]


def test_llama_bench(tmp_path: Path) -> None:
    rows = ingest(save(tmp_path, LLAMA), {"hardware": "rtx-3090", "model": "llama-2-7b"})
    assert [r["metric"] for r in rows] == ["ttft", "tpot"]
    assert rows[0]["value"] == pytest.approx(512 / 2410.974 * 1e3, rel=1e-3)  # ms, from its own tokens/s
    assert rows[1]["value"] == pytest.approx(1e3 / 130.966, rel=3e-3)
    assert {(r["dtype"], r["engine"], r["batch"]) for r in rows} == {("q4_k", "llama.cpp", 1)}


def test_written_rows_are_a_tidy_file(tmp_path: Path) -> None:
    rows = ingest(save(tmp_path, VLLM_SERVE), {"hardware": "h100-sxm"})
    write(rows, tmp_path / "rows.csv")
    back = read(tmp_path / "rows.csv")
    assert [r.measured for r in back] == [180.5, 15.25, 1998.0]
    assert {r.hardware for r in back} == {"h100-sxm"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"loss": 1}', "no benchmark output that is known here"),
        ("a.jsonl", '{"a": 1}\n{broken\n', r"a.jsonl:2: neither JSON nor one JSON object a line"),
        ("a.json", "", "no JSON objects"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=said):
        ingest(tmp_path / name, {"hardware": "h100-sxm"})
