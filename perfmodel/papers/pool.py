"""One pool of a setting under Poisson arrivals: what is found of it once serves every limit and every rate asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from perfmodel import calibration
from perfmodel.errors import Infeasible
from perfmodel.papers.setting import Resolved, estimator
from perfmodel.serving import goodput as goals_of
from perfmodel.serving.clock import kv_tokens
from perfmodel.serving.modes import policy_instance
from perfmodel.serving.queueing import Mix

_HALVINGS = 8
_DOWN = 4.0  # steps by which a bracket goes down
_IDLE = 1e-5  # requests/s of an instance that is idle
_BESIDE = 4.0
_LEAST = 1e-4
_ASKED = ("rate", "ttft", "tpot", "gap", "gaps", "attainment", "batch", "prompts", "steps", "per_token", "instances", "burst",
          "requests", "longest", "tick", "overtaken", "fetch", "migration", "spare", "draw")  # fmt: skip
"""Values that ask something of a pool and do not change it."""


class Pool:
    """An instance and the requests it sees. fill: seconds of each first token while a pipeline fills [request]."""

    def __init__(self, instance: Any, mix: Mix, fill: np.ndarray) -> None:
        self.instance, self.mix, self.fill = instance, mix, fill
        self._states: dict[float, Any] = {}

    def state(self, rate: float) -> Any:
        """Steady state at a rate [1/s]."""
        if rate not in self._states:
            self._states[rate] = self.instance.state(rate, self.mix)
        return self._states[rate]

    @cached_property
    def _most(self) -> float:
        """A rate that is not stable: a few times what prefill alone would carry, since prompts beside decoding cost less."""
        work = self.mix.mean(np.asarray(self.state(_IDLE).work))
        return _BESIDE / work if work > 0 else 1 / _IDLE

    def highest(self, holds: Callable[[Any], bool]) -> float:
        """Highest rate whose state is stable and `holds`; 0 where none does."""

        def able(rate: float) -> bool:
            s = self.state(rate)
            return bool(s.feasible) and holds(s)

        high = self._most
        while high > _IDLE and not self.state(high / _DOWN).feasible:
            high /= _DOWN
        low, least = high / _DOWN, high * _LEAST
        while not able(low):
            high, low = low, low / _DOWN
            if low < least:
                return 0.0
        return bisected(able, low, high)

    def met(self, rate: float, goals: goals_of.Goals) -> float:
        """Share of the requests that meet both limits at a rate; Infeasible where it is not stable."""
        s = self.state(rate)
        if not s.feasible:
            raise Infeasible(f"{rate:g} requests/s: {s.reason}", binding=(s.reason,))
        return goals_of.attainment(self.instance, s, self.mix, goals, outside=self.fill)

    def capacity(self, goals: goals_of.Goals) -> float:
        """Highest rate at which the goals' share of the requests meets both limits."""
        return self.highest(lambda s: self.met(s.rate, goals) >= goals.share)


def bisected(holds: Callable[[float], bool], low: float, high: float, times: int = _HALVINGS) -> float:
    """Highest rate that holds between one that does and one that does not, on the logarithm."""
    for _ in range(times):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def fills(policy: str, role: str) -> bool:
    """Whether prefill keeps the stages of a pipeline full: chunks of like length do, and prompts one after the other where
    none decodes; whole prompts between decode steps leave the other stages idle (Sarathi-Serve, arXiv:2403.02310, section 3)."""
    return policy == "chunked" or role == "prefill"


def held(setting: Resolved, context: float) -> float:
    """Tokens that an instance caches: what memory holds, or what its engine was told if that is less."""
    fits = kv_tokens(estimator(setting), context)
    told = float(setting.values["cache"])
    return min(fits, told) if told else fits


_pools: dict[tuple[str, str, float, bytes], Pool] = {}
_MOST_POOLS = 64


def pool(setting: Resolved, role: str, mix: Mix, handoff: float = 0.0) -> Pool:
    """The pool of a setting in a role; settings that differ only in limits or rates share one."""
    values = {k: v for k, v in setting.values.items() if k not in _ASKED}
    lengths = np.stack([mix.input, mix.output, mix.weight, np.zeros(mix.input.shape) if mix.cached is None else mix.cached])
    key = (replace(setting, values=values, roles={}, devices=0.0, classes=(), routing="").key, role, handoff, lengths.tobytes())
    if key not in _pools:
        if len(_pools) >= _MOST_POOLS:
            _pools.pop(next(iter(_pools)))
        e = estimator(setting)
        e.require_fit()
        lanes = int(e.par.pp) if fills(setting.policy, role) else 1
        instance = policy_instance(
            e, mix, held(setting, mix.context), setting.policy, role=role, max_batch=int(values["largest"]),
            chunk=int(values["chunk"]), handoff=handoff, prefill_share=float(values["prefill_share"]), lanes=lanes,
            alone=float(values["alone_share"]),
        )  # fmt: skip
        fill = np.zeros(mix.input.shape)
        if lanes > 1:
            last = np.minimum(mix.new, instance.clock.chunk / instance.clock.ranks)
            fill = np.asarray(e.prefill_pass(1.0, last)) * (1 - 1 / lanes)
        _pools[key] = Pool(instance, mix, fill)
    return _pools[key]


calibration.on_change(_pools.clear)
