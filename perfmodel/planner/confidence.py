"""How much slower a device and its stack may be than expected: one shared error for all columns on it."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from perfmodel.catalog import load_model
from perfmodel.planner.layout import build, layouts
from perfmodel.planner.offer import Offer
from perfmodel.serving.queueing import Mix
from perfmodel.serving.workload import Workload
from perfmodel.spec.choices import Choices

_TYPICAL_BATCH = 32.0
_TYPICAL_PROMPT = 2048.0


def slowness(
    model: str, offers: list[Offer], choices: Choices, workload: Workload, built: dict[Any, Any], confidence: float
) -> dict[str, float]:
    """By offer label: exp(z(confidence) sigma), the factor that its times stay below with this probability.

    Offers of one device share one error whatever their region or terms.
    """
    z = NormalDist().inv_cdf(confidence)
    return {label: math.exp(z * s) for label, s in sigmas(model, offers, choices, workload, built).items()}


def sigmas(
    model: str, offers: list[Offer], choices: Choices, workload: Workload, built: dict[Any, Any]
) -> dict[str, float]:
    """By offer label: standard deviation of the logarithm of its times, of decode or prefill, whichever is less sure.

    Each is the median over the layouts that hold the model of the estimator's own spread (perturbed parameters and what the law
    leaves unexplained); offers of one device get the same number.
    """
    inputs, outputs, weight = workload.sample()
    context = Mix(inputs, outputs, weight).context
    by_device: dict[str, list[float]] = {}
    for offer in offers:
        name = offer.machine.device.name
        if name in by_device:
            continue
        decode, prefill = [], []
        for layout in layouts(load_model(model), offer, choices):
            if layout not in built:
                built[layout] = build(model, offer, layout, choices, workload)
            if not isinstance(built[layout], str):
                e = built[layout][0]
                decode.append(e.parts(_TYPICAL_BATCH, 1.0, context, is_decode=True).sigma)
                prefill.append(e.parts(1.0, min(_TYPICAL_PROMPT, float(inputs.max())), 0.0, is_decode=False).sigma)
        if decode:
            by_device[name] = [float(np.median(decode)), float(np.median(prefill))]
    return {o.label: max(by_device.get(o.machine.device.name, [0.0])) for o in offers}
