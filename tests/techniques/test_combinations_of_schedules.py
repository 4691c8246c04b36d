"""Techniques on the schedule, the kernels and the machine in pairs: no order, bounds kept."""

from __future__ import annotations

import itertools

import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator

TEXTS = (
    "nano-batching", "nano-batching:hide=network,units=0.1", "kernel-launch:elementwise=0.5,merged=0.3",
    "kernel-launch:dataflow=true", "attention-kernel:unfused=true", "batch-padding:prompt=1.5,output=2", "power-cap:clock=0.6",
    "phase-split:units=0.5,knee=0.7", "chunked-prefill:chunk=512", "network-overhead:link=0.5,link_latency=1e-5",
    "parallel-scheme:prefill=ring,overlap=true", "parallel-scheme:prefill=ulysses,decode=tree",
    "remote-attention:share=0.5,bandwidth=5e10,latency=1e-5", "attention-ffn-split:latency=1e-5",
    "kv-quantization:bits=4,residual=128", "kv-eviction:budget=1024,sinks=4",
)  # fmt: skip


def _seen(*texts: str) -> list[float]:
    e = Estimator("llama-3-8b", "h100-sxm", tp=2, cp=2, techniques=texts)
    step = e.parts(8, 1, 4095, is_decode=True)
    assert step.lower <= step.seconds * (1 + 1e-9)
    return [float(e.decode(8, 4096)), float(e.prefill(2, 4096)), float(e.memory(8, 4096).total)]


def _kind(text: str) -> str:
    return text.partition(":")[0]


# What divides a batch or a prompt to overlap it stands alone.
APART = {("nano-batching", "chunked-prefill"), ("nano-batching", "attention-ffn-split")}
PAIRS = [(a, b) for a, b in itertools.combinations(TEXTS, 2) if _kind(a) != _kind(b)]


@pytest.mark.parametrize(("one", "other"), [p for p in PAIRS if (_kind(p[0]), _kind(p[1])) not in APART])
def test_two_combine_in_either_order(one: str, other: str) -> None:
    assert _seen(one, other) == pytest.approx(_seen(other, one), rel=1e-9)


@pytest.mark.parametrize(("one", "other"), [p for p in PAIRS if (_kind(p[0]), _kind(p[1])) in APART])
def test_others_say_why_not(one: str, other: str) -> None:
    with pytest.raises(SpecError, match="cannot be combined"):
        _seen(other, one)
