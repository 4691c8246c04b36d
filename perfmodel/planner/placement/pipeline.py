"""Layers over unequal devices and links: which device runs which run of layers, in which order, and which stay idle.

Devices come in groups of equal ones on one host. A stage is a device d with the layers k+1 … l, and costs

    w(d, k, l) = sum of c_dj over its layers j, + the table if k = 0, + the head if l = layers, + host time    [s per request]
    x(d, d')   = seconds that the link from one stage to the next is busy for one request

subject to the bytes of its layers (+ table, + head) fitting the device. Pipelined stages and links work at the same
time, one request goes through all of them:

    throughput: minimise max(max over stages w, max over hops x); requests/s are its inverse
    latency:    minimise sum of stages + sum of hops, both of one request that waits for every decode step

Either is solved exactly by dynamic programming over (devices used of each group, last group, layers done); the same
choice as an integer program over stages checks it. PipeDream (SOSP 2019) and EdgeShard (arXiv:2405.14371) pose it so.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pulp

from perfmodel.errors import Infeasible, SpecError
from perfmodel.machine import machine
from perfmodel.planner.placement.stages import Entry, Link, Request, StageCosts, inside_seconds, stage_costs
from perfmodel.planner.solver import TIME_LIMIT_S, solve
from perfmodel.spec.model import Model

Goal = Literal["throughput", "latency"]
# Transitions of the dynamic program; about half a minute.
_LARGEST = 60_000_000


@dataclass(frozen=True)
class Problem:
    """Stage costs by group, hop seconds between groups, and how many devices a group has."""

    counts: tuple[int, ...]
    work: tuple[np.ndarray, ...]
    """w[k, l] of a device of each group: the stage with layers k+1 … l; inf where it does not fit or l <= k."""
    hop: np.ndarray
    """x[g, h]: seconds from a stage on group g to the next on group h."""
    labels: tuple[str, ...]
    goal: Goal = "throughput"
    ordered: bool = False
    """Groups only in the order given."""
    most: int | None = None
    """Stages at most: with more than there are micro-batches some would idle."""

    @property
    def layers(self) -> int:
        return len(self.work[0]) - 1


@dataclass(frozen=True)
class Stage:
    """Layers first … last (counted from 1) on a device of a group, and what it costs."""

    group: int
    first: int
    last: int
    seconds: float
    hop: float
    """Of the link from the stage before; 0 for the first."""


@dataclass(frozen=True)
class Partition:
    """Stages in order; objective in seconds per request."""

    stages: tuple[Stage, ...]
    objective: float
    bound: float
    method: str
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        return (self.objective - self.bound) / self.objective

    @property
    def binding(self) -> tuple[str, int]:
        """("stage" | "link", index) of the longest."""
        stage = max(range(len(self.stages)), key=lambda i: self.stages[i].seconds)
        hop = max(range(len(self.stages)), key=lambda i: self.stages[i].hop)
        return ("link", hop) if self.stages[hop].hop > self.stages[stage].seconds else ("stage", stage)


def _worst(goal: Goal, *parts: float) -> float:
    return max(parts) if goal == "throughput" else sum(parts)


def measure(problem: Problem, stages: list[tuple[int, int]], method: str) -> Partition:
    """The cost of any split: (group, layers of the stage) in order; inf where a stage does not fit or is one too many."""
    done, last, found = 0, -1, []
    for group, n in stages:
        hop = 0.0 if last < 0 else float(problem.hop[last, group])
        found.append(Stage(group, done + 1, done + n, float(problem.work[group][done, done + n]), hop))
        done, last = done + n, group
    if done != problem.layers:
        raise SpecError(f"the stages have {done} layers and the model {problem.layers}")
    objective = _worst(problem.goal, *(s.seconds for s in found), *(s.hop for s in found))
    if problem.most is not None and len(found) > problem.most:
        objective = math.inf
    return Partition(tuple(found), objective, objective, method)


def partition(problem: Problem) -> Partition | None:
    """The best split, proven; None where no split fits the devices' memory."""
    start = time.perf_counter()
    groups, n = range(len(problem.counts)), problem.layers
    states = math.prod(c + 1 for c in problem.counts)
    if states * len(problem.counts) ** 2 * n * n > _LARGEST:
        raise SpecError(
            f"{states:,} ways to use {sum(problem.counts)} devices in {len(problem.counts)} groups are too many for an exact "
            "order; put equal devices into one group, or join cards with /tpN"
        )
    join = np.maximum if problem.goal == "throughput" else np.add
    best: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
    came: dict[tuple[tuple[int, ...], int], tuple[np.ndarray, np.ndarray]] = {}
    most = problem.most or sum(problem.counts)
    for used in (u for u in sorted(itertools.product(*(range(c + 1) for c in problem.counts)), key=sum) if sum(u) <= most):
        for g in (g for g in groups if used[g]):
            before = (*used[:g], used[g] - 1, *used[g + 1 :])
            value, where, last = np.full(n + 1, np.inf), np.zeros(n + 1, int), np.full(n + 1, -1)
            if not any(before):
                value = problem.work[g][0].copy()
            for h in groups:
                earlier = best.get((before, h))
                if earlier is None or (problem.ordered and h > g):
                    continue
                reach = join(join(earlier, problem.hop[h, g])[:, None], problem.work[g])
                k = reach.argmin(axis=0)
                better = reach[k, np.arange(n + 1)] < value
                value = np.where(better, reach[k, np.arange(n + 1)], value)
                where, last = np.where(better, k, where), np.where(better, h, last)
            best[used, g], came[used, g] = value, (where, last)
    ends = [(float(v[n]), sum(key[0]), key) for key, v in best.items() if np.isfinite(v[n])]
    if not ends:
        return None
    # Of equal ones, the one with the fewest devices.
    least = min(e[0] for e in ends)
    _, _, key = min(e for e in ends if e[0] <= least * (1 + 1e-12))
    stages: list[tuple[int, int]] = []
    done = n
    while done:
        used, g = key
        where, last = came[key]
        stages.append((g, int(done - where[done])))
        key = ((*used[:g], used[g] - 1, *used[g + 1 :]), int(last[done]))
        done = int(where[done])
    found = measure(problem, stages[::-1], "dynamic program")
    return replace(found, seconds=time.perf_counter() - start)


def partition_program(problem: Problem, *, solver: str = "highs", time_limit: float = TIME_LIMIT_S) -> Partition | None:
    """The same as an integer program: a path of stages s = (k, h) -> (l, g) from layer 0 to the last one.

    s = 1: a device of group g runs layers k+1 … l after a stage on group h. Flow is conserved at every (layer, group),
    each group is used at most as often as it has devices. Throughput: T >= cost of the stage, T >= its hop.
    """
    p = pulp.LpProblem("pipeline", pulp.LpMinimize)
    n, groups = problem.layers, range(len(problem.counts))
    stages: dict[tuple[int, int, int, int], pulp.LpVariable] = {}
    for g, work in enumerate(problem.work):
        for k, l in zip(*np.nonzero(np.isfinite(work)), strict=True):
            for h in [-1] if k == 0 else groups:
                if not (problem.ordered and h > g):
                    stages[int(k), h, int(l), g] = p.add_variable(f"s_{k}_{h + 1}_{l}_{g}", cat="Binary")
    cost = {s: (problem.work[s[3]][s[0], s[2]], problem.hop[s[1], s[3]] if s[1] >= 0 else 0.0) for s in stages}
    longest = p.add_variable("T", lowBound=0)
    p.setObjective(longest)
    p += pulp.lpSum(v for s, v in stages.items() if s[0] == 0) == 1, "start"
    p += pulp.lpSum(v for s, v in stages.items() if s[2] == n) == 1, "end"
    for layer in range(1, n):
        for g in groups:
            arrive = pulp.lpSum(v for s, v in stages.items() if s[2:] == (layer, g))
            p += arrive == pulp.lpSum(v for s, v in stages.items() if s[:2] == (layer, g)), f"flow_{layer}_{g}"
    for g in groups:
        p += pulp.lpSum(v for s, v in stages.items() if s[3] == g) <= problem.counts[g], f"devices_{g}"
    if problem.most is not None:
        p += pulp.lpSum(stages.values()) <= problem.most, "stages"
    if problem.goal == "latency":
        p += longest >= pulp.lpSum(sum(cost[s]) * v for s, v in stages.items()), "sum"
    else:
        for layer in range(1, n + 1):
            # One stage at most ends at a layer, so one row holds them all; its layers' stages are alternatives.
            ending = [(s, v) for s, v in stages.items() if s[2] == layer]
            if ending:
                p += longest >= pulp.lpSum(max(cost[s]) * v for s, v in ending), f"longest_{layer}"
    found = solve(p, solver=solver, time_limit=time_limit)
    if not found.ok:
        return None
    chosen = sorted(s for s in stages if found.values[f"s_{s[0]}_{s[1] + 1}_{s[2]}_{s[3]}"] > 0.5)
    result = measure(problem, [(s[3], s[2] - s[0]) for s in chosen], f"integer program ({found.solver})")
    return replace(result, bound=min(found.bound, result.objective), seconds=found.seconds)


@dataclass(frozen=True)
class Fleet:
    """Entries of devices, the links between their hosts, and what is asked of them."""

    model: Model
    entries: tuple[Entry, ...]
    links: dict[tuple[int, int], Link]
    """By pair of entries (lower index first)."""
    request: Request
    goal: Goal = "throughput"
    ordered: bool = False
    engine: str = "vllm"

    def problem(self, micro_batches: int) -> Problem:
        """Costs when the batch goes through the pipeline in so many parts."""
        r = self.request
        micro = max(r.batch / micro_batches, 1.0)
        costs = [stage_costs(self.model, d, r, micro, self.engine) for d in self.entries]
        return Problem(
            tuple(d.count for d in self.entries), tuple(_table(c, self.goal) for c in costs),
            self._hops(micro, costs[0].token_bytes), tuple(d.label for d in self.entries), self.goal, self.ordered,
            micro_batches if self.goal == "throughput" else None,
        )  # fmt: skip

    def _hops(self, micro: float, width: float) -> np.ndarray:
        """Seconds of hidden states between stages, per request: one prompt, and a micro-batch each step."""
        r, n = self.request, len(self.entries)
        hop = np.zeros((n, n))
        steps = r.osl if self.goal == "latency" else r.osl / micro
        for g, h in itertools.product(range(n), repeat=2):
            for size, times in ((r.isl * width, 1.0), (micro * width, steps)):
                if g == h:
                    hop[g, h] += times * inside_seconds(self.model, self.entries[g], size, self.engine)
                else:
                    hop[g, h] += times * self.links[min(g, h), max(g, h)].seconds(size)
        return hop

    @property
    def devices(self) -> int:
        return sum(d.count for d in self.entries)

    def problems(self) -> dict[int, Problem]:
        """By number of micro-batches. Latency: the whole batch at once, since parts would wait for each other."""
        most = min(self.devices, self.request.batch) if self.goal == "throughput" else 1
        return {s: self.problem(s) for s in range(1, most + 1)}


def _table(c: StageCosts, goal: Goal) -> np.ndarray:
    """w[k, l] of one device; inf where the stage is empty or does not fit."""
    t = c.shared if goal == "throughput" else c.alone
    n = t.layers.size
    sums, sizes = np.concatenate([[0.0], np.cumsum(t.layers)]), np.concatenate([[0.0], np.cumsum(c.layer_bytes)])
    k, l = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    seconds = sums[None, :] - sums[:, None] + t.host + np.where(k == 0, t.table, 0.0) + np.where(l == n, t.head, 0.0)
    held = sizes[None, :] - sizes[:, None] + np.where(k == 0, c.table_bytes, 0.0) + np.where(l == n, c.head_bytes, 0.0)
    held = held - np.where((k == 0) & (l == n), c.shared_bytes, 0.0)
    return np.where((l > k) & (held <= c.room), seconds, np.inf)


@dataclass(frozen=True)
class Answer:
    """The best split over all numbers of micro-batches, and what other choices would give."""

    best: Partition
    micro_batches: int
    alternatives: dict[str, float]
    """Seconds per request of other splits; inf where one does not fit."""
    values: dict[str, float]
    """Seconds per request without one device of a group, or with links ten times as fast."""


def split(fleet: Fleet, *, solver: str = "dp") -> Answer:
    """The best split of a fleet. solver: dp, or highs and cbc for the integer program.

    Raises Infeasible where the layers fit no way, with how much memory is missing.
    """
    problems = fleet.problems()
    found = _best(problems, solver)
    if found is None:
        raise _too_large(fleet)
    best, micro = found
    names = {"uniform": _uniform, "in proportion to memory": _by_memory}
    alternatives = {
        name: min(measure(p, rule(fleet, p), name).objective for p in problems.values()) for name, rule in names.items()
    }
    for g, label in enumerate(problems[micro].labels):
        only = {s: replace(p, counts=tuple(c if h == g else 0 for h, c in enumerate(p.counts))) for s, p in problems.items()}
        alone = _best(only, "dp")
        alternatives[f"{label} only"] = alone[0].objective if alone else math.inf
    values = {}
    for g, label in enumerate(problems[micro].labels):
        fewer = tuple(c - (h == g) for h, c in enumerate(problems[micro].counts))
        less = _best({s: replace(p, counts=fewer) for s, p in problems.items()}, "dp") if any(fewer) else None
        values[f"without one {label}"] = less[0].objective if less else math.inf
    faster = {pair: Link(link.rate * 10, link.latency / 10, link.name) for pair, link in fleet.links.items()}
    quick = _best(replace(fleet, links=faster).problems(), "dp")
    values["links between hosts 10 x as fast"] = quick[0].objective if quick else math.inf
    return Answer(best, micro, alternatives, values)


def _best(problems: dict[int, Problem], solver: str) -> tuple[Partition, int] | None:
    tried = {
        s: partition(p) if solver == "dp" else partition_program(p, solver=solver) for s, p in problems.items()
    }  # fmt: skip
    fitting = [(found, s) for s, found in tried.items() if found is not None]
    return min(fitting, key=lambda f: (f[0].objective, f[1])) if fitting else None


def _uniform(fleet: Fleet, problem: Problem) -> list[tuple[int, int]]:
    """Equally many layers on every device, in the order listed."""
    return _shared_out(fleet, problem, [1.0] * len(fleet.entries))


def _by_memory(fleet: Fleet, problem: Problem) -> list[tuple[int, int]]:
    """Layers in proportion to the devices' memory, in the order listed."""
    return _shared_out(fleet, problem, [machine(d.name).capacity * d.tp for d in fleet.entries])


def _shared_out(fleet: Fleet, problem: Problem, weights: list[float]) -> list[tuple[int, int]]:
    devices = [g for g, d in enumerate(fleet.entries) for _ in range(d.count)]
    ends = np.round(np.cumsum([weights[g] for g in devices]) / sum(weights[g] for g in devices) * problem.layers)
    layers = np.diff(np.concatenate([[0], ends])).astype(int)
    return [(g, int(n)) for g, n in zip(devices, layers, strict=True) if n]


def _too_large(fleet: Fleet) -> Infeasible:
    r = fleet.request
    need = have = 0.0
    for d in fleet.entries:
        costs = stage_costs(fleet.model, d, r, 1.0, fleet.engine)
        need = float(costs.layer_bytes.sum()) * d.tp + costs.table_bytes + costs.head_bytes
        have += costs.room * d.tp * d.count
    fits = next((b for b in _halves(r.batch) if _best(replace(fleet, request=replace(r, batch=b)).problems(), "dp")), None)
    return Infeasible(
        f"{fleet.model.name} with {r.batch} sequences of {r.isl + r.osl} tokens needs {need / 1e9:,.1f} GB; the "
        f"{fleet.devices} devices have {have / 1e9:,.1f} GB for weights and cache, in pieces that must hold whole layers",
        nearest=f"--batch {fits}" if fits else f"{max(need - have, 0) / 1e9:,.1f} GB more, or a narrower checkpoint",
        binding=("memory",),
    )


def _halves(n: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length()) if n >> i]
