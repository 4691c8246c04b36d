"""Explanations: formulas that give the hand-made numbers, parts that add up, and effects that a second run confirms."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from perfmodel import roofline
from perfmodel.breakdown import op_table, step_phase
from perfmodel.estimator import Estimator
from perfmodel.explain import explain


@pytest.fixture(scope="module")
def llama():
    return Estimator("llama-3.1-8b", "h100-sxm")


@pytest.fixture(scope="module")
def data(llama):
    return explain(llama, 16, 1024, 128).data()


def operators(step):
    return {op["name"]: op for group in step["groups"] for op in group["operators"]}


def formula(op, quantity):
    return next(f for f in op["formulas"] if f["quantity"] == quantity)


def test_projection_of_llama_by_hand(data):
    """16 tokens through q, k, v: 2 x 16 x 4096 x (4096 + 2 x 1024) FLOP; 4096 x 6144 weights of 2 bytes."""
    op = operators(data["steps"]["decode"])["qkv_proj"]
    assert formula(op, "flops.bf16")["value"] == 2 * 16 * 4096 * 6144
    assert formula(op, "bytes.hbm.weights")["value"] == 2 * 4096 * 6144
    assert formula(op, "flops.bf16")["numbers"] == "2·16·4096·(128·32 + 2·128·8)"
    # Input and output of 16 tokens, 2 bytes: 16 x (4096 + 6144) x 2 = 327,680.
    assert op["bytes"] == 2 * 4096 * 6144 + 327_680
    assert op["intensity"] == pytest.approx(805_306_368 / 50_659_328)
    assert op["times"] == 32


def test_attention_of_llama_by_hand(data):
    """The middle of 127 steps has 1024 + 63 cached tokens and the new one: 1088 pairs per query."""
    op = operators(data["steps"]["decode"])["attention"]
    assert data["steps"]["decode"]["context"] == 1087
    assert formula(op, "flops.bf16")["value"] == 16 * 32 * (2 * 128 + 2 * 128) * 1088
    assert formula(op, "bytes.hbm.kv")["value"] == 16 * 1088 * 2 * 8 * 128 * 2


def test_numbers_put_in_give_the_value(data):
    """Each printed substitution, evaluated as arithmetic, is the printed value."""
    checked = 0
    for step in data["steps"].values():
        for op in operators(step).values():
            for f in op["formulas"]:
                arithmetic = f["numbers"].replace("·", "*").replace("^", "**")
                assert eval(arithmetic, {"max": max, "min": min}) == pytest.approx(f["value"], rel=1e-12)
                checked += 1
    assert checked > 60


def test_operators_add_up_to_the_step(llama, data):
    for name, step in data["steps"].items():
        ops = [op for group in step["groups"] for op in group["operators"]]
        assert sum(op["share"] for op in ops) == pytest.approx(1)
        device = sum(op["times"] * op["seconds"] for op in ops)
        assert device == pytest.approx(step["device_seconds"])
        direct = llama.prefill(16, 1024) if name == "prefill" else llama.decode(16, 1088)
        assert step["seconds"] == pytest.approx(direct)
        assert step["seconds"] == pytest.approx(step["device_seconds"] + step["host_seconds"])


def test_every_operator_is_bound_by_its_longest_resource(data):
    for step in data["steps"].values():
        for op in operators(step).values():
            assert op["busy"][op["bound_by"]] == max(op["busy"].values())


def test_ridge_of_the_datasheet(llama, data):
    """989.4 TFLOP/s over 3.35 TB/s is 295.3 FLOP per byte."""
    assert data["steps"]["decode"]["ridge"]["dtypes"]["bf16"]["datasheet"] == pytest.approx(989.4e12 / 3.35e12)
    assert data["steps"]["prefill"]["binding"]["resource"] == "compute"
    assert data["steps"]["decode"]["binding"]["resource"] == "hbm"


def test_batch_at_the_ridge_of_the_linear_layers_by_hand(data):
    """2 N B / peak = (2 N + 2 A B) / bandwidth, so B = N / (N / r - A), with r the ridge.

    N = 7,504,658,432 weights of 2 bytes. A counts inputs and outputs of a token: per layer 4096 + 6144, 4096 + 4096,
    4096 + 28672 and 14336 + 4096, and 4096 + 128256 in the head.
    """
    n, ridge = 7_504_658_432, 989.4e12 / 3.35e12
    a = 32 * (4096 + 6144 + 4096 + 4096 + 4096 + 28672 + 14336 + 4096) + 4096 + 128_256
    linear = data["steps"]["decode"]["ridge"]["linear"]
    assert linear["at"] == pytest.approx(n / (n / ridge - a), rel=1e-9)
    assert linear["closed_form"]


def test_no_batch_reaches_the_ridge_when_each_sequence_reads_longer_than_it_computes(data):
    """One more sequence reads 32 x 1088 x 4096 bytes of cache alone, and computes 2 FLOP per weight and its attention."""
    whole = data["steps"]["decode"]["ridge"]["pass"]
    assert whole["at"] is None
    matrix, memory = whole["more"]
    assert matrix == pytest.approx((2 * 7_504_658_432 + 32 * 4 * 32 * 128 * 1088) / 989.4e12, rel=1e-9)
    assert memory > 32 * 1088 * 4096 / 3.35e12
    assert memory > matrix


def test_effects_of_the_machine_are_those_of_a_changed_machine(llama, data):
    """Bandwidth raised by half a percent either way, evaluated from scratch, gives the printed elasticity."""
    schedule = llama.lower(step_phase(llama, 16, 1, 1087, is_decode=True)).schedule
    near, far = (
        llama._finish(
            roofline.cost(schedule, replace(llama.machine, bandwidth=llama.machine.bandwidth * f)), 16, 1, True,
            llama.machine,
        )
        for f in (0.995, 1.005)
    )  # fmt: skip
    effects = {x["parameter"]: x for x in data["steps"]["decode"]["machine_effects"]}
    slope = np.log(float(far) / float(near)) / np.log(1.005 / 0.995)
    assert effects["memory bandwidth"]["elasticity"] == pytest.approx(slope, abs=0.01)
    assert effects["memory bandwidth"]["elasticity"] < effects["matrix peak"]["elasticity"] < 0
    assert effects["memory bandwidth"]["seconds_at_twice"] > data["steps"]["decode"]["seconds"] / 2


def test_memory_limits_are_those_that_just_fit(llama, data):
    m = data["memory"]
    assert bool(llama.memory(m["max_batch"], m["tokens"]).total <= m["capacity"] * 1.001)
    # Cached bytes of a token: 32 layers x 2 x 8 heads x 128 x 2 bytes = 131,072.
    assert m["longest_context"] == int(m["free"] / (16 * 131_072))


@pytest.mark.parametrize(
    ("model", "hardware", "degrees"),
    [
        ("deepseek-r1", "h200-sxm", {"tp": 8, "ep": 8}),
        ("gpt-oss-120b", "h100-sxm", {"tp": 2}),
        ("qwen3-next-80b-a3b", "h100-sxm", {"tp": 2, "pp": 2}),
        ("llama-3.1-70b", "mi300x", {"tp": 8, "weight_dtype": "fp8"}),
    ],
)
def test_text_fits_a_terminal_and_data_are_json(model, hardware, degrees):
    explanation = explain(Estimator(model, hardware, **degrees), 16, 1024, 128)
    lines = explanation.text().splitlines()
    assert max(map(len, lines)) <= 110
    for part in ("PREFILL", "DECODE STEP", "TOTALS", "WHAT BINDS", "MEMORY", "SYMBOLS"):
        assert any(line.startswith(part) for line in lines)
    json.dumps(explanation.data(), allow_nan=False)


def test_every_symbol_of_the_text_is_in_the_legend(data, llama):
    text = explain(llama, 16, 1024, 128).text()
    legend = text[text.index("SYMBOLS") :]
    for name in ("B ", "heads ", "kv_heads ", "inter ", "w ", "kv "):
        assert f"\n  {name}" in legend


def test_one_output_token_has_no_decode_step(llama):
    explanation = explain(llama, 2, 128, 1)
    assert list(explanation.data()["steps"]) == ["prefill"]
    assert "DECODE" not in explanation.text()


def test_cached_prefix_is_context_of_the_prefill(llama):
    step = explain(llama, 1, 1000, 1, prefix=400).data()["steps"]["prefill"]
    assert (step["new"], step["context"]) == (600, 400)


def test_table_of_operators_stands_alone(llama):
    """The rows that reports reuse: achieved rate is FLOPs over seconds, and collectives send bytes."""
    e = Estimator("llama-3.1-8b", "h100-sxm", tp=2)
    rows = {r["name"]: r for r in op_table(e, step_phase(e, 8, 1, 500, is_decode=True))}
    assert rows["qkv_proj"]["flops"] == 2 * 8 * 4096 * 6144 / 2
    assert rows["qkv_proj"]["achieved"] == rows["qkv_proj"]["flops"] / rows["qkv_proj"]["seconds"]
    # Ring all-reduce over 2 ranks sends 2 (2 - 1) / 2 = 1 time the message of 8 x 4096 x 2 bytes.
    assert rows["mixer_all_reduce"]["link_bytes"] == 8 * 4096 * 2
    assert rows["mixer_all_reduce"]["bound_by"] == "link"
    assert rows["sampler"]["intensity"] is None
