"""Speculative decoding against its published table, simulation, and sums of passes written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.ops.traffic import Op
from perfmodel.techniques.registry import technique
from perfmodel.techniques.speculation import chain_tokens, tree_tokens

MODEL, DRAFT, GPU = "llama-3-8b", "llama-3.2-1b", "h100-sxm"


def built(*techniques: str, **more: int) -> Estimator:
    return Estimator(MODEL, GPU, techniques=techniques, **more)  # type: ignore[arg-type]


PLAIN = built()


@pytest.mark.parametrize(
    ("acceptance", "length", "speedup"),
    # Table 1 of arXiv:2211.17192: the speedup of a draft that costs nothing.
    [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71), (0.9, 10, 6.86)],
)
def test_tokens_of_a_chain_as_published(acceptance: float, length: int, speedup: float) -> None:
    assert chain_tokens(acceptance, length) == pytest.approx(speedup, abs=0.005)


@pytest.mark.parametrize(("acceptance", "branches"), [(0.7, (1, 1, 1, 1)), (0.4, (4, 2, 1)), (0.9, (2, 2))])
def test_tokens_of_a_tree_by_simulation(acceptance: float, branches: tuple[int, ...]) -> None:
    """Every level draws b candidates; the path ends at the first level where none is accepted."""
    rng = np.random.default_rng(1)
    trials = 200_000
    alive, emitted = np.ones(trials, bool), np.ones(trials)
    for b in branches:
        alive &= (rng.random((trials, b)) < acceptance).any(axis=1)
        emitted += alive
    assert tree_tokens(acceptance, branches) == pytest.approx(emitted.mean(), abs=4 * emitted.std() / math.sqrt(trials))
    if set(branches) == {1}:
        assert tree_tokens(acceptance, branches) == pytest.approx(chain_tokens(acceptance, len(branches)))


def test_a_round_is_the_drafts_passes_and_one_verification() -> None:
    spec = built(f"speculation:draft={DRAFT},length=3,acceptance=0.5")
    draft = Estimator(DRAFT, GPU)
    verification = PLAIN._many(8, 4, 1999, is_decode=True)
    by_hand = (3 * draft.decode(8, 2000) + verification) / (1 + 0.5 + 0.25 + 0.125)
    assert spec.decode(8, 2000) == pytest.approx(by_hand, rel=1e-9)
    assert spec.round_seconds(8, 2000) == pytest.approx(by_hand * 1.875, rel=1e-9)
    # The draft reads the prompt as well.
    assert spec.prefill(2, 1000) == pytest.approx(PLAIN.prefill(2, 1000) + draft.prefill(2, 1000), rel=1e-9)


def test_a_tree_verifies_all_nodes_and_drafts_level_by_level() -> None:
    spec = built(f"speculation:draft={DRAFT},tree=4x2,acceptance=0.5")
    draft = Estimator(DRAFT, GPU)
    # 4 + 8 nodes and the model's own token; the first level from 1 token, the second from 4.
    passes = PLAIN._many(4, 13, 999, is_decode=True) + draft.decode(4, 1000) + draft._many(4, 4, 999, is_decode=True)
    tokens = 1 + (1 - 0.5**4) + (1 - 0.5**4) * (1 - 0.5**2)
    assert spec.decode(4, 1000) == pytest.approx(passes / tokens, rel=1e-9)


def test_head_verifies_every_position() -> None:
    spec = built("speculation:by=lookup,length=7")
    ops = {op.name: op for op in _pass(spec, batch=2, new=8, context=100)}
    assert ops["lm_head"].shape["m"] == 16
    assert ops["sampler"].shape["elements"] == 16 * 128256


def _pass(e: Estimator, batch: float, new: float, context: float) -> list[Op]:
    from perfmodel.schedule import operators

    return [op for op, _, _ in operators(e.lower(e._phase(batch, new, context, True)).schedule)]


def test_the_length_adapts_to_the_batch() -> None:
    knobs = f"speculation:draft={DRAFT},length=4,acceptance=0.7"
    fixed, adaptive = built(knobs), built(f"{knobs},adaptive=true")
    batches = np.array([1, 8, 32, 128, 512, 2048])
    plain, four, best = (e.decode(batches, 500) for e in (PLAIN, fixed, adaptive))
    assert (best <= np.minimum(plain, four) * (1 + 1e-9)).all()
    every = [built(f"speculation:draft={DRAFT},length={k},acceptance=0.7").decode(1, 500) for k in (1, 2, 3, 4)]
    assert best[0] == pytest.approx(min(every))
    assert best[0] < plain[0]
    # Near the ridge the verification's tokens cost as much as they bring: no speculation is best.
    assert best[-1] == pytest.approx(plain[-1])
    assert four[-1] > plain[-1]
    assert np.all(np.diff(plain / best) <= 1e-9)
    assert adaptive.round_seconds(2048, 500) == pytest.approx(plain[-1])


def test_memory_of_draft_by_hand() -> None:
    spec, draft = built(f"speculation:draft={DRAFT}"), Estimator(DRAFT, GPU)
    # Llama-3.2-1B: 1,235,814,400 parameters of two bytes; 16 layers x 2 x 8 heads x 64 x 2 bytes a token.
    assert spec.memory(1, 16).weights - PLAIN.memory(1, 16).weights == pytest.approx(1_235_814_400 * 2, rel=1e-3)
    assert spec.memory(4, 1600).kv - PLAIN.memory(4, 1600).kv == pytest.approx(4 * 1600 * 32768)
    assert spec.max_batch(4096) < PLAIN.max_batch(4096)
    assert draft.memory(4, 1600).kv == pytest.approx(4 * 1600 * 32768)
    apart = built(f"speculation:draft={DRAFT},aside=true")
    assert apart.memory(4, 1600).total == PLAIN.memory(4, 1600).total


def test_memory_and_cost_of_heads_by_hand() -> None:
    medusa = built("speculation:by=heads,head_layers=0,length=3")
    # Three blocks of 4096 x 4096 and three output matrices of 4096 x 128256, in 16 bits.
    assert medusa.memory(1, 16).weights - PLAIN.memory(1, 16).weights == pytest.approx(3 * 2 * 4096 * (4096 + 128256))
    added = [op for op in _pass(medusa, 2, 4, 100) if op.name.startswith("draft_")]
    assert sum(op.flops["bf16"] for op in added) == pytest.approx(3 * 2 * 2 * 4096 * (4096 + 128256))
    eagle = built("speculation:by=heads,length=3")
    # One layer: 4096 x (4096 + 2 x 1024 + 4096) attention and 3 x 4096 x 14336 feed-forward parameters, two norms.
    layer = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096)
    assert eagle.memory(1, 16).weights - PLAIN.memory(1, 16).weights == pytest.approx(layer)
    assert eagle.memory(1, 160).kv - PLAIN.memory(1, 160).kv == pytest.approx(PLAIN.memory(1, 160).kv / 32)


def test_self_speculation_skips_layers_and_reads_a_sparse_cache() -> None:
    half = built("speculation:draft_with=layer-skip:share=0.5,length=2,acceptance=1")
    alone = built("layer-skip:share=0.5")
    by_hand = (PLAIN._many(1, 3, 999, is_decode=True) + 2 * alone.decode(1, 1000)) / 3
    assert half.decode(1, 1000) == pytest.approx(by_hand, rel=1e-9)
    assert half.memory(1, 1000).total == PLAIN.memory(1, 1000).total
    sparse = built("speculation:draft_with=kv-eviction:budget=512/sinks=4,length=4,acceptance=0.9,copied=512")
    assert sparse.decode(32, 100_000) < 0.6 * PLAIN.decode(32, 100_000)
    # The draft's own copy of 512 tokens: 32 layers x 2 x 8 x 128 x 2 bytes each.
    assert sparse.memory(1, 100_000).kv - PLAIN.memory(1, 100_000).kv == pytest.approx(512 * 131072)


def test_hierarchy_by_hand() -> None:
    spec = built(
        f"hierarchical-speculation:draft={DRAFT},draft_length=2,draft_acceptance=0.5,length=7,acceptance=1,"
        "middle_with=kv-eviction:budget=1024,draft_with=kv-eviction:budget=256/sinks=4"
    )
    middle = built("kv-eviction:budget=1024")
    small = Estimator(DRAFT, GPU, techniques=["kv-eviction:budget=256,sinks=4"])
    # A middle pass emits 1.75 of the 7 tokens: four passes over three tokens, each after two of the small draft.
    passes = 4 * middle._many(1, 3, 59_999, is_decode=True) + 8 * small.decode(1, 60_000)
    by_hand = (passes + PLAIN._many(1, 8, 59_999, is_decode=True)) / 8
    assert spec.decode(1, 60_000) == pytest.approx(by_hand, rel=1e-9)


def test_runs_follow_each_other_through_a_pipeline() -> None:
    plain = built(pp=4)
    alone, pair = (plain._many(1, n, 999, is_decode=True) for n in (1, 2))

    def pace(acceptance: float, cancelled: float = 1.0, runs: int = 4) -> float:
        knobs = f"by=lookup,length=2,acceptance={acceptance},in_flight={runs},cancelled={cancelled}"
        return built(f"speculation:{knobs}", pp=4).decode(1, 1000)

    # Nothing is ever rejected: the two drafted tokens leave each quarter of a pass. Everything is: one token a pass, as without.
    assert pace(1.0) == pytest.approx(pair / 4 / 2)
    assert pace(0.0) == pytest.approx(alone)
    assert pace(0.0, cancelled=0.0) == pytest.approx(alone + pair / 4)
    # From one rejection to the next, 1 / (1 - a) tokens: a plain pass, and a / (1 - a^2) runs of two.
    for a in (0.3, 0.6, 0.9):
        assert pace(a) == pytest.approx((alone + a / (1 - a**2) * pair / 4) * (1 - a))
    # More runs than stages bring no more.
    assert pace(1.0, runs=16) == pytest.approx(pace(1.0))
    rates = [pace(a) for a in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert rates == sorted(rates, reverse=True)


def test_a_draft_beside_sets_the_pace_when_it_is_slower() -> None:
    draft = Estimator(DRAFT, GPU)
    spec = Estimator("llama-3.2-3b", GPU, techniques=[f"speculation:draft={DRAFT},length=8,acceptance=1,aside=true"])
    assert spec.decode(1, 100) == pytest.approx(8 * draft.decode(1, 100) / 9)


def test_no_speculation_changes_nothing() -> None:
    none = built("speculation:by=lookup,length=0")
    batches, contexts = np.array([1, 16, 300]), np.array([10, 5000, 800])
    assert none.decode(batches, contexts) == pytest.approx(PLAIN.decode(batches, contexts), rel=1e-12)
    assert none.prefill(3, 700) == pytest.approx(PLAIN.prefill(3, 700), rel=1e-12)
    assert none.memory(8, 700) == PLAIN.memory(8, 700)
    # A draft that never guesses right only costs.
    assert built("speculation:by=lookup,acceptance=0").decode(64, 2000) > PLAIN.decode(64, 2000)


def test_parts_of_an_estimate_are_those_of_a_round() -> None:
    spec = built(f"speculation:draft={DRAFT},length=3")
    parts = spec.parts(8, 1, 1999, is_decode=True)
    assert parts.seconds == pytest.approx(spec.round_seconds(8, 2000))
    assert parts.busy["beside"] == pytest.approx(3 * Estimator(DRAFT, GPU).decode(8, 2000))
    assert parts.lower <= parts.seconds <= parts.upper
    # The bound has the draft's weights in it, three times, beside the model's: 2.47 GB each without the tied table's rows.
    alone = built("speculation:by=lookup,length=3").parts(8, 1, 1999, is_decode=True).lower
    assert parts.lower >= alone + 3 * 2 * 1_235_814_400 / PLAIN.machine.bandwidth * 0.99
    piped = built("speculation:by=lookup,length=2,acceptance=1,in_flight=4", pp=4).parts(1, 1, 999, is_decode=True)
    assert piped.lower <= piped.seconds <= piped.upper


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speculation:by=lookup,spare_layers=2", "no single layer"),
        ("speculation:length=4", "cannot draft for itself"),
        ("speculation:draft=qwen2.5-0.5b", "vocabulary"),
        ("speculation:by=lookup,in_flight=2", "--pp 2"),
        ("speculation:by=lookup,tree=4xx2", "4x2x1"),
        ("speculation:by=lookup,length=2,tokens=3.5", "cannot exceed"),
        ("speculation:by=lookup,draft=llama-3.2-1b", "no drafting model"),
        ("speculation:acceptance=1.2", "a number from 0 to 1, got 1.2"),
        ("hierarchical-speculation:length=4", "middle_with"),
    ],
)
def test_what_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        built(text)


def test_measured_tokens_replace_the_law() -> None:
    spec = technique("speculation:by=lookup,length=4,tokens=2.5")
    assert Estimator(MODEL, GPU, techniques=[spec]).round(1).tokens == 2.5
