"""One side of a device whose compute units are divided between prefill and decode."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.shard import Parallelism
from perfmodel.spec.model import Model
from perfmodel.techniques.base import Technique, knob


class PhaseSplit(Technique):
    """Passes run on a share of the compute units, with the memory bandwidth that the other side leaves.

    FLOP/s = min(units / knee, 1) of the device's; from a share `knee` on, more units do not help (Nexus,
    arXiv:2507.06608; semi-PD, arXiv:2504.19867). Bytes/s = min(share, what so few units can draw), as Machine.part.
    Weights and cache are stored once: both sides see the whole memory. How both sides settle their bandwidth under load,
    and percentiles, are serving.split's; this is the view of one pass.
    """

    kind: ClassVar[str] = "phase-split"
    reference: ClassVar[str] = "arXiv:2507.06608"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"

    units: float = knob(1.0, "share of the compute units of this side", low=0.01, high=1)
    bandwidth: float = knob(1.0, "share of the memory bandwidth that the other side leaves", low=0.01, high=1)
    knee: float = knob(1.0, "share of the units from which more do not help", low=0.01, high=1)

    def machine(self, machine: Machine) -> Machine:
        if self.units == 1 and self.bandwidth == 1:
            return machine
        part = machine.part(self.units, self.bandwidth)
        gain = min(1 / self.knee, 1 / self.units)
        return replace(
            part, vector=part.vector * gain, exp=part.exp * gain, matrix={k: v * gain for k, v in part.matrix.items()}
        )

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.units < 1 and machine.device.compute is not None and machine.device.compute.units * self.units < 1:
            raise SpecError(
                f"phase-split: {self.units:g} of the {machine.device.compute.units} units of {machine.device.name} is less "
                "than one; give a larger share"
            )
