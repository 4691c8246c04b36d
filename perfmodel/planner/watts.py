"""Watts of one instance at an operating point."""

from __future__ import annotations

from perfmodel.cost import demand_shares, device_power
from perfmodel.estimator import Estimator
from perfmodel.serving.encode import EncodeClock
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.static_batch import StaticState


def instance_power(e: Estimator, instance: Instance, s: State | StaticState, mix: Mix) -> float | None:
    """Watts of all devices of an instance in a steady state; None where a device's power is unknown."""
    compute, hbm = _shares(e, instance, s, mix)
    tower = instance.clock if instance.role == "encode" else getattr(instance, "encoder", None)
    if isinstance(tower, EncodeClock) and mix.images is not None:
        # Its images are counted for one device of an instance, which shares them.
        more = tower.shares(s.rate * mix.mean(mix.images))
        compute, hbm = min(compute + more[0], 1.0), min(hbm + more[1], 1.0)
    one = device_power(e, compute, hbm)
    return one * int(e.par.devices) if one is not None else None


def _shares(e: Estimator, instance: Instance, s: State | StaticState, mix: Mix) -> tuple[float, float]:
    """Mean shares of the peak compute and memory rates that the language model demands of one device."""
    role = instance.role
    if role == "encode":
        return 0.0, 0.0
    if isinstance(s, StaticState):
        steps = (s.busy - s.utilisation) / s.step if s.step else 0.0
        return demand_shares(e, s.rate * s.prompt, mix.context, steps, s.mean_batch)
    tokens = s.rate * mix.mean(mix.input) if role != "decode" else 0.0
    steps = 1 / s.step if role != "prefill" and s.step > 0 and s.batch > 0 else 0.0
    return demand_shares(e, tokens, mix.context, steps, max(s.batch, 1.0))
