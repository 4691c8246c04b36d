"""Power of a device at work: idle, plus shares for its matrix units and its memory, capped at the board limit."""

from __future__ import annotations

from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.roofline import cost as schedule_cost


def device_power(e: Estimator, busy_compute: float, busy_memory: float) -> float | None:
    """Watts of one device: P = TDP min(1, idle + compute share x demand + memory share x demand); None without a TDP.

    busy_*: mean share of the datasheet rate that is demanded (0..1).
    """
    if not e.machine.tdp:
        return None
    law = e.machine.law
    load = law["power_idle"] + law["power_compute"] * busy_compute + law["power_memory"] * busy_memory
    return float(e.machine.tdp * min(1.0, load))


def demand_shares(
    e: Estimator, prefill_tokens_per_s: float, context: float, steps_per_s: float, batch: float
) -> tuple[float, float]:
    """Mean shares of the peak compute and memory rates that a mix of prefill and decode demands of one device."""
    compute = memory = 0.0
    if prefill_tokens_per_s > 0:
        tokens = float(e.engine.chunk_tokens)
        peak = schedule_cost(e.lower(Phase((Group(1.0, tokens, 0.0),))).schedule, e.machine).peak
        compute += float(peak["compute"]) / tokens * prefill_tokens_per_s
        memory += float(peak["hbm"]) / tokens * prefill_tokens_per_s
    if steps_per_s > 0 and batch >= 1:
        peak = schedule_cost(e.lower(Phase((Group(batch, 1.0, context, decode=True),))).schedule, e.machine).peak
        compute += float(peak["compute"]) * steps_per_s
        memory += float(peak["hbm"]) * steps_per_s
    return min(compute, 1.0), min(memory, 1.0)
