"""Clocks below the rated one: set by hand, or as high as a power cap allows."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import Infeasible, SpecError
from perfmodel.machine import Machine
from perfmodel.techniques.base import Technique, knob

_HALVINGS = 40


class PowerCap(Technique):
    """Compute units run at a share f of their rated clock; the clocks of memory and links stay.

    Matrix, vector and special-function peaks, the row rate and the last-level cache scale with f; memory bandwidth falls
    only where the units' loads no longer fill it (Machine.part). Watts over the board's rated watts, as in
    perfmodel.cost, = idle + dynamic(f) (active + compute x busy) + moved(f) memory x busy, with dynamic(f) = f V(f)^2 (CMOS)
    and V(f) = floor + (1 - floor) f. Of what a byte from memory costs, `dram` is drawn by the memory, whose voltage stays
    (HBM2: 3.9 pJ/bit), and the rest on its way through caches and units (some 20 pJ/bit with it), which falls with V(f)^2:
    moved(f) = s + (1 - s) V(f)^2 with s = dram x bandwidth / (memory x rated watts). cap: share of the rated power, from
    which the clock follows at the load `busy_compute`, `busy_memory`; oversubscription: further devices on the same budget,
    all busy at once, so that each has cap / (1 + oversubscription) (POLCA, arXiv:2308.12908). Energy per token:
    perfmodel.cost.pass_energy.
    """

    kind: ClassVar[str] = "power-cap"
    reference: ClassVar[str] = "arXiv:2308.12908"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"

    clock: float = knob(1.0, "share of the rated clock at most", low=0.1, high=1)
    cap: float = knob(1.0, "share of the rated board power at most", low=0.1, high=1)
    oversubscription: float = knob(0.0, "devices on the same power budget over those it was made for, minus one", low=0, high=2)
    busy_compute: float = knob(0.6, "share of the matrix peak that the capped work demands at the rated clock", low=0, high=1)
    busy_memory: float = knob(0.0, "share of the memory's peak that it demands", low=0, high=1)
    floor: float = knob(0.5, "voltage at the lowest clocks over the rated one", low=0, high=1)
    dram: float = knob(3.9, "what a bit costs in the memory itself, whatever the clock", "pJ/bit", low=0, high=100)

    def machine(self, machine: Machine) -> Machine:
        share = self.cap / (1 + self.oversubscription)
        clock = self.clock if share >= 1 else min(self.clock, self.within(share, machine))
        if clock == 1 and share == 1:
            return machine
        return self._capped(self._slowed(machine, clock) if clock < 1 else machine, share)

    def check(self, model: object, machine: Machine, par: object) -> None:
        if not machine.tdp and (self.cap < 1 or self.oversubscription):
            raise SpecError(f"power-cap: {machine.device.name} states no board power; give a clock instead")

    def dynamic(self, clock: float) -> float:
        """Switching power over that at the rated clock: f V(f)^2."""
        return clock * self._voltage(clock) ** 2

    def moved(self, clock: float, machine: Machine) -> float:
        """Power of a rate of bytes over that at the rated clock: the memory's own part stays, the chip's goes with V(f)^2."""
        rated = float(machine.law["power_memory"]) * (machine.tdp or 0.0)
        own = min(8e-12 * self.dram * machine.bandwidth / rated, 1.0) if rated else 1.0
        return own + (1 - own) * self._voltage(clock) ** 2

    def _voltage(self, clock: float) -> float:
        return self.floor + (1 - self.floor) * clock

    def load(self, clock: float, machine: Machine) -> float:
        """Power over the board's rated power at a share of the clock, before any limit."""
        law = machine.law
        running = float(law["power_active"] + law["power_compute"] * self.busy_compute)
        reading = self.moved(clock, machine) * float(law["power_memory"]) * self.busy_memory
        return float(law["power_idle"]) + reading + self.dynamic(clock) * running

    def within(self, share: float, machine: Machine) -> float:
        """Highest clock whose power stays within a share of the board's. Raises Infeasible where none does."""
        low, high = 0.1, 1.0
        rated = min(self.load(high, machine), 1.0)
        if rated <= share:
            return high
        # Boards throttle at their own limit already: the rated clock is the one that draws just that.
        scale = rated / self.load(high, machine)
        if self.load(low, machine) * scale > share:
            raise Infeasible(
                f"power-cap: {share:.2f} of the board's power holds no clock of {machine.device.name}",
                nearest=f"a cap of {self.load(low, machine) * scale:.2f}",
                binding=("power",),
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.load(middle, machine) * scale <= share else (low, middle)
        return low

    def _slowed(self, m: Machine, clock: float) -> Machine:
        device, compute = m.device, m.device.compute
        if compute is not None:
            device = device.model_copy(update={"compute": compute.model_copy(update={"clock": compute.clock * clock})})
        dynamic = self.dynamic(clock)
        law = m.law | {
            "cache_ratio": m.law["cache_ratio"] * clock,
            "power_active": m.law["power_active"] * dynamic,
            # Of a share of the slower peak: f V^2 for the same share of the rated one times f.
            "power_compute": m.law["power_compute"] * dynamic,
            "power_memory": m.law["power_memory"] * self.moved(clock, m),
        }
        slower = replace(
            m, device=device, law=law, vector=m.vector * clock, exp=m.exp * clock,
            matrix={k: v * clock for k, v in m.matrix.items()},
        )  # fmt: skip
        # At very low clocks the units cannot draw the whole bandwidth.
        return slower.part(1.0)

    def _capped(self, m: Machine, share: float) -> Machine:
        """The board's limit is the cap; what work draws stays the same in watts."""
        names = ("power_idle", "power_active", "power_compute", "power_memory")
        return replace(m, tdp=m.tdp * share, law=m.law | {k: m.law[k] / share for k in names})
