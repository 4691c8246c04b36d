"""What a setting measures: every name a paper's expression may ask of it, computed when asked.

`Measured` is the model; `Bare` is the null model that knows only bytes over bandwidth and FLOPs over peak.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from perfmodel import cost, prices, roofline
from perfmodel.denoising import denoise
from perfmodel.errors import SpecError
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.papers.facts import Facts
from perfmodel.schedule import operators


class Measured(Facts):
    """One setting at work. Times in s, sizes in byte, rates per instance in 1/s; all floats."""

    # Times of single passes: what the null model replaces.

    def _prefill(self, batch: float, new: float, cached: float) -> float:
        return float(self._estimator.prefill(batch, new, cached))

    def _decode(self, batch: float, context: np.ndarray) -> np.ndarray:
        return np.asarray(self._estimator.decode(batch, context))

    # One request, or one batch.

    @cached_property
    def ttft(self) -> float:
        """Seconds of a prefill of `prompts` prompts together, without waiting."""
        return self._prefill(self._value("prompts"), self.input - self._value("prefix"), self._value("prefix"))

    @cached_property
    def tpot(self) -> float:
        """Mean seconds per output token of a sequence in the batch, over the contexts it passes."""
        if self.output <= 1:
            return float(self._decode(self.batch, np.array([self.input + 1]))[0])
        # Gauss-Legendre quadrature with three points over the output.
        at = self.input + np.array([0.113, 0.5, 0.887]) * self.working_output
        return float(np.dot([5, 8, 5], self._decode(self.batch, at)) / 18)

    @property
    def step(self) -> float:
        """Seconds of the decode step in the middle of the output, all its emitted tokens together."""
        return float(self._estimator.round_seconds(self.batch, self.context))

    @property
    def latency(self) -> float:
        """Seconds of one request of the batch from its prefill to its last token."""
        return self._batch_prefill + (self.output - 1) * self.tpot

    @cached_property
    def _batch_prefill(self) -> float:
        """Seconds of the prefill a request waits for: the whole batch's in static batching, its own else."""
        in_turn = self.batch if self.setting.batching == "in-turn" else 1
        together = self.batch if self.setting.batching == "static" else self._value("prompts")
        return in_turn * self._prefill(together, self.input - self._value("prefix"), self._value("prefix"))

    @property
    def requests_per_s(self) -> float:
        """Requests per second without end: every request's prefill and its share of decode steps, one after the other."""
        if self.setting.static:
            return self.batch / self.latency
        return 1 / (self.ttft / self._value("prompts") + self.output * self.tpot / self.batch)

    @property
    def throughput(self) -> float:
        """Output tokens per second of the instance, prefill included."""
        return self.requests_per_s * self.output

    @property
    def total_throughput(self) -> float:
        """Input and output tokens per second of the instance."""
        return self.requests_per_s * (self.input + self.output)

    @cached_property
    def mixed_throughput(self) -> float:
        """Input and output tokens per second of the instance where every step carries its share of prefill.

        A step of b decoding sequences prefills b input / output tokens; a prompt longer than that passes in pieces.
        """
        tokens = self.batch * (self.input - self._value("prefix")) / self.output
        prompts = max(tokens / (self.input - self._value("prefix")), 1.0)
        piece = tokens / prompts
        before = self._value("prefix") + (self.input - self._value("prefix") - piece) / 2
        step = float(self._estimator.mixed(self.batch, self.context, piece, before, prompts))
        return self.batch / self.output * (self.input + self.output) / step

    @property
    def decode_throughput(self) -> float:
        """Output tokens per second while decoding."""
        return self.batch / self.tpot

    @property
    def prefill_throughput(self) -> float:
        """Prompt tokens per second while prefilling."""
        return self._value("prompts") * self.input / self.ttft

    @cached_property
    def denoising(self) -> float:
        """Seconds of `steps` denoising passes over the batch, `input` tokens (latent patches or text) each."""
        return self._denoised(bare=False)

    def _denoised(self, *, bare: bool) -> float:
        steps = self._value("steps")
        if steps < 1:
            raise SpecError("denoising needs the setting's `steps`")
        found = denoise(self._estimator, self.batch, self.input, steps)
        return float(found.lower if bare else found.seconds)

    # Parts of a pass.

    def _phase(self, *, decode: bool, causal: bool = True) -> Phase:
        if decode:
            return Phase((Group(self.batch, 1.0, self.context, decode=True),))
        prefix = self._value("prefix")
        return Phase((Group(self._value("prompts"), self.input - prefix, prefix),), causal=causal)

    def _part(self, *, decode: bool, causal: bool = True) -> roofline.Cost:
        e = self._estimator
        return roofline.cost(e.lower(self._phase(decode=decode, causal=causal)).schedule, e.machine, contextual=True)

    @property
    def attention(self) -> float:
        """Seconds of one decode step in attention and what it needs: reading, fetching, choosing."""
        return float(self._part(decode=True).seconds)

    @property
    def prefill_attention(self) -> float:
        """Seconds of the prefill in attention."""
        return float(self._part(decode=False).seconds)

    @property
    def unmasked_attention(self) -> float:
        """Seconds in attention of the same pass without a causal mask, where every token attends every other."""
        return float(self._part(decode=False, causal=False).seconds)

    def _linear(self, *, decode: bool) -> float:
        e = self._estimator
        found = operators(e.lower(self._phase(decode=decode)).schedule)
        kinds = ("gemm", "grouped_gemm")
        return float(sum(times * roofline.op_cost(op, e.machine).seconds for op, times, _ in found if op.kind in kinds))

    @property
    def linear(self) -> float:
        """Seconds of one decode step in matrix products with weights."""
        return self._linear(decode=True)

    @property
    def prefill_linear(self) -> float:
        """Seconds of the prefill in matrix products with weights."""
        return self._linear(decode=False)

    def _counted(self, *, decode: bool) -> dict[str, float]:
        e = self._estimator
        peak = roofline.cost(e.lower(self._phase(decode=decode)).schedule, e.machine).peak
        return {k: float(v) for k, v in peak.items()}

    @property
    def step_bytes(self) -> float:
        """Stored bytes one device reads in a decode step."""
        return self._counted(decode=True)["hbm"] * self.bandwidth

    @property
    def prefill_bytes(self) -> float:
        """Stored bytes one device reads in the prefill."""
        return self._counted(decode=False)["hbm"] * self.bandwidth

    @property
    def prefill_flops(self) -> float:
        """Matrix FLOPs one device does in the prefill."""
        return self._flops(decode=False)

    @property
    def step_flops(self) -> float:
        """Matrix FLOPs one device does in a decode step."""
        return self._flops(decode=True)

    def _flops(self, *, decode: bool) -> float:
        found = operators(self._estimator.lower(self._phase(decode=decode)).schedule)
        return float(sum(
            times * count for op, times, _ in found for unit, count in op.flops.items() if unit not in ("vector", "exp")
        ))  # fmt: skip

    @property
    def launches(self) -> float:
        """Kernels of a decode step."""
        e = self._estimator
        return float(roofline.cost(e.lower(self._phase(decode=True)).schedule, e.machine).launches)

    @property
    def prefill_floor(self) -> float:
        """Seconds of the prefill at datasheet rates with perfect overlap."""
        return max(self._counted(decode=False).values())

    @property
    def step_floor(self) -> float:
        """Seconds of a decode step at datasheet rates with perfect overlap."""
        return max(self._counted(decode=True).values())

    # Energy and money.

    @property
    def energy(self) -> float:
        """Joules per output token of all devices, prefill shared out."""
        step = self._known(cost.pass_energy(self._estimator, self._phase(decode=True), self.step))
        prefill = self._known(cost.pass_energy(self._estimator, self._phase(decode=False), self.ttft))
        return step * self.tpot / self.step / self.batch + prefill / self._value("prompts") / self.output

    @property
    def prefill_power(self) -> float:
        """Watts of one device while prefilling."""
        return self._power(self._phase(decode=False), self.ttft)

    @property
    def decode_power(self) -> float:
        """Watts of one device while decoding."""
        return self._power(self._phase(decode=True), self.step)

    @property
    def mean_power(self) -> float:
        """Watts of one device over a request of the batch, its two phases by their time."""
        first, rest = self._batch_prefill, (self.output - 1) * self.tpot
        return (self.prefill_power * first + self.decode_power * rest) / (first + rest)

    @property
    def overhead_power(self) -> float:
        """Watts of the node that are not its devices', per device."""
        return float(self._machine.node_overhead_power / self._machine.devices_per_node)

    def _power(self, phase: Phase, seconds: float) -> float:
        return self._known(cost.pass_power(self._estimator, self._estimator.lower(phase), seconds))

    def _known(self, found: float | None) -> float:
        """A power or an energy; SpecError where the catalogue states no board power."""
        if found is None:
            raise SpecError(f"the catalogue has no board power of {self.setting.hardware}")
        return found

    @property
    def usd_per_s(self) -> float:
        """Price of the instance's devices, on demand."""
        e = self._estimator
        offer = prices.on_demand(e.machine.node.name) if e.machine.node else None
        if offer is None:
            raise SpecError(f"no price list offers {self.setting.hardware}")
        return offer.usd_per_s * self.devices / e.machine.devices_per_node

    @property
    def usd_per_token(self) -> float:
        """Price of one output token."""
        return self.usd_per_s / self.throughput


class Bare(Measured):
    """Null model: decode is the bytes read over the bandwidth, prefill the FLOPs over the peak; nothing else costs time."""

    def _prefill(self, batch: float, new: float, cached: float) -> float:
        return float(self._floor(Phase((Group(batch, new, cached),)), "compute"))

    def _decode(self, batch: float, context: np.ndarray) -> np.ndarray:
        found = self._floor(Phase((Group(batch, 1.0, context - 1, decode=True),)), "hbm")
        return np.broadcast_to(np.asarray(found, float), context.shape)

    def _floor(self, phase: Phase, resource: str) -> Any:
        e = self._estimator
        return roofline.cost(e.lower(phase).schedule, e.machine).peak[resource]

    @property
    def step(self) -> float:
        return self.tpot

    @cached_property
    def denoising(self) -> float:
        return self._denoised(bare=True)

    @property
    def attention(self) -> float:
        return float(self._part(decode=True).peak["hbm"])

    @property
    def prefill_attention(self) -> float:
        return float(self._part(decode=False).peak["compute"])

    @property
    def unmasked_attention(self) -> float:
        return float(self._part(decode=False, causal=False).peak["compute"])


def known() -> list[str]:
    """Names of all metrics."""
    return sorted(n for n in dir(Measured) if not n.startswith("_") and n != "setting")
