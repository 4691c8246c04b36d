"""Power of a device at work: idle, running, plus shares for its matrix units and its memory, capped at the board limit."""

from __future__ import annotations

from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, Program
from perfmodel.kernels.elsewhere import work_joules
from perfmodel.ops.shard import Group
from perfmodel.roofline import cost as schedule_cost
from perfmodel.schedule import operators


def device_power(e: Estimator, busy_compute: float, busy_memory: float) -> float | None:
    """Watts of one running device; None without a TDP.

    P = TDP min(1, idle + active + compute busy_compute + memory busy_memory). busy_*: mean share of the datasheet rate
    that is demanded (0..1). At the limit the clock drops until P equals it.

    >>> device_power(Estimator("llama-2-70b", "a100-sxm-80gb", tp=4), 1.0, 0.5)  # far beyond the limit of 400 W
    400.0
    """
    if not e.machine.tdp:
        return None
    law = e.machine.law
    running = law["power_idle"] + law["power_active"]
    load = running + law["power_compute"] * busy_compute + law["power_memory"] * busy_memory
    return float(e.machine.tdp * min(1.0, load))


def demand_shares(
    e: Estimator, prefill_tokens_per_s: float, context: float, steps_per_s: float, batch: float
) -> tuple[float, float]:
    """Mean shares of the peak compute and memory rates that a mix of prefill and decode demands of one device."""
    compute = memory = 0.0
    if prefill_tokens_per_s > 0:
        tokens = float(e.engine.chunk_tokens)
        seconds = tokens / prefill_tokens_per_s
        compute, memory = step_shares(e, Phase((Group(1.0, tokens, 0.0),)), seconds)
    if steps_per_s > 0 and batch >= 1:
        step = step_shares(e, Phase((Group(batch, 1.0, context, decode=True),)), 1 / steps_per_s)
        compute, memory = compute + step[0], memory + step[1]
    return min(compute, 1.0), min(memory, 1.0)


def step_shares(e: Estimator, phase: Phase, seconds: float) -> tuple[float, float]:
    """Shares of the peak compute and memory rates that one forward pass demands of one device in `seconds`."""
    return _shares(e, e.lower(phase), seconds)


def _shares(e: Estimator, program: Program, seconds: float) -> tuple[float, float]:
    peak = schedule_cost(program.schedule, e.machine).peak
    return float(peak["compute"]) / seconds, float(peak["hbm"]) / seconds


def pass_power(e: Estimator, program: Program, seconds: float) -> float | None:
    """Watts of one device during a pass that takes `seconds`; None without a TDP.

    Clocks, caps and what a technique takes out of the pass enter through the machine's power law and the demands.
    """
    return device_power(e, *_shares(e, program, seconds))


def program_energy(e: Estimator, program: Program, seconds: float) -> float | None:
    """Joules of a lowered pass of `seconds` on all devices of an instance; None without a TDP.

    Power x time of the devices, and what memories that compute draw beside them.
    """
    watts = pass_power(e, program, seconds)
    beside = sum(float(times * work_joules(op, e.machine)) for op, times, _ in operators(program.schedule))
    return None if watts is None else (watts * seconds + beside) * float(e.par.devices)


def pass_energy(e: Estimator, phase: Phase, seconds: float) -> float | None:
    """Joules of one forward pass of `seconds` on all devices of an instance; None without a TDP."""
    return program_energy(e, e.lower(phase), seconds)


def decode_energy(e: Estimator, batch: float, context: float) -> float | None:
    """Joules per generated token of `batch` sequences that attend `context` tokens each [J/token]."""
    emitted = float(e.round(batch).tokens) if e.techniques else 1.0
    seconds = float(e.decode(batch, context)) * emitted
    joules = pass_energy(e, Phase((Group(batch, 1, context - 1, decode=True),)), seconds)
    return None if joules is None else joules / (batch * emitted)
