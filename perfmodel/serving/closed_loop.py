"""C clients in a closed loop: each sends its next request when the last one ends. Mean TTFT and TPOT.

Mean-value analysis (Reiser and Lavenberg, J. ACM 27, 1980) of two stations: prefill, first come first served, and
decoding, whose step time depends on how many decode. A colocated instance interleaves them: each prefill makes every
decoding sequence wait, so a token takes tau(b) + (C - 1)/cycle * S * tpot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perfmodel import memory
from perfmodel.estimator import Estimator

_SWEEPS = 40
_POINTS = 12  # decode batches at which a step is evaluated


@dataclass(frozen=True)
class Loop:
    """Means over all requests, one element per row."""

    ttft: np.ndarray
    tpot: np.ndarray
    first: np.ndarray
    """TTFT of the requests sent at the start, all at once."""
    later: np.ndarray
    """TTFT of all others."""
    batch: np.ndarray
    """Mean decoding sequences."""


@dataclass(frozen=True)
class Shapes:
    """Rows: prompt and output tokens, clients, and requests per client (the start-up burst is one of them)."""

    prompt: np.ndarray
    output: np.ndarray
    clients: np.ndarray
    rounds: np.ndarray

    @property
    def context(self) -> np.ndarray:
        """Mean tokens a decoding sequence attends."""
        return self.prompt + (self.output + 1) / 2

    @property
    def steps(self) -> np.ndarray:
        """Decode steps of a request."""
        return np.maximum(self.output - 1, 1)


def colocated(e: Estimator, rows: Shapes) -> Loop:
    """Prefill and decode on one instance with chunked prefill."""
    admitted = np.minimum(rows.clients, _admissible(e, rows))
    step = _StepTable(e, rows, admitted)
    loop = _solve(e, rows, admitted, step, prompt_work(e, rows, admitted), servers=1.0, shared=True)
    # The work a prompt adds depends weakly on the batch it joins: one correction suffices.
    return _solve(e, rows, admitted, step, prompt_work(e, rows, loop.batch), servers=1.0, shared=True)


def disaggregated(
    prefill: Estimator, decode: Estimator, rows: Shapes, prefill_instances: float, decode_instances: float
) -> Loop:
    """Prompts and tokens on pools of their own; the cache moves between them before the first token."""
    share = Shapes(rows.prompt, rows.output, rows.clients / decode_instances, rows.rounds)
    admitted = np.maximum(np.minimum(share.clients, _admissible(decode, share)), 1.0)
    step = _StepTable(decode, share, admitted)
    servers = prefill_instances / decode_instances
    loop = _solve(prefill, share, admitted, step, _alone(prefill, rows), servers=servers, shared=False)
    return replace(loop, ttft=loop.ttft + _handover(prefill, rows))


def _handover(e: Estimator, rows: Shapes) -> np.ndarray:
    """Seconds to send a prompt's cache from a prefill instance, every device its share over its NIC (else its link)."""
    m = e.machine
    held = np.asarray(memory.cache_bytes(e.model, e.par, e.formats, 1, rows.prompt))
    rate = m.network * m.network_efficiency if m.network else m.link * m.link_efficiency
    return held / rate


def _admissible(e: Estimator, rows: Shapes) -> np.ndarray:
    """Requests that fit in memory at the mean context; a load test raises the engine's limit of sequences as needed.

    Where not even the weights fit by our account, all are admitted: callers that plan ask `require_fit` first, and what
    was measured did run.
    """
    if e.kv_free <= 0:
        return rows.clients
    return np.maximum(np.array([e.max_batch(float(t)) for t in rows.context]), 1)


class _StepTable:
    """Seconds of a decode step over the batch, per row, interpolated between a few batches."""

    def __init__(self, e: Estimator, rows: Shapes, most: np.ndarray) -> None:
        self.most = np.maximum(most, 2.0)
        share = np.linspace(0, 1, _POINTS)[:, None]
        self.batches = self.most**share  # [points, rows], geometric from 1
        self.seconds = np.asarray(e.decode(self.batches, rows.context + np.zeros_like(self.batches)))

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        place = np.clip(np.log(np.maximum(batch, 1.0)) / np.log(self.most), 0, 1) * (_POINTS - 1)
        low = np.minimum(place.astype(int), _POINTS - 2)
        column = np.arange(low.size)
        x0, x1 = self.batches[low, column], self.batches[low + 1, column]
        y0, y1 = self.seconds[low, column], self.seconds[low + 1, column]
        return np.asarray(y0 + (y1 - y0) * (np.clip(batch, x0, x1) - x0) / (x1 - x0))


def prompt_work(e: Estimator, rows: Shapes, batch: np.ndarray) -> np.ndarray:
    """Seconds that one prompt adds to steps that already decode `batch` sequences.

    As many prompts share a step as sequences end in one, where the budget of tokens lets them; a longer prompt is cut.
    """
    batch = np.maximum(np.asarray(batch, float), 1.0)
    budget = np.maximum(e.engine.chunk_tokens - batch, 1.0)
    together = np.clip(np.floor(np.minimum(batch / rows.output, budget / rows.prompt)), 1, None)
    row, new, done = _chunks(rows.prompt, budget)
    mixed = np.asarray(e.mixed(batch[row], rows.context[row], new, done, together[row]))
    extra = mixed - np.asarray(e.decode(batch[row], rows.context[row]))
    return np.bincount(row, np.maximum(extra, 0.0), minlength=rows.prompt.size) / together


def _alone(e: Estimator, rows: Shapes) -> np.ndarray:
    """Seconds per prompt of an instance that does nothing else, each of its ranks on one."""
    row, new, done = _chunks(rows.prompt, np.full(rows.prompt.shape, float(e.engine.chunk_tokens)))
    return np.bincount(row, np.asarray(e.prefill(e.par.dp, new, done)) / e.par.dp, minlength=rows.prompt.size)


def _chunks(prompt: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, new tokens, cached tokens) of every chunk of every row's prompt."""
    count = np.ceil(prompt / budget).astype(int)
    row = np.repeat(np.arange(prompt.size), count)
    index = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
    done = index * budget[row]
    return row, np.minimum(budget[row], prompt[row] - done), done


def _solve(
    e: Estimator,
    rows: Shapes,
    admitted: np.ndarray,
    step: _StepTable,
    work: np.ndarray,
    *,
    servers: float,
    shared: bool,
) -> Loop:
    """Fixed point of the cycle wait, prefill, decode; each client sees the others as they are on average.

    work: seconds that one prompt keeps its prefill server (shared: every decoding sequence) busy. Shared or not, a
    request's first token also waits `queue_steps` mean steps.
    """
    law = e.machine.law
    fixed = law["request_latency"] + law["request_token_latency"] * rows.prompt
    chunks = np.ceil(rows.prompt / np.maximum(e.engine.chunk_tokens - admitted, 1.0)) if shared else 0.0
    others = admitted - 1
    batch, ttft, tpot = admitted, work, step(admitted)
    for _ in range(_SWEEPS):
        tau = step(batch)
        cycle = ttft + rows.steps * tpot
        # Prompts of others that come in one step of this sequence.
        arrivals = others / cycle * tpot
        tpot = _half(tpot, tau + work * _in_turn(arrivals, e.par.dp) * shared)
        cycle = ttft + rows.steps * tpot
        new = fixed + work + chunks * tau + law["queue_steps"] * tpot * shared
        if not shared:
            busy = np.minimum(others / cycle * work / servers, 0.95)
            # Waiting as in M/D/c; a pool that cannot keep up makes the cycle as long as all its prompts.
            new = new + busy / (1 - busy) / 2 * work / servers
            new = np.maximum(new, admitted * work / servers - rows.steps * tpot)
        ttft = _half(ttft, new)
        batch = _half(batch, np.clip(admitted * rows.steps * tpot / cycle, 1, admitted))
    tau = step(batch)
    cycle = ttft + rows.steps * tpot
    # Clients beyond what is admitted wait outside for others to leave.
    outside = (rows.clients - admitted) / admitted * cycle
    first = fixed + (admitted + 1) / 2 * work / servers + tau * shared + outside / 2
    later = ttft + outside
    # Rounds in which all prompts come together: the first, and those of an engine that keeps its clients in step.
    # There, as in the last round, half the foreign prompts come before a request's own.
    apart = (1 - 1 / rows.rounds) * (1 - law["lockstep"])
    meets = (1 - 1 / rows.rounds) * (1 - law["lockstep"] / 2)
    return Loop(first * (1 - apart) + later * apart, tau + (tpot - tau) * meets, first, later, batch)


def _half(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Damping that lets the fixed point settle."""
    return 0.5 * (old + new)


def _in_turn(arrivals: np.ndarray, ranks: int) -> np.ndarray:
    """Prefill times that `arrivals` prompts of a step add to it: data-parallel ranks prefill side by side.

    One rank: each adds its own. Many ranks: at most one time, with the probability that any comes; in between the mean
    of both limits by 1/ranks.
    """
    return arrivals / ranks + (1 - 1 / ranks) * (1 - np.exp(-arrivals))
