"""Counts as expressions: the same numbers as the direct evaluation, the physics of widths, derivatives, JavaScript."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import lru_cache

import numpy as np
import pytest

from perfmodel import catalog, graph, vectorize
from perfmodel.errors import SpecError
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.schedule import operators
from perfmodel.spec.formats import get_format
from perfmodel.symbols import ALPHABET

BF16 = get_format("bf16")
PLAIN = Formats(BF16, BF16, BF16, BF16)
# Weight-only 4 bit, head and embedding at 16 bits, FP8 cache: every width differs.
MIXED = Formats(get_format("int4"), get_format("q6_k"), BF16, get_format("fp8"), ("embedding", "head", "router"))
# W8A8: activations are cast, so quantise operators appear.
CAST = Formats(get_format("fp8"), get_format("fp8"), BF16, BF16, ("embedding", "head", "router"), quantise=True)

MODELS = {
    "dense": "llama-3.1-8b",
    "windowed MoE": "gpt-oss-120b",
    "latent MoE": "deepseek-v3",
    "sparse latent": "deepseek-v3.2",
    "Mamba-2 hybrid": "nemotron-h-8b",
    "Mamba-1 hybrid": "jamba-v0.1",
    "delta-rule hybrid": "qwen3-next-80b-a3b",
    "lightning hybrid": "minimax-text-01",
}


@lru_cache
def model(kind):
    return catalog.load_model(MODELS[kind])


def resized(m, rng):
    """The same structure with every size drawn anew; all layers keep one number of experts, as R supposes."""
    blocks = {}
    experts, top_k = int(rng.integers(2, 40)) * 8, int(rng.integers(1, 8))
    for name, block in m.blocks.items():
        update = {}
        for part in ("mixer", "ffn"):
            record = getattr(block, part)
            if record is None:
                continue
            sizes = {k: v for k, v in record if type(v) is int and v > 1 and k not in ("top_groups", "groups")}
            drawn = {k: int(rng.integers(2, 40)) * 8 for k in sizes}
            if "top_k" in drawn:
                drawn |= {"experts": experts, "top_k": top_k}
            if "kv_heads" in drawn:
                drawn["heads"] = drawn["kv_heads"] * 4
            update[part] = record.model_copy(update=drawn)
        blocks[name] = block.model_copy(update=update)
    return m.model_copy(update={"blocks": blocks, "hidden": int(rng.integers(8, 99)) * 64, "vocab": 50_000})


def direct(m, formats, par, phase):
    """The counts of every operator from the formulas called with numbers: the other path."""
    found = []
    for op, times, _ in operators(graph.lower(m, phase, par, formats).schedule):
        counts = {f"flops.{unit}": n for unit, n in op.flops.items()}
        for t in op.traffic:
            key = f"bytes.{t.path}.{t.tensor}"
            counts[key] = counts.get(key, 0.0) + t.elements * t.width
        found += [(op.name, quantity, n, times) for quantity, n in counts.items() if np.any(n != 0)]
    return found


def phase_of(kind, b, q, c):
    return graph.decode(b, c) if kind == "decode" else graph.prefill(b, q, c)


@pytest.mark.parametrize("degrees", [{}, {"tp": 4}, {"tp": 2, "dp": 4, "ep": 8, "pp": 2, "cp": 2}])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_counts_equal_direct_evaluation_on_random_sizes(kind, phase, degrees):
    rng = np.random.default_rng(7)
    par = Parallelism(**degrees)
    b, q, c = (rng.integers(1, most, 20).astype(float) for most in (300, 9000, 200_000))
    for formats in (PLAIN, MIXED, CAST):
        m = resized(model(kind), rng)
        counts = vectorize.expressions(vectorize.symbolic_program(m, phase, formats, degrees))
        values = vectorize.inputs(m, formats, par) | {"B": b, "Q": q, "C": c}
        found = vectorize.compile(x.expr for x in counts)(values)
        times = vectorize.compile(x.times for x in counts)(values)
        expected = direct(m, formats, par, phase_of(phase, b, q, c))
        assert [(x.op, x.quantity) for x in counts] == [(op, quantity) for op, quantity, _, _ in expected]
        np.testing.assert_allclose(found, [np.broadcast_to(n, b.shape) for _, _, n, _ in expected], rtol=1e-9)
        np.testing.assert_allclose(times[:, 0], [n for _, _, _, n in expected], rtol=1e-9)


def test_models_of_one_structure_share_one_program_and_others_do_not():
    small, large = catalog.load_model("llama-3.1-8b"), catalog.load_model("llama-3.1-70b")
    program = vectorize.symbolic_program(small, "decode", PLAIN, ("tp",))
    assert vectorize.symbolic_program(large, "decode", PLAIN, ("tp",)) is program
    assert vectorize.symbolic_program(small, "decode", PLAIN) is not program
    assert vectorize.symbolic_program(small, "prefill", PLAIN, ("tp",)) is not program
    assert vectorize.symbolic_program(small, "decode", CAST, ("tp",)) is not program


@pytest.mark.parametrize("kind", MODELS)
def test_flops_contain_no_width(kind):
    widths = {name for name, entry in ALPHABET.items() if entry.unit == "byte"}
    for phase in ("prefill", "decode"):
        for count in vectorize.expressions(vectorize.symbolic_program(model(kind), phase, MIXED, ("tp", "ep"))):
            used = {s.name for s in count.expr.free_symbols}
            if count.quantity.startswith("flops."):
                assert not used & widths, count


# Records of a width that no format changes: logits and router scores in FP32, keys (1 byte) and scores of the indexer.
FIXED = {
    ("sampler", "logits"), ("top_k", "activations"), ("indexer.scores_0", "kv"), ("indexer.scores_0", "activations"),
    ("indexer.cache", "kv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_bytes_are_homogeneous_of_degree_one_in_widths(kind):
    """Doubling every width doubles the bytes of each record, but for those of fixed width, which stay."""
    counts = vectorize.expressions(vectorize.symbolic_program(model(kind), "decode", MIXED))
    values = vectorize.inputs(model(kind), MIXED) | {"B": 7.0, "C": 3000.0}
    doubled = values | {w: 2 * values[w] for w in ("w", "w_e", "a", "kv", "s")}
    moved = [c for c in counts if c.quantity.startswith("bytes.")]
    once, twice = (vectorize.compile(c.expr for c in moved)(v)[:, 0] for v in (values, doubled))
    for count, x, y in zip(moved, once, twice, strict=True):
        fixed = (count.op, count.quantity.rsplit(".", 1)[1]) in FIXED
        assert y == pytest.approx(x if fixed else 2 * x, rel=1e-12), count


def test_llama_totals_by_hand():
    """One sequence, one token, no context: every weight but the embedding is read once and used once.

    Weights: 32 layers x (4096 x 6144 + 4096 x 4096 + 3 x 4096 x 14336) + 128256 x 4096 = 7,504,658,432; two FLOP each, and
    4 x 32 layers x 4096 for the one query-key pair.
    """
    m = catalog.load_model("llama-3.1-8b")
    exprs = vectorize.totals(vectorize.expressions(vectorize.symbolic_program(m, "decode", PLAIN)))
    values = vectorize.inputs(m, PLAIN) | {"B": 1.0, "C": 0.0}
    flops, weights = vectorize.compile([exprs["flops"], exprs["bytes.hbm.weights"]])(values)[:, 0]
    assert flops == 2 * 7_504_658_432 + 4 * 32 * 4096
    assert weights == 2 * 7_504_658_432 + 2 * 4096  # and one row of the embedding table


@pytest.mark.parametrize("kind", ["dense", "windowed MoE", "latent MoE", "Mamba-2 hybrid"])
@pytest.mark.parametrize("name", ["B", "C", "w", "kv", "h"])
def test_elasticity_equals_finite_differences(kind, name):
    m = model(kind)
    exprs = vectorize.totals(vectorize.expressions(vectorize.symbolic_program(m, "decode", MIXED)))
    values = vectorize.inputs(m, MIXED) | {"B": 12.0, "C": 5000.0}
    step = 1e-5
    for quantity in ("flops", "bytes"):
        up, down = (
            vectorize.compile([exprs[quantity]])(values | {name: values[name] * f})[0, 0] for f in (1 + step, 1 - step)
        )
        slope = (np.log(up) - np.log(down)) / (np.log1p(step) - np.log1p(-step))
        exact = vectorize.compile([vectorize.elasticity(exprs[quantity], name)])(values)[0, 0]
        assert exact == pytest.approx(slope, abs=1e-6)


def test_bytes_elasticities_of_a_pure_decode_read():
    """Of bytes = w N + kv M the elasticities are the shares of the two terms."""
    w, kv, h = (vectorize.symbol(n) for n in ("w", "kv", "h"))
    bytes_ = 30 * w * h + 10 * kv * h
    values = {"w": 2.0, "kv": 2.0, "h": 5.0}
    shares = vectorize.compile([vectorize.elasticity(bytes_, n) for n in ("w", "kv", "h", "tp")])(values)[:, 0]
    assert shares.tolist() == pytest.approx([0.75, 0.25, 1.0, 0.0])


def test_crossing_in_closed_form_by_bisection_and_absent():
    b, e, k = (vectorize.symbol(n) for n in ("B", "experts", "top_k"))
    # 3 B - 12 is positive beyond 4; 2 B^2 - 8 B - 10 = 2 (B - 5)(B + 1) beyond 5.
    assert vectorize.crossing(3 * b - 12, "B", {}) == pytest.approx(4)
    assert vectorize.crossing(2 * b**2 - 8 * b - 10, "B", {}) == pytest.approx(5)
    assert vectorize.crossing(-3 * b - 12, "B", {}) is None
    assert vectorize.crossing(3 * b + 12, "B", {}) is None
    # 8 (1 - (1 - 2/8)^B) - 4 = 0 at 0.75^B = 1/2, B = ln 2 / ln(4/3) = 2.4094.
    touched = e * (1 - (1 - k / e) ** b) - 4
    assert not vectorize.is_polynomial(touched, "B")
    assert vectorize.crossing(touched, "B", {"experts": 8, "top_k": 2}) == pytest.approx(2.40942, rel=1e-5)


def test_a_missing_value_is_named():
    run = vectorize.compile([vectorize.symbol("B") * vectorize.symbol("h")])
    with pytest.raises(SpecError, match="no value for h"):
        run({"B": 1.0})


def test_chunks_join_without_a_seam():
    """More rows than one chunk holds: each row is B^2 of its own B."""
    b = np.arange(1.0, 70_001.0)
    found = vectorize.compile([vectorize.symbol("B") ** 2])({"B": b})
    assert np.array_equal(found[0], b**2)


def test_text_and_latex_use_the_alphabet():
    b, h, kv = (vectorize.symbol(n) for n in ("B", "h", "kv_heads"))
    expr = 2 * b * h * (kv + 1)
    assert vectorize.text(expr) == "2·B·h·(kv_heads + 1)"
    assert vectorize.text(expr, {"B": 16.0, "h": 4096.0, "kv_heads": 8.0}) == "2·16·4096·(8 + 1)"
    assert vectorize.latex(expr) == r"2 B h \left(H_{kv} + 1\right)"
    assert vectorize.text(vectorize.unindexed(vectorize.symbol("heads", "1") * h)) == "h·heads"


@pytest.mark.parametrize("kind", MODELS)
def test_javascript_equals_python(kind):
    """Every total of a pass, written as JavaScript functions and run by node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    m = model(kind)
    degrees = ("tp", "dp", "ep", "pp")
    exprs = vectorize.totals(vectorize.expressions(vectorize.symbolic_program(m, "prefill", MIXED, degrees)))
    par = Parallelism(tp=2, dp=4, ep=8, pp=2)
    values = vectorize.inputs(m, MIXED, par) | {"B": 13.0, "Q": 700.0, "C": 3000.0}
    expected = vectorize.compile(exprs.values())(values)[:, 0]
    lines = [f"const {name} = {value!r};" for name, value in values.items()]
    lines.append(f"console.log(JSON.stringify([{', '.join(map(vectorize.javascript, exprs.values()))}]));")
    ran = subprocess.run([node, "-e", "\n".join(lines)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), expected, rtol=1e-12)
