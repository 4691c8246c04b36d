"""Layers over unequal devices: every split of small cases, both solvers, hand arithmetic and the Estimator."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import need
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import catalog
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.placement import pipeline, stages
from perfmodel.planner.placement.pipeline import Fleet, Problem
from perfmodel.planner.placement.stages import Entry, Link, Request

SLOW, QUICK = Link(1e6, 1e-3, "slow"), Link(1e10, 1e-5, "quick")


def work_of(costs: list[float], most: int) -> np.ndarray:
    """w[k, l] of a device with these seconds per layer and room for `most` layers."""
    n = len(costs)
    table = np.full((n + 1, n + 1), np.inf)
    for k in range(n):
        for l in range(k + 1, min(k + most, n) + 1):
            table[k, l] = sum(costs[k:l])
    return table


def random_problem(seed: int, goal: str, *, ordered: bool = False, most: int | None = None) -> Problem:
    rng = np.random.default_rng(seed)
    counts = (2, 1, 1)
    work = tuple(work_of((rng.random(5) + 0.1).tolist(), int(rng.integers(2, 5))) for _ in counts)
    return Problem(counts, work, rng.random((3, 3)), ("a", "b", "c"), goal, ordered, most)


def brute(p: Problem) -> float:
    """Every order of every choice of devices, with every cut."""
    best, devices = math.inf, [g for g, c in enumerate(p.counts) for _ in range(c)]
    for k in range(1, min(len(devices), p.most or len(devices)) + 1):
        for order in set(itertools.permutations(devices, k)):
            if p.ordered and list(order) != sorted(order):
                continue
            for cuts in itertools.combinations(range(1, p.layers), k - 1):
                ends = (0, *cuts, p.layers)
                parts = [p.work[g][ends[i], ends[i + 1]] for i, g in enumerate(order)]
                parts += [p.hop[a, b] for a, b in itertools.pairwise(order)]
                best = min(best, max(parts) if p.goal == "throughput" else sum(parts))
    return float(best)


@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize(("seed", "ordered", "most"), [(0, False, None), (1, True, None), (2, False, 3), (3, True, 3)])
def test_both_programs_equal_brute_force(goal: str, seed: int, ordered: bool, most: int | None) -> None:
    p = random_problem(seed, goal, ordered=ordered, most=most)
    best = brute(p)
    found = [pipeline.partition(p), pipeline.partition_program(p), pipeline.partition_program(p, solver=need.cbc())]
    for split in found:
        if math.isinf(best):
            assert split is None
        else:
            assert split is not None
            assert split.objective == pytest.approx(best, rel=1e-6)
            assert split.gap == pytest.approx(0.0, abs=1e-4)
            assert sum(s.last - s.first + 1 for s in split.stages) == p.layers


def test_two_devices_by_hand() -> None:
    """Six layers of 1 s on the one and 2 s on the other: 4 and 2 layers take 4 s each, with a link of 0.5 s."""
    hop = np.full((2, 2), 0.5)
    p = Problem((1, 1), (work_of([1.0] * 6, 6), work_of([2.0] * 6, 6)), hop, ("fast", "slow"))
    split = pipeline.partition(p)
    assert split is not None
    assert (split.objective, split.binding[0]) == (4.0, "stage")
    assert {s.group: s.last - s.first + 1 for s in split.stages} == {0: 4, 1: 2}
    # A link slower than 6 s makes the second device worse than none; one request alone never wants it.
    alone = pipeline.partition(replace(p, hop=np.full((2, 2), 7.0)))
    assert alone is not None
    assert [(s.group, s.seconds) for s in alone.stages] == [(0, 6.0)]
    latency = pipeline.partition(replace(p, goal="latency"))
    assert latency is not None
    assert latency.objective == 6.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["throughput", "latency"]))
def test_another_device_never_hurts_and_slower_links_never_help(seed: int, goal: str) -> None:
    p = random_problem(seed, goal)

    def best(q: Problem) -> float:
        split = pipeline.partition(q)
        return split.objective if split else math.inf

    assert best(replace(p, counts=(3, 1, 1))) <= best(p) <= best(replace(p, counts=(1, 1, 1)))
    assert best(replace(p, hop=2 * p.hop)) >= best(p)
    assert best(replace(p, ordered=True)) >= best(p)


def llama(*devices: str, link: Link = QUICK, batch: int = 16, goal: str = "throughput") -> Fleet:
    entries = tuple(stages.entry(d) for d in devices)
    links = dict.fromkeys(itertools.combinations(range(len(entries)), 2), link)
    return Fleet(catalog.load_model("llama-3.1-8b"), entries, links, Request(512, 64, batch), goal)


def test_a_whole_model_on_one_device_costs_what_the_estimator_says() -> None:
    """prefill(1, 512) + 64 decode(16, 544) / 16, from the Estimator's public methods."""
    e = Estimator("llama-3.1-8b", "a100-pcie-80gb")
    answer = pipeline.split(llama("a100-pcie-80gb"))
    assert answer.best.objective == pytest.approx(e.prefill(1, 512) + 64 * e.decode(16, 544) / 16, rel=0.02)
    alone = pipeline.split(llama("a100-pcie-80gb", goal="latency"))
    assert alone.best.objective == pytest.approx(e.prefill(1, 512) + 64 * e.decode(16, 544), rel=0.02)


def test_room_of_a_stage_is_weights_and_cache_by_hand() -> None:
    """Llama-3.1-8B: 218.1 M parameters a layer in 2 bytes, and 16 sequences x 576 tokens x 2 x 8 x 128 x 2 bytes."""
    costs = stages.stage_costs(catalog.load_model("llama-3.1-8b"), Entry("l40s", 1), Request(512, 64, 16), 16, "vllm")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert costs.layer_bytes[0] == pytest.approx(2 * layer + 16 * 576 * 4096, rel=1e-6)
    assert costs.table_bytes == pytest.approx(2 * 128256 * 4096)
    assert costs.head_bytes == pytest.approx(2 * 128256 * 4096, rel=1e-4)


def test_a_slow_link_leaves_a_host_out_and_a_fast_one_uses_it() -> None:
    near = pipeline.split(llama("l40s", "l40s", batch=64))
    far = pipeline.split(llama("l40s", "l40s", batch=64, link=SLOW))
    assert len(near.best.stages) == 2
    assert len(far.best.stages) == 1
    assert far.values["links between hosts 10 x as fast"] <= far.best.objective


def test_the_slower_device_gets_fewer_layers() -> None:
    answer = pipeline.split(llama("a100-pcie-80gb", "t4", batch=8))
    layers = {s.group: s.last - s.first + 1 for s in answer.best.stages}
    assert layers[0] > layers.get(1, 0)
    assert answer.best.objective <= min(answer.alternatives.values())


def test_what_fits_nowhere_is_refused_with_the_nearest_batch() -> None:
    with pytest.raises(Infeasible, match="--batch") as error:
        pipeline.split(llama("t4", "t4", batch=4096))
    smaller = int(str(error.value.nearest).split()[-1])
    assert pipeline.split(llama("t4", "t4", batch=smaller)).best.objective > 0
    with pytest.raises(Infeasible, match="narrower checkpoint"):
        pipeline.split(llama("t4", batch=1))


def test_entries_and_links_are_read_strictly() -> None:
    assert stages.entry("4 x rtx-4090/tp2") == Entry("rtx-4090", 2, 2)
    assert stages.link("10 Gbit/s").rate == pytest.approx(1.25e9 * 0.85)
    assert stages.link("ethernet-10g").rate == stages.link("10 Gbit/s").rate
    for bad in ("3x l40s/tp2", "0x l40s"):
        with pytest.raises(SpecError):
            stages.entry(bad)
    for bad in ("10 Gb/s", "etherned-10g", "l40s"):
        with pytest.raises(SpecError):
            stages.link(bad)


def test_orders_too_many_to_enumerate_are_refused() -> None:
    p = random_problem(0, "throughput")
    many = Problem((30,) * 6, p.work * 2, np.ones((6, 6)), tuple("abcdef"))
    with pytest.raises(SpecError, match="too many for an exact order"):
        pipeline.partition(many)
