"""`perfmodel estimate`: what its numbers mean, checked by the identities that define them and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.cli.options import degrees
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator

RESOURCES = {"compute", "vector", "hbm", "cache", "link", "network", "host_link", "storage", "launch", "host"}
LLAMA = ("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm")
BATCH = ("--batch", 16, "--isl", 1024, "--osl", 256)

# One device that no price list and no node names.
TOY = """\
name: toy-1
title: Toy 1
vendor: Nobody
kind: accelerator
architecture: hopper
compute:
  source: unverified
  matrix: {bf16: 989 TFLOP/s}
  vector: {fp32: 67 TFLOP/s}
  units: 132
  unit_name: SM
  clock: 1.98 GHz
memory: {source: unverified, technology: hbm3, capacity: 80 GB, bandwidth: 3.35 TB/s}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.yaml"
    path.write_text(TOY, encoding="utf-8")
    return path


@pytest.fixture
def estimate(cli: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def run(*more: object, base: tuple[object, ...] = LLAMA) -> dict[str, Any]:
        outcome = cli(*base, *more, "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json

    return run


@pytest.mark.parametrize(
    "more",
    [
        ("--batch", 1, "--isl", 1, "--osl", 2),
        BATCH,
        ("--batch", 7, "--isl", 3000, "--osl", 33, "--prefix", 2999),
        ("--batch", 64, "--isl", 512, "--osl", 64, "--tp", 4, "--kv-dtype", "fp8"),
        ("--batch", 32, "--isl", 512, "--osl", 64, "--pp", 2, "--weight-dtype", "fp8"),
    ],
)
def test_identities_of_one_estimate(estimate: Callable[..., dict[str, Any]], more: tuple[object, ...]) -> None:
    r = estimate(*more)
    c, given = r["configuration"], dict(zip(more[::2], more[1::2], strict=True))
    batch, isl, osl = given["--batch"], given["--isl"], given["--osl"]
    devices = given.get("--tp", 1) * given.get("--pp", 1)
    assert (c["batch"], c["isl"], c["osl"], c["devices"]) == (batch, isl, osl, devices)
    assert r["e2e_s"] == pytest.approx(r["ttft_s"] + (osl - 1) * r["tpot_s"], rel=1e-12)
    assert r["output_tokens_per_s"] == pytest.approx(batch * osl / r["e2e_s"], rel=1e-12)
    assert r["output_tokens_per_s_per_device"] == pytest.approx(r["output_tokens_per_s"] / devices, rel=1e-12)
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        lower, upper = r["bounds"][key]
        p10, p90 = r["interval"][key]
        assert 0 < lower <= r[key] <= upper
        assert p10 < r[key] < p90
    memory = r["memory"]
    parts = [memory[k] for k in ("weights", "kv", "activations", "other")]
    assert min(parts) > 0
    assert memory["total_per_device"] == pytest.approx(sum(parts), rel=1e-12)
    assert memory["fits"] is (memory["total_per_device"] <= memory["capacity"])
    for phase in ("prefill", "decode"):
        assert r["bottleneck"][phase] in RESOURCES
        assert set(r["busy_s"][phase]) <= RESOURCES
        assert r["bottleneck"][phase] == max(r["busy_s"][phase], key=r["busy_s"][phase].get)
    assert isinstance(r["provenance"], str)
    assert "meets" not in r
    assert "serving" not in r


def test_tpot_is_the_mean_over_the_contexts_of_the_decode_steps(estimate: Callable[..., dict[str, Any]]) -> None:
    r = estimate("--batch", 5, "--isl", 100, "--osl", 40)
    e = Estimator("llama-3.1-8b", "h100-sxm")
    steps = [e.decode(5, context) for context in range(101, 140)]  # 39 steps make the 2nd … 40th token
    assert r["tpot_s"] == pytest.approx(np.mean(steps), rel=1e-9)
    assert r["ttft_s"] == pytest.approx(e.prefill(5, 100), rel=1e-9)


def test_one_output_token_has_no_decode_step(estimate: Callable[..., dict[str, Any]]) -> None:
    r = estimate("--batch", 4, "--isl", 500, "--osl", 1)
    assert r["tpot_s"] is None
    assert r["bounds"]["tpot_s"] is None
    assert r["interval"]["tpot_s"] is None
    assert r["bottleneck"]["decode"] is None
    assert r["e2e_s"] == r["ttft_s"]
    assert r["output_tokens_per_s"] == pytest.approx(4 / r["ttft_s"])


def test_batch_is_prefilled_together(estimate: Callable[..., dict[str, Any]]) -> None:
    """Sixteen prompts cost about sixteen times one, not the same: long prompts already fill the device."""
    one = estimate("--batch", 1, "--isl", 4096, "--osl", 1)["ttft_s"]
    many = estimate("--batch", 16, "--isl", 4096, "--osl", 1)["ttft_s"]
    assert many == pytest.approx(16 * one, rel=0.15)


def test_bytes_and_decode_floor_by_hand(estimate: Callable[..., dict[str, Any]]) -> None:
    r = estimate(*BATCH)
    # 8,030,261,248 published parameters of two bytes, and the cosines and sines of 131,072 positions (128 elements each).
    assert r["memory"]["weights"] == 2 * (8_030_261_248 + 131_072 * 128)
    # 32 layers x (K and V) x 8 heads x 128 x 2 B = 131,072 B a token; 1,280 is a whole number of 16-token blocks.
    assert r["memory"]["kv"] == 16 * 1280 * 131_072
    # A step reads all weights but the embedding table (128,256 x 4,096 x 2 B), and the keys and values of 1,152
    # tokens on average (1,025 … 1,279), at 3.35 TB/s at best.
    least = (2 * 8_030_261_248 - 128_256 * 4096 * 2 + 16 * 1152 * 131_072) / 3.35e12
    assert r["bounds"]["tpot_s"][0] == pytest.approx(least, rel=0.01)
    # Prefill multiplies 16,384 tokens with 6.98 G parameters of the layers (the head sees only the last tokens).
    layers = 8_030_261_248 - 2 * 128_256 * 4096
    assert r["bounds"]["ttft_s"][0] > 2 * 16_384 * layers / 989.4e12


def test_price_is_of_a_whole_node(estimate: Callable[..., dict[str, Any]]) -> None:
    r = estimate(*BATCH, "--tp", 2, "--price", "88 USD/h")
    assert r["usd_per_hour"] == pytest.approx(88 * 2 / 8)  # two of the eight devices of an HGX
    assert r["usd_per_million_output_tokens"] == pytest.approx(22 / 3600 / r["output_tokens_per_s"] * 1e6)
    assert r["price_source"] == "given"


def test_without_a_price_money_is_null(
    estimate: Callable[..., dict[str, Any]], cli: Callable[..., Any], toy: Path
) -> None:
    base = ("estimate", "--model", "llama-3.1-8b", "--hw", toy)
    r = estimate(base=base)
    assert r["usd_per_million_output_tokens"] is None
    assert r["usd_per_hour"] is None
    assert "no price in the catalogue" in cli(*base).out


def test_limits_are_judged_not_enforced(estimate: Callable[..., dict[str, Any]]) -> None:
    assert estimate(*BATCH, "--ttft", "1 ns", "--tpot", "1 h")["meets"] == {"ttft": False, "tpot": True}
    assert estimate(*BATCH, "--tpot", "1 ns")["meets"] == {"tpot": False}


def test_a_batch_too_large_is_said_not_refused(
    estimate: Callable[..., dict[str, Any]], cli: Callable[..., Any]
) -> None:
    most = estimate(*BATCH)["memory"]["max_batch"]
    assert estimate("--batch", most, "--isl", 1024, "--osl", 256)["memory"]["fits"] is True
    too_many = ("--batch", 2 * most, "--isl", 1024, "--osl", 256)
    assert estimate(*too_many)["memory"]["fits"] is False
    outcome = cli(*LLAMA, *too_many)
    assert outcome.code == 0
    assert f"does NOT fit: room for at most {most} sequences" in outcome.out


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (("--tensor-parallel-size", 2), ("--tp", 2)),
        (("-tp", 2, "-pp", 2), ("--tp", 2, "--pp", 2)),
        (("--pipeline-parallel-size", 2, "--data-parallel-size", 2), ("--pp", 2, "--dp", 2)),
        (("--gpus", 4), ("--tp", 4)),
        (("--gpus", 4, "--pp", 2), ("--tp", 2, "--pp", 2)),
        (("--gpu-memory-utilization", 0.8), ("--mem-fraction", "80 %")),
        (("--kv-cache-dtype", "fp8_e4m3"), ("--kv-dtype", "fp8")),
        (("--kv-cache-dtype", "auto"), ()),
        (("--quantization", "awq"), ("--weight-dtype", "int4")),
        (("--dtype", "auto"), ()),
        (("--dtype", "float16"), ("--weight-dtype", "fp16", "--act-dtype", "fp16")),
        (("--batch-size", 3, "--input-len", 50, "--output-len", 7), ("--batch", 3, "--isl", 50, "--osl", 7)),
        (("--hardware", "H100-SXM"), ()),
    ],
)
def test_spellings_of_serving_engines(
    estimate: Callable[..., dict[str, Any]], long: tuple[object, ...], short: tuple[object, ...]
) -> None:
    assert estimate(*long) == estimate(*short)


def test_expert_parallel_flag(estimate: Callable[..., dict[str, Any]]) -> None:
    base = ("estimate", "--model", "gpt-oss-120b", "--hw", "h100-sxm", "--tp", 2, "--dp", 2)
    flag = estimate("--enable-expert-parallel", base=base)
    assert flag == estimate("--ep", 4, base=base)
    assert flag["configuration"]["ep"] == 4
    assert flag["ttft_s"] != estimate(base=base)["ttft_s"]


def test_dtype_leaves_quantised_experts_alone(estimate: Callable[..., dict[str, Any]]) -> None:
    base = ("estimate", "--model", "gpt-oss-120b", "--hw", "h200-sxm")
    assert estimate("--dtype", "bfloat16", base=base)["memory"] == estimate(base=base)["memory"]


def test_fp32_is_fp32(estimate: Callable[..., dict[str, Any]]) -> None:
    """Not quietly half precision or TF32: 66.9 TFLOP/s of the vector units, and four bytes a weight."""
    r = estimate("--dtype", "float32", "--batch", 8)
    assert r["configuration"]["compute_dtype"] == "fp32"
    assert r["memory"]["weights"] == 4 * (8_030_261_248 + 131_072 * 128)
    layers = 8_030_261_248 - 2 * 128_256 * 4096
    assert r["bounds"]["ttft_s"][0] >= 2 * 8 * 1024 * layers / 66.9e12


def test_gpus_decides_tp_unless_given() -> None:
    assert degrees(8, tp=None, pp=None, dp=None, cp=None) == (8, 1, 1, 1)
    assert degrees(8, tp=None, pp=2, dp=2, cp=None) == (2, 2, 2, 1)
    assert degrees(8, tp=4, pp=2, dp=None, cp=None) == (4, 2, 1, 1)
    assert degrees(None, tp=4, pp=None, dp=None, cp=3) == (4, 1, 1, 3)
    with pytest.raises(SpecError, match="--gpus 8 contradicts tp x pp x dp x cp = 4"):
        degrees(8, tp=4, pp=None, dp=None, cp=None)
    with pytest.raises(SpecError, match="--gpus 8 contradicts tp x pp x dp x cp = 3"):
        degrees(8, tp=None, pp=3, dp=None, cp=None)


def test_the_page_reads_well_in_a_pipe(cli: Callable[..., Any]) -> None:
    outcome = cli(*LLAMA, *BATCH, "--ttft", "2 s", "--tpot", "1 ms")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "llama-3.1-8b on 1 x h100-sxm (hgx-h100-8)"
    assert "\x1b" not in outcome.out
    assert max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)
    squeezed = " ".join(outcome.out.split())
    for wanted in ("weights 16.1 GB", "KV cache and states 2.68 GB", "TTFT met", "TPOT MISSED", "-bound"):
        assert wanted in squeezed


def test_json_holds_whatever_load_it_is_asked_about(cli: Callable[..., Any]) -> None:
    outcome = cli(*LLAMA, "--rate", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert isinstance(outcome.json["serving"], dict)
    assert cli(*LLAMA, "--rate", "1 /s", "--json").json == outcome.json
    text = cli(*LLAMA, "--rate", 1)
    assert "1 requests/s" in text.out
    assert max(map(len, text.out.splitlines())) <= 120
    closed = cli(*LLAMA, "--concurrency", 8, "--json").json["serving"]
    assert closed["concurrency"] == 8
    assert "8 requests in flight" in cli(*LLAMA, "--concurrency", 8).out


def test_a_load_beyond_the_device_is_infeasible(cli: Callable[..., Any]) -> None:
    outcome = cli(*LLAMA, "--rate", 10_000)
    assert outcome.code == 3
    assert outcome.out == ""
    assert "error: 1e+04 requests/s" in outcome.err
    most = outcome.err.rsplit("--rate ", 1)[1].strip()
    assert cli(*LLAMA, "--rate", 0.99 * float(most)).code == 0


def test_the_page_says_what_a_rate_is_worth(cli: Callable[..., Any]) -> None:
    one = (*LLAMA, "--isl", 1000, "--osl", 200)
    text = " ".join(cli(*one, "--rate", 5, "--ttft", "200 ms").out.split())
    for wanted in ("front end", "attainment", "goodput", "capacity", "per device", "ITL p50", "longest gap p50"):
        assert wanted in text
    # 1 / 27.25 ms: vLLM's API process per request of 200 tokens.
    refused = cli(*LLAMA, "--isl", 50, "--osl", 200, "--rate", 40)
    assert (refused.code, refused.out) == (3, "")
    assert "front end" in refused.err
    assert "Nearest feasible change: --rate 36" in refused.err
