"""What a server will hold, how many requests at once, and what stops one more."""

from __future__ import annotations

import math

from perfmodel.lint.finding import Fit
from perfmodel.lint.server import Server

_FLAT = 1.1  # below this gain of tokens/s from twice the batch, another sequence buys nothing: compute binds


def fit(s: Server) -> Fit:
    """Bytes per device, tokens of cache, concurrency and the binding resource."""
    active, outside, captured = s.reserved
    at_context = s.concurrency(s.context)
    at_lengths = s.concurrency(sum(s.lengths)) if s.lengths else None
    limit = s.sequences * s.ranks
    binding, why = _binding(s, at_lengths if at_lengths is not None else at_context, limit)
    return Fit(
        devices=s.devices, device=s.device.name, weights=s.weights, activations=active, overhead=outside,
        graphs=captured, kv_pool=s.pool, visible=s.instance.total, kv_tokens=s.kv_tokens, ranks=s.ranks, context=s.context,
        concurrency_at_context=at_context, lengths=s.lengths, concurrency_at_lengths=at_lengths, limit_sequences=limit,
        step_tokens=s.step_tokens, binding=binding, binding_why=why,
    )  # fmt: skip


def _binding(s: Server, memory: float, limit: int) -> tuple[str, str]:
    tokens = sum(s.lengths) if s.lengths else s.context
    what = f"sequences of {tokens:,} tokens"
    if s.pool <= 0:
        return "memory", "the weights leave no room for a cache"
    held = min(memory, limit)
    if memory < limit:
        return "memory", f"the cache holds {memory:,.1f} {what}, the scheduler would run {limit:,}"
    gain = throughput(s, 2 * held) / throughput(s, held) if held >= 1 else 2.0
    if gain < _FLAT:
        return "compute", f"at {limit:,} sequences twice as many would give only {gain - 1:.0%} more tokens/s"
    return "scheduler", f"the scheduler runs {limit:,} at most, the cache would hold {memory:,.0f} {what}"


def throughput(s: Server, batch: float) -> float:
    """Decoded tokens per second of all replicas with `batch` sequences at half of the workload's (or context's) length."""
    each = max(batch / s.replicas, 1.0)
    seen = s.lengths[0] + s.lengths[1] / 2 if s.lengths else s.context / 2
    return each / float(s.estimator.decode(each, max(math.floor(seen), 1))) * s.replicas
