"""Conversations and agents: a session's cache waits for its next turn, pinned for a while, then in a farther tier."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from pydantic import model_validator

from perfmodel.ops.shard import Load
from perfmodel.symbols import Num, maximum
from perfmodel.techniques.base import Quality, Request, Technique, knob


class SessionCache(Technique):
    """Every prompt is a history and a `turn` of new tokens; the history may still be cached when the turn comes.

    Pauses (think time, tool calls) are exponential with mean `pause`. A cache pinned for `ttl` seconds is still on the
    device with p = 1 - exp(-ttl / pause) and holds memory for pause x p seconds of every pause, so while n sequences run
    for `run` seconds a turn, n (1 + pause p / run) are held (Little's law): the batch shrinks (Continuum,
    arXiv:2511.02230). What is not on the device comes from the host with share `host`, layer by layer (Pensieve,
    arXiv:2312.05516), else it is computed again, after `queue` seconds for a place in the batch. Mean tokens.
    """

    kind: ClassVar[str] = "session-cache"
    reference: ClassVar[str] = "arXiv:2511.02230"
    by_layer: ClassVar[bool] = False
    quality: ClassVar[Quality] = "exact"

    turn: int = knob(0, "new tokens of a turn; the rest of the prompt is history", "token", low=0, high=10_000_000)
    device: float = knob(0.0, "share of the history still on the device, where no pause is given", low=0, high=1)
    host: float = knob(0.0, "share of what left the device that the host holds", low=0, high=1)
    pause: float = knob(0.0, "mean seconds between a turn and the next; 0: `device` says what is found", "s", low=0, high=1e7)
    ttl: float = knob(0.0, "seconds a cache stays pinned after a turn", "s", low=0, high=1e7)
    run: float = knob(0.0, "mean seconds a turn runs", "s", low=0, high=1e6)
    queue: float = knob(0.0, "seconds a turn waits for a place where its cache was dropped", "s", low=0, high=1e6)
    ahead: bool = knob(True, "history is fetched layer by layer beside the pass; false: every layer waits for its own")
    page: float = knob(0.0, "bytes of one piece fetched; 0: a layer at once", "byte", low=0, high=1e12)

    @model_validator(mode="after")
    def _consistent(self) -> SessionCache:
        if self.pause and self.device:
            raise ValueError("device follows from pause and ttl; give one or the other")
        if self.ttl and not (self.pause and self.run):
            raise ValueError("ttl needs the mean pause and the mean run of a turn: give pause and run")
        if (self.device or self.host or self.ttl) and not self.turn:
            raise ValueError("history is what a prompt has beyond its turn: give turn")
        return self

    @property
    def returns(self) -> float:
        """Probability that the history is still on the device."""
        return -math.expm1(-self.ttl / self.pause) if self.pause else self.device

    @property
    def pinned(self) -> float:
        """Paused sequences held on the device per running one."""
        return self.pause * self.returns / self.run if self.ttl else 0.0

    def held(self, sequences: Num) -> Num:
        return sequences * (1 + self.pinned)

    def request(self, request: Request) -> Request:
        if not self.turn:
            return request
        history = maximum(request.new - self.turn, 0)
        here, there = history * self.returns, history * (1 - self.returns) * self.host
        loads = (Load(there, "host", page=self.page, ahead=self.ahead),) if self.host and self.returns < 1 else ()
        return replace(
            request, new=request.new - here - there, cached=request.cached + here + there, loads=(*request.loads, *loads),
            wait=request.wait + self.queue * (1 - self.returns),
        )  # fmt: skip
