"""Experts on ranks: against every placement of small cases, tokens counted one by one, and hand arithmetic."""

from __future__ import annotations

import itertools

import need
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.ops.moe import distinct_ranks
from perfmodel.planner.placement import experts, routing
from perfmodel.planner.placement.experts import Demand, Ranks
from perfmodel.planner.placement.routing import Layer
from perfmodel.serving.prefix_laws import zipf


def naive_cost(hosts: tuple[tuple[int, ...], ...], demand: Demand, ranks: Ranks) -> float:
    """The formulas of experts.py with plain loops; inf where a rank holds too many."""
    work, held = [0.0] * ranks.count, [0] * ranks.count
    for e, where in enumerate(hosts):
        for g in where:
            work[g] += demand.loads[e] / len(where)
            held[g] += 1
    if max(held) > ranks.slots:
        return float("inf")
    slowest = max(ranks.per_token * w + ranks.per_expert * h for w, h in zip(work, held, strict=True))
    crossing = 0.0
    if ranks.nodes > 1:
        node = [g // (ranks.count // ranks.nodes) for g in range(ranks.count)]
        saved = 0.0
        for e, f in itertools.combinations(range(len(hosts)), 2):
            for n in range(ranks.nodes):
                parts = [sum(node[g] == n for g in hosts[x]) / len(hosts[x]) for x in (e, f)]
                saved += demand.together[e, f] * min(parts)
        crossing = (1 - 1 / ranks.nodes) * (demand.loads.sum() - 2 / demand.top_k * saved)
    return slowest + ranks.per_copy * crossing


def brute(demand: Demand, ranks: Ranks) -> float:
    places = [c for r in range(1, ranks.count + 1) for c in itertools.combinations(range(ranks.count), r)]
    return min(naive_cost(h, demand, ranks) for h in itertools.product(places, repeat=demand.loads.size))


def random_demand(seed: int, n: int) -> Demand:
    rng = np.random.default_rng(seed)
    loads = rng.integers(1, 50, n).astype(float)
    together = np.triu(rng.random((n, n)), 1) * np.minimum.outer(loads, loads) / 2
    return Demand(loads, 2, together + together.T)


@pytest.mark.parametrize(("seed", "nodes", "per_expert"), [(0, 1, 0.0), (1, 1, 4.0), (2, 3, 0.5), (3, 3, 0.0)])
@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_program_equals_brute_force_with_both_solvers(solver: str, seed: int, nodes: int, per_expert: float) -> None:
    if solver == "cbc":
        need.cbc()
    demand = random_demand(seed, 4)
    ranks = Ranks(3, 2, nodes, 1.0, per_expert, 0.3)
    best = brute(demand, ranks)
    found, held = experts.solve_program(demand, ranks, solver=solver)
    assert found.objective == pytest.approx(best, rel=1e-4)
    assert held is not None
    hosts = tuple(tuple(int(g) for g in np.nonzero(row)[0]) for row in held)
    assert naive_cost(hosts, demand, ranks) == pytest.approx(best, rel=1e-4)
    placed = experts.place(demand, ranks, exact=True, solver=solver)
    assert placed.objective == pytest.approx(best, rel=1e-4)
    assert placed.gap <= 1e-3


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3), st.booleans())
def test_bound_heuristic_and_brute_force_are_ordered(seed: int, slots: int, linked: bool) -> None:
    demand = random_demand(seed, 4)
    ranks = Ranks(2, slots, 2 if linked else 1, 1.0, 0.1, 0.2)
    best, quick = brute(demand, ranks), experts.place(demand, ranks, exact=False)
    assert experts.lower_bound(demand, ranks) <= best * (1 + 1e-9)
    assert best <= quick.objective * (1 + 1e-9)


def test_four_experts_by_hand() -> None:
    """8 + 4 on the first rank and 2 + 2 on the second take 12; 8 against 4 + 2 + 2 takes 8, the mean."""
    demand, ranks = Demand(np.array([8.0, 4.0, 2.0, 2.0])), Ranks(2, 3)
    before = experts.evaluate(experts.contiguous(demand, ranks), demand, ranks, 0.0, "")
    placed = experts.place(demand, ranks)
    assert (before.busiest, placed.busiest, placed.bound) == (12.0, 8.0, 8.0)


def test_a_lone_expert_above_the_mean_is_bounded_by_its_slots() -> None:
    """10, 1, 1, 1 on 2 x 2 slots, no slot to spare: the rank of the 10 holds a second expert, so 11 and not 6.5."""
    demand = Demand(np.array([10.0, 1.0, 1.0, 1.0]))
    placed = experts.place(demand, Ranks(2, 2))
    assert (placed.busiest, placed.bound) == (11.0, 11.0)
    # With one more slot each, halves of the 10 make 6.5 a rank.
    assert experts.place(demand, Ranks(2, 3)).busiest == pytest.approx(6.5)


def test_copies_of_top_2_equal_tokens_counted_one_by_one() -> None:
    rng = np.random.default_rng(3)
    choices = np.array([rng.choice(8, 2, replace=False) for _ in range(500)])
    demand = routing.demand_of(choices, 8, 500.0)
    ranks = Ranks(4, 2, 2, per_copy=1.0)
    held = experts.contiguous(demand, ranks)
    node = {e: e // 4 for e in range(8)}
    visits = sum(len({node[int(e)] for e in row}) for row in choices)
    assert experts.copies(held.astype(float), demand, ranks) == pytest.approx(visits / 2)
    assert routing.nodes_visited(choices, held, ranks) == pytest.approx(visits / 500)


def test_large_layer_with_redundant_slots_is_near_its_bound() -> None:
    """256 experts on 32 ranks x 10 slots, as DeepSeek's prefill units are laid out; loads recomputed here."""
    loads = np.random.default_rng(0).permutation(zipf(256, 0.8)) * 1e5
    demand, ranks = Demand(loads, 8), Ranks(32, 10)
    placed = experts.place(demand, ranks)
    work = np.zeros(32)
    for e in range(256):
        where = np.nonzero(placed.held[e])[0]
        assert where.size >= 1
        work[where] += loads[e] / where.size
    assert placed.held.sum(axis=0).max() <= 10
    assert work.max() == pytest.approx(placed.busiest)
    assert work.max() >= placed.bound >= loads.sum() / 32 * (1 - 1e-12)
    assert placed.gap < 0.01
    assert placed.seconds < 10


def test_a_hotter_expert_gets_more_replicas() -> None:
    loads = np.full(16, 10.0)
    ranks = Ranks(4, 6)
    assert experts.place(Demand(loads), ranks, exact=False).replicas[5] <= 2
    loads[5] = 120.0
    assert experts.place(Demand(loads), ranks, exact=False).replicas[5] == 4


def test_reading_weights_makes_replicas_unwanted() -> None:
    demand = Demand(np.array([10.0, 6.0, 5.0, 5.0]))
    free = experts.place(demand, Ranks(2, 4, per_expert=0.0))
    dear = experts.place(demand, Ranks(2, 4, per_expert=100.0))
    assert dear.held.sum() == 4
    assert free.busiest <= dear.loads.max()


def test_a_dear_link_brings_together_what_is_chosen_together() -> None:
    """Pairs (0, 2) and (1, 3) are always chosen together; balance alone is content with any two on a node."""
    together = np.zeros((4, 4))
    together[0, 2] = together[2, 0] = together[1, 3] = together[3, 1] = 10.0
    demand = Demand(np.array([10.0, 11.0, 10.0, 11.0]), 2, together)
    dear = experts.place(demand, Ranks(2, 2, 2, per_copy=1.0))
    assert np.array_equal(dear.held[0], dear.held[2])
    assert np.array_equal(dear.held[1], dear.held[3])
    # (42 choices - 20 saved) x half that come from the other node.
    assert dear.copies == pytest.approx(11.0)
    cheap = experts.place(demand, Ranks(2, 2, 2, per_copy=0.01))
    assert cheap.copies > dear.copies
    assert cheap.busiest < dear.busiest


def test_sampled_routing_follows_popularity_and_groups() -> None:
    shares = zipf(16, 1.0)
    one = routing.sample(shares, 1, 40_000, seed=1)
    assert np.bincount(one[:, 0], minlength=16) / 40_000 == pytest.approx(shares, abs=0.01)
    limited = routing.sample(shares, 4, 500, groups=4, top_groups=2, seed=1)
    assert all(len(set(row)) == 4 and len({int(e) // 4 for e in row}) <= 2 for row in limited)


@pytest.mark.parametrize("nodes", [2, 4])
def test_replicas_of_an_expert_save_visits(nodes: int) -> None:
    rng = np.random.default_rng(5)
    choices = np.array([rng.choice(8, 3, replace=False) for _ in range(300)])
    ranks = Ranks(4, 8, nodes)
    held = experts.contiguous(Demand(np.ones(8)), ranks)
    everywhere = np.ones((8, 4), bool)
    assert routing.nodes_visited(choices, everywhere, ranks) == 1.0
    assert 1.0 < routing.nodes_visited(choices, held, ranks) <= min(nodes, 3)


def test_even_routing_gives_back_the_estimators_step() -> None:
    """Replacing the Estimator's expert time and node visits by themselves changes nothing."""
    e = Estimator("deepseek-v3", "hgx-h100-8", dp=16, ep=16)
    layer = Layer.of(e, 1024.0)
    pairs = 1024 * 8 / 16
    busiest = pairs + (2 * pairs * np.log(16)) ** 0.5
    touched = 256 * (1 - (1 - 8 / 256) ** 1024) / 16
    # Served text leaves more experts untouched than even routing (negative binomial, kernels/grouped.py).
    c, x = e.machine.law["expert_popularity"], busiest / 16
    touched *= (1 - (1 + c * x) ** (-1 / c)) / (1 - np.exp(-x))
    experts_s = float(layer.seconds(np.array([busiest]), np.array([touched]))[0])
    ranks = layer.ranks(Demand(np.full(256, 32.0), 8), 16, 16, 2)
    even = layer.tokens_per_s(2048, experts_s, distinct_ranks(layer.moe, 2), ranks)
    assert even == pytest.approx(1024 / float(e.decode(1024, 2048)), rel=0.01)
    assert layer.tokens_per_s(2048, 1.2 * experts_s, distinct_ranks(layer.moe, 2), ranks) < even
    assert layer.tokens_per_s(2048, experts_s, 2.0, ranks) < even
    assert ranks.per_token > 0
    # One expert of DeepSeek-V3: 3 x 7168 x 2048 bytes in FP8 over 3.35 TB/s at 88 to 95 %.
    assert ranks.per_expert == pytest.approx(3 * 7168 * 2048 / (0.9 * 3.35e12), rel=0.2)


def test_bad_requests_say_what_would_do() -> None:
    with pytest.raises(Infeasible, match="5 slots per rank"):
        experts.place(Demand(np.ones(9)), Ranks(2, 4))
    with pytest.raises(SpecError, match="co-activation"):
        experts.place(Demand(np.ones(4), 2), Ranks(2, 2, 2, per_copy=1.0))
    with pytest.raises(SpecError, match="symmetric"):
        Demand(np.ones(2), 2, np.array([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(SpecError, match="choose two experts together"):
        Demand(np.ones(2), 2, np.array([[0.0, 3.0], [3.0, 0.0]]))
    with pytest.raises(SpecError, match="divide"):
        Ranks(4, 2, 3)
    with pytest.raises(SpecError, match="no experts"):
        Layer.of(Estimator("llama-3.1-8b", "h100-sxm"), 8.0)
