"""Degrees of parallelism that can cut a model, on devices that reach each other."""

from __future__ import annotations

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.shard import Parallelism
from perfmodel.spec.model import Model, Moe


def check_parallelism(model: Model, par: Parallelism) -> None:
    """Raise SpecError where a degree cannot cut the model, naming degrees that can."""
    for name, degree in (("tp", par.tp), ("pp", par.pp), ("dp", par.dp), ("ep", par.ep), ("cp", par.cp)):
        if not isinstance(degree, (int, np.integer)) or degree < 1:
            raise SpecError(f"--{name} must be a positive whole number, got {degree!r}")
    if par.pp > model.n_layers:
        raise SpecError(f"--pp {par.pp} exceeds the {model.n_layers} layers of {model.name}")
    for name, block in model.blocks.items():
        heads = getattr(block.mixer, "heads", None) or getattr(block.mixer, "value_heads", None)
        if heads and heads % par.tp:
            fits = [d for d in range(1, heads + 1) if heads % d == 0 and d <= 64]
            raise SpecError(
                f"--tp {par.tp} does not divide the {heads} heads of {model.name} ({name} layers); "
                f"degrees that do: {', '.join(map(str, fits))}"
            )
        kv_heads = getattr(block.mixer, "kv_heads", None)
        if heads and kv_heads and kv_heads % par.tp and par.tp % kv_heads:
            fits = [d for d in range(1, heads + 1) if heads % d == 0 and (kv_heads % d == 0 or d % kv_heads == 0) and d <= 64]
            raise SpecError(
                f"--tp {par.tp} neither divides the {kv_heads} key-value heads of {model.name} ({name} layers) nor is a "
                f"multiple of them; degrees that do: {', '.join(map(str, fits))}"
            )
    moes = [b.ffn for b in model.blocks.values() if isinstance(b.ffn, Moe)]
    if par.ep > 1:
        if not moes:
            raise SpecError(f"--ep {par.ep}: {model.name} has no experts to divide")
        if par.group % par.ep:
            raise SpecError(f"--ep {par.ep} must divide tp x dp x cp = {par.group}")
        if any(x.experts % par.ep for x in moes):
            raise SpecError(f"--ep {par.ep} does not divide the {moes[0].experts} experts of {model.name}")


def check_reach(model: Model, par: Parallelism, m: Machine) -> None:
    """Raise SpecError where devices that must exchange data have no path between them."""
    mixes = any(isinstance(b.ffn, Moe) for b in model.blocks.values())
    # Data-parallel replicas of a dense model exchange nothing.
    linked = par.devices if mixes else par.devices // par.dp
    if m.node is None and linked > 1 and not m.device.links:
        raise SpecError(f"{linked} x {m.device.name} must exchange data, and it has no port to another device")
    if m.node is not None and linked > m.devices_per_node and not m.network:
        raise SpecError(
            f"{linked} devices must exchange data, and {m.name} has {m.devices_per_node} and no network to another node"
        )
