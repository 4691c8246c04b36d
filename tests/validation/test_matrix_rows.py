"""Rows of dense matrix products: launch regimes, formats, and a few measured kernels."""

from __future__ import annotations

import pytest

from perfmodel.machine import machine
from perfmodel.ops.gemm import gemm
from perfmodel.roofline import op_cost
from perfmodel.spec.formats import get_format
from perfmodel.validation.kinds import kind_of, predict
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")


def row(hardware: str, engine: str, dtype: str, shape: tuple[int, int, int], op: str = "", us: float = 1.0) -> Row:
    m, n, k = shape
    cells = {
        "hardware": hardware, "engine": engine, "dtype": dtype, "op": op, "phase": "gemm", "metric": "kernel_time",
        "m": str(m), "n": str(n), "k": str(k), "value": str(us), "unit": "us",
    }  # fmt: skip
    return Row("inline.csv", 1, cells)


def microseconds(r: Row) -> float:
    (outcome,) = predict([r])
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


@pytest.mark.parametrize(
    ("hardware", "engine", "dtype", "shape", "measured"),
    [
        # Microsoft Azure AI benchmarking guide, cublasLt (MIT).
        ("A100-SXM-80GB", "cublasLt", "fp16", (1024, 1024, 1024), 17.99),
        ("A100-SXM-80GB", "cublasLt", "fp16", (8192, 8192, 8192), 4333.9),
        ("A100-SXM-80GB", "cublasLt", "fp16", (6144, 12288, 12288), 7398.0),
        ("H100-SXM-80GB", "cublasLt", "fp8", (8192, 8192, 8192), 852.3),
        ("H100-SXM-80GB", "cublasLt", "fp8", (6144, 12288, 12288), 1373.0),
        # Vidur, Qwen-72B on A100 (MIT): qkv and output projections.
        ("A100-SXM-80GB", "vllm-fork(sarathi)", "fp16", (4096, 24576, 8192), 7306.0),
        ("A100-SXM-80GB", "vllm-fork(sarathi)", "fp16", (4096, 8192, 8192), 2468.0),
        # LLMCompass, PyTorch on A100 (BSD-3): a few rows and many.
        ("A100-SXM-80GB", "pytorch/cublas", "fp16", (64, 12288, 12288), 190.0),
        ("A100-SXM-80GB", "pytorch/cublas", "fp16", (2048, 12288, 12288), 2358.6),
    ],
)
def test_measured_kernels(hardware: str, engine: str, dtype: str, shape: tuple[int, int, int], measured: float) -> None:
    assert microseconds(row(hardware, engine, dtype, shape)) == pytest.approx(measured, rel=0.25)


def test_a_library_times_the_product_alone() -> None:
    # 16384 x 16384 inputs, cast from 2 bytes to 1: 805 MB move in no less than 240 us at 3.35 TB/s before the product.
    shape = (16384, 16384, 16384)
    alone = microseconds(row("h100-sxm", "cublasLt", "fp8", shape))
    assert microseconds(row("h100-sxm", "sglang", "fp8", shape)) - alone > 240
    named = microseconds(row("h100-sxm", "sglang", "fp8_block", shape, op="sglang_deepgemm_gemm_nt_f8f8bf16"))
    assert microseconds(row("h100-sxm", "sglang", "fp8_block", shape)) - named > 240


def test_modules_launched_by_python_wait_for_the_host() -> None:
    # A product of a few microseconds takes as long as any other small one; a long one hides the host.
    kernel = "DeepGemmFp8BlockScaledMMKernel"
    small = [microseconds(row("h100-sxm", "vllm", "fp8_block", (m, 2048, 256), op=kernel)) for m in (1, 1024)]
    assert small[0] == small[1] > 10 * microseconds(row("h100-sxm", "vllm", "fp8_block", (1, 2048, 256)))
    long = (16384, 8192, 8192)
    assert microseconds(row("h100-sxm", "vllm", "fp8_block", long, op=kernel)) == microseconds(
        row("h100-sxm", "vllm", "fp8_block", long)
    )


def test_sixteen_bit_products_add_nothing_to_their_kernel() -> None:
    bf16 = get_format("bf16")
    (op,) = gemm("gemm", 64.0, 4096.0, 4096.0, weight=bf16, act=bf16, dtype="bf16")
    expected = float(op_cost(op, machine("h100-sxm")).seconds) * 1e6
    for engine in ("", "an engine nobody knows", "trtllm", "sglang"):
        assert microseconds(row("h100-sxm", engine, "bf16", (64, 4096, 4096))) == pytest.approx(expected)


def test_formats_by_the_names_benchmarks_give_them() -> None:
    # Few rows stream the weights: 4096 x 16384 at 2, 1.06 and 0.54 bytes, beside the launch.
    shape = (4, 4096, 16384)
    wide, eight, four = (microseconds(row("a100-sxm-80gb", "x", d, shape)) for d in ("bf16", "int8_wo", "int4_wo"))
    assert 0.5 < eight / wide < 0.75
    assert 0.25 < four / wide < 0.5
    # Eight-bit integers multiply at twice the rate of bf16 on A100: a large product takes half the time.
    large = (8192, 8192, 8192)
    ratio = microseconds(row("a100-sxm-80gb", "x", "sq", large)) / microseconds(
        row("a100-sxm-80gb", "x", "bf16", large)
    )
    assert 0.45 < ratio < 0.75


def test_what_cannot_be_predicted_says_why() -> None:
    for r, reason in (
        (row("h100-sxm", "vllm", "int3_squeeze", (64, 64, 64)), "unknown"),
        (row("h900-sxm", "vllm", "bf16", (64, 64, 64)), "unknown hardware"),
    ):
        (outcome,) = predict([r])
        assert isinstance(outcome, Refused)
        assert reason in str(outcome)
    without_shape = row("h100-sxm", "vllm", "bf16", (64, 64, 64))
    without_shape.cells["m"] = ""
    kind = kind_of(without_shape)
    assert kind is None or kind.name != "gemm"
