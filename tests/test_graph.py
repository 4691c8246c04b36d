"""Whole passes by hand and by conservation: what is cut, what is replicated, what is exchanged, what is stored."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import catalog, graph
from perfmodel.graph import Phase, weight_residency
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.ops.traffic import Op
from perfmodel.parameters import block_weights, parameters_total
from perfmodel.schedule import operators
from perfmodel.spec.formats import Format, get_format
from perfmodel.spec.model import Model

BF16 = Formats(*[get_format("bf16")] * 4)
# One of each kind of layer: grouped, windowed, parallel, latent, mixture, recurrent, with its own embedding width.
KINDS = (
    "llama-3.1-8b", "gemma-2-2b", "gpt-j-6b", "deepseek-v3", "deepseek-v3.2", "qwen3-30b-a3b", "gpt-oss-20b",
    "qwen3-next-80b-a3b", "mamba2-2.7b", "jamba-v0.1", "opt-350m",
)  # fmt: skip


def ops_of(name: str, phase: Phase, formats: Formats = BF16, **degrees: int) -> list[tuple[Op, float]]:
    program = graph.lower(catalog.load_model(name), phase, Parallelism(**degrees), formats)
    return [(op, times) for op, times, _ in operators(program.schedule)]


def flops(ops: list[tuple[Op, float]], *, without: tuple[str, ...] = ()) -> float:
    return sum(n * count for op, n in ops if op.name not in without for count in op.flops.values())


def tokenwise(ops: list[tuple[Op, float]]) -> float:
    """FLOPs of operators that see each new token once, whatever its context."""
    return sum(n * sum(op.flops.values()) for op, n in ops if not op.contextual)


# --- tensor, pipeline, data and context parallelism -----------------------------------------------------------------


def test_llama_70b_collectives_of_eight_ranks_by_hand() -> None:
    """Decode of 16: one all-reduce after the embedding and two in each of 80 layers, 16 * 8192 * 2 bytes; logits gathered once.

    A ring sends 2 * 7/8 of an all-reduced message and 7/8 of a gathered one.
    """
    ops = [(op, n) for op, n in ops_of("llama-3.1-70b", graph.decode(16, 1000), tp=8) if op.kind == "collective"]
    calls, sent = Counter[str](), Counter[str]()
    for op, n in ops:
        kind = next(iter(op.shape))
        calls[kind] += int(n)
        sent[kind] += n * op.bytes("fabric")
        assert op.shape["ranks"] == 8
    message = 16 * 8192 * 2
    assert calls == {"all_reduce": 161, "all_gather": 1}
    assert sent["all_reduce"] == 161 * message * 2 * 7 / 8
    assert sent["all_gather"] == 16 * 128_256 * 2 * 7 / 8


def test_parallel_branches_share_one_all_reduce() -> None:
    """GPT-J adds attention and feed-forward before reducing: 28 layers and the embedding."""
    ops = ops_of("gpt-j-6b", graph.decode(1, 100), tp=8)
    assert sum(n for op, n in ops if "all_reduce" in op.shape) == 29


def test_one_device_exchanges_nothing() -> None:
    assert not [op for op, _ in ops_of("deepseek-v3", graph.decode(4, 100)) if op.kind in ("collective", "p2p")]


@pytest.mark.parametrize("phase", [graph.prefill(2, 300, 50), graph.decode(8, 4095)], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", ["llama-3.1-70b", "gpt-j-6b", "gemma-2-27b", "mistral-7b"])
def test_tensor_parallel_ranks_share_the_matrix_work_of_one(name: str, phase: Phase) -> None:
    """Norms, residuals and sampling are repeated on every rank; matrix products are not (KV heads >= ranks here)."""
    one, eight = (sum(n * op.flops.get("bf16", 0.0) for op, n in ops_of(name, phase, tp=tp)) for tp in (1, 8))
    assert 8 * eight == pytest.approx(one, rel=1e-12)


def test_context_parallel_ranks_share_the_work_of_one() -> None:
    """Every operator of a prefill divides but the head, which only the rank with the last token needs: all do it here."""
    head = ("final_norm", "lm_head", "sampler", "ring_kv")
    one, four = (ops_of("llama-3.1-8b", graph.prefill(2, 4096, 512), cp=cp) for cp in (1, 4))
    assert 4 * flops(four, without=head) == pytest.approx(flops(one, without=head), rel=1e-12)


@pytest.mark.parametrize(("pp", "layers"), [(2, 80), (3, 81), (7, 84), (80, 80)])
def test_pipeline_stages_are_as_long_as_the_longest(pp: int, layers: int) -> None:
    """80 layers on 3 stages: the longest has 27, so a pass costs 81 layers and 2 hops of 4 * 8192 bf16."""
    ops = ops_of("llama-3.1-70b", graph.decode(4, 100), pp=pp)
    assert sum(n for op, n in ops if op.name == "o_proj") == pytest.approx(layers)
    hops = [(op, n) for op, n in ops if op.name == "stage_hop"]
    assert [(n, op.bytes("fabric")) for op, n in hops] == [(pp - 1, 4 * 8192 * 2)]


@pytest.mark.parametrize(("batch", "dp", "rows"), [(9, 4, 3), (8, 4, 2), (1, 4, 1), (4, 1, 4)])
def test_data_parallel_batch_is_padded_to_the_fullest_rank(batch: int, dp: int, rows: int) -> None:
    head = next(op for op, _ in ops_of("llama-3.1-8b", graph.decode(batch, 10), dp=dp) if op.name == "lm_head")
    assert head.shape["m"] == rows


def test_groups_that_leave_a_node_know_how_far_apart_their_ranks_are() -> None:
    """tp neighbours are adjacent, data-parallel ranks tp apart, pipeline stages tp * dp apart."""
    ops = ops_of("mixtral-8x7b", graph.decode(16, 10), tp=4, dp=2, pp=2)
    stride = {op.name: op.shape["stride"] for op, _ in ops if "stride" in op.shape}
    assert stride["mixer_all_reduce"] == 1
    assert stride["dispatch"] == stride["combine"] == 4
    assert stride["stage_hop"] == 8


def test_expert_and_context_parallel_ranks_are_apart() -> None:
    """Two expert ranks of eight devices are four apart; context-parallel ranks of tp = 4 are four apart."""
    experts = {op.name: op for op, _ in ops_of("mixtral-8x7b", graph.decode(16, 10), dp=8, ep=2)}
    assert experts["dispatch"].shape["stride"] == experts["combine"].shape["stride"] == 4
    for phase, exchange in ((graph.decode(16, 10), "cp_gather"), (graph.prefill(1, 100), "ring_kv")):
        context = {op.name: op for op, _ in ops_of("llama-3.1-8b", phase, tp=4, cp=2)}
        assert context[exchange].shape["stride"] == 4


# --- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [k for k in KINDS if k not in ("deepseek-v3", "deepseek-v3.2")])
def test_mixed_pass_is_the_sum_of_its_parts(name: str) -> None:
    """FLOPs of a decode batch and a chunk together are those of each alone: weights are read once, tokens computed once each."""
    both = flops(ops_of(name, graph.mixed(5, 700, 256, 128)))
    apart = flops(ops_of(name, graph.decode(5, 700))) + flops(ops_of(name, graph.prefill(1, 256, 128)))
    assert both == pytest.approx(apart, rel=1e-12)


@settings(max_examples=20)
@given(
    name=st.sampled_from(["llama-3.1-8b", "gemma-2-2b", "qwen3-30b-a3b"]),
    cuts=st.lists(st.integers(1, 3000), min_size=2, max_size=4),
)
def test_chunked_prefill_computes_what_one_prefill_does(name: str, cuts: list[int]) -> None:
    """Token-wise work and attention pairs; the head runs once per chunk and is left out."""
    head = ("final_norm", "lm_head", "sampler")
    done, chunked = 0, 0.0
    for cut in cuts:
        chunked += flops(ops_of(name, graph.prefill(1, cut, done)), without=head)
        done += cut
    assert chunked == pytest.approx(flops(ops_of(name, graph.prefill(1, done)), without=head), rel=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_tokenwise_work_does_not_see_the_context(name: str) -> None:
    assert tokenwise(ops_of(name, graph.decode(4, 10))) == tokenwise(ops_of(name, graph.decode(4, 100_000)))


def test_logits_of_the_last_or_of_all_positions() -> None:
    last, every = (
        next(op for op, _ in ops_of("llama-3.1-8b", Phase((Group(3, 100, 0),), logits=which)) if op.name == "lm_head")
        for which in ("last", "all")
    )
    assert every.flops["bf16"] == 100 * last.flops["bf16"] == 2 * 300 * 4096 * 128_256


# --- widths ----------------------------------------------------------------------------------------------------------

# Scores of the router, logits, partial softmax results and index scores are FP32 (keys of the index FP8) in every format.
_FIXED = ("top_k", "sampler", "indexer.cache", "indexer.scores_0")


@settings(max_examples=25)
@given(name=st.sampled_from(KINDS), scale=st.floats(0.25, 4), is_decode=st.booleans())
def test_bytes_follow_widths_and_flops_do_not(name: str, scale: float, is_decode: bool) -> None:
    """Scale every width: bytes scale with it, operator by operator, and FLOPs stay."""
    wide = Format("wide", 16 * scale, 0, 0, "bf16", "")
    scaled = Formats(wide, wide, wide, wide, state_width=4 * scale)
    phase = graph.decode(4, 1000) if is_decode else graph.prefill(2, 100, 50)
    for (a, _), (b, _) in zip(ops_of(name, phase), ops_of(name, phase, scaled), strict=True):
        assert b.flops == a.flops
        if a.name not in _FIXED:
            assert b.bytes() == pytest.approx(scale * a.bytes())
            assert b.bytes("fabric") == pytest.approx(scale * a.bytes("fabric"))


def test_four_bit_weights_are_read_narrow_and_expanded() -> None:
    """Llama-3.1-8B with 4-bit weights in groups of 128 (20 bits of scale and zero): (4 + 20/128) / 8 bytes an element."""
    formats = Formats(get_format("int4"), get_format("int4"), get_format("bf16"), get_format("bf16"))
    down = next(op for op, _ in ops_of("llama-3.1-8b", graph.decode(4, 10), formats) if op.name == "down_proj")
    assert down.bytes(tensor="weights") == 4096 * 14336 * (4 + 20 / 128) / 8
    assert down.flops["bf16"] == 2 * 4 * 4096 * 14336
    assert down.flops["vector"] > 0


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.names("models"))
def test_one_device_stores_every_parameter_once(name: str) -> None:
    model = catalog.load_model(name)
    stored = sum(r.elements for r in weight_residency(model, Parallelism(), BF16))
    assert stored == parameters_total(model)


def matrices(model: Model, *, experts: bool) -> int:
    """Elements of the layers' matrices that parallelism cuts."""
    whole = ("q_a_proj", "kv_a_proj", "router", "shared_gate")
    return sum(
        count * w.elements
        for name, count in model.block_counts().items()
        for w in block_weights(model.blocks[name], model.hidden)
        if w.matrix and w.name not in whole and (w.part == "experts") == experts
    )


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama-3.1-70b", {"tp": 8}),
        ("llama-3.1-70b", {"tp": 8, "pp": 4}),
        ("llama-3.1-70b", {"pp": 80}),
        ("gpt-j-6b", {"tp": 4, "pp": 2}),
        ("mixtral-8x7b", {"tp": 4, "ep": 4}),
        ("mixtral-8x7b", {"tp": 2, "dp": 4, "ep": 8}),
        ("qwen3-30b-a3b", {"tp": 4, "dp": 2, "ep": 2}),
    ],
    ids=str,
)
def test_ranks_together_store_each_matrix_as_often_as_it_is_replicated(name: str, degrees: dict[str, int]) -> None:
    """Experts once over the whole instance; other matrices once per data-parallel replica."""
    model, par = catalog.load_model(name), Parallelism(**degrees)
    stored = {r.name: r.elements for r in weight_residency(model, par, BF16)}
    parts = {f"{b}.{w.name}": w for b in model.blocks for w in block_weights(model.blocks[b], model.hidden)}
    whole = ("router",)
    for experts, copies in ((True, 1), (False, par.dp)):
        ours = sum(
            elements
            for key, elements in stored.items()
            if key in parts
            and parts[key].matrix
            and parts[key].name not in whole
            and (parts[key].part == "experts") == experts
        )
        assert par.devices * ours == pytest.approx(copies * matrices(model, experts=experts))


def test_llama_70b_rank_of_eight_by_hand() -> None:
    """Per layer q and o 8192^2, k and v 1024 * 8192, three of 28672 * 8192, cut by 8; two norms whole; table and head cut by 8."""
    layer = (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192) / 8 + 2 * 8192
    rest = 2 * 128_256 * 8192 / 8 + 8192
    stored = sum(r.elements for r in weight_residency(catalog.load_model("llama-3.1-70b"), Parallelism(tp=8), BF16))
    assert stored == 80 * layer + rest


def test_kv_projections_replicate_beyond_the_kv_heads() -> None:
    """Qwen3-30B-A3B has 4 KV heads: on 8 ranks each stores a quarter of k_proj, 128 of 512 rows of 2048."""
    stored = weight_residency(catalog.load_model("qwen3-30b-a3b"), Parallelism(tp=8), BF16)
    assert next(r.elements for r in stored if r.name.endswith("k_proj")) == 48 * 128 * 2048


def test_last_stage_does_not_also_hold_the_table() -> None:
    """With two stages the fullest device has one of table and head, 128256 * 8192 each, not both."""
    model = catalog.load_model("llama-3.1-70b")
    one, two = (sum(r.elements for r in weight_residency(model, Parallelism(pp=pp), BF16)) for pp in (1, 2))
    layers = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192)
    assert one - two == layers / 2 + 128_256 * 8192
