"""Offloading: hand arithmetic of published policies, published throughputs, a grid of shares, and what moves the split."""

from __future__ import annotations

import itertools
from dataclasses import replace

import need
import pytest

from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.placement import offload
from perfmodel.planner.placement.offload import Block, Job, Policy

# FlexGen's runs on one T4, 208 GB of host memory and a 1.5 TB disk (arXiv:2303.06865, table 2 and its repository's
# benchmark suite, Apache-2.0): prompt, format, percentages on device and host of weights, cache and activations,
# batch x batches, attention on the host, generated tokens/s.
PUBLISHED = {
    "175b": ("opt-175b", 512, None, (0, 50, 0, 0, 0, 100), Block(32, 8, True), 0.69),
    "175b, short": ("opt-175b", 256, None, (0, 50, 0, 0, 0, 100), Block(64, 8, True), 1.36),
    "175b, 4 bit": ("opt-175b", 512, "int4_g64", (0, 100, 0, 100, 0, 100), Block(48, 3, False), 1.12),
    "30b": ("opt-30b", 512, None, (20, 80, 0, 100, 0, 100), Block(48, 3, True), 7.32),
    "6.7b": ("opt-6.7b", 512, None, (100, 0, 100, 0, 100, 0), Block(2, 1, False), 25.26),
    "6.7b, short": ("opt-6.7b", 256, None, (100, 0, 100, 0, 100, 0), Block(4, 1, False), 53.29),
}


def job(model: str, isl: int = 512, osl: int = 32, form: str | None = None) -> Job:
    return Job.of(Estimator(model, "t4-server", engine="pytorch", weight_dtype=form, kv_dtype=form), isl, osl)


def as_run(name: str, **paths: float) -> tuple[Policy, float]:
    model, isl, form, percent, block, published = PUBLISHED[name]
    w_g, w_c, c_g, c_c, h_g, h_c = (x / 100 for x in percent)
    shares = (w_g, w_c, 1 - w_g - w_c, c_g, c_c, 1 - c_g - c_c, h_g, h_c, 1 - h_g - h_c)
    expand = paths.pop("expand", 0.0)
    asked = job(model, isl, form=form)
    asked = replace(asked, paths=replace(asked.paths, **paths), expand=expand)
    return offload.evaluate(asked, block, shares), published


def test_a_published_policy_by_hand() -> None:
    """OPT-175B: 96 layers of 12 x 12288^2 weights and 2 x 12288 cached elements a token, 2 bytes each."""
    policy, _ = as_run("175b")
    weights = 0.5 * 96 * 12 * 12288**2 * 2
    cache = 256 * (512 + 16) * 96 * 2 * 12288 * 2
    assert policy.decode["disk reads"] == pytest.approx((weights + cache) / 2e9, rel=1e-3)
    assert policy.prefill["disk writes"] == pytest.approx(256 * 512 * 96 * 2 * 12288 * 2 / 1e9, rel=1e-6)
    activations = 96 * 256 * 512 * 12288 * 2
    # PCIe 3.0 x16 at 75 % of 15.75 GB/s.
    assert policy.prefill["to device"] == pytest.approx((2 * weights + activations) / (0.75 * 15.75e9), rel=1e-3)
    assert policy.binding == ("device", "disk reads")
    seconds = policy.prefill["device"] + 31 * policy.decode["disk reads"]
    assert policy.tokens_per_s == pytest.approx(256 * 32 / seconds)
    assert policy.held["disk"] == pytest.approx(weights + 256 * 544 * 96 * 2 * 12288 * 2, rel=1e-3)


@pytest.mark.parametrize(("name", "factor"), [("175b", 1.2), ("175b, short", 1.2), ("6.7b", 1.3), ("6.7b, short", 1.25)])
def test_published_throughput_of_published_policies(name: str, factor: float) -> None:
    policy, published = as_run(name)
    assert published / factor < policy.tokens_per_s < published * factor


def test_published_throughput_where_host_and_expansion_are_slower_than_their_memories() -> None:
    """Attention on that host at 12.3 GFLOP/s (the repository's own cost model), one byte of cache for each FLOP; 4-bit
    elements expanded by passes of at least 15 bytes each: (0.5 + 0.5) + 0.5 + 2 twice, and two passes of 4."""
    plain, published = as_run("30b")
    slow, _ = as_run("30b", host_attention=12.3e9)
    assert published < slow.tokens_per_s < 1.7 * published
    assert slow.tokens_per_s < 0.7 * plain.tokens_per_s
    fused, published = as_run("175b, 4 bit")
    eager, _ = as_run("175b, 4 bit", expand=15.0)
    assert published < eager.tokens_per_s < 2.3 * published
    assert eager.tokens_per_s < 0.7 * fused.tokens_per_s


@pytest.fixture(scope="module")
def small() -> Job:
    """OPT-30B with room for its weights on the host and little more."""
    asked = job("opt-30b")
    return replace(asked, paths=replace(asked.paths, host_bytes=60e9, disk_bytes=400e9))


BLOCK = Block(16, 4, True)


def test_the_program_beats_every_share_of_a_grid(small: Job) -> None:
    best = offload.solve_block(small, BLOCK)
    assert best is not None
    rows = offload.rows(small, BLOCK)
    quarters = [t for t in itertools.product((0, 0.25, 0.5, 0.75, 1), repeat=3) if sum(t) == 1]
    reached = 0.0
    for shares in itertools.product(quarters, repeat=3):
        flat = tuple(itertools.chain(*shares))
        policy = offload.evaluate(small, BLOCK, flat) if reached == 0 else None
        vector = [*flat, 1.0]
        held = {t: sum(a * b for a, b in zip(row, vector, strict=True)) for t, row in rows.held.items()}
        if any(held[t] > rows.room[t] for t in held):
            continue
        times = [max(sum(a * b for a, b in zip(r, vector, strict=True)) for r in part.values())
                 for part in (rows.prefill, rows.decode)]  # fmt: skip
        speed = BLOCK.sequences * 32 / (times[0] + 31 * times[1])
        if policy is not None:
            assert policy.tokens_per_s == pytest.approx(speed)
        reached = max(reached, speed)
    assert 0 < reached <= best.tokens_per_s * (1 + 1e-6)
    assert best.tokens_per_s < 1.5 * reached
    assert all(best.held[t] <= rows.room[t] * (1 + 1e-6) for t in rows.room)


def test_both_solvers_agree(small: Job) -> None:
    found = [offload.solve_block(small, BLOCK, solver=s) for s in ("highs", need.cbc())]
    assert found[0].tokens_per_s == pytest.approx(found[1].tokens_per_s, rel=1e-5)


def test_the_price_of_memory_is_what_more_of_it_gives(small: Job) -> None:
    """The dual of a tier's row against solving again with 0.1 GB more."""
    best = offload.solve_block(small, BLOCK)
    for tier, field in (("host", "host_bytes"), ("device", "device_bytes")):
        more = replace(small, paths=replace(small.paths, **{field: getattr(small.paths, field) + 1e8}))
        gained = (offload.solve_block(more, BLOCK).tokens_per_s - best.tokens_per_s) / 0.1
        assert best.prices[tier] == pytest.approx(gained, rel=0.05, abs=1e-6)
    assert best.prices["host"] > 0


def test_less_host_memory_pushes_to_disk_and_costs_speed(small: Job) -> None:
    on_disk, speed = [], []
    for size in (90e9, 60e9, 30e9):
        found = offload.solve_block(replace(small, paths=replace(small.paths, host_bytes=size)), BLOCK)
        on_disk.append(found.held["disk"])
        speed.append(found.tokens_per_s)
    assert on_disk[0] < on_disk[1] < on_disk[2]
    assert speed[0] > speed[1] > speed[2]


def test_faster_disks_help_and_no_overlap_hurts(small: Job) -> None:
    best = offload.solve_block(small, BLOCK)
    faster = replace(small, paths=replace(small.paths, disk_read=2 * small.paths.disk_read))
    assert offload.solve_block(faster, BLOCK).tokens_per_s > best.tokens_per_s
    one_by_one = offload.evaluate(small, BLOCK, best.shares, overlapped=False)
    assert one_by_one.tokens_per_s < offload.evaluate(small, BLOCK, best.shares).tokens_per_s


def test_the_search_is_no_worse_than_what_was_published() -> None:
    """On its own costs: FlexGen's policy is one of those the search may choose."""
    asked = job("opt-175b")
    best = offload.search(asked)
    assert best.tokens_per_s >= as_run("175b")[0].tokens_per_s
    others = offload.alternatives(asked, best)
    assert max(others.values()) <= best.tokens_per_s * (1 + 1e-9)
    assert others["nothing on disk"] == 0.0
    assert others["one device batch per block"] < best.tokens_per_s
    gains = offload.tenth_more(asked, best)
    assert gains["disk read"] > 1.01
    assert gains["host memory"] == pytest.approx(1.0, abs=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Infeasible, match="more disk"):
        offload.search(replace(job("opt-175b"), paths=replace(job("opt-175b").paths, disk_bytes=1e9)))
    tiny = job("opt-175b")
    with pytest.raises(Infeasible, match="of the device's"):
        offload.search(replace(tiny, paths=replace(tiny.paths, device_bytes=1e9)))
    with pytest.raises(SpecError, match="add up to 1"):
        offload.evaluate(job("opt-6.7b"), BLOCK, (1.0,) * 9)
    with pytest.raises(SpecError, match="one device"):
        Job.of(Estimator("opt-6.7b", "hgx-a100-8", tp=2), 512, 32)
