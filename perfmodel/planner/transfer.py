"""The hand-off of caches between the pools of a plan, as the closed forms and the simulation take it."""

from __future__ import annotations

import math

from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.handoff import handoff
from perfmodel.serving.queueing import Mix
from perfmodel.serving.replay import Handoff
from perfmodel.serving.replay.deploy import link


def exposed_per_token(e: Estimator, clock: StepClock, mix: Mix) -> float:
    """Seconds per input token from the end of prefill to the first decode step, with a partner built the same way.

    The line through the origin that a mix's mean lies on; infinite without a network.
    """
    if not e.machine.network:
        return math.inf
    moved = handoff(e, e, mix.input, clock.prefill_work(mix.input, 0.0, 0.0))
    return mix.mean(moved.exposed_s) / mix.mean(mix.input)


def slowest_link(prefill: Estimator, decoders: list[Estimator], mix: Mix) -> Handoff:
    """The prefill side's link as the simulation shares it, to the decode pool that takes longest."""
    tokens = mix.mean(mix.input)
    return max((link(prefill, d, tokens) for d in decoders), key=lambda h: h.seconds_per_token)
