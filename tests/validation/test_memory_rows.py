"""Start-up logs as measured rows: what is scored, what is refused and why, and how names are resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfmodel.errors import SpecError
from perfmodel.validation.memory_lines import device_named, model_named
from perfmodel.validation.memory_rows import is_memory_file, score_memory
from perfmodel.validation.rows import Predicted
from perfmodel.validation.score import Scored, by

HEADER = (
    "source_url,engine,engine_version,model,quant,dtype,kv_dtype,gpu,gpu_memory_gib,n_gpus,tp,pp,dp,"
    "gpu_memory_utilization,max_model_len,max_num_seqs,eager,weights_gib_per_gpu,non_torch_gib,activation_peak_gib,"
    "cuda_graph_gib,kv_available_gib_per_gpu,kv_tokens,gpu_blocks,block_size,note"
)
# Logged facts from the threads named in the first cell.
LINES = (
    "vllm #15360,vLLM,0.8.1 V0,Qwen/Qwen2.5-7B-Instruct,bf16,bf16,auto,A10G,21.99,1,1,1,1,"
    "0.9,6600,,0,14.25,0.06,1.43,0.76,4.05,75856,4741,16,",
    "vllm #16692,vLLM,0.8.4 V1,deepseek-r1,fp8-block,bf16,auto,H800,,16,16,1,1,,32768,,0,40.3174,,,,,304704,,,",
    "vllm #16378,vLLM,0.8.0rc3 V0,Gemma-3-27b,bf16,bf16,auto,A100 40GB,39.38,4,4,1,1,"
    "0.9,65536,64,0,13.17,0.52,3.73,0.29,18.03,152416,9526,16,max_num_batched_tokens 16384",
    "sglang #6027,SGLang,0.4.6.post2,DeepSeek-V3-0324,fp8-block,bf16,auto,H100 80GB,,16,16,1,16,"
    ",,,,,,,,17.99,274934,,,",
    "sglang #4094,SGLang,0.4.3,Qwen2.5-7B-Instruct,bf16,bf16,auto,A100 40GB class,38.97,1,1,1,1,"
    "0.88,32768,4097,0,14.38,,,,19.92,372945,,,",
    "llama.cpp #10152,llama.cpp,b4020,Qwen2.5 32B Instruct,gguf-Q4_K_M,,K f16 / V f16,Tesla P40,,3,1,3,1,"
    ",32768,,,6.025,,0.3,,2.6667,32768,,,n_ubatch 512; flash_attn 1",
    "a thread,vLLM,0.8.5 V0,somebody/private-finetune-9b,bf16,,auto,L40S,,1,1,1,1,0.9,,,,16.73,,,,,1000,,,",
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "memory.csv"
    path.write_text("\n".join((HEADER, *LINES)) + "\n", encoding="utf-8")
    return path


def found(log: Path, thread: int, metric: str) -> Scored:
    return next(s for s in score_memory(log) if s.row.line == thread + 2 and s.row.text("metric") == metric)


def ratio(s: Scored) -> float:
    assert isinstance(s.outcome, Predicted), s.outcome
    assert s.outcome.low <= s.outcome.value <= s.outcome.high
    return s.outcome.value / s.measured


@pytest.mark.parametrize(
    ("thread", "metric", "tolerance"),
    [
        (0, "weights", 0.004),
        (0, "kv_tokens_given_bytes", 0.001),
        (0, "kv_tokens", 0.02),
        (0, "activation", 0.02),
        (1, "weights", 0.001),
        (2, "kv_tokens_given_bytes", 0.001),  # every layer at full length, in 62 layers of 4 heads
        (3, "kv_tokens_given_bytes", 0.001),  # attention on each of 16 ranks, which all hold the latent
        (4, "weights", 0.015),
        (4, "kv_tokens_given_bytes", 0.001),
        (4, "kv_tokens", 0.02),
        (5, "weights", 0.001),
        (5, "kv_tokens_given_bytes", 0.001),
    ],
)
def test_logged_quantities(log: Path, thread: int, metric: str, tolerance: float) -> None:
    assert ratio(found(log, thread, metric)) == pytest.approx(1, rel=tolerance)


@pytest.mark.parametrize(
    ("thread", "metric", "reason"),
    [
        (1, "kv_tokens", "inputs not logged: memory fraction"),
        (2, "kv_tokens", "inputs not logged: images of the reserved step"),
        (2, "activation", "inputs not logged: images of the reserved step"),
        (5, "kv_tokens", "the context is asked for, not derived"),
        (6, "weights", "unidentified model"),
        (6, "kv_tokens", "unidentified model"),
    ],
)
def test_refusals_say_why(log: Path, thread: int, metric: str, reason: str) -> None:
    assert str(found(log, thread, metric).outcome) == reason


def test_rows_are_grouped_like_any_others(log: Path) -> None:
    scores = {(k["engine"], k["metric"]): s for k, s in by(score_memory(log), ["engine", "metric"])}
    assert scores["vllm", "weights"].rows == 4
    assert scores["vllm", "weights"].refused == {"unidentified model": 1}
    assert scores["sglang", "kv_tokens_given_bytes"].predicted == 2
    row = found(log, 1, "weights").row
    assert (row.text("hardware"), row.text("phase"), row.text("unit"), row.measured) == (
        "h800-sxm", "memory", "GiB", 40.3174
    )  # fmt: skip


def test_a_file_is_told_by_its_columns(log: Path, tmp_path: Path) -> None:
    assert is_memory_file(log)
    tidy = tmp_path / "tidy.csv"
    tidy.write_text("hardware,phase,metric,value,unit\nL40S,gemm,kernel_time,1,us\n", encoding="utf-8")
    assert not is_memory_file(tidy)
    log.write_text(HEADER + "\na,b\n", encoding="utf-8")
    with pytest.raises(SpecError, match="2 cells under"):
        score_memory(log)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen2.5-7B (4-bit)", "qwen2.5-7b"),
        ("lingshu-medical-mllm/Lingshu-32B (Qwen2.5-VL-32B)", "qwen2.5-vl-32b"),
        ("Qwen3-0.6B (inferred from KV bytes)", "qwen3-0.6b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2.5-7b"),
        ("DeepSeek-R1-Distill-Qwen-32B-Q4_K_M.gguf", "qwen2.5-32b"),
        ("gpt-oss:120b", "gpt-oss-120b"),
        ("Qwen2-VL-7B-class (inferred)", "qwen2-vl-7b"),
        ("LLaMA v2", None),
        ("Llama-3.x-70B FP8 (inferred)", None),
        ("MERaLiON/MERaLiON-2-10B-ASR", None),
    ],
)
def test_model_names(text: str, name: str | None) -> None:
    model = model_named(text)
    assert (model.name if model else None) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("A100 40GB (inferred)", "a100-sxm-40gb"),
        ("NVIDIA L4", "l4"),
        ("RTX 3090/4090", None),
        ("80GB (79.22 GiB as logged)", None),
        ("24GB card not named", None),
    ],
)
def test_device_names(text: str, name: str | None) -> None:
    device = device_named(text)
    assert (device.name if device else None) == name
