"""A fitted workload against the log it was made from: the same percentiles under replay, the same hits in a cache."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import arrivals, sharing
from perfmodel.serving.clock import StepClock
from perfmodel.serving.replay import Settings, simulate
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.serving.synthesis import synthesise
from perfmodel.serving.trace import read_trace
from perfmodel.serving.trace_fit import fit, matches, to_yaml
from perfmodel.serving.trace_summary import summary
from perfmodel.serving.workload import build, read_fitted
from perfmodel.spec.fitted import FittedWorkload
from perfmodel.spec.workload import Objectives, Trace
from perfmodel.spec.workload import Workload as Spec

ROOT = Path(__file__).parents[2]
KV_TOKENS = 4e5  # an H100 beside the weights of Llama-3.1-8B
WITHIN = 0.15


@pytest.fixture(scope="module")
def h100() -> StepClock:
    return StepClock(Estimator("llama-3.1-8b", "h100-sxm"), 2000.0)


@pytest.fixture(scope="module")
def logs() -> dict[str, Requests]:
    names = {"conv": "azure-conv-2023", "code": "azure-code-2023", "mooncake": "mooncake-conversation"}
    return {k: read_trace(Trace(file=f"examples/traces/{f}.csv.gz"), ROOT) for k, f in names.items()}


@pytest.fixture(scope="module")
def fitted(logs: dict[str, Requests]) -> dict[str, FittedWorkload]:
    return {name: fit(log, name) for name, log in logs.items()}


def capacity(clock: StepClock, r: Requests) -> float:
    """Requests/s that one instance completes when all arrive at once."""
    some = r.take(np.linspace(0, len(r) - 1, 1500).astype(int))
    at_once = Requests(np.zeros(1500), some.input, some.output)
    return 1500 / float(simulate(clock, KV_TOKENS, at_once).finish.max())


def ttft_p95(clock: StepClock, r: Requests, rate: float, **settings: bool) -> float:
    paced = replace(r, arrival=r.arrival * (len(r) / r.arrival[-1] / rate), session=None, think=None)
    return simulate(clock, KV_TOKENS, paced, "colocated", Settings(**settings)).percentile("ttft", 0.95)


@pytest.mark.parametrize(("name", "cached"), [("conv", False), ("code", False), ("mooncake", False), ("mooncake", True)])
def test_p95_ttft_under_replay_is_the_logs(
    name: str, cached: bool, h100: StepClock, logs: dict[str, Requests], fitted: dict[str, FittedWorkload]
) -> None:
    rate = 0.6 * capacity(h100, logs[name])
    wanted = ttft_p95(h100, logs[name], rate, prefix_caching=cached)
    seeds = (1,) if name == "mooncake" else (1, 2)  # its long prompts take seconds to replay
    found = [ttft_p95(h100, synthesise(fitted[name], seed=s), rate, prefix_caching=cached) for s in seeds]
    assert found == pytest.approx([wanted] * len(seeds), rel=WITHIN)
    # It is the bursts and the lengths that make it: Poisson arrivals of mean lengths are far off.
    log = logs[name]
    if name == "code":
        even = np.sort(np.random.default_rng(1).uniform(0, log.arrival[-1], len(log)))
        assert ttft_p95(h100, Requests(even, log.input, log.output), rate) < wanted / 10


def lru_hits(r: Requests, capacity_blocks: int) -> float:
    """Share of prompt tokens found in a least-recently-used cache, block by block."""
    cache: OrderedDict[int, None] = OrderedDict()
    found = 0.0
    for i in range(len(r)):
        ids = r.blocks.of(i).tolist()
        n = 0
        while n < len(ids) and ids[n] in cache:
            n += 1
        found += min(n * r.blocks.tokens, r.input[i] - 1)
        for block in reversed(ids):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity_blocks:
            cache.popitem(last=False)
    return found / float(r.input.sum())


def test_hit_rates_at_every_cache_size_are_the_logs(logs: dict[str, Requests], fitted: dict[str, FittedWorkload]) -> None:
    # 1 M to 100 M tokens: from one instance's memory to a pool that forgets nothing.
    sizes = [2_000, 5_000, 20_000, 60_000, 200_000]
    wanted = [lru_hits(logs["mooncake"], s) for s in sizes]
    like = synthesise(fitted["mooncake"], seed=1)
    assert wanted[-1] > 5 * wanted[0]
    assert [lru_hits(like, s) for s in sizes] == pytest.approx(wanted, rel=WITHIN)


@pytest.mark.parametrize("name", ["conv", "code", "mooncake"])
def test_lengths_bursts_and_sessions_are_the_logs(
    name: str, logs: dict[str, Requests], fitted: dict[str, FittedWorkload]
) -> None:
    log, like = logs[name], synthesise(fitted[name], seed=3)
    assert len(like) == len(log)
    for tokens in ("input", "output"):
        a, b = getattr(log, tokens), getattr(like, tokens)
        assert b.mean() == pytest.approx(a.mean(), rel=0.02)
        assert np.percentile(b, (10, 50, 90, 99)) == pytest.approx(np.percentile(a, (10, 50, 90, 99)), rel=0.05, abs=1)
    rank = [np.argsort(np.argsort(x)) for x in (log.input, log.output, like.input, like.output)]
    assert np.corrcoef(*rank[2:])[0, 1] == pytest.approx(np.corrcoef(*rank[:2])[0, 1], abs=0.04)
    for window in (1.0, 10.0, 60.0):
        a, b = (arrivals.index_of_dispersion(x.arrival, window) for x in (log, like))
        assert b == pytest.approx(a, rel=0.3), window
    # The output tokens per quarter hour drift as the log's do.
    quarter = [np.array([x.output[(x.arrival // 900).astype(int) == k].mean() for k in range(4)]) for x in (log, like)]
    assert quarter[1] == pytest.approx(quarter[0], rel=0.12)
    if log.session is not None:
        turns = [len(x) / np.unique(x.session).size for x in (log, like)]
        assert turns[1] == pytest.approx(turns[0], rel=0.1)
        lag = [np.median((x.arrival - x.arrival[matches(x).earlier])[matches(x).earlier >= 0]) for x in (log, like)]
        assert lag[1] == pytest.approx(lag[0], rel=0.15)


@pytest.mark.parametrize("name", ["conv", "mooncake"])
def test_the_file_holds_a_few_hundred_numbers_and_reads_back(
    name: str, logs: dict[str, Requests], fitted: dict[str, FittedWorkload], tmp_path: Path
) -> None:
    text = to_yaml(fitted[name])
    assert len(re.findall(r"\d[\d.e-]*", text)) < 800
    assert len(text) < 6000
    (tmp_path / "w.yaml").write_text(text, encoding="utf-8")
    again = read_fitted(tmp_path / "w.yaml")
    assert to_yaml(again) == text
    # A plan takes the file where it takes a trace.
    spec = Spec(fitted="w.yaml", objectives=Objectives())
    w = build(spec, tmp_path, 1, 1)
    log = build(Spec(trace=Trace(file=str(ROOT / f"examples/traces/{'azure-conv-2023' if name == 'conv' else 'mooncake-conversation'}.csv.gz")),
                     objectives=Objectives()), tmp_path, 1, 1)  # fmt: skip
    assert w.rate == pytest.approx(log.rate, rel=0.05)
    assert w.requests.input.mean() == pytest.approx(log.requests.input.mean(), rel=0.1)
    assert (w.before is None) == (log.before is None)


def test_nothing_of_a_row_is_in_it(logs: dict[str, Requests], fitted: dict[str, FittedWorkload]) -> None:
    """Only counts of many requests and quantiles: no arrival time, block id or label of the log."""
    log = replace(logs["mooncake"], labels={"tenant": np.full(len(logs["mooncake"]), "acme")})
    text = to_yaml(fit(log, "log"))
    assert "acme" not in text
    like = synthesise(fitted["mooncake"], seed=1)
    rows = {(round(a, 3), i, o) for a, i, o in zip(log.arrival, log.input, log.output, strict=True)}
    made = {(round(a, 3), i, o) for a, i, o in zip(like.arrival, like.input, like.output, strict=True)}
    assert len(rows & made) <= 3


def test_a_span_a_number_and_a_seed(fitted: dict[str, FittedWorkload]) -> None:
    f = fitted["conv"]
    assert len(synthesise(f, n=1000)) == 1000
    assert len(synthesise(f, n=30_000)) == 30_000
    two = synthesise(f, span=2 * f.span_s)
    assert len(two) == 2 * f.requests
    half = synthesise(f, span=f.span_s / 2)
    assert half.arrival[-1] < f.span_s / 2
    assert len(half) == pytest.approx(sum(f.arrivals.windows[:96]), abs=30)
    a, b, c = (synthesise(f, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a.arrival, b.arrival)
    assert not np.array_equal(a.arrival, c.arrival)


def gamma(cv2: float, n: int = 4000) -> Requests:
    rng = np.random.default_rng(4)
    return Requests(np.cumsum(rng.gamma(1 / cv2, cv2, n)), rng.integers(10, 900, n).astype(float), rng.integers(1, 99, n).astype(float))


def test_burstier_logs_give_burstier_requests() -> None:
    """Equal rates and lengths: only the gaps differ."""
    found = [arrivals.index_of_dispersion(synthesise(fit(gamma(cv2))).arrival, 10.0) for cv2 in (0.2, 1.0, 4.0, 16.0)]
    assert found == sorted(found)
    assert found[0] < 0.6
    assert found[1] == pytest.approx(1.0, abs=0.25)
    assert found[3] > 4


def test_sessions_without_block_ids() -> None:
    rng = np.random.default_rng(5)
    base = gamma(1.0)
    session = rng.integers(0, 1500, 4000)
    like = synthesise(fit(replace(base, session=session, think=np.full(4000, np.nan))))
    assert like.blocks is None
    assert np.unique(like.session).size == pytest.approx(np.unique(session).size, rel=0.15)
    gap = [np.median((x.arrival - x.arrival[sharing.previous_turn(x)])[sharing.previous_turn(x) >= 0])
           for x in (replace(base, session=session), like)]  # fmt: skip
    assert gap[1] == pytest.approx(gap[0], rel=0.25)


@given(seed=st.integers(0, 99), shares=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.4)))
@settings(max_examples=8, deadline=None)
def test_system_prompts_come_back_with_their_shares(seed: int, shares: tuple[float, float]) -> None:
    """Two system prompts of 2 and 3 blocks that share the first block; every prompt has a block of its own."""
    rng = np.random.default_rng(seed)
    n = 1500
    kind = rng.choice(3, n, p=[shares[0], shares[1], 1 - sum(shares)])
    heads = ([0, 1], [0, 2, 3], [])
    ids = [[*heads[k], 10 + i] for i, k in enumerate(kind)]
    start = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    base = gamma(1.0, n)
    r = replace(base, input=np.array([len(x) * 16.0 for x in ids]), blocks=Blocks(np.concatenate(ids), start, 16))
    r = replace(r, session=sharing.conversations(r))
    f = fit(r)
    assert [(root.blocks, root.under) for root in f.sharing.roots] == [(1, None), (2, 0), (3, 0)]
    like = synthesise(f)
    count = np.bincount(np.unique(like.blocks.ids, return_inverse=True)[1])
    # Blocks held by many: 0 by both, 1 by the first, 2 and 3 by the second.
    held = sorted(count[count > 0.05 * n] / n)
    first, second = (float(np.mean(kind == k)) for k in (0, 1))
    assert held == pytest.approx(sorted([first + second, first, second, second]), abs=0.03)
    assert lru_hits(like, 10**6) == pytest.approx(lru_hits(r, 10**6), rel=0.1)


N = 60
ODD = {
    "equal requests at an even pace": Requests(np.arange(N) * 1.0, np.full(N, 1024.0), np.full(N, 256.0)),
    "one burst": Requests(np.append(np.zeros(N - 1), 5.0), np.ones(N), np.ones(N)),
    "pairs on a coarse clock": Requests(np.repeat(np.arange(30.0), 2), np.arange(N) + 1.0, np.arange(N) % 7 + 1.0, tick=1.0),
    "nothing shared": Requests(np.arange(N) * 1.0, np.full(N, 16.0), np.ones(N), Blocks(np.arange(N), np.arange(N + 1), 16), np.arange(N)),
    "everything shared": Requests(np.arange(N) * 1.0, np.full(N, 16.0), np.ones(N), Blocks(np.zeros(N, int), np.arange(N + 1), 16), np.arange(N)),
    "no full blocks": Requests(np.arange(N) * 1.0, np.full(N, 7.0), np.ones(N), Blocks(np.zeros(0, int), np.zeros(N + 1, int), 16), np.arange(N)),
    "one session": Requests(np.arange(N) * 1.0, np.full(N, 16.0), np.ones(N), session=np.zeros(N, int)),
    "no session": Requests(np.arange(N) * 1.0, np.full(N, 16.0), np.ones(N), session=np.full(N, -1)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_logs_come_back_as_they_are(name: str, tmp_path: Path) -> None:
    log = ODD[name]
    (tmp_path / "w.yaml").write_text(to_yaml(fit(log)), encoding="utf-8")
    like = synthesise(read_fitted(tmp_path / "w.yaml"))
    assert len(like) == N
    assert like.input.mean() == pytest.approx(log.input.mean(), rel=0.02)
    if name != "one burst":  # its two instants lie anywhere in the first and the last of three windows
        assert like.arrival[-1] == pytest.approx(log.arrival[-1], rel=0.1)
    if log.blocks is not None and log.blocks.ids.size:
        assert lru_hits(like, 10**6) == pytest.approx(lru_hits(log, 10**6), rel=0.1)
    summary(like)


def test_too_little_to_fit() -> None:
    with pytest.raises(SpecError, match="too few requests: 20 over"):
        fit(gamma(1.0, 20), "x.csv")
    with pytest.raises(SpecError, match="too few"):
        fit(Requests(np.zeros(99), np.ones(99), np.ones(99)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version: 1", "version: 2", ":3:.*version 2 is not read here"),
        ("kind: workload", "kind: plan", ":2:.*'plan' is not one of 'workload'"),
        ("requests: 4000", "requests: 4001", "hold 4000 requests, not 4001"),
        ("span_s: ", "spam_s: ", "unknown key 'spam_s'.*did you mean 'span_s'"),
        ("  at: [0.0, ", "  at: [0.1, ", "rise from 0 to 1"),
        ("  joint:\n", "  joint:\n  - [1.0]\n", "rows of 7 shares"),
    ],
)
def test_a_damaged_file_is_one_error(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = to_yaml(fit(gamma(1.0)))
    assert old in text
    (tmp_path / "w.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SpecError, match=rf"(?s)w\.yaml.*{words}"):
        read_fitted(tmp_path / "w.yaml")
