"""Step times of one instance as small tables, so that closed forms and the simulation share one clock.

A step with b decoding sequences of total context X and prefill chunks (q_i, c_i) takes
    host(b) + tokenwise(b + sum q) + attention_decode(b, X) + sum attention_prefill(q_i, c_i)
where the token-wise part is tabulated over tokens, decode attention is affine in X for each b, and prefill
attention is interpolated over (q, c).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal

import numpy as np

from perfmodel import memory, roofline
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group

_KNOTS = 12  # numbers of tokens at which the time of a step is found


class StepClock:
    """Tabulated step times of an Estimator. `context`: typical tokens per sequence, where the tables are fitted.

    lanes: micro-batches of prefill under way at once in a pipeline that they keep full, each with a token budget of its own; a
    step is then one pass of them all, and the first of a prompt's passes takes as much longer as the stages take to fill.
    only: the phase whose tables are needed, where the clock never sees the other.
    """

    def __init__(
        self, estimator: Estimator, context: float, lanes: int = 1, only: Literal["prefill", "decode", ""] = ""
    ) -> None:
        self.estimator = estimator
        engine = estimator.engine
        self._host_base = float(estimator.host_seconds(0))
        self._host_each = float(estimator.host_seconds(1)) - self._host_base
        # Each data-parallel rank schedules for itself; the tables are those of ranks that have equal shares.
        self.ranks = int(estimator.par.dp) * lanes
        self.chunk = engine.chunk_tokens * self.ranks
        self.max_batch = engine.max_sequences * self.ranks
        self._slope: np.ndarray = np.zeros(self.max_batch + 1)
        self._decode: np.ndarray = np.zeros(self.max_batch + 1)
        if only != "prefill":
            self._tabulate_decode(context)
        self._tokens = np.unique(np.geomspace(1, 2 * self.chunk + self.max_batch, 160).round())
        self._grid_q = np.unique(np.geomspace(1, 2 * self.chunk, 24).round())
        self._grid_c = np.concatenate([[0.0], np.geomspace(256, max(65536.0, 4 * context), 9)])
        self._tokenwise: np.ndarray = np.zeros(self._tokens.size)
        self._attention: np.ndarray = np.zeros((self._grid_q.size, self._grid_c.size))
        if only != "decode":
            self._tabulate_prefill()
        self._floor = float(self._attention[0, 0])
        self._q_list, self._c_list = self._grid_q.tolist(), self._grid_c.tolist()
        self._attention_list = self._attention.tolist()
        self._token_list = self._tokens.tolist()
        self._wise_list = self._tokenwise.tolist()
        self.decode_base: list[Any] = self._decode.tolist()
        self.decode_slope: list[Any] = self._slope.tolist()

    def _tabulate_decode(self, context: float) -> None:
        b = np.arange(1, self.max_batch + 1, dtype=float)
        # decode() with one attended token has almost no attention: token-wise part, host and fixed latencies.
        low, high = max(16.0, context / 2), max(64.0, context * 2)
        # Together, so that what does not depend on the context is found once.
        at_low, at_high = np.asarray(self.estimator.decode(b, np.array([[low], [high]])))
        self._slope = np.concatenate([[0.0], (at_high - at_low) / (b * (high - low))])
        self._decode = np.concatenate([[0.0], at_low - self._slope[1:] * b * low])

    def _tabulate_prefill(self) -> None:
        of_rank = np.maximum(self._tokens / self.ranks, 1.0)
        self._tokenwise = self._evaluate(of_rank, 0.0, contextual=False)
        self._tokenwise = self._tokenwise + self._launch_floor(of_rank, self._tokenwise)
        q, c = np.meshgrid(self._grid_q, self._grid_c, indexing="ij")
        self._attention = self._evaluate(q.ravel(), c.ravel(), contextual=True).reshape(q.shape) / self.ranks

    def _evaluate(self, q: np.ndarray, c: np.ndarray | float, *, contextual: bool) -> np.ndarray:
        e = self.estimator
        schedule = e.lower(Phase((Group(1.0, q, c),))).schedule
        if contextual and e.techniques:
            # Layers with branches side by side are costed whole: what exceeds the context-free part is the context's.
            free = roofline.cost(schedule, e.machine, contextual=False).seconds
            seconds = roofline.cost(schedule, e.machine).seconds - free
        else:
            seconds = roofline.cost(schedule, e.machine, contextual=contextual).seconds
        return np.broadcast_to(np.asarray(seconds, float), q.shape).copy()

    def _launch_floor(self, tokens: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Time that launching one by one adds beyond the device's: zero for long steps, which hide it. `free`: their seconds
        that depend on no context."""
        e = self.estimator
        whole = np.asarray(e.prefill_pass(1, tokens))
        device = free + self._evaluate(tokens, 0.0, contextual=True)
        return np.maximum(whole - device - self.host(1), 0.0)

    def host(self, sequences: float) -> float:
        """Host seconds of a step that the device waits for."""
        return self._host_base + self._host_each * sequences

    def decode(self, batch: float, total_context: float) -> float:
        """Step of `batch` sequences that attend `total_context` tokens together; batch may be fractional."""
        if batch <= 0:
            return 0.0
        i = min(int(batch), self.max_batch)
        if i == batch or i == self.max_batch:
            return self.decode_base[i] + self.decode_slope[i] * total_context
        low = self.decode_base[max(i, 1)] + self.decode_slope[max(i, 1)] * total_context
        high = self.decode_base[i + 1] + self.decode_slope[i + 1] * total_context
        return low + (batch - i) * (high - low) if i else high

    def tokenwise(self, tokens: float) -> float:
        """Linear layers, norms, collectives of a step of `tokens` new tokens."""
        i = bisect_right(self._token_list, tokens)
        if i == 0:
            return self._wise_list[0]
        if i == len(self._token_list):
            return self._wise_list[-1] * tokens / self._token_list[-1]
        x0, x1 = self._token_list[i - 1], self._token_list[i]
        y0, y1 = self._wise_list[i - 1], self._wise_list[i]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def attention(self, q: float, c: float) -> float:
        """Prefill attention of one chunk beyond its fixed latency: `attention_array` of one, without its overhead."""
        i = min(max(bisect_right(self._q_list, q) - 1, 0), len(self._q_list) - 2)
        j = min(max(bisect_right(self._c_list, c) - 1, 0), len(self._c_list) - 2)
        u = (q - self._q_list[i]) / (self._q_list[i + 1] - self._q_list[i])
        v = (c - self._c_list[j]) / (self._c_list[j + 1] - self._c_list[j])
        a, b = self._attention_list[i], self._attention_list[i + 1]
        return (a[j] * (1 - u) + b[j] * u) * (1 - v) + (a[j + 1] * (1 - u) + b[j + 1] * u) * v - self._floor

    def attention_array(self, q: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Bilinear look-up over (new tokens, cached tokens), fixed latency left out."""
        # Places of all points but the ends, so that none lies outside.
        i = np.searchsorted(self._grid_q[1:-1], q, side="right")
        j = np.searchsorted(self._grid_c[1:-1], c, side="right")
        u = (q - self._grid_q[i]) / (self._grid_q[i + 1] - self._grid_q[i])
        v = (c - self._grid_c[j]) / (self._grid_c[j + 1] - self._grid_c[j])
        a = self._attention
        low = a[i, j] * (1 - u) + a[i + 1, j] * u
        high = a[i, j + 1] * (1 - u) + a[i + 1, j + 1] * u
        return low * (1 - v) + high * v - self._floor

    def step(self, batch: int, total_context: float, chunks: list[tuple[float, float]]) -> float:
        """Seconds of one step: `batch` decoding sequences and prefill chunks of (new tokens, cached tokens)."""
        if not chunks:
            return self.decode(batch, total_context)
        new = sum(q for q, _ in chunks)
        seconds = self.host(batch + len(chunks)) + self.tokenwise(batch + new) + self._floor
        seconds += sum(self.attention(q, c) for q, c in chunks)
        return seconds + (self.decode_slope[batch] * total_context if batch else 0.0)

    def prefill_line(self, batch: int, tokens: float) -> tuple[np.ndarray, float, np.ndarray]:
        """A step's seconds over the tokens it prefills, attention aside: a straight line from `tokens` to a full budget.

        Returns knots [token], what the line has at no tokens beyond a decode step of `batch` sequences [s], and what a step of
        so many tokens departs from the line [s].
        """
        room = max(self.chunk - batch, 1.0)
        knots = np.concatenate([[tokens], np.geomspace(1, room, _KNOTS)])
        seconds = np.array([self.step(batch, 0.0, [(float(n), 0.0)]) - self.attention(float(n), 0.0) for n in knots])
        each = (seconds[-1] - seconds[0]) / max(room - tokens, 1.0)
        bend = seconds[1:] - seconds[0] - each * (knots[1:] - tokens)
        return knots[1:], float(seconds[0] - each * tokens) - (self.decode(batch, 0.0) if batch else 0.0), bend

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds that prefilling each input adds to steps which already decode `batch` sequences.

        Long inputs take several chunks; each chunk's step would otherwise have been a decode step, as far as one runs.
        `cached` tokens of the input are in the prefix cache: they are attended, not computed.
        """
        room = max(self.chunk - batch, 1.0)
        first = np.zeros(inputs.shape) + cached
        count = np.maximum(np.ceil((inputs - first) / room - 1e-9), 0).astype(int)
        of = np.repeat(np.arange(inputs.size), count)
        held = first[of] + (np.arange(of.size) - (np.cumsum(count) - count)[of]) * room
        q = np.minimum(inputs[of] - held, room)
        saved = (self.decode(batch, total_context) - self._attention_share(batch, total_context)) * min(batch, 1.0)
        wise = np.interp(batch + q, self._tokens, self._tokenwise) + self._floor + self.host(batch + 1)
        each = np.maximum(wise + self.attention_array(q, held) - saved, 1e-6)
        return np.bincount(of, each, inputs.size)

    def _attention_share(self, batch: float, total_context: float) -> float:
        return self.decode_slope[min(max(int(batch), 0), self.max_batch)] * total_context


def kv_tokens(e: Estimator, context: float) -> float:
    """Cached tokens an instance holds over its data-parallel ranks, at a typical context (windows and states included)."""
    per_token = float(memory.cache_bytes(e.model, e.par, e.formats, 1, context, e.engine.block_tokens)) / context
    return e.kv_free / per_token * float(e.par.dp)
