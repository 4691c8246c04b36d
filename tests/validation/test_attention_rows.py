"""Rows of attention kernels: what each engine times, formats, benchmarks in FLOP/s, and a few measured kernels."""

from __future__ import annotations

import pytest

from perfmodel.validation.kinds import kind_of, predict
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")

_PREFILL, _DECODE = "context_attention", "generation_attention"


def row(hardware: str, **cells: str) -> Row:
    given = {
        "hardware": hardware,
        "phase": "attention",
        "metric": "kernel_time",
        "value": "1",
        "unit": "us",
        "dtype": "bf16",
    }
    return Row("inline.csv", 1, given | cells)


def engine_row(hardware: str, engine: str, op: str, shape: tuple[int, ...], kv: str = "bf16", **cells: str) -> Row:
    names = ("batch", "context_len", "n_heads", "n_kv_heads", "head_dim")
    text = dict(zip(names, map(str, shape), strict=True))
    return row(hardware, engine=engine, op=op, kv_dtype=kv, input_len=text["context_len"], **text, **cells)


def value(r: Row) -> float:
    (outcome,) = predict([r])
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return float(outcome.value)


@pytest.mark.parametrize(
    ("hardware", "engine", "op", "shape", "kv", "measured"),
    [
        # AIConfigurator (Apache-2.0): batch, context, query heads, KV heads, head dimension; microseconds.
        ("H100-SXM-80GB", "sglang", _DECODE, (32, 8192, 64, 8, 128), "bf16", 354.07),
        ("H100-SXM-80GB", "trtllm", _DECODE, (256, 16384, 2, 1, 128), "bf16", 720.58),
        ("B200-SXM-180GB", "vllm", _DECODE, (32, 16384, 24, 8, 64), "bf16", 158.6),
        ("B200-SXM-180GB", "trtllm", _DECODE, (8, 32768, 16, 8, 128), "fp8", 86.6),
        ("H100-SXM-80GB", "vllm", _PREFILL, (128, 128, 16, 1, 192), "bf16", 134.69),
        ("H100-SXM-80GB", "sglang", _PREFILL, (128, 64, 24, 24, 128), "bf16", 177.51),
        ("B200-SXM-180GB", "trtllm", _PREFILL, (256, 128, 64, 2, 256), "bf16", 1496.46),
        ("A100-SXM-80GB", "sglang", _PREFILL, (128, 64, 24, 24, 128), "bf16", 284.31),
    ],
)
def test_measured_kernels(
    hardware: str, engine: str, op: str, shape: tuple[int, ...], kv: str, measured: float
) -> None:
    assert value(engine_row(hardware, engine, op, shape, kv)) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(
    ("hardware", "op", "dim", "measured"),
    [
        # Microsoft Azure AI benchmarking guide (MIT): batch 2, 8192 tokens, TFLOP/s of the full rectangle.
        ("A100-SXM-80GB", "flash_attn2_fwd", "64", 179.5),
        ("H100-SXM-80GB", "flash_attn2_fwd", "128", 327.9),
        ("A100-SXM-80GB", "pytorch_attention", "64", 46.0),
        ("H100-SXM-80GB", "pytorch_attention", "128", 145.1),
    ],
)
def test_benchmarks_of_one_kernel(hardware: str, op: str, dim: str, measured: float) -> None:
    r = row(
        hardware, op=op, dtype="fp16", batch="2", input_len="8192", head_dim=dim, metric="throughput", unit="TFLOPS"
    )
    assert value(r) == pytest.approx(measured, rel=0.2)


def test_rate_and_time_of_one_kernel_agree() -> None:
    """4 x 2 x 16 x 128 x 4096^2 FLOP over the predicted seconds is the predicted rate; half of them with a mask."""
    for note, flop in (("", 4 * 2 * 16 * 128 * 4096**2), ("causal", 2 * 2 * 16 * 128 * 4096**2)):
        cells = {
            "op": "flash_attn2",
            "batch": "2",
            "input_len": "4096",
            "n_heads": "16",
            "head_dim": "128",
            "note": note,
        }
        rate = value(row("A100-SXM-80GB", metric="tflops", unit="TFLOPS", **cells))
        assert flop / (value(row("A100-SXM-80GB", **cells)) * 1e-6) == pytest.approx(rate * 1e12)


@pytest.mark.parametrize(
    ("cells", "causal"),
    [
        ({"note": "causal"}, True),
        ({"note": "causal=True"}, True),
        ({"causal": "true"}, True),
        ({"op": "flash_attn2_causal"}, True),
        ({"note": "non-causal"}, False),
        ({"note": "causal=False"}, False),
        ({"causal": "false"}, False),
        ({}, False),
    ],
)
def test_mask_is_as_the_row_says(cells: dict[str, str], causal: bool) -> None:
    plain = {"op": "flash_attn2", "batch": "4", "input_len": "16384", "n_heads": "16", "head_dim": "128"}
    ratio = value(row("A100-SXM-80GB", **plain | cells)) / value(row("A100-SXM-80GB", **plain))
    assert ratio == pytest.approx(0.5 if causal else 1.0, rel=0.05)


def test_backward_pass_and_missing_cells_are_refused_with_a_reason() -> None:
    cells = {"op": "flash_attn2_bwd", "batch": "4", "input_len": "4096", "head_dim": "128"}
    assert "backward" in str(predict([row("A100-SXM-80GB", **cells)])[0])
    (missing,) = predict([row("A100-SXM-80GB", op="flash_attn2", batch="4", input_len="4096")])
    assert isinstance(missing, Refused)
    assert "head_dim" in str(missing)


def test_prefill_times_writing_the_cache_with_the_engine_that_does() -> None:
    """64 heads, 65,536 tokens: 4 GiB pass through TensorRT-LLM's rotation, none in an unknown library."""
    shape = (512, 128, 64, 64, 128)
    alone = value(engine_row("H100-SXM-80GB", "some-kernel", _PREFILL, shape))
    moved = 65_536 * 3 * 64 * 128 * 4  # bytes: queries, keys and values read and written
    for engine in ("trtllm", "vllm", "sglang"):
        assert value(engine_row("H100-SXM-80GB", engine, _PREFILL, shape)) > alone
    assert value(engine_row("H100-SXM-80GB", "trtllm", _PREFILL, shape)) - alone > moved / 3.35e12 * 1e6


def test_portable_kernels_ignore_the_window_and_narrow_formats_in_prefill() -> None:
    shape = (4, 8192, 16, 8, 256)
    plain = engine_row("H100-SXM-80GB", "sglang", _PREFILL, shape, "bf16", kernel="triton")
    windowed = engine_row("H100-SXM-80GB", "sglang", _PREFILL, shape, "bf16", kernel="triton", window="128")
    native = engine_row("H100-SXM-80GB", "sglang", _PREFILL, shape, "bf16", kernel="fa3", window="128")
    assert value(windowed) == pytest.approx(value(plain))
    assert value(native) < value(windowed) / 20


def test_kinds() -> None:
    names = {op: kind_of(engine_row("H100", "vllm", op, (1, 8, 8, 8, 64))) for op in (_PREFILL, _DECODE)}
    assert [k.name for k in names.values() if k] == ["prefill attention", "decode attention"]
