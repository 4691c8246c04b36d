"""Which devices serve a setting's requests at least cost, when there are several types to choose from."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from perfmodel import calibration
from perfmodel.errors import Infeasible, SpecError
from perfmodel.papers.setting import Resolved, estimator
from perfmodel.serving.queueing import Mix

_BATCHES = np.array([1.0, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256])


class Fleet:
    """One instance per device; every kind of request has the rate a device of each type reaches within the TPOT limit."""

    def __init__(self, setting: Resolved, mix: Mix, rate: float) -> None:
        if not setting.fleet:
            raise SpecError("the setting names no `fleet` to choose from")
        if rate <= 0:
            raise SpecError("a fleet serves a `rate` of requests [1/s]: give one")
        self.setting, self.mix, self.rate = setting, mix, rate
        self.prices = np.array([price for _, price in setting.fleet])

    @cached_property
    def load(self) -> np.ndarray:
        """Devices that each kind of request keeps busy [type, kind]; infinite beyond a limit."""
        most = np.array([_most(replace(self.setting, hardware=device), self.mix) for device, _ in self.setting.fleet])
        with np.errstate(divide="ignore"):
            return self.rate * self.mix.weight / most

    @cached_property
    def cost(self) -> float:
        """USD/h of the cheapest mix of types."""
        from perfmodel.planner.mix import cheapest

        return cheapest(self.prices, self.load)[0]

    @cached_property
    def singles(self) -> np.ndarray:
        """USD/h of each type that can serve everything alone."""
        devices = np.ceil(self.load.sum(axis=1) - 1e-9)
        able = np.isfinite(devices)
        if not able.any():
            raise Infeasible("no single type serves every request within the limits", binding=("latency",))
        return np.asarray(self.prices[able] * devices[able])


_found: dict[tuple[str, bytes], np.ndarray] = {}
_MOST_FOUND = 512


def _most(setting: Resolved, mix: Mix) -> np.ndarray:
    """Requests/s of each kind that one device serves within the limits [kind]; 0 where it cannot.

    With b sequences at work TPOT = step(b) + b prefill / output, and b / (output TPOT) requests a second leave it.
    """
    key = replace(setting, values={**setting.values, "rate": 0.0}).key, np.stack([mix.input, mix.output]).tobytes()
    if key not in _found:
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[key] = _served(setting, mix)
    return _found[key]


def _served(setting: Resolved, mix: Mix) -> np.ndarray:
    e = estimator(setting)
    if e.kv_free <= 0:
        return np.zeros(mix.input.shape)
    limit, first = float(setting.values["tpot"]) or np.inf, float(setting.values["ttft"]) or np.inf
    batch = _BATCHES[np.less_equal(_BATCHES, float(setting.values["largest"] or e.engine.max_sequences))][:, None]
    room = np.array([float(e.max_batch(float(t))) for t in mix.input + mix.output])
    prefill = np.asarray(e.prefill(1.0, mix.input))
    tpot = np.asarray(e.decode(batch, mix.contexts)) + batch * prefill / mix.output
    fits = (tpot <= limit) & (prefill <= first) & (batch <= room)
    return np.asarray(np.where(fits, batch / (mix.output * tpot), 0.0).max(axis=0))


calibration.on_change(_found.clear)
