"""Latent-attention rows: measured times, what the timed operators hold, and what is refused."""

from __future__ import annotations

import pytest

from perfmodel.validation.kinds.mla import MLA, claims
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")


def row(**cells: object) -> Row:
    known = {
        "hardware": "H100-SXM-80GB", "phase": "attention", "op": "mla_generation", "model": "DeepSeek-V3 MLA", "dtype": "bf16",
        "kv_dtype": "bf16", "engine": "trtllm", "kernel": "default", "batch": 32, "context_len": 1024, "n_heads": 16,
        "metric": "kernel_time", "value": 1, "unit": "us",
    }  # fmt: skip
    return Row("x.csv", 1, {k: str(v) for k, v in (known | cells).items()})


def predicted(**cells: object) -> Predicted:
    (outcome,) = MLA.predict([row(**cells)])
    assert isinstance(outcome, Predicted), outcome
    return outcome


_GENERATION, _CONTEXT = "mla_generation", "mla_context"
_A, _H, _B = "A100-SXM-80GB", "H100-SXM-80GB", "B200-SXM-180GB"


@pytest.mark.parametrize(
    ("hardware", "engine", "kernel", "kv", "op", "batch", "context", "heads", "measured"),
    [
        # AIConfigurator, Apache-2.0: systems/data/*/mla, commit 095f58a51c4c.
        (_H, "trtllm", "default", "bf16", _GENERATION, 1, 2, 8, 13.7),
        (_H, "trtllm", "default", "bf16", _GENERATION, 64, 1024, 8, 45.0),
        (_H, "trtllm", "default", "fp8", _GENERATION, 128, 131072, 16, 3305.2),
        (_H, "sglang", "flash_attention", "bf16", _GENERATION, 256, 65536, 128, 8708.9),
        (_H, "sglang", "flash_attention", "fp8", _GENERATION, 256, 8192, 1, 4333.0),
        (_H, "vllm", "vllm_flash_attn_mla", "bf16", _GENERATION, 1, 2, 8, 164.7),
        (_B, "trtllm", "default", "bf16", _GENERATION, 512, 2048, 2, 226.4),
        (_B, "sglang", "trtllm_mla", "fp8", _GENERATION, 1024, 32, 1, 37.1),
        (_A, "vllm", "vllm_triton_mla", "bf16", _GENERATION, 128, 16384, 128, 18917.7),
        (_A, "trtllm", "default", "bf16", _GENERATION, 1024, 8192, 2, 13104.8),
        (_H, "trtllm", "default", "bf16", _CONTEXT, 2, 32768, 64, 77785.9),
        (_H, "trtllm", "default", "fp8", _CONTEXT, 128, 512, 32, 2403.5),
        (_H, "sglang", "flash_attention", "bf16", _CONTEXT, 2, 32768, 64, 240505.0),
        (_H, "vllm", "vllm_flash_attn_mla", "bf16", _CONTEXT, 64, 1024, 64, 6892.5),
        (_B, "sglang", "trtllm_mla", "bf16", _CONTEXT, 32, 2048, 16, 1052.4),
        (_A, "vllm", "vllm_triton_mla", "bf16", _CONTEXT, 1, 32768, 16, 34297.2),
    ],
)
def test_measured_times(
    hardware: str, engine: str, kernel: str, kv: str, op: str, batch: int, context: int, heads: int, measured: float
) -> None:
    new = 1 if op == _GENERATION else context
    found = predicted(
        hardware=hardware, engine=engine, kernel=kernel, kv_dtype=kv, op=op, batch=batch, context_len=context,
        input_len=new, n_heads=heads,
    )  # fmt: skip
    assert found.value == pytest.approx(measured, rel=0.3)
    assert found.low < found.value < found.high


def test_absorbed_prefill_costs_its_flops() -> None:
    # 2 (576 + 512) FLOP a pair against 2 (192 + 128): 3.4 times; measured 240505 / 77786 = 3.09.
    long = {"op": _CONTEXT, "batch": 2, "context_len": 32768, "n_heads": 64}
    absorbed = predicted(engine="sglang", kernel="flash_attention", **long).value
    assert absorbed / predicted(**long).value == pytest.approx(3.09, rel=0.2)


def test_short_prefill_of_vllm_runs_absorbed() -> None:
    # Measured per token and head: 2.7 ns at 512 tokens, 1.64 ns at 1024, with twice the pairs a token (128 and 64 sequences).
    def each(batch: int, tokens: int, heads: int) -> float:
        found = predicted(
            op=_CONTEXT, engine="vllm", kernel="vllm_flash_attn_mla", batch=batch, context_len=tokens, n_heads=heads
        )
        return found.value * 1e3 / (batch * tokens * heads)

    assert each(128, 512, 32) == pytest.approx(2.71, rel=0.3)
    assert each(64, 1024, 64) == pytest.approx(1.64, rel=0.3)


def test_rates_are_work_over_time() -> None:
    long = {"engine": "", "kernel": "FlashMLA", "batch": 128, "context_len": 8192, "n_heads": 128}
    seconds = predicted(**long).value * 1e-6
    tflops = predicted(metric="tflops", unit="TFLOPS", **long)
    assert tflops.value == pytest.approx(2 * 128 * (576 + 512) * 128 * 8192 / seconds / 1e12)
    assert tflops.low < tflops.value < tflops.high
    # Latents once, queries in, outputs out, all of two bytes.
    moved = 2 * (128 * 8192 * 576 + 128 * 128 * (576 + 512))
    assert predicted(metric="bandwidth", unit="GB/s", **long).value == pytest.approx(moved / seconds / 1e9)


def test_a_portable_kernel_is_slower_wherever_it_runs() -> None:
    # Triton splits a sequence four times at most and reads its latents once for each 16 heads.
    long = {"engine": "", "batch": 4, "context_len": 65536, "n_heads": 128}
    assert predicted(kernel="triton_mla", **long).value > 4 * predicted(kernel="flashmla", **long).value


def test_unknown_engines_and_missing_cells_have_defaults() -> None:
    known = predicted(engine="", kernel="", n_heads=128).value
    assert predicted(engine="somebody's", kernel="", n_heads="", model="").value == pytest.approx(known)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"batch": 0}, "batch is not positive"),
        ({"n_heads": -1}, "n_heads is not positive"),
        ({"context_len": ""}, "context_len not stated"),
        ({"context_len": 4, "input_len": 9}, "more new tokens than context"),
        ({"model": "llama-3.1-8b"}, "no latent attention"),
        ({"kv_dtype": "fp9"}, "unknown number format 'fp9'"),
        ({"metric": "tflops", "unit": "furlong"}, "unknown unit"),
    ],
)
def test_what_cannot_be_predicted_says_why(cells: dict[str, object], reason: str) -> None:
    wrong, right = MLA.predict([row(**cells), row(batch=7)])
    assert isinstance(wrong, Refused)
    assert reason in str(wrong)
    assert isinstance(right, Predicted)


def test_which_rows_are_latent_attention() -> None:
    assert claims(row())
    assert claims(row(op="", kernel="FlashMLA", model=""))
    assert claims(row(op="decode", kernel="", model="DeepSeek-V3 MLA"))
    assert not claims(row(op="generation_attention", kernel="", model="mlabonne/some-llama"))
    assert not claims(row(phase="gemm"))
