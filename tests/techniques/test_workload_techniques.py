"""Techniques on what is asked of the model, together: they commute, keep their identity and stay above their traffic."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.techniques.registry import kinds, technique

MODEL, NODE = "llama-3-8b", "dgx-h100"
PLAIN = Estimator(MODEL, NODE)
EACH = (
    "speculation:draft=llama-3.2-1b,length=3,acceptance=0.7",
    "prefix-cache:host=0.5,device=0.2",
    "shared-prefix:tokens=512,group=4",
    "token-reduction:tokens=300,keep=0.5,after=512",
    "session-cache:turn=400,device=0.5,host=0.5",
    "kv-allocation:reserve=block,block=64",
    "preemption:rate=0.001,overlap=0.5",
    "kv-allocation:evicted=0.2,output=300",
    "tree-search:width=16,prompt=600,distinct=0.5,step=50,reward=llama-3.2-1b",
    "kv-quantization:bits=8,unpack=0",
)


def built(*texts: str) -> Estimator:
    return Estimator(MODEL, NODE, techniques=texts)


def numbers(e: Estimator) -> list[float]:
    return [e.decode(16, 3000), e.memory(16, 3000).kv, e.memory(16, 3000).weights, e.prefill(2, 3000)]


@pytest.mark.parametrize("pair", [(a, b) for i, a in enumerate(EACH) for b in EACH[i + 1 :]])
def test_any_two_stand_together_in_either_order(pair: tuple[str, str]) -> None:
    named = {t.split(":")[0] for t in pair}
    if len(named) == 1 or named == {"shared-prefix", "tree-search"}:
        return  # one kind twice; or refused, see test_shared_prefix
    if named == {"prefix-cache", "session-cache"}:
        return  # both say what of the prompt is found: the second one finds it in what the first one left
    one, other = (numbers(built(*order)) for order in permutations(pair))
    assert one == pytest.approx(other, rel=1e-9)


def test_arrays_give_what_numbers_give() -> None:
    for text in (*EACH, "tree-search:width=8,prompt=200,fanout=2,step=64", "speculation:by=lookup,adaptive=true",
                 "prefix-cache:remote=0.9,choose=true", "kv-allocation:evicted=0.1,output=100"):  # fmt: skip
        e = built(text)
        batches, contexts = np.array([1, 8, 64]), np.array([600, 3000, 900])
        assert list(e.decode(batches, contexts)) == pytest.approx(
            [e.decode(int(b), int(c)) for b, c in zip(batches, contexts, strict=True)], rel=1e-9
        )
        assert list(e.prefill(batches, contexts)) == pytest.approx(
            [e.prefill(int(b), int(c)) for b, c in zip(batches, contexts, strict=True)], rel=1e-9
        )


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 200), context=st.integers(600, 20_000))
def test_no_step_is_faster_than_its_traffic(batch: int, context: int) -> None:
    """Weights once and the private part of every cache, at the datasheet's rate, over the tokens of a round."""
    bandwidth = PLAIN.machine.bandwidth
    weights = PLAIN.memory(1, 16).weights - 128256 * 4096 * 2  # of the input table a step reads single rows
    for text, tokens, kept in ((EACH[0], 1 + 0.7 + 0.49 + 0.343, 1.0), (EACH[2], 1.0, 1 - 512 / context)):
        least = (weights + batch * kept * (context - 1) * 131072) / bandwidth / tokens
        assert built(text).decode(batch, context) >= least
        assert built(text).parts(batch, 1, context - 1, is_decode=True).lower >= 0.999 * least * tokens


def test_every_kind_says_what_it_does() -> None:
    mine = ("speculation", "hierarchical-speculation", "layer-skip", "prefix-cache", "shared-prefix", "tree-search",
            "token-reduction", "session-cache", "kv-allocation", "preemption")  # fmt: skip
    for kind in mine:
        cls = kinds()[kind]
        assert cls.reference.startswith("arXiv:")
        assert cls.__doc__
        assert "arXiv" in cls.__doc__
        for name, field in cls.model_fields.items():
            assert field.description, f"{kind}.{name}"


def test_layers_that_are_left_out() -> None:
    """Half of 32 layers: half of their weights, caches and FLOPs; embedding and head stay."""
    half = built("layer-skip:share=0.5")
    layer = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096)  # attention, feed-forward, norms
    assert PLAIN.memory(1, 16).weights - half.memory(1, 16).weights == pytest.approx(16 * layer)
    assert half.memory(3, 160).kv == pytest.approx(PLAIN.memory(3, 160).kv / 2)
    assert half.model.n_layers == 16
    assert built("layer-skip").decode(4, 900) == pytest.approx(PLAIN.decode(4, 900), rel=1e-12)
    assert technique("layer-skip:layers=8").effects() == "lossy"
    assert technique("layer-skip").effects() == "exact"
