"""Measured element-wise kernels and single operators of a layer: which operator a name means, and how far off."""

from __future__ import annotations

import pytest

from perfmodel.validation.kinds import elementwise
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")
H100, A100 = "H100-SXM-80GB", "A100-SXM-80GB"
LLAMA, GPT3 = "meta-llama/Llama-2-70b-hf", "GPT-3 175B (one layer: d=12288,h=96)"


def row(**cells: str | float) -> Row:
    base = {
        "hardware": A100, "phase": "elementwise", "metric": "kernel_time", "unit": "us", "dtype": "fp16", "value": 1,
        "engine": "vllm-fork(sarathi)",
    }  # fmt: skip
    return Row("f.csv", 2, {k: str(v) for k, v in (base | cells).items()})


def answer(r: Row) -> Predicted | Refused:
    kind = next(k for k in (elementwise.ELEMENTWISE, elementwise.LAYER) if k.claims(r))
    return kind.predict([r])[0]


def value(r: Row) -> float:
    outcome = answer(r)
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


def refusal(r: Row) -> str:
    outcome = answer(r)
    assert isinstance(outcome, Refused), outcome
    return str(outcome)


# Microseconds of unfused kernels of 2023 in Vidur's profiles (MIT licence): Llama-2-70B, and Phi-2 for its plain GELU and
# its parallel block, whose two additions are timed together.
PROFILED = [
    (A100, LLAMA, 1, "mlp_act", 4096, 679.0),
    (A100, LLAMA, 1, "mlp_act", 1, 22.0),
    (A100, LLAMA, 8, "mlp_act", 4096, 91.8),
    (A100, LLAMA, 1, "input_layernorm", 4096, 194.0),
    (A100, LLAMA, 1, "attn_rope", 4096, 173.0),
    (A100, LLAMA, 8, "add", 4096, 117.0),
    (H100, LLAMA, 1, "mlp_act", 4096, 362.0),
    (H100, LLAMA, 1, "input_layernorm", 1, 6.0),
    (H100, LLAMA, 1, "attn_rope", 4096, 100.5),
    (H100, "microsoft/phi-2", 1, "add", 4096, 40.0),
    (H100, "microsoft/phi-2", 1, "mlp_act", 4096, 68.0),
]


@pytest.mark.parametrize(("hardware", "model", "tp", "op", "m", "measured"), PROFILED)
def test_profiled_kernels(hardware: str, model: str, tp: int, op: str, m: int, measured: float) -> None:
    assert value(row(hardware=hardware, model=model, tp=tp, op=op, m=m)) == pytest.approx(measured, rel=0.3)


# PyTorch timed on the host (LLMCompass, BSD-3): compiled layer norm and GELU start at 48-52 us, softmax at 13 us.
EAGER = [
    ("softmax", 4096, 32, 13.1), ("softmax", 4096, 32768, 557.2), ("softmax", 32768, 4096, 481.4),
    ("layernorm", 4096, 1024, 53.2), ("layernorm", 32768, 4096, 347.9),
    ("gelu", 1, 65536, 47.4), ("gelu", 1, 2**29, 1375.4),
]  # fmt: skip


@pytest.mark.parametrize(("op", "m", "n", "measured"), EAGER)
def test_eager_kernels(op: str, m: int, n: int, measured: float) -> None:
    got = value(row(engine="pytorch/cublas/rocblas/nccl", op=op, m=m, n=n))
    assert got == pytest.approx(measured, rel=0.3)


# One layer of GPT-3 on 4 A100, 8 sequences of 2,048 tokens (LLMCompass, BSD-3) [us].
PREFILL = {
    "Q_K_V": 13721.8, "Q_mul_K": 1881.1, "A_mul_V": 1183.2, "Wo_proj": 4540.3, "W1_proj": 17464.3, "W2_proj": 17485.6,
    "Softmax": 2801.5, "LayerNorm_MHA": 681.6, "LayerNorm_FFN": 681.6, "GeLU": 524.3, "AllReduce_MHA": 2890.9,
    "AllReduce_FFN": 2890.9,
}  # fmt: skip


def test_operators_of_a_layer_add_up() -> None:
    given: dict[str, str | float] = {
        "phase": "prefill",
        "batch": 8,
        "input_len": 2048,
        "context_len": 2048,
        "tp": 4,
        "model": GPT3,
    }
    cells = {**given, "metric": "layer_op_time", "engine": "pytorch/cublas/rocblas/nccl"}
    predicted = {op: value(row(op=op, **cells)) for op in PREFILL}
    assert sum(predicted.values()) == pytest.approx(sum(PREFILL.values()), rel=0.2)
    for op, measured in PREFILL.items():
        assert predicted[op] == pytest.approx(measured, rel=0.5), op


def test_a_layer_is_more_than_its_products() -> None:
    cells: dict[str, str | float] = {"metric": "layer_time", "phase": "decode", "batch": 8, "context_len": 1024, "engine": "vllm",
             "model": "meta-llama/Llama-3.1-8B", "hardware": H100}  # fmt: skip
    # 218 M weights of a layer in bf16 at 3.35 TB/s take 130 us; keys and values of 8 x 1,024 tokens (33.6 MB) 10 us.
    assert 140 < value(row(**cells)) < 2 * 140


def test_serving_engines_fuse_what_frameworks_do_not() -> None:
    cells: dict[str, str | float] = {
        "hardware": H100,
        "model": "meta-llama/Llama-3.1-8B",
        "dtype": "bf16",
        "op": "input_layernorm",
        "m": 8192,
    }
    # 4 streams of 8192 x 4096 x 2 B = 268 MB against 3 (x twice, its norm once), but vectorised loads.
    fused = value(row(engine="vllm", **cells))
    assert fused == pytest.approx(268e6 / 3.35e12 * 1e6, rel=0.35)
    assert value(row(engine="vllm-fork(sarathi)", **cells)) > fused


def test_shards_by_tp() -> None:
    cells: dict[str, str | float] = {"hardware": A100, "model": LLAMA, "m": 4096}
    for op, share in (("mlp_act", 8.0), ("attn_rope", 8.0), ("add", 1.0)):
        whole, part = value(row(op=op, tp=1, **cells)), value(row(op=op, tp=8, **cells))
        # (64 + 8) heads become 8 + 1: rotary embedding divides by 8 too.
        assert whole / part == pytest.approx(share, rel=0.15), op


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("post_attention_layernorm", "norm"), ("final_layernorm", "norm"), ("rotary_emb", "rope"), ("qkv_proj", "qkv"),
        ("q_proj", "q"), ("v_proj", "kv"), ("o_proj", "o"), ("gate_up_proj", "gate_up"), ("gate_proj", "up"),
        ("up_proj", "up"), ("down_proj", "down"), ("act_fn", "activation"), ("silu_and_mul", "activation"),
        ("attn", "attention"), ("lm_head", "lm_head"), ("embedding", "embedding"), ("AllReduce_MHA", "all_reduce"),
        ("Q_mul_K", "scores"), ("A_mul_V", "values"), ("residual_add", "add"), ("attn_post_proj", "o"),
    ],
)  # fmt: skip
def test_words(name: str, word: str) -> None:
    assert elementwise.word(name) == word


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"op": "teleport", "m": 1, "model": LLAMA}, "unknown operator 'teleport'"),
        ({"op": "attn_rope", "m": 1}, "model not stated"),
        ({"op": "norm", "m": 1, "model": "no-such"}, "unknown model 'no-such'"),
        ({"op": "norm", "m": 1, "hardware": "no-such", "model": LLAMA}, "unknown hardware 'no-such'"),
        ({"op": "gelu", "n": 4096}, "m not stated"),
        ({"op": "gelu", "m": 4096}, "n not stated"),
        ({"op": "mlp_act", "m": 1, "model": LLAMA, "tp": 7}, "does not divide the 64 heads"),
        ({"op": "all_reduce", "m": 1, "model": LLAMA, "phase": "prefill", "metric": "layer_op_time"}, "no operator"),
        ({"op": "norm", "m": 1, "model": LLAMA, "metric": "bandwidth"}, "is not a time"),
    ],
)
def test_refusals(cells: dict[str, str | float], reason: str) -> None:
    assert reason in refusal(row(**cells))
