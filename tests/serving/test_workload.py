"""The workload to plan for: which window, at which rate, said how; and what a router's buckets keep of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving.buckets import representatives
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import Workload, bucket_of, buckets, build
from perfmodel.spec.workload import Objectives, Trace
from perfmodel.spec.workload import Workload as Spec

ROOT = Path(__file__).parents[2]
AZURE = Trace(file="examples/traces/azure-conv-2023.csv.gz")
CODE = Trace(file="examples/traces/azure-code-2023.csv.gz")
MOONCAKE = Trace(file="examples/traces/mooncake-conversation.csv.gz")


def make(times: float = 1, trace: Trace = AZURE, **spec: object) -> Workload:
    return build(Spec(trace=trace, objectives=Objectives(), **spec), ROOT, times, 1)


@pytest.fixture(scope="module")
def azure() -> Workload:
    return make()


@pytest.fixture(scope="module")
def mooncake() -> Workload:
    return make(trace=MOONCAKE)


def test_busiest_window_by_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrival = np.sort(np.concatenate([rng.uniform(0, 2000, 300), rng.uniform(900, 1100, 300)]))
    arrival -= arrival[0]
    (tmp_path / "t.csv").write_text("arrival_s,input,output\n" + "".join(f"{a!r},10,10\n" for a in arrival.tolist()))
    w = build(Spec(trace=Trace(file="t.csv"), objectives=Objectives()), tmp_path, 1, 1)
    best = max(int(((arrival >= a) & (arrival < a + 300)).sum()) for a in arrival if a + 300 <= arrival[-1])
    assert len(w.requests) == best
    assert w.rate == pytest.approx(best / 300)


def test_rates_stand_in_their_order() -> None:
    rates = [make(rate=r).rate for r in ("mean", "percentile(50)", "percentile(95)", "peak")]
    assert rates[0] == pytest.approx(19_366 / 3501.722)
    assert rates[1:] == sorted(rates[1:])
    # A narrower window finds a higher peak.
    assert make(rate="peak(60 s)").rate > make(rate="peak(300 s)").rate > make(rate="peak(1800 s)").rate


def test_a_given_rate_stretches_the_clock_and_keeps_the_burstiness() -> None:
    whole, slow = make(rate="mean"), make(rate="2 /s")
    assert slow.rate == pytest.approx(2.0)
    assert slow.dispersion == pytest.approx(whole.dispersion)
    assert slow.requests.arrival[-1] * 2.0 == pytest.approx(len(slow.requests), rel=0.01)


def test_superposing_multiplies_the_rate_and_keeps_the_lengths(azure: Workload) -> None:
    many = make(10)
    assert many.rate == pytest.approx(10 * azure.rate)
    assert len(many.requests) == 10 * len(azure.requests)
    assert np.array_equal(np.unique(many.requests.input), np.unique(azure.requests.input))
    assert many.requests.output.mean() == pytest.approx(azure.requests.output.mean())
    assert "superposed x10 (smoother" in many.described


def test_the_way_of_scaling_shows_in_the_bursts_and_is_said() -> None:
    calm, burst = make(8, CODE, rate="mean", scale="superpose"), make(8, CODE, rate="mean", scale="compress")
    assert calm.rate == pytest.approx(burst.rate)
    assert burst.dispersion > 5 * calm.dispersion
    assert burst.index_of_dispersion(1.0) > 2 * calm.index_of_dispersion(1.0)
    assert "superposed" in calm.described
    assert "clock compressed x8 (as bursty as before: CV of gaps 13.2" in burst.described
    # An explicit way makes the whole multiple, the given rate's too.
    assert "thinned x0.3616" in make(rate="2 /s", scale="thin").described
    with pytest.raises(SpecError, match=r"0\.362 times the trace's rate; write thin or compress"):
        make(rate="2 /s", scale="superpose")


def test_headroom_is_a_rate_on_top() -> None:
    w = make(2, headroom=0.25)
    assert w.rate == pytest.approx(2.5 * make().rate)
    assert len(w.requests) == pytest.approx(2.5 * len(make().requests), rel=0.05)
    assert "25% headroom included" in w.described


def test_a_coarse_clock_is_reported(mooncake: Workload) -> None:
    assert mooncake.tick == pytest.approx(3.0, abs=0.001)
    assert "clock of 3 s and spread evenly over each tick" in mooncake.described
    kept = make(trace=MOONCAKE.model_copy(update={"spread_ticks": False}))
    assert "whose ticks are kept as bursts" in kept.described
    # Ten requests at once every 3 s: gaps 0 nine times and 3 s once, CV^2 = 10 - 1. Between ticks counts are near Poisson's.
    assert kept.dispersion == pytest.approx(3.0 * kept.rate - 1, rel=0.15)
    assert 0.8 < mooncake.dispersion < 2.5
    fast = make(4, MOONCAKE, scale="compress")
    assert fast.dispersion == pytest.approx(mooncake.dispersion)
    assert make().tick == 0


def test_a_cache_is_warm_when_the_window_opens(mooncake: Workload) -> None:
    assert mooncake.before is not None
    assert mooncake.before.arrival[-1] < 0 <= mooncake.requests.arrival[0]
    warm = mooncake.cached()
    cold = replace(mooncake, before=None).cached()
    # By hand: blocks known from earlier requests, up to the first unknown one; never the last token.
    known: set[int] = set()
    for part, expected in ((mooncake.before, None), (mooncake.requests, warm)):
        for i in range(len(part)):
            ids = part.blocks.of(i).tolist()
            hits = sum(1 for _ in itertools.takewhile(known.__contains__, ids))
            if expected is not None:
                assert expected[i] == min(hits * 512, part.input[i] - 1)
            known.update(ids)
    assert warm.sum() > cold.sum()
    assert make().cached() is None


def test_impossible_traces(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,input,output\n1,5,5\n1,5,5\n")
    with pytest.raises(SpecError, match=r"t\.csv: .*same time"):
        build(Spec(trace=Trace(file="t.csv"), objectives=Objectives()), tmp_path, 1, 1)


def test_the_first_turn_of_a_window_has_no_answer_to_wait_for(tmp_path: Path) -> None:
    rows = "".join(f"{t},10,10,s,{'' if t == 0 else 4}\n" for t in range(0, 1000, 10))
    (tmp_path / "t.csv").write_text("arrival_s,input,output,session,think_s\n" + rows)
    w = build(Spec(trace=Trace(file="t.csv"), objectives=Objectives()), tmp_path, 1, 1)
    assert np.isnan(w.requests.think[0])
    assert np.all(w.requests.think[1:] == 4)


# Buckets


def test_buckets_partition_the_requests_and_keep_every_mean(azure: Workload) -> None:
    groups = buckets(azure, 4)
    assert len(groups) == 4
    assert sum(b.share for b in groups) == pytest.approx(1)
    assert all(a.high < b.low for a, b in itertools.pairwise(groups))
    work = [b.share * b.input.mean() for b in groups]
    assert max(work) < 1.1 * min(work)
    for name in ("input", "output"):
        found = sum(b.share * getattr(b, name).mean() for b in groups)
        assert found == pytest.approx(getattr(azure.requests, name).mean(), rel=1e-9)
    placed = bucket_of(groups, azure.requests)
    for k, b in enumerate(groups):
        mine = azure.requests.take(placed == k)
        assert len(mine) == round(b.share * len(azure.requests))
        assert (mine.input.min(), mine.input.max()) == (b.low, b.high)
    # Lengths nobody has sent yet fall into a bucket too.
    odd = Requests(np.zeros(2), np.array([1.0, 10**6]), np.ones(2))
    assert bucket_of(groups, odd).tolist() == [0, 3]


def test_the_tail_gets_more_points(azure: Workload) -> None:
    inputs, outputs, weight = azure.sample()
    assert weight.sum() == pytest.approx(1)
    assert (inputs * weight).sum() == pytest.approx(azure.requests.input.mean(), rel=1e-9)
    assert (outputs * weight).sum() == pytest.approx(azure.requests.output.mean(), rel=1e-9)
    assert np.mean(inputs > np.quantile(azure.requests.input, 0.9)) > 0.25
    order = np.argsort(inputs)
    for p in (0.9, 0.99):
        found = inputs[order][np.searchsorted(np.cumsum(weight[order]), p)]
        assert found == pytest.approx(np.quantile(azure.requests.input, p), rel=0.05)


def test_a_bucket_keeps_how_input_and_output_go_together() -> None:
    """Equal margins, opposite dependence: E[input x output] tells them apart, exactly as in the requests."""
    rng = np.random.default_rng(3)
    i = np.sort(rng.integers(1, 4000, 5000)).astype(float)
    o = np.sort(rng.integers(1, 800, 5000)).astype(float)
    found = []
    for output in (o, o[::-1]):
        w = Workload(Requests(np.arange(5000.0), i, output), 1, 5000, 1)
        groups = buckets(w, 4)
        found.append(sum(b.share * (b.input * b.output).mean() for b in groups))
        assert found[-1] == pytest.approx((i * output).mean(), rel=0.02)
    assert found[0] > 1.5 * found[1]


@given(n=st.integers(1, 300), points=st.integers(1, 60), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_representatives_keep_means_and_ranges(n: int, points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.gamma(0.5, 100, (2, n))
    found = representatives(values[0], values, points)
    assert found.mean(axis=1) == pytest.approx(values.mean(axis=1))
    assert np.all(found.min(axis=1) >= values.min(axis=1) - 1e-9)
    assert np.all(found.max(axis=1) <= values.max(axis=1) + 1e-9)
    assert found.shape[1] <= max(points, n if points >= n else points)


def test_buckets_by_cached_prefix(mooncake: Workload) -> None:
    groups = buckets(mooncake, 6, by=("cached", "input"))
    cached = mooncake.cached()
    placed = bucket_of(groups, mooncake.requests, cached)
    assert np.bincount(placed, minlength=len(groups)) / placed.size == pytest.approx([b.share for b in groups])
    # Found and unfound prompts have whole numbers of points: at most half a point in a hundred is on the wrong side.
    assert sum(b.share * b.cached.mean() for b in groups) == pytest.approx(cached.mean(), rel=0.01)
    hit = [b.cached.sum() / b.input.sum() for b in groups]
    assert min(hit) < 0.05
    assert max(hit) > 0.8
    # Going by input length alone mixes them.
    blind = [b.cached.sum() / b.input.sum() for b in buckets(mooncake, 6)]
    assert max(blind) - min(blind) < max(hit) - min(hit)
    assert all(b.cached is None for b in buckets(make(), 3))


def test_buckets_by_labels_and_by_an_oracle(azure: Workload) -> None:
    r = azure.requests
    model = np.where(np.arange(len(r)) % 4 == 0, "large", "small")
    cap = np.where(r.output > 200, 4096.0, 256.0)
    w = replace(azure, requests=replace(r, labels={"model": model, "max_tokens": cap}))
    groups = buckets(w, 6, by=("model", "max_tokens", "input"))
    placed = bucket_of(groups, w.requests)
    for k, b in enumerate(groups):
        assert np.unique(model[placed == k]).tolist() == list(b.key["model"])
        assert np.unique(cap[placed == k]).size == 1
    assert "small" in groups[0].label
    spread = [np.ptp(b.output) for b in buckets(azure, 6)]
    oracle = [np.ptp(b.output) for b in buckets(azure, 6, by=("output", "input"))]
    assert np.median(oracle) < np.median(spread)
    with pytest.raises(SpecError, match="no column 'tenant'"):
        buckets(azure, 4, by=("tenant",))
    with pytest.raises(SpecError, match=r"'inputs' \(did you mean 'input'"):
        buckets(azure, 4, by=("inputs",))
    with pytest.raises(SpecError, match="no block ids"):
        buckets(azure, 4, by=("cached", "input"))


@given(n=st.integers(1, 60), count=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_requests_fall_into_one_bucket_each(n: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, top, n).astype(float) for top in (40, 20)]
    r = Requests(np.arange(float(n)), *lengths, labels={"tenant": rng.choice(["a", "b", "c"], n)})
    for by in (("input",), ("tenant", "input"), ("tenant",)):
        groups = buckets(Workload(r, 1, n, 1), count, by)
        placed = np.bincount(bucket_of(groups, r), minlength=len(groups))
        assert placed / n == pytest.approx([b.share for b in groups])
        assert sum(b.share * b.output.mean() for b in groups) == pytest.approx(r.output.mean())
        assert len(groups) <= count + 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"scale": "thin", "load": (2.0,)}, "cannot reach a load above 1"),
        ({"scale": "thin", "headroom": 0.2}, "cannot reach a load above 1"),
        ({"scale": "superpose", "load": (0.5,)}, "cannot reach a load below 1"),
    ],
)
def test_multiples_that_no_scaling_of_that_kind_makes(spec: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spec(trace=AZURE, objectives=Objectives(), **spec)
    # Of a given rate only the trace tells the multiple: 1 /s, doubled, is still less than the trace's 5.5 /s.
    assert make(2, rate="1 /s", scale="thin", load=(2.0,)).rate == pytest.approx(2)
