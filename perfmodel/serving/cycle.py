"""The step cycle: requests that arrive during a step are prefilled together in the next one (batch service).

A backlog of x seconds of prefill work makes a step of T(x) seconds; what arrives meanwhile is the next backlog. That is a
Markov chain over (backlog, phase of the arrivals), solved on about two dozen backlogs: with arrivals of phases mu, share and
work transform F, the work of an interval T has the transform exp(G T), G = -diag(mu) + F mu share' (a Markov-modulated
compound process; Neuts, Structured Stochastic Matrices of M/G/1 Type, 1989). A tagged request waits for the rest R of the
running step and shares the next one with the others that gathered; both laws follow from the same exponentials. A backlog
over the token budget takes several steps, first come first served; here they count as one long step, whose workload is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel.serving.renewal import Renewal

_CELLS = {1: 256, 4: 128}  # cells of the work laws, by phases
_NODES = {1: 26, 4: 17}
_GROUPS = 4
_CLASSES = 6
"""Classes of own work in the laws of what interrupts a request."""
DOUBLINGS = 9
"""Decode steps are followed up to 2^9; beyond them sums grow as they last did."""


@dataclass(frozen=True, eq=False)
class Load:
    """What one instance prefills: work adds up, and a step of backlog x > 0 takes tau + extra + x seconds."""

    rate: float
    work: np.ndarray
    """Seconds of work of each request of the mix, all its chunks."""
    weight: np.ndarray
    tau: float
    """Decode step that runs when nothing prefills; 0: nothing decodes."""
    extra: float
    """Seconds a step with prefill takes beyond the decode step and its work (negative: small prompts ride along)."""
    chunk: float
    """Work of a full token budget."""
    idle: float
    """Share of the time without prefill in which nothing decodes either."""

    backlog: np.ndarray
    bend: np.ndarray
    """Seconds by which a step of so much backlog departs from that straight line."""

    @property
    def overhead(self) -> float:
        return self.tau + self.extra

    def seconds(self, backlog: np.ndarray) -> np.ndarray:
        """Time to work a backlog off, decode steps that it carries along included."""
        steps = np.maximum(backlog / self.chunk, 1.0)
        bend = np.interp(backlog, self.backlog, self.bend)
        return np.where(backlog > 0, np.maximum(backlog + self.overhead * steps + bend, self.tau), self.tau)


@dataclass(frozen=True, eq=False)
class Cycle:
    """Stationary laws of the step cycle."""

    load: Load
    grid: np.ndarray
    """Seconds of the cells of `gathered` and `ahead`."""
    rest: np.ndarray
    """Mean R, per group of steps [group]."""
    gathered: np.ndarray
    """P(group, R + work of the others in the gate), where all fit in one step [group, cell]."""
    ahead: np.ndarray
    """P(work ahead, R included), where the backlog takes several steps [cell]."""
    idle: float
    """P(a request starts at once)."""
    lengths: np.ndarray
    often: np.ndarray
    """Lengths of single steps while anything decodes, and how often each comes [cell]."""
    own: np.ndarray
    """Work that stands for each class of requests [class]."""
    free: np.ndarray
    """P(2^k decode steps after the first token without any prefill) [k, class]."""
    mean: np.ndarray
    """Mean seconds of the first 2^k decode steps after the first token [k, class]."""
    variance: np.ndarray
    """Variance of those seconds [k, class]."""


def solve(load: Load, arrivals: Renewal) -> Cycle:
    """Stationary cycle of a load below saturation."""
    phases = arrivals.mu.size
    cells, count = _CELLS[phases], _NODES[phases]
    nodes, cell = _nodes(load, arrivals.dispersion, count, cells)
    seconds = load.seconds(nodes)
    seconds[0] = max(load.tau, 1e-9)
    place = np.minimum(load.work / cell, cells - 1.001)
    low = place.astype(int)
    part = place - low
    work = np.bincount(low, load.weight * (1 - part), cells)[:cells]
    work += np.bincount(low + 1, load.weight * part, cells)[:cells]
    root = arrivals.roots(np.fft.rfft(work))
    right, left = arrivals.vectors(root)  # [root, phase, frequency]
    left = left / (right * left).sum(1)[:, None]
    grown = np.exp(seconds[:, None, None] * root)  # [node, root, frequency]
    grid = np.arange(cells) * cell
    onto = _onto(nodes, grid)
    if phases == 1:
        fine = np.fft.irfft(grown[:, 0], cells, axis=1)
        moves, fine = fine @ onto, fine[:, None]
    else:
        turns = (right[:, :, None] * left[:, None]).reshape(phases, phases**2, -1)
        kernel = grown.transpose(2, 0, 1) @ turns.transpose(2, 0, 1)  # [frequency, node, phases at both ends]
        whole = np.fft.irfft(kernel, cells, axis=0)
        law = onto.T @ whole.reshape(cells, -1)
        fine = whole.reshape(cells, count, phases, phases).sum(3).transpose(1, 2, 0)
        moves = law.reshape(count, count, phases, phases).transpose(1, 2, 0, 3).reshape(count * phases, -1)
    # An idle engine starts with the first request alone; idle and decoding share the time without prefill as given.
    starts = np.full(phases, load.idle)
    if load.idle < 1:
        starts = load.idle * seconds[0] / (load.idle * seconds[0] + (1 - load.idle) * arrivals.until)
    whole = moves.copy()
    whole[:phases] *= 1 - starts[:, None]
    whole[:phases] += np.outer(starts, np.outer(work @ onto, arrivals.share).ravel())
    state = _stationary(whole).reshape(count, phases)
    idle = state[0] * starts
    run = state.copy()
    run[0] -= idle
    begun = np.einsum("na,jaf->njf", run, right) * (left * arrivals.exit[:, None]).sum(1)
    split = max(int(np.searchsorted(nodes, load.chunk * 1.0001)), 2)
    groups = np.unique(np.r_[0, 1, np.linspace(1, split, _GROUPS + 1)[:-1].astype(int)])
    gathered, ahead = _waits(begun, grown, root, right, left, arrivals, seconds, cells, cell, split, groups)
    total = gathered.sum() + ahead.sum() + idle.sum()
    rest = _rests(begun[:split, :, 0], root[:, 0], seconds[:split], groups)
    # Backlogs on the cells: on the nodes, one that lies between two would be split.
    often = np.tensordot(run, fine, 2) + idle.sum() * work
    often = np.maximum(often, 0.0) * np.maximum(grid / load.chunk, 1.0)
    own, others = _others(load, begun, grown, root, right, left, arrivals, seconds, idle, cells)
    after = _after(load, moves, own, others, nodes, grid, phases)
    return Cycle(
        load, np.maximum(np.arange(cells) - 1, 0) * cell, rest, gathered / total, ahead / total,
        float(idle.sum() / total), np.minimum(load.seconds(grid), load.chunk + load.overhead),
        often / often.sum(), own, *after,
    )  # fmt: skip


def _nodes(load: Load, dispersion: float, count: int, cells: int) -> tuple[np.ndarray, float]:
    """Backlogs at which the chain is solved, and the width of a cell: up to eight times the mean wait of a GI/G/1 queue."""
    first, second = float(load.weight @ load.work), float(load.weight @ load.work**2)
    busy = min(load.rate * first * (1 + max(load.overhead, 0.0) / load.chunk), 0.95)
    wait = load.rate * (second + first**2 * (dispersion - 1)) / 2 / (1 - busy)
    longest = float(load.work.max())
    top = 8 * wait + 0.7 * longest + 6 * first
    least = max(float(load.work.min()) * 0.7, top / 2000)
    return np.concatenate([[0.0], np.geomspace(least, top, count - 1)]), (1.4 * top + longest) / cells


def _onto(nodes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights that split each x between its two neighbouring nodes, means kept [x, node]."""
    i = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, nodes.size - 2)
    part = np.clip((x - nodes[i]) / (nodes[i + 1] - nodes[i]), 0, 1)
    onto = np.zeros((x.size, nodes.size))
    rows = np.arange(x.size)
    onto[rows, i] = 1 - part
    onto[rows, i + 1] = part
    return onto


def _spread(nodes: np.ndarray, x: np.ndarray, law: np.ndarray) -> np.ndarray:
    """A law over cells [phase, cell] on the nodes around x [class, cell], as in `_onto`: [class, node and phase]."""
    i = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, nodes.size - 2)
    part = np.clip((x - nodes[i]) / (nodes[i + 1] - nodes[i]), 0, 1)
    place = (i + nodes.size * np.arange(len(x))[:, None]).ravel()
    onto = [
        np.bincount(place, (p * (1 - part)).ravel(), x.shape[0] * nodes.size)
        + np.bincount(place + 1, (p * part).ravel(), x.shape[0] * nodes.size)
        for p in law
    ]
    return np.array(onto).T.reshape(len(x), -1)


def _stationary(moves: np.ndarray) -> np.ndarray:
    balance = moves.T - np.eye(len(moves))
    balance[-1] = 1.0
    known = np.zeros(len(moves))
    known[-1] = 1.0
    law = np.maximum(np.linalg.solve(balance, known), 0.0)
    return np.asarray(law / law.sum())


def _waits(
    begun: np.ndarray, grown: np.ndarray, root: np.ndarray, right: np.ndarray, left: np.ndarray, arrivals: Renewal,
    seconds: np.ndarray, cells: int, cell: float, split: int, groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Laws of R + others in the gate (per group), and of the work ahead where it takes several steps.

    A request at time t of a step T: integral of e^{Gt} (arrival) e^{(G - i w)(T - t)} dt, with R = T - t.
    """
    turn = 2j * np.pi * np.fft.rfftfreq(cells, cell)
    passed = np.exp(-np.outer(seconds, turn))
    # Values between cells are split over both neighbours, and all is one cell late so that none falls below zero.
    smooth = np.sinc(turn.imag * cell / 2 / np.pi) ** 2 * np.exp(-turn * cell)
    onward, ends = (right * arrivals.share[:, None]).sum(1), left.sum(1)
    start = np.add.reduceat((begun * grown)[:split], groups, axis=0)
    law = np.zeros((groups.size, turn.size), complex)
    for k in range(len(root)):
        stop = np.add.reduceat((begun * (grown[:, k] * passed)[:, None])[:split], groups, axis=0)
        gap = root - root[k] + turn
        same = np.abs(gap) < 1e-9 * (1 + np.abs(root))
        term = (start - stop) / np.where(same, 1.0, gap)
        if same.any():
            equal = np.add.reduceat((begun * grown * seconds[:, None, None])[:split], groups, axis=0)
            term = np.where(same, equal, term)
        law += (term * (onward[k] * ends[k])).sum(1)
    gathered = np.fft.irfft(law * smooth, cells, axis=1)
    gap = root + turn
    same = np.abs(gap) < 1e-9 * (1 + np.abs(root))
    late = (begun * (grown - passed[:, None]))[split:].sum(0) / np.where(same, 1.0, gap)
    late = np.where(same, (begun * grown * seconds[:, None, None])[split:].sum(0), late)
    return gathered, np.fft.irfft(late.sum(0) * smooth, cells)


def _rests(begun: np.ndarray, root: np.ndarray, seconds: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean rest T - t of the step T that a request finds, per group: those of a burst come soon after it has begun.

    Requests come at time t with the density sum_k begun_k e^{root_k t}.
    """
    exponent = root * seconds[:, None]
    small = np.abs(exponent) < 1e-4
    r = np.where(small, 1.0, root)
    count = np.where(small, seconds[:, None] * (1 + exponent / 2), np.expm1(exponent) / r)
    rests = np.where(small, seconds[:, None] ** 2 * (0.5 + exponent / 6), (np.expm1(exponent) - exponent) / r**2)
    found, many = (np.add.reduceat((begun * x).sum(1).real, groups) for x in (rests, count))
    return np.asarray(found / np.maximum(many, 1e-300))


def _others(
    load: Load, begun: np.ndarray, grown: np.ndarray, root: np.ndarray, right: np.ndarray, left: np.ndarray,
    arrivals: Renewal, seconds: np.ndarray, idle: np.ndarray, cells: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Own work per class, and the law of the others' work in a request's gate, with the phase at its end [phase, cell]."""
    onward = (right * arrivals.share[:, None]).sum(1)
    start = (begun * grown).sum(0)
    law = np.zeros((arrivals.mu.size, root.shape[1]), complex)
    for k in range(len(root)):
        gap = root - root[k]
        same = np.abs(gap) < 1e-9 * (1 + np.abs(root))
        term = (start - (begun * grown[:, k][:, None]).sum(0)) / np.where(same, 1.0, gap)
        term = np.where(same, (begun * grown * seconds[:, None, None]).sum(0), term)
        law += (term * onward[k]).sum(0) * left[k]
    others = np.fft.irfft(law, cells, axis=1)
    others[:, 0] += idle.sum() * arrivals.share
    order = np.argsort(load.work, kind="stable")
    parts = np.split(order, np.searchsorted(np.cumsum(load.weight[order]), np.arange(1, _CLASSES) / _CLASSES))
    own = np.array([np.average(load.work[p], weights=load.weight[p]) for p in parts if p.size])
    return own, others / others.sum()


def _after(
    load: Load, moves: np.ndarray, own: np.ndarray, others: np.ndarray, nodes: np.ndarray, grid: np.ndarray, phases: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a request meets in the 2^k decode steps after its first token: P(no prefill), mean and variance of the seconds.

    A backlog of several steps is left with the chance 1/steps after each; what that chance adds to the variance is taken off
    again (`_chance`). Those behind a request in a gate of several steps, on average half of the others, come first.
    """
    tokens = np.repeat(np.maximum(nodes / load.chunk, 1.0), phases)
    time = np.repeat(load.seconds(nodes), phases) / tokens
    state = _spread(nodes, own[:, None] + grid, others) @ moves
    steps_own = np.ceil((own[:, None] + grid / 2) / load.chunk - 1e-9)
    behind = np.maximum((own[:, None] + grid) / load.chunk - steps_own, 0.0)  # steps [class, cell]
    chance = others.sum(0)
    none_behind = (behind <= 0) @ chance
    quiet, calm = moves[:phases, :phases], state[:, :phases]
    power = moves / tokens[:, None]
    power[np.diag_indices_from(power)] += 1 - 1 / tokens
    # Sums over the steps so far, given the first: seconds and their square; `weighed` = E[seconds; state after].
    sums = np.column_stack([time, time**2])
    weighed, stay = time[:, None] * power, np.eye(phases)
    full = load.chunk + load.overhead
    law = _stationary(moves)
    often = law / (law @ tokens)
    centred = often * (time - often @ (time * tokens)) ** 2
    counts = 2.0 ** np.arange(DOUBLINGS + 1)
    free, found = [], []
    for n in counts:
        free.append(calm @ stay.sum(1))
        found.append(state @ sums)
        if n == counts[-1]:
            break
        # E[(A + B)^2] = E[A^2] + E[B^2] + 2 E[A B].
        both = weighed @ sums[:, 0]
        sums = sums + power @ sums
        sums[:, 1] += 2 * both
        weighed = weighed @ power + power @ weighed
        power = power @ power
        stay = stay @ stay @ quiet
    n = counts[:, None]
    first, square = np.array(found).transpose(2, 0, 1)
    some = (behind > 0).any(0) & (chance > 0)
    slow = np.minimum(behind[:, some], n[:, :, None])  # [count, class, cell]
    held, held_square = slow @ chance[some], slow**2 @ chance[some]
    left = 1 - held / n
    varies = np.maximum(square - first**2 - _chance(tokens, n) @ centred[:, None], 0.0)
    spread = np.maximum(held_square - held**2, 0.0) * (full - first / n) ** 2
    return np.array(free) * none_behind, held * full + left * first, varies * left**2 + spread


def _chance(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """E[overlap^2] of a window of n steps with stays of geometric length, mean k, less that with stays of k steps.

    Per stay that begins in each step: 2 k^3 (n/k - 1 + e^{-n/k}) and m^2 (M - m/3), m and M the lesser and the greater of n, k.
    """
    least, most = np.minimum(n, k), np.maximum(n, k)
    return np.asarray((1 - 1 / k) * (2 * k**3 * (n / k + np.expm1(-n / k)) - least**2 * (most - least / 3)))
