"""Batch policies: whole prompts, layered prefill and split devices, against naive simulations and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from perfmodel import graph, roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.layered import expert_bytes, layer_groups, layered_program
from perfmodel.serving.modes import policy_clock, policy_instance, stall
from perfmodel.serving.queueing import Mix
from perfmodel.serving.split import Sides, SplitInstance, best_share, contention


@pytest.fixture(scope="module")
def moe():
    return Estimator("qwen3-30b-a3b", "h100-sxm")


@pytest.fixture(scope="module")
def mix():
    rng = np.random.default_rng(2)
    inputs = np.floor(np.exp(rng.uniform(np.log(50), np.log(4000), 400)))
    return Mix(inputs, rng.integers(20, 301, 400).astype(float), np.full(400, 1 / 400))


def arrivals(mix, rate, n, seed=3):
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, mix.input.size, n)
    return np.cumsum(rng.exponential(1 / rate, n)), mix.input[pick], mix.output[pick]


def percentiles(values):
    return np.nanpercentile(values, [50, 95])


# -- whole prompts ------------------------------------------------------------------------------------------------


def prefill_first(clock, arrival, inputs, outputs):
    """All waiting prompts in a pass of their own before any decode step; (TTFT, TPOT, longest gap) of each request."""
    n = arrival.size
    first, last, gap = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n)
    context, left = {}, {}
    now, i = 0.0, 0
    while i < n or context:
        if not context and i < n:
            now = max(now, arrival[i])
        if i < n and arrival[i] <= now:
            j = int(np.searchsorted(arrival, now, side="right"))
            now += clock.prompt_pass([(float(x), 0.0) for x in inputs[i:j]])
            first[i:j] = last[i:j] = now
            for k in range(i, j):
                if outputs[k] > 1:
                    context[k], left[k] = inputs[k] + 1, outputs[k] - 1
            i = j
            continue
        now += clock.decode(len(context), float(sum(context.values())))
        for k in list(context):
            gap[k] = max(gap[k], now - last[k])
            last[k] = now
            context[k] += 1
            left[k] -= 1
            if left[k] == 0:
                del context[k], left[k]
    tpot = np.where(outputs > 1, (last - first) / np.maximum(outputs - 1, 1), np.nan)
    return first - arrival, tpot, gap


@pytest.mark.parametrize("rate", [3.0, 6.0])
def test_whole_prompts_equal_a_prefill_first_simulation(estimator, mix, rate):
    whole = policy_instance(estimator, mix, 1e9, "whole")
    runs = [prefill_first(whole.clock, *arrivals(mix, rate, 3000, seed)) for seed in (1, 2)]
    ttft, tpot, gap = (np.concatenate(x) for x in zip(*runs, strict=True))
    s = whole.state(rate, mix)
    assert 0.15 < s.utilisation < 0.7
    for p, tolerance, measured in zip((0.5, 0.95), (0.1, 0.2), percentiles(tpot), strict=True):
        assert whole.tpot_quantile(p, s, mix) == pytest.approx(measured, rel=tolerance)
    for p, tolerance, measured in zip((0.5, 0.95), (0.1, 0.2), percentiles(ttft), strict=True):
        assert whole.ttft_quantile(p, s, mix) == pytest.approx(measured, rel=tolerance)
    # The longest gap is at least the stall of one typical prompt, and chunks make it far shorter.
    context = s.batch * mix.context
    stalls = stall(whole.clock, mix.input, s.batch, context)
    assert np.percentile(gap, 95) >= np.percentile(stalls, 50)
    short = stall(policy_clock(estimator, mix.context, chunk=256), mix.input, s.batch, context)
    assert short.max() < stalls.max() / 4


def test_a_prompt_longer_than_an_uncut_step_is_refused(estimator):
    clock = policy_clock(estimator, 1000.0, "whole", chunk=2048)
    assert clock.prefill_work(np.array([2048.0]), 4.0, 4000.0)[0] > 0
    with pytest.raises(SpecError, match="does not fit a step of 2,048 tokens"):
        clock.prefill_work(np.array([3000.0]), 4.0, 4000.0)


def test_an_unknown_policy_names_the_nearest(estimator):
    with pytest.raises(SpecError, match="did you mean 'layered'"):
        policy_clock(estimator, 1000.0, "layerd")


# -- layered prefill ----------------------------------------------------------------------------------------------


def test_expert_bytes_of_a_lone_prompt_by_hand(moe):
    """Qwen3-30B-A3B: 48 layers x 128 experts x 3 x 2048 x 768 x 2 B = 57.98 GB; 512 tokens x 8 choices touch all of them.

    In 16 chunks of 512 a prompt of 8192 reads them 16 times, layer by layer once.
    """
    whole = 48 * 128 * 3 * 2048 * 768 * 2
    chunked = sum(expert_bytes(moe.lower(graph.prefill(1, 512, 512 * i))) for i in range(16))
    layered = sum(expert_bytes(layered_program(moe, 0, 0, 8192, g)) for g in layer_groups(48, 16))
    assert chunked == pytest.approx(16 * whole, rel=1e-6)
    assert layered == pytest.approx(whole, rel=1e-6)


def test_beside_a_decode_batch_the_experts_that_decode_touches_are_read_anyway(moe):
    """32 sequences touch 128 (1 - (1 - 8/128)^32) = 111.8 experts in each of the 16 steps; a group's layers all 128."""
    touched = 128 * (1 - (1 - 8 / 128) ** 32)
    step = 48 * 3 * 2048 * 768 * 2
    layered = sum(expert_bytes(layered_program(moe, 32, 2000, 8192, g)) for g in layer_groups(48, 16))
    assert layered == pytest.approx(step * (15 * touched + 128), rel=1e-6)


def test_layered_tables_equal_the_schedules_they_stand_for(moe):
    """Sum over the groups of (step - decode step), each step lowered and costed on its own."""
    clock = policy_clock(moe, 4000.0, "layered", chunk=512, longest=16384)
    batch, context, prompt = 16, 4000.0, 8192.0
    groups = layer_groups(48, math.ceil(prompt / (512 - batch)))
    exact = [
        float(roofline.cost(layered_program(moe, batch, context, prompt, g).schedule, moe.machine).seconds)
        + float(moe.host_seconds(batch + 1))
        for g in groups
    ]
    extra = sum(exact) - len(exact) * clock.decode(batch, batch * context)
    work = clock.prefill_work(np.array([prompt]), batch, batch * context)[0]
    assert work == pytest.approx(extra, rel=0.02)
    # Chunk by chunk it adds up to the same, and no step is much longer than the others.
    steps = [clock.step(batch, batch * context, [(512.0, 512.0 * i)], [prompt]) for i in range(16)]
    assert sum(steps) - 16 * clock.decode(batch, batch * context) == pytest.approx(work, rel=0.01)
    assert max(exact) < 1.5 * min(exact)


def step_by_step(clock, arrival, inputs, outputs):
    """First come first served in the tokens that decoding leaves of a step; (TTFT, TPOT)."""
    n = arrival.size
    first, end = np.full(n, np.nan), np.full(n, np.nan)
    now, i, queue, context, left = 0.0, 0, [], {}, {}
    while i < n or queue or context:
        if not queue and not context:
            now = max(now, arrival[i])
        while i < n and arrival[i] <= now:
            queue.append([i, 0.0])
            i += 1
        room, taken = clock.chunk - len(context), []
        for entry in queue:
            if room <= 0:
                break
            taken.append((entry, min(inputs[entry[0]] - entry[1], room)))
            room -= taken[-1][1]
        chunks = [(float(q), entry[1]) for entry, q in taken]
        prompts = [float(inputs[entry[0]]) for entry, _ in taken]
        now += clock.step(len(context), float(sum(context.values())), chunks, prompts)
        for k in list(context):
            context[k] += 1
            left[k] -= 1
            if left[k] == 0:
                end[k] = now
                del context[k], left[k]
        for entry, q in taken:
            entry[1] += float(q)
            k = entry[0]
            if entry[1] >= inputs[k]:
                queue.remove(entry)
                first[k] = end[k] = now
                if outputs[k] > 1:
                    context[k], left[k] = inputs[k] + 1, outputs[k] - 1
    return first - arrival, np.where(outputs > 1, (end - first) / np.maximum(outputs - 1, 1), np.nan)


@pytest.mark.parametrize("rate", [3.0, 6.0])
def test_layered_percentiles_equal_a_step_by_step_simulation(moe, mix, rate):
    layered = policy_instance(moe, mix, 1e9, "layered", chunk=512)
    chunked = policy_instance(moe, mix, 1e9, chunk=512)
    s = layered.state(rate, mix)
    ttft, tpot = step_by_step(layered.clock, *arrivals(mix, rate, 3000))
    for p, tolerance in ((50, 0.1), (95, 0.2)):
        assert layered.ttft_quantile(p / 100, s, mix) == pytest.approx(np.nanpercentile(ttft, p), rel=tolerance)
        assert layered.tpot_quantile(p / 100, s, mix) == pytest.approx(np.nanpercentile(tpot, p), rel=tolerance)
        other = chunked.state(rate, mix)
        assert layered.ttft_quantile(p / 100, s, mix) < chunked.ttft_quantile(p / 100, other, mix)
        assert layered.tpot_quantile(p / 100, s, mix) < chunked.tpot_quantile(p / 100, other, mix)


@pytest.mark.parametrize(("model", "hardware", "options"), [
    ("qwen3-30b-a3b", "h100-sxm", {}), ("deepseek-v3", "h200-sxm", {"tp": 8, "ep": 8}),
])  # fmt: skip
def test_layered_beats_chunks_where_experts_are_many(model, hardware, options):
    """arXiv:2510.08055 finds up to 39 % of the traffic and up to 70 % of TTFT: same steps per prompt, less work in each."""
    e = Estimator(model, hardware, **options)
    prompt, batch, context = np.array([8192.0]), 16.0, 16 * 4000.0
    chunked = policy_clock(e, 4000.0, chunk=512)
    layered = policy_clock(e, 4000.0, "layered", chunk=512, longest=16384)
    less = layered.prefill_work(prompt, batch, context) / chunked.prefill_work(prompt, batch, context)
    assert 0.3 < less[0] < 0.8
    assert stall(layered, prompt, batch, context) < stall(chunked, prompt, batch, context)


def test_layered_gains_nothing_where_no_expert_is_read_again():
    """Mixtral: 16 sequences touch 8 (1 - 0.75^16) = 7.92 of 8 experts anyway."""
    e = Estimator("mixtral-8x7b", "h100-sxm", tp=2)
    prompt, batch, context = np.array([8192.0]), 16.0, 16 * 4000.0
    chunked = policy_clock(e, 4000.0, chunk=512).prefill_work(prompt, batch, context)
    layered = policy_clock(e, 4000.0, "layered", chunk=512, longest=16384).prefill_work(prompt, batch, context)
    assert layered[0] == pytest.approx(chunked[0], rel=0.1)


# -- compute units divided between the phases ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides(estimator, mix):
    return {f: Sides(estimator, mix.context, f) for f in (0.4, 0.6)}


def test_contention_is_a_fair_fixed_point(estimator):
    for share in (0.2, 0.5, 0.8):
        prefill, decode, of_prefill, of_decode = contention(estimator, share, 64.0, 2000.0, 1024.0)
        assert of_prefill == pytest.approx(max(0.5, 1 - decode.drawn), abs=2e-3)
        assert of_decode == pytest.approx(max(0.5, 1 - prefill.drawn), abs=2e-3)
        assert prefill.drawn + decode.drawn <= 1.01
    # A prefill of few tokens streams weights like a decode step: both want everything, each gets half.
    assert contention(estimator, 0.5, 16.0, 200.0, 16.0)[2:] == pytest.approx((0.5, 0.5), abs=0.05)


def test_more_units_speed_up_their_side_only(sides, mix):
    inputs = np.array([2000.0])
    little, much = sides[0.4], sides[0.6]
    assert much.prefill(1.0).prefill_work(inputs, 0, 0) < little.prefill(1.0).prefill_work(inputs, 0, 0)
    assert much.decode(1.0).decode(64, 64e3) > little.decode(1.0).decode(64, 64e3)
    # Compute-bound prefill takes the inverse of its share; memory-bound decode less than that.
    ratio = little.prefill(1.0).prefill_work(inputs, 0, 0) / much.prefill(1.0).prefill_work(inputs, 0, 0)
    assert ratio[0] == pytest.approx(0.6 / 0.4, rel=0.15)
    whole = StepClock(little.estimator, mix.context)
    assert 1.0 <= little.decode(1.0).decode(16, 16e3) / whole.decode(16, 16e3) < 1.4


def two_sides(sides, arrival, inputs, outputs, chunk):
    """Both sides step by step: each step looks whether the other side is busy when it starts."""
    n = arrival.size
    first, end = np.full(n, np.nan), np.full(n, np.nan)
    clocks = {}

    def clock(side, batch):
        size = 2 ** round(math.log2(max(batch, 1)))
        if (side, size) not in clocks:
            shares = sides.shares(size, chunk)
            clocks[side, size] = sides.prefill(shares[0]) if side == "prefill" else sides.decode(shares[1])
        return clocks[side, size]

    free_p, free_d, waiting, context, left = 0.0, 0.0, 0, {}, {}
    ready = []
    alone_p, alone_d = sides.prefill(1.0), sides.decode(1.0)
    while waiting < n or context or ready:
        start_p = max(free_p, arrival[waiting]) if waiting < n else math.inf
        start_d = free_d if context else max(free_d, ready[0][0]) if ready else math.inf
        if start_p <= start_d:
            busy = bool(context) or any(t <= start_p for t, _ in ready)
            c = clock("prefill", len(context)) if busy else alone_p
            free_p = start_p + float(c.prefill_work(inputs[waiting : waiting + 1], 0, 0)[0])
            first[waiting] = end[waiting] = free_p
            if outputs[waiting] > 1:
                ready.append((free_p, waiting))
            waiting += 1
            continue
        while ready and ready[0][0] <= start_d:
            _, k = ready.pop(0)
            context[k], left[k] = inputs[k] + 1, outputs[k] - 1
        c = clock("decode", len(context)) if free_p > start_d else alone_d
        free_d = start_d + c.decode(len(context), float(sum(context.values())))
        for k in list(context):
            context[k] += 1
            left[k] -= 1
            if left[k] == 0:
                end[k] = free_d
                del context[k], left[k]
    tpot = np.where(outputs > 1, (end - first) / np.maximum(outputs - 1, 1), np.nan)
    return first - arrival, tpot


def test_split_percentiles_equal_a_simulation_of_both_sides(sides, mix):
    split = SplitInstance(sides[0.6], 1e9)
    rate = 2.5
    s = split.state(rate, mix)
    assert s.feasible
    ttft, tpot = two_sides(sides[0.6], *arrivals(mix, rate, 2500), chunk=mix.mean(mix.input))
    for p, tolerance in ((50, 0.15), (95, 0.25)):
        assert split.ttft_quantile(p / 100, s, mix) == pytest.approx(np.nanpercentile(ttft, p), rel=tolerance)
        assert split.tpot_quantile(p / 100, s, mix) == pytest.approx(np.nanpercentile(tpot, p), rel=tolerance)


def test_the_best_share_follows_the_limits(estimator, mix):
    tight_ttft, _ = best_share(estimator, mix, 1.5, 1e9, ttft=0.3, tpot=0.2, shares=(0.3, 0.5, 0.7))
    tight_tpot, _ = best_share(estimator, mix, 1.5, 1e9, ttft=5.0, tpot=0.02, shares=(0.3, 0.5, 0.7))
    assert tight_ttft > tight_tpot


def test_a_share_outside_the_device_is_refused(estimator):
    with pytest.raises(SpecError, match="between 0 and 1"):
        Sides(estimator, 1000.0, 1.0)
