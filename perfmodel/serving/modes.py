"""How prefill and decode share a device: one clock for each batch policy, with the interface of StepClock.

`policy_clock` gives the step times, `policy_instance` what answers for percentiles.
chunked: prompts in chunks beside decode steps (Sarathi-Serve, arXiv:2403.02310).
whole: whole prompts between decode steps, prompts first (vLLM before chunked prefill, arXiv:2309.06180).
layered: whole prompts, one group of layers a step (arXiv:2510.08055).
static: batches that start and end together; split: compute units divided between the phases. These two are queues of
their own kind, in static_batch and split.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.layered import LayeredClock, replace_engine
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.split import Sides, SplitClock, SplitInstance
from perfmodel.serving.static_batch import StaticInstance
from perfmodel.spec.deployment import Policy


class WholeClock(StepClock):
    """Whole prompts run in steps of their own while decoding waits."""

    def step(self, batch: int, total_context: float, chunks: list[tuple[float, float]]) -> float:
        """Seconds of a pass over the prompts and the decode step after it: sequences get one token from both together."""
        if not chunks:
            return self.decode(batch, total_context)
        return self.prompt_pass(chunks) + self.decode(batch, total_context)

    def prompt_pass(self, chunks: list[tuple[float, float]]) -> float:
        """Seconds of a pass that only prefills; its prompts have their first tokens at its end."""
        return super().step(0, 0.0, chunks)

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds by which a pass of its own for each input holds up everything else, whatever decodes."""
        longest = float(np.max(inputs - cached, initial=0.0))
        if longest > self.chunk:
            raise SpecError(
                f"a prompt of {longest:,.0f} tokens does not fit a step of {self.chunk:,} tokens, and the policy "
                "'whole' does not cut prompts; raise chunk, or take 'chunked'"
            )
        return super().prefill_work(inputs, 0.0, 0.0, cached)


class WholeInstance(Instance):
    """An instance whose prompts take steps of their own: a first token comes at the pass's end, not after a decode step."""

    def ttft_met(self, limit: float | np.ndarray, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """As Instance.ttft_met, less the decode step in a request's own step, and in the one before if that prefills too."""
        carried = s.pure_step * (1 + s.utilisation) if s.batch >= 1 else 0.0
        return super().ttft_met(limit + carried, s, mix, dispersion)


def policy_clock(
    e: Estimator, context: float, policy: str = "chunked", *, chunk: int = 0, max_batch: int = 0, longest: float = 0.0,
    prefill_share: float = 0.5, lanes: int = 1,
) -> StepClock:  # fmt: skip
    """Step times of an estimator under a batch policy.

    context: typical tokens per sequence. chunk, max_batch: tokens and sequences of a step; 0: the engine's defaults.
    longest: longest prompt [token], for policies that do not cut prompts; 0: the model's longest context. prefill_share: of
    the compute units under `split`. lanes: of a full pipeline (see StepClock), for `chunked` and `whole`. `static` has the
    step times of any engine: what it collects and pads is the business of the instance. Raises SpecError for an unknown
    policy, and where `longest` is needed and nothing says it.
    """
    if policy not in get_args(Policy):
        raise SpecError(f"unknown batch policy {policy!r}{did_you_mean(policy, get_args(Policy))}")
    limits = {"chunk_tokens": chunk, "max_sequences": max_batch}
    e = replace_engine(e, **{k: v for k, v in limits.items() if v})
    if policy == "layered":
        return LayeredClock(e, context, _longest(e, longest))
    if policy == "whole":
        # An engine that does not cut prompts sizes its step for the longest.
        return WholeClock(e if chunk else replace_engine(e, chunk_tokens=int(_longest(e, longest))), context, lanes)
    if policy == "split":
        return SplitClock(Sides(e, context, prefill_share))
    return StepClock(e, context, lanes)


AnyInstance = Instance | StaticInstance | SplitInstance
"""Each has state(rate, mix), ttft_met, tpot_met, ttft_quantile and tpot_quantile, which take that state."""


def policy_instance(
    e: Estimator, mix: Mix, kv_tokens: float, policy: str = "chunked", *, role: str = "colocated", handoff: float = 0.0,
    chunk: int = 0, max_batch: int = 0, longest: float = 0.0, prefill_share: float = 0.5, max_wait: float = 0.0,
    pads: bool = True, lanes: int = 1, alone: float = 0.0,
) -> AnyInstance:  # fmt: skip
    """One serving instance under a batch policy, with its percentiles in closed form.

    As `policy_clock`; kv_tokens: cached tokens that fit. handoff: seconds per input token, for the role decode. max_wait [s]
    and pads: of `static` (see static_batch.StaticInstance). alone: of `split` (see split.Sides).
    """
    longest = longest or float(np.max(mix.input))
    limits = {"chunk_tokens": chunk, "max_sequences": max_batch}
    if policy == "split":
        limited = replace_engine(e, **{k: v for k, v in limits.items() if v})
        return SplitInstance(Sides(limited, mix.context, prefill_share, alone), kv_tokens)
    clock = policy_clock(e, mix.context, policy, chunk=chunk, max_batch=max_batch, longest=longest, lanes=lanes)
    if policy == "static":
        return StaticInstance(clock, kv_tokens, clock.max_batch, max_wait, pads)
    return (WholeInstance if policy == "whole" else Instance)(clock, role, kv_tokens, handoff)


def _longest(e: Estimator, longest: float) -> float:
    if longest <= 0 and not e.model.max_positions:
        raise SpecError(f"{e.model.name} states no longest context: say how long prompts get (longest)")
    return max(longest or e.model.max_positions, e.engine.chunk_tokens)


def stall(clock: StepClock, inputs: np.ndarray, batch: float, total_context: float) -> np.ndarray:
    """Longest time by which prefilling each input delays one token of those that decode [input].

    chunked: its dearest chunk, which is the last whole one; whole: the pass; layered: one group of layers.
    """
    if isinstance(clock, WholeClock):
        return clock.prefill_work(inputs, batch, total_context)
    if isinstance(clock, LayeredClock):
        return clock.prefill_work(inputs, batch, total_context) / clock.iterations(inputs, batch)
    room = max(clock.chunk - batch, 1.0)
    q = np.minimum(inputs, room)
    done = np.maximum(np.floor(inputs / room) - 1, 0) * room
    b = max(round(batch), 1)
    steps = [clock.step(b, total_context, [(float(x), float(c))]) for x, c in zip(q, done, strict=True)]
    return np.array(steps) - clock.decode(b, total_context)
