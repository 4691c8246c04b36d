"""Cache placement against hand arithmetic, exhaustive search, naive simulations of the trace, and perturbed inputs."""

import itertools
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner import solver
from perfmodel.planner.placement import cache, study
from perfmodel.planner.placement.profile import Profile, profile, token_seconds, visible_fetch
from perfmodel.planner.placement.tiers import Tier, tiers
from perfmodel.serving import prefix
from perfmodel.serving.requests import Requests
from perfmodel.serving.trace import read_trace
from perfmodel.spec.workload import Trace

TRACE = Path(__file__).parents[2] / "examples" / "traces" / "mooncake-conversation.csv.gz"
FREE = float("inf")


@pytest.fixture(scope="module")
def e() -> Estimator:
    return Estimator("llama-3.1-70b", "hgx-h100-8", tp=8)


@pytest.fixture(scope="module")
def mooncake() -> Requests:
    return read_trace(Trace(file=str(TRACE)), Path())


@pytest.fixture(scope="module")
def uses(mooncake):
    return prefix.uses(mooncake)


@pytest.fixture(scope="module")
def reuse(e, mooncake, uses) -> Profile:
    return profile(e, mooncake, uses)


def tier(name: str, capacity: float, fetch: float = 0.0, *, read: float = FREE, write: float = FREE, usd=None) -> Tier:
    return Tier(name, name, capacity, read, write, fetch, 0.0, 1000.0, usd)


def small(hits, held, saved=None, entered=None) -> Profile:
    """One class; every hit saves 1 ms unless stated."""
    hits, held = np.array([hits], float), np.array([held], float)
    saved = hits * 1e-3 if saved is None else np.array([saved], float)
    entered = np.zeros_like(hits) if entered is None else np.array([entered], float)
    edges = np.append(np.arange(hits.size, dtype=float), np.inf)
    return Profile(
        edges, hits, np.zeros_like(hits), saved, held, entered, 2 * float(hits.sum()), 1.0, 100.0, float(hits.size),
        (np.array([1.0]), np.array([1.0])), 1,
    )  # fmt: skip


def test_two_ages_and_two_tiers_by_hand():
    """100 hits/s from the young half, 50 from the old, 1,000 tokens each; a fast tier for 1,000 and a slow one at 0.4 ms a token.

    The young go to the fast tier (100 ms/s), the old to the slow one: 50 x 0.6 ms = 30 ms/s. One more token of the fast
    tier would take a token of the old: 50/1000 x 0.4 ms = 20 us/s; of the slow one, nothing.
    """
    best = cache.place(small([100, 50], [1000, 1000]), [tier("hbm", 1000), tier("dram", 5000, 4e-4)])
    assert best.saved == pytest.approx(0.130, rel=1e-4)
    assert [u.hits for u in best.uses] == pytest.approx([100, 50])
    assert best.of("hbm").value == pytest.approx(2e-5, rel=1e-2)
    assert best.of("dram").value == pytest.approx(0, abs=1e-8)
    assert best.hit_share == pytest.approx(0.5)
    assert best.recomputed == pytest.approx(0, abs=1e-9)


def test_exhaustive_search_agrees():
    """Every way to give 5 ages of unit size to two tiers of whole units or to none, blocks moving down only."""
    rng = np.random.default_rng(5)
    for _ in range(6):
        hits, room = np.sort(rng.uniform(1, 20, 5))[::-1], (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        fetch = float(rng.uniform(1e-4, 8e-4))
        options = [
            places for places in itertools.product((0, 1, 2), repeat=5)
            if list(places) == sorted(places) and all(places.count(t) <= room[t] for t in (0, 1))
        ]  # fmt: skip
        worth = [1e-3, 1e-3 - fetch, 0.0]
        best = max(sum(h * worth[t] for h, t in zip(hits, places, strict=True)) for places in options)
        found = cache.place(small(hits, np.ones(5)), [tier("hbm", room[0]), tier("dram", room[1], fetch)])
        assert found.saved == pytest.approx(best, rel=1e-4)


def test_cbc_agrees_with_highs(e, reuse):
    solver.cbc()
    held = tiers(e, 3, 512, 5e5, {"dram": "600GB"})
    two = cache.place(reuse, held, busy=0.8, solver="cbc")
    assert two.saved == pytest.approx(cache.place(reuse, held, busy=0.8).saved, rel=1e-5)


def test_limited_paths_by_hand():
    """A tier that may give 30 tokens/s finds 30; one that may be written 20 tokens/s, of 80 that come, keeps a quarter."""
    p = small([100], [1000], entered=[80])
    assert cache.place(p, [tier("dram", FREE, 1e-4, read=30.0)]).of("dram").hits == pytest.approx(30, rel=1e-4)
    assert cache.place(p, [tier("dram", FREE, 1e-4, read=60.0)], busy=0.5).of("dram").hits == pytest.approx(30, rel=1e-4)
    best = cache.place(p, [tier("ssd", FREE, 1e-4, write=20.0)])
    assert best.of("ssd").hits == pytest.approx(25, rel=1e-4)
    assert best.of("ssd").write == pytest.approx(1.0)


def test_shadow_price_is_the_finite_difference(e, reuse):
    held = tiers(e, 2, 512, 4e5, {"ssd": "0", "dram": "600GB"})
    base = cache.place(reuse, held, busy=0.8)
    for i, t in enumerate(held):
        step = 0.002 * t.capacity
        more = cache.place(reuse, [*held[:i], replace(t, capacity=t.capacity + step), *held[i + 1 :]], busy=0.8)
        less = cache.place(reuse, [*held[:i], replace(t, capacity=t.capacity - step), *held[i + 1 :]], busy=0.8)
        up, down = (more.saved - base.saved) / step, (base.saved - less.saved) / step
        # Concave and piecewise linear: the price lies between what one more and one less are worth.
        assert up * 0.98 - 1e-12 <= base.of(t.name).value <= down * 1.02 + 1e-12
        assert base.of(t.name).value > 0


def simulate_cascade(r: Requests, capacities: list[float], begin: float) -> list[float]:
    """Prompt tokens found in each tier of a chain of LRU caches from `begin` seconds on, one dictionary per tier."""
    chain = [OrderedDict() for _ in capacities]
    held = [0.0] * len(chain)
    found = [0.0] * len(chain)
    size = r.blocks.tokens
    for i in range(len(r)):
        ids = r.blocks.of(i).tolist()
        tokens = [min(size, r.input[i] - size * j) for j in range(len(ids))]
        for j, block in enumerate(ids):
            where = next((t for t, c in enumerate(chain) if block in c), None)
            if where is None:
                break
            if r.arrival[i] >= begin:
                found[where] += tokens[j] - (j == len(ids) - 1)
        for block, n in zip(reversed(ids), reversed(tokens), strict=True):
            for t, c in enumerate(chain):
                if block in c:
                    held[t] -= c.pop(block)
            chain[0][block] = n
            held[0] += n
        for t, c in enumerate(chain):
            while held[t] > capacities[t]:
                block, n = c.popitem(last=False)
                held[t] -= n
                if t + 1 < len(chain):
                    chain[t + 1][block] = n
                    held[t + 1] += n
    return found


def test_lru_chain_is_a_naive_cascade(e, mooncake, uses, reuse):
    capacities = [2e6, 6e6, 1e7]
    chain = [tier("hbm", capacities[0]), tier("dram", capacities[1], 1e-6), tier("ssd", capacities[2], 6e-6)]
    found = simulate_cascade(mooncake, capacities, reuse.warm_up)
    assert [h * reuse.seconds for h in cache.lru(e, uses, reuse, chain, 1).hits] == pytest.approx(found)


def simulate_policy(r: Requests, best: cache.Placement, p: Profile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt tokens found per tier, tokens held per tier: mean and most) when every block goes where the placement says.

    Block by block, request by request; a conversation (its second block) has a number in [0, 1) that decides where it is.
    """
    order = np.cumsum(best.shares, axis=2)  # [class, age, tier]
    classes, _, count = order.shape
    numbers = 200  # so many different lots are enough
    lot = np.random.default_rng(7).integers(numbers, size=int(r.blocks.ids.max()) + 1).tolist()
    # Where a block of each class and lot is, over its age: [(begin, end, tier)].
    spans = {}
    for c, m in itertools.product(range(classes), range(numbers)):
        where = ((m + 0.5) / numbers >= order[c]).sum(axis=1)
        runs = [(t, list(ages)) for t, ages in itertools.groupby(range(where.size), where.__getitem__)]
        spans[c, m] = [(float(p.edges[k[0]]), float(p.edges[k[-1] + 1]), int(t)) for t, k in runs if t < count]
    last: dict[int, tuple[float, int, float, int]] = {}
    found, size, end = np.zeros(count), r.blocks.tokens, float(r.arrival[-1])
    stays: list[list[tuple[float, float, float]]] = [[] for _ in range(count)]

    def leave(block: int, now: float) -> int:
        """Tier that holds the block now, and where it was since its last use."""
        at, seen, n, number = last[block]
        for begin, stop, t in spans[min(seen, classes) - 1, number]:
            if at + begin > now:
                break
            stays[t].append((at + begin, min(at + stop, now), n))
            if at + stop > now:
                return t
        return count

    for i in range(len(r)):
        now, ids, whole = float(r.arrival[i]), r.blocks.of(i).tolist(), True
        number = lot[ids[min(1, len(ids) - 1)]]
        for j, block in enumerate(ids):
            n, seen = min(size, r.input[i] - size * j), 0
            if block in last:
                seen = last[block][1]
                where = leave(block, now)
                whole = whole and where < count
                if whole and now >= p.warm_up:
                    found[where] += n - (j == len(ids) - 1)
            else:
                whole = False
            last[block] = (now, seen + 1, n, number if j else 0)
    for block in last:
        leave(block, end)
    grid = np.linspace(p.warm_up, end, 400)
    held = np.zeros((count, grid.size))
    for t, parts in enumerate(stays):
        begin, stop, n = np.array(parts).T
        for times, sign in ((begin, 1), (stop, -1)):
            place_of = np.argsort(times)
            total = np.concatenate([[0.0], np.cumsum(n[place_of])])
            held[t] += sign * total[np.searchsorted(times[place_of], grid, side="right")]
    return found, held.mean(axis=1), held.max(axis=1)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_policy_of_the_optimum_does_what_it_promises(e, mooncake, uses, classes):
    """The trace served block by block under the ages, classes and shares of the optimum: hits and room of each tier."""
    p = profile(e, mooncake, uses, classes=classes)
    held = tiers(e, 3, 512, 7e5)
    held = [held[0], replace(held[1], capacity=8e6), replace(held[2], capacity=2e7)]
    best = cache.place(p, held, busy=0.8)
    found, room, most = simulate_policy(mooncake, best, p)
    for t, use in enumerate(best.uses):
        assert use.hits * p.seconds == pytest.approx(found[t], rel=0.10)
        assert use.used == pytest.approx(room[t], rel=0.10)
        # Room is planned for on average; this trace is steady enough for that.
        assert most[t] < 1.5 * held[t].capacity


def test_optimum_is_no_worse_than_any_lru(e, uses, reuse):
    held = tiers(e, 1, 512, 2e6)
    best = cache.place(reuse, held, busy=0.8)
    for chain in (held, held[:1], held[1:2], held[2:]):
        assert best.saved >= 0.99 * cache.lru(e, uses, reuse, chain, 1, busy=0.8).saved
    alone = cache.place(reuse, held[:1])
    assert alone.saved > 1.2 * cache.lru(e, uses, reuse, held[:1], 1).saved


def test_less_reuse_is_worth_less(e, reuse):
    held = tiers(e, 3, 512, 5e5)
    half = replace(reuse, hits=reuse.hits / 2, saved=reuse.saved / 2, requests=reuse.requests / 2)
    full, less = (cache.place(p, held, busy=0.8) for p in (reuse, half))
    assert less.saved == pytest.approx(full.saved / 2, rel=0.02)
    assert all(less.of(t.name).value <= full.of(t.name).value * 0.51 + 1e-15 for t in held)


def test_a_slower_drive_gets_less(e, reuse):
    held = tiers(e, 3, 512, 5e5, {"dram": "600GB"})
    ssd = held[-1]
    kept = []
    for factor in (1, 8, 40):
        slow = replace(ssd, fetch=ssd.fetch * factor, read=ssd.read / factor, write=ssd.write / factor)
        kept.append(cache.place(reuse, [*held[:-1], slow], busy=0.8).of("ssd").saved)
    assert kept[0] > kept[1] > kept[2]
    worn = replace(ssd, write=ssd.write / 1000)
    assert cache.place(reuse, [*held[:-1], worn], busy=0.8).of("ssd").hits < 0.5 * cache.place(reuse, held, busy=0.8).of("ssd").hits


def test_nothing_is_fetched_where_computing_is_quicker(mooncake, uses):
    """Llama-3.2-1B caches 32 KiB a token: 60 us from a SATA drive of 550 MB/s, a few us to compute on an H100."""
    e = Estimator("llama-3.2-1b", "hgx-h100-8")
    p = profile(e, mooncake, uses)
    held = tiers(e, 8, 512, 1e5, {"dram": "0", "ssd": "1xsata-ssd"})
    ssd = next(t for t in held if t.name == "ssd")
    assert ssd.fetch == pytest.approx(32768 / 550e6, rel=1e-6)
    assert float(token_seconds(e, np.array([10_000.0]))[0]) < ssd.fetch / 5
    best = cache.place(p, held, busy=0.8)
    assert best.of("ssd").hits == 0
    assert best.of("ssd").value == 0
    assert best.recomputed > 0.2


def test_fetches_hidden_behind_prefill(reuse):
    """Slow enough and nothing hides; quick enough and one layer's share is seen, and prompts that are cached whole."""
    assert 1 / reuse.layers <= visible_fetch(reuse, 1e-9) < 3 / reuse.layers
    assert visible_fetch(reuse, 1.0) == pytest.approx(1.0, rel=0.01)
    slow = [tier("hbm", 1e6), tier("ssd", 5e7, 2e-5)]
    assert cache.place(reuse, slow, overlap=True).saved > cache.place(reuse, slow).saved
    assert cache.place(reuse, slow, objective="gpu").saved > cache.place(reuse, slow, overlap=True).saved


def test_prices_decide_how_much_to_rent(e, reuse):
    """Where the last token's value equals its rent; far too dear, nothing is kept."""
    held = tiers(e, 3, 512, 5e5, {"ssd": "0"})

    def rented(usd: float) -> cache.Placement:
        priced = [held[0], replace(held[1], usd_per_gb_month=usd, capacity=FREE)]
        return cache.place(reuse, priced, busy=0.8, usd_per_second=25 / 3600)

    amounts = [rented(usd).of("dram").used for usd in (0.001, 0.05, 0.3, 1000.0)]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > 2 * amounts[2] > 0
    assert amounts[3] < 1e-6 * amounts[0]
    best = rented(0.3).of("dram").used
    bounded = [held[0], replace(held[1], capacity=best)]
    usd = cache.place(reuse, bounded, busy=0.8).of("dram").value_per_gb * 25 / 3600 * cache.MONTH_S
    less = [held[0], replace(held[1], capacity=0.97 * best)]
    more = [held[0], replace(held[1], capacity=1.03 * best)]
    values = [cache.place(reuse, x, busy=0.8).of("dram").value_per_gb * 25 / 3600 * cache.MONTH_S for x in (less, more)]
    assert values[1] <= 0.3 * 1.02
    assert values[0] >= 0.3 * 0.98
    assert usd >= 0
    sized = cache.sizes(reuse, [held[0], replace(held[1], usd_per_gb_month=0.3)], usd_per_second=25 / 3600, busy=0.8)
    assert sized == pytest.approx({"dram": best}, rel=1e-3)


def test_tiers_of_a_node_by_hand(e):
    """Llama-3.1-70B: 80 layers x 2 x 8 heads x 128 x 2 B = 327,680 B a token, 40,960 B on each of 8 devices.

    Host memory: 40,960/(63.015e9 x 0.75) s a token over each device's own link (the node's sheet rounds to 63 GB/s).
    Drives: 327,680/(8 x 6.5e9). Network: 40,960/(50e9 x efficiency).
    """
    found = {t.name: t for t in tiers(e, 2, 512, 1e6, {"remote": "10TB", "cxl": "8xcxl-expander", "csd": "8xsmartssd"})}
    assert list(found) == ["hbm", "dram", "remote", "cxl", "ssd", "csd"]
    assert found["dram"].fetch == pytest.approx(40_960 / (63.015e9 * 0.75), rel=1e-3)
    assert found["dram"].capacity == pytest.approx(2 * 2e12 / 327_680)
    assert found["ssd"].fetch == pytest.approx(327_680 / (8 * 6.5e9), rel=1e-3)
    assert found["ssd"].write == pytest.approx(2 * 8 * 3.5e9 / 327_680, rel=1e-3)
    assert found["csd"].fetch == pytest.approx(327_680 / (8 * 3.3e9), rel=1e-3)
    assert found["remote"].fetch == pytest.approx(40_960 / (50e9 * float(e.machine.network_efficiency)), rel=1e-6)
    assert found["remote"].capacity == pytest.approx(10e12 / 327_680)
    worn = {t.name: t for t in tiers(e, 2, 512, 1e6, drive_writes_per_day=1.0)}
    assert worn["ssd"].write == pytest.approx(2 * 8 * 3.84e12 / 86400 / 327_680)
    # Half a node: half its memory and drives.
    half = {t.name: t for t in tiers(Estimator("llama-3.1-70b", "hgx-h100-8", tp=4), 1, 512, 1e6)}
    assert half["dram"].bytes == pytest.approx(1e12)


def test_devices_behind_one_switch_share_its_uplink():
    """H100 NVL: four cards behind each uplink, so four shards of a rank come one after the other."""
    e = Estimator("llama-3.1-70b", "h100-nvl-8", tp=4)
    dram = next(t for t in tiers(e, 1, 512, 1e6) if t.name == "dram")
    assert dram.fetch == pytest.approx(4 * 81_920 / (63.015e9 * 0.75), rel=1e-2)


def test_saved_seconds_are_those_of_the_prefill(e):
    """Tokens 0 to 65,536 in full chunks, summed token by token, against the estimator's own steps."""
    steps = sum(float(e.prefill(1, 8192, k * 8192)) for k in range(8))
    assert token_seconds(e, np.arange(65_536.0)).sum() == pytest.approx(steps, rel=0.03)


ARGUMENTS = ["place", "cache", "--model", "llama-3.1-70b", "--hw", "hgx-h100-8", "--tp", "8", "--trace", str(TRACE), "--price",
             "24 USD/h"]  # fmt: skip


def test_command_says_what_each_tier_is_for():
    data = json.loads(CliRunner().invoke(main, [*ARGUMENTS, "--json"], catch_exceptions=False).stdout)
    assert [t["tier"] for t in data["tiers"]] == ["hbm", "dram", "ssd"]
    assert data["hit_share"] + data["recomputed_share"] + data["new_share"] == pytest.approx(1)
    steps = [x["saved_gpu_s_per_s"] for x in data["ladder"]]
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(data["saved_gpu_s_per_s"])
    assert sum(t["saved_gpu_s_per_s"] for t in data["tiers"]) == pytest.approx(data["saved_gpu_s_per_s"])
    text = CliRunner().invoke(main, ARGUMENTS, catch_exceptions=False).stdout
    assert "USD/month of +1 GB" in text
    assert "Binding: the capacity of hbm" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tier", "drma=1TB"], "did you mean 'dram'"),
        (["--tier", "dram"], "NAME=VALUE"),
        (["--tier", "dram=1TB", "--tier", "dram=2TB"], "twice"),
        (["--tier", "dram=lots"], "size"),
        (["--tier", "csd=4xnvme-gen99"], "nvme-gen99"),
        (["--tier", "cxl=1TB"], "8xcxl-expander"),
        (["--tier", "cxl=4xnvme-gen4"], "no memory expander"),
        (["--tier", "ssd=900TB"], "is more than"),
        (["--tier", "csd=1TB"], "no such drives"),
        (["--gb-price", "dram=cheap"], "not a number"),
        (["--busy", "1.5"], "--busy"),
        (["--guard", "0.9", "--replicas", "4"], "--guard"),
    ],
)
def test_bad_input_is_one_line(more, message):
    result = CliRunner().invoke(main, ARGUMENTS + more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_too_few_replicas_name_enough():
    result = CliRunner().invoke(main, [*ARGUMENTS, "--replicas", "1"])
    assert result.exit_code == 3
    assert "--replicas " in result.stderr


def test_a_trace_without_blocks_and_a_model_without_cache_are_refused(e):
    azure = TRACE.parent / "azure-conv-2023.csv.gz"
    with pytest.raises(SpecError, match="block ids"):
        study.study("llama-3.1-70b", "hgx-h100-8", str(azure), tp=8)
    with pytest.raises(Infeasible, match="no tier"):
        cache.place(small([1], [1]), [])
