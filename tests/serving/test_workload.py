"""Traces: what is read, which window is the busiest, what superposing does, and every bad row named."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving import workload
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import buckets, build, read_trace, superpose
from perfmodel.spec.workload import Columns, Objectives, Trace
from perfmodel.spec.workload import Workload as Spec

ROOT = Path(__file__).parents[2]
AZURE = Trace(file="examples/traces/azure-conv-2023.csv.gz", columns=Columns(input="input_len", output="output_len"))


def test_the_carried_trace_is_the_public_one() -> None:
    # AzurePublicDataset, AzureLLMInferenceTrace_conv.csv: 19,366 requests, mean 1,155 input and 211 output tokens.
    r = read_trace(AZURE, ROOT)
    assert len(r) == 19_366
    assert r.input.mean() == pytest.approx(1154.7, abs=0.1)
    assert r.output.mean() == pytest.approx(211.1, abs=0.1)


def test_busiest_window_by_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrival = np.sort(np.concatenate([rng.uniform(0, 2000, 300), rng.uniform(900, 1100, 300)]))
    arrival -= arrival[0]
    (tmp_path / "t.csv").write_text("arrival_s,input,output\n" + "".join(f"{a!r},10,10\n" for a in arrival.tolist()))
    w = build(Spec(trace=Trace(file="t.csv"), objectives=Objectives()), tmp_path, 1, 1)
    span = arrival[-1]
    best = max(int(((arrival >= a) & (arrival < a + 300)).sum()) for a in arrival if a + 300 <= span)
    assert len(w.requests) == best
    assert w.rate == pytest.approx(best / 300)


def test_superposing_multiplies_the_rate_and_keeps_the_lengths() -> None:
    spec = Spec(trace=AZURE, objectives=Objectives())
    one, many = build(spec, ROOT, 1, 1), build(spec, ROOT, 10, 1)
    assert many.rate == pytest.approx(10 * one.rate)
    assert len(many.requests) == 10 * len(one.requests)
    assert np.array_equal(np.unique(many.requests.input), np.unique(one.requests.input))
    assert many.requests.output.mean() == pytest.approx(one.requests.output.mean())
    assert np.all(np.diff(many.requests.arrival) >= 0)
    assert abs(many.dispersion - 1) <= abs(one.dispersion - 1)


@given(load=st.floats(0.2, 4.0), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_fractional_loads(load: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    r = Requests(np.sort(rng.uniform(0, 100, 4000)), np.ones(4000), np.ones(4000))
    assert len(superpose(r, 100.0, load, seed)) / 4000 == pytest.approx(load, rel=0.1)


def test_a_given_rate_stretches_the_clock_and_keeps_the_burstiness() -> None:
    whole = build(Spec(trace=AZURE, rate="mean", objectives=Objectives()), ROOT, 1, 1)
    slow = build(Spec(trace=AZURE, rate="2 /s", objectives=Objectives()), ROOT, 1, 1)
    assert slow.rate == 2.0
    assert slow.dispersion == pytest.approx(whole.dispersion)
    assert slow.requests.arrival[-1] * 2.0 == pytest.approx(len(slow.requests), rel=0.01)


def test_dispersion_of_known_processes() -> None:
    rng = np.random.default_rng(2)
    assert workload._dispersion(np.arange(100.0)) == pytest.approx(0.0, abs=1e-12)
    assert workload._dispersion(np.cumsum(rng.exponential(1, 50_000))) == pytest.approx(1.0, rel=0.05)
    assert workload._dispersion(np.cumsum(rng.gamma(0.25, 4.0, 50_000))) == pytest.approx(4.0, rel=0.1)


def test_buckets_partition_the_sample() -> None:
    w = build(Spec(trace=AZURE, objectives=Objectives()), ROOT, 1, 1)
    groups = buckets(w, 4)
    inputs, outputs, weight = w.sample()
    assert sum(b.share for b in groups) == pytest.approx(1)
    assert weight.sum() == pytest.approx(1)
    assert all(a.high < b.low for a, b in itertools.pairwise(groups))
    assert float(inputs.mean()) == pytest.approx(float(w.requests.input.mean()), rel=0.02)
    assert float(outputs.mean()) == pytest.approx(float(w.requests.output.mean()), rel=0.06)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrival_s,input,output\n0,5,5\n1,5\n", [":3:", "2 values"]),
        ("# note\narrival_s,input,output\n0,5,5\n1,x,5\n", [":4:", "'x'", "input"]),
        ("arrival_s,input,output\n0,5,5\n\n2,5,5\n", [":3:", "empty row"]),
        ("arrival_s,input,output\n0,5,5\n1,0,5\n", [":3:", "input"]),
        ("arrival_s,input,output\n0,5,5\n1,nan,5\n", [":3:", "input"]),
        ("arrival_s,input,output\n-3,5,5\n1,5,5\n", [":2:", "arrival_s"]),
        ("arrival,input,output\n0,5,5\n", ["did you mean", "arrival"]),
        ("", ["empty"]),
        ("arrival_s,input,output\n", ["no requests"]),
        ("arrival_s,input,output\n1,5,5\n1,5,5\n", ["same time"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_traces_name_the_line(text: str, words: list[str], packed: bool, tmp_path: Path) -> None:
    name = "t.csv.gz" if packed else "t.csv"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(SpecError) as caught:
        build(Spec(trace=Trace(file=name), objectives=Objectives()), tmp_path, 1, 1)
    for word in words:
        assert word in str(caught.value)


def test_missing_and_binary_traces(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the trace"):
        read_trace(Trace(file="none.csv"), tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not text"):
        read_trace(Trace(file="b.csv"), tmp_path)
    (tmp_path / "b.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(SpecError):
        read_trace(Trace(file="b.csv.gz"), tmp_path)
