"""The estimator: one model on one instance, as array methods and as one complete Estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from perfmodel import calibration, catalog, graph, memory, roofline
from perfmodel.errors import Infeasible, SpecError
from perfmodel.machine import Machine, from_node, machine
from perfmodel.memory import Memory
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.spec.formats import get_format
from perfmodel.spec.hardware import Node
from perfmodel.spec.model import Model, Moe
from perfmodel.symbols import Num

_REMEMBERED = 4096  # shapes whose token-wise cost a built estimator keeps
_ROWS = 32_768  # configurations evaluated at once: arrays stay in the processor's cache


def choose_formats(
    model: Model, m: Machine, weight: str | None = None, act: str | None = None, kv: str | None = None
) -> Formats:
    """Storage and arithmetic of a run: the checkpoint's own unless overridden.

    Activations follow the weights (W8A8, W4A4) where the matrix units multiply that format; else they stay at 16 bits
    and the weights are expanded on the fly.
    """
    stored = get_format(weight or model.dtype)
    expert = get_format(weight or model.expert_dtype or model.dtype)
    base = act if act is not None and get_format(act).width >= 2 else "bf16" if model.dtype != "fp16" else "fp16"
    wide = get_format(base)
    # 16-bit formats stand in for each other (bf16 on Volta, fp16 on a TPU); FP32 was asked for and stays.
    if wide.width == 2 and wide.matrix not in m.matrix and m.matrix:
        wide = get_format(next((name for name in ("bf16", "fp16") if name in m.matrix), "fp32"))
    narrowest = min((stored, expert), key=lambda f: f.width)
    wants = act is None or get_format(act).width < 2
    quantise = wants and narrowest.matrix is not None and narrowest.width < wide.width and m.native(narrowest.matrix)
    if act is not None and get_format(act).width < 2 and not quantise:
        raise SpecError(
            f"activations cannot be {act}: {m.device.name} multiplies {', '.join(m.matrix) or 'no matrix formats'}, "
            f"and the weights are {narrowest.name}; give a --weight-dtype of that width or leave --act-dtype out"
        )
    cache = get_format(kv) if kv not in (None, "auto") else get_format(model.kv_dtype) if model.kv_dtype else wide
    quantised = stored.width < wide.width or expert.width < wide.width
    kept = model.unquantized if quantised else ()
    return Formats(stored, expert, wide, cache, kept, bool(quantise))


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


class Estimator:
    """Times of one model on one instance. Array methods return seconds as NumPy arrays for array inputs.

    hardware: a device or node by name, alias or path, or a Node. tp, pp, dp, ep, cp: degrees of the instance.
    Raises SpecError for unknown names and impossible degrees.
    """

    def __init__(
        self,
        model: str | Model,
        hardware: str | Node,
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        ep: int = 1,
        cp: int = 1,
        sequence_parallel: bool = False,
        engine: str = "vllm",
        weight_dtype: str | None = None,
        act_dtype: str | None = None,
        kv_dtype: str | None = None,
        mem_fraction: float | None = None,
    ) -> None:
        self.model = catalog.load_model(model) if isinstance(model, str) else model
        base = machine(hardware) if isinstance(hardware, str) else from_node(hardware)
        self.engine_name, self.engine = engine, calibration.engine(engine)
        driven = base.with_engine(self.engine)
        # Kernels of a step queue up behind each other, so part of each launch is hidden.
        self.machine = replace(driven, kernel_latency=driven.kernel_latency * driven.law["queued_launch"])
        self.par = Parallelism(tp, pp, dp, ep, cp, sequence_parallel)
        check_parallelism(self.model, self.par)
        check_reach(self.model, self.par, self.machine)
        self.formats = choose_formats(self.model, self.machine, weight_dtype, act_dtype, kv_dtype)
        if mem_fraction is not None and not 0 < mem_fraction <= 1:
            raise SpecError(f"--mem-fraction must lie in (0, 1], got {mem_fraction}")
        self.mem_fraction = mem_fraction
        self._remembered: dict[tuple[float, float, bool], roofline.Cost] = {}

    def prefill(self, batch: Num, new_tokens: Num, context: Num = 0) -> Any:
        """Seconds of one unchunked pass over `batch` sequences of `new_tokens`, on top of `context` cached tokens."""
        return self._many(batch, new_tokens, context, is_decode=False)

    def decode(self, batch: Num, context: Num) -> Any:
        """Seconds of one decode step of `batch` sequences that attend `context` tokens each, the new one included."""
        return self._many(batch, 1, np.asarray(context) - 1, is_decode=True)

    def mixed(self, batch: Num, context: Num, chunk: Num, chunk_context: Num = 0, prompts: Num = 1) -> Any:
        """Seconds of a step that decodes `batch` sequences and prefills `chunk` tokens of each of some `prompts` more."""
        phase = graph.mixed(batch, np.asarray(context) - 1, chunk, chunk_context, prompts)
        total = roofline.cost(self.lower(phase).schedule, self.machine)
        return self._with_host(total.seconds, total.launches, batch, prompts * chunk, self.machine)

    def lower(self, phase: graph.Phase) -> graph.Program:
        """Operators of one device for a phase."""
        return graph.lower(self.model, phase, self.par, self.formats)

    def _micro(self, batch: Num) -> Num:
        """Micro-batches that keep the pipeline's stages busy."""
        return np.minimum(batch, self.par.pp)

    def _many(self, batch: Num, new: Num, context: Num, *, is_decode: bool) -> Any:
        """Evaluate over broadcast arrays: token-wise operators once per distinct (batch, new), attention per row."""
        arrays = np.broadcast_arrays(np.asarray(batch, float), np.asarray(new, float), np.asarray(context, float))
        flat = [a.ravel() for a in arrays]
        if flat[0].size and (flat[0].min() < 1 or flat[1].min() < 1 or flat[2].min() < 0):
            raise SpecError("batch and new tokens must be at least 1, and context at least 1 for decode, 0 for prefill")
        out = np.empty(flat[0].size)
        for start in range(0, out.size, _ROWS):
            part = [a[start : start + _ROWS] for a in flat]
            out[start : start + _ROWS] = self._rows(*part, is_decode=is_decode)
        result = out.reshape(arrays[0].shape)
        return result if result.ndim else float(result)

    def _rows(self, batch: Any, new: Any, context: Any, *, is_decode: bool) -> Any:
        if batch.size == 1:
            fixed = self._token_wise(float(batch[0]), float(new[0]), is_decode)
            phase = self._phase(batch[0], new[0], context[0], is_decode)
            varying = roofline.cost(self.lower(phase).schedule, self.machine, contextual=True)
            total = roofline.Cost(fixed.seconds + varying.seconds, fixed.launches + varying.launches)
            return self._finish(total, batch, new, is_decode, self.machine)
        key = batch * 1e8 + new
        _, first, back = np.unique(key, return_index=True, return_inverse=True)
        tokenwise = self.lower(self._phase(batch[first], new[first], 0.0, is_decode)).schedule
        per_shape = roofline.cost(tokenwise, self.machine, contextual=False)
        rows = self.lower(self._phase(batch, new, context, is_decode)).schedule
        per_row = roofline.cost(rows, self.machine, contextual=True)
        total = roofline.Cost(
            np.broadcast_to(per_shape.seconds, first.shape)[back] + per_row.seconds,
            per_shape.launches + per_row.launches,
        )
        return self._finish(total, batch, new, is_decode, self.machine)

    def _token_wise(self, batch: float, new: float, is_decode: bool) -> roofline.Cost:
        """What does not depend on the context, remembered: schedulers ask for the same shapes again and again."""
        key = (batch, new, is_decode)
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            schedule = self.lower(self._phase(batch, new, 0.0, is_decode)).schedule
            self._remembered[key] = roofline.cost(schedule, self.machine, contextual=False)
        return self._remembered[key]

    def _phase(self, batch: Num, new: Num, context: Num, is_decode: bool) -> graph.Phase:
        n = batch / self._micro(batch)
        if is_decode and self.par.dp > 1:
            n = self._captured(np.ceil(n / self.par.dp)) * self.par.dp
        return graph.Phase((Group(n, new, context, decode=is_decode),))

    def _captured(self, per_rank: Num) -> Num:
        """Sequences of a step that data-parallel ranks run together: the next captured graph (1, 2, 4, multiples of 8)."""
        small = np.exp2(np.ceil(np.log2(np.maximum(per_rank, 1))))
        captured = np.where(per_rank <= 4, small, np.ceil(per_rank / 8) * 8)
        return np.where(per_rank <= self.engine.graph_batch, captured, per_rank)

    def _finish(self, total: roofline.Cost, batch: Num, new: Num, is_decode: bool, m: Machine) -> Any:
        """Pipeline fill and host time around the device time of one micro-batch."""
        seconds = total.seconds * self._passes(batch, is_decode)
        return self._with_host(seconds, total.launches, batch, new, m)

    def _passes(self, batch: Num, is_decode: bool) -> Num:
        """Device time of a step over the time of one micro-batch through all stages.

        Decode steps of different micro-batches interleave, so a token waits for one pass; a prefill of M
        micro-batches lasts (M + pp - 1) stages (GPipe, arXiv:1811.06965).
        """
        micro = self._micro(batch)
        # With fewer micro-batches than stages the pipeline idles, but a token still waits for one pass only.
        return 1.0 if is_decode else (micro + self.par.pp - 1) / self.par.pp

    def _with_host(self, seconds: Num, launches: Num, batch: Num, new: Num, m: Machine) -> Any:
        """Host work of a step, then the device's; steps too large for a captured graph are launched one by one."""
        by_one = np.where(batch * new > self.engine.graph_batch, launches * m.law["eager_issue"], 0.0)
        return self.host_seconds(batch, m) + np.maximum(seconds, by_one * m.law["host_slowdown"])

    def host_seconds(self, batch: Num, m: Machine | None = None) -> Num:
        """Host seconds of a step that the device waits for: scheduling, input preparation, sampled tokens.

        Data-parallel ranks have a scheduler each, so a rank waits for its own sequences only.
        """
        m = m or self.machine
        return m.law["host_slowdown"] * (m.law["host_base"] + m.law["host_per_sequence"] * batch / self.par.dp)

    def parts(self, batch: float, new: float, context: float, *, is_decode: bool) -> Parts:
        """Expected time, bounds, spread and bottleneck of one step; context in cached tokens before the step."""
        phase = self._phase(float(batch), float(new), float(context), is_decode)
        program = self.lower(phase)
        total = roofline.cost(program.schedule, self.machine)
        expected = float(self._finish(total, batch, new, is_decode, self.machine))
        passes = float(self._passes(batch, is_decode))
        host = float(self.host_seconds(batch))
        busy = {k: float(v) * passes for k, v in total.busy.items()} | {"host": host}
        shaken = self.machine.perturbed()
        rows = roofline.cost(program.schedule, shaken)
        seconds = np.broadcast_to(self._finish(rows, batch, new, is_decode, shaken), (len(self.machine.sigma) + 1,))
        steps = np.log(seconds[1:] / seconds[0])
        residual = calibration.law().residual["decode" if is_decode else "prefill"]
        sigma = max(float(np.sqrt(np.sum(steps**2) + residual**2)), self.machine.least_sigma)
        return Parts(
            expected,
            float(total.lower) * passes,
            max(sum(busy.values()), expected) * math.exp(calibration.P90 * sigma),
            sigma,
            max(busy, key=lambda r: busy[r]),
            busy,
            dict(zip(self.machine.sigma, steps.tolist(), strict=True)),
        )

    @cached_property
    def kv_free(self) -> float:
        """Bytes per device left for the KV cache."""
        return memory.kv_capacity(self.model, self.par, self.formats, self.machine, self.engine, self.mem_fraction)

    def memory(self, batch: float, tokens: float) -> Memory:
        """Bytes on the fullest device with `batch` sequences of `tokens` tokens."""
        return memory.resident(
            self.model, self.par, self.formats, self.machine, self.engine,
            sequences=batch, tokens=tokens, mem_fraction=self.mem_fraction,
        )  # fmt: skip

    def max_batch(self, tokens: float) -> int:
        """Most sequences of `tokens` tokens that fit; cached bytes are proportional to sequences per rank."""
        one = memory.cache_bytes(self.model, self.par, self.formats, self.par.dp, tokens, self.engine.block_tokens)
        return max(0, int(self.kv_free / float(one)) * self.par.dp) if float(one) > 0 else self.engine.max_sequences

    def require_fit(self) -> None:
        """Raise Infeasible, with the nearest change, when not even the weights fit."""
        if self.kv_free > 0:
            return
        need = float(memory.weight_bytes(self.model, self.par, self.formats)) / 1e9
        have = self.machine.capacity / 1e9
        raise Infeasible(
            f"{self.model.name} in {self.formats.weight.name} needs {need:.1f} GB of weights on each of "
            f"{self.par.devices} {self.machine.device.name} with {have:.1f} GB",
            nearest=self._nearest_fit(),
            binding=("memory",),
        )

    def _nearest_fit(self) -> str | None:
        """Smallest tp (then pp) of the same device whose weights leave room, or a narrower format."""
        for pp in (1, 2, 4, 8):
            for tp in (1, 2, 4, 8, 16):
                trial = Parallelism(tp, pp, self.par.dp, 1, self.par.cp)
                if trial.devices < self.par.devices:
                    continue
                try:
                    check_parallelism(self.model, trial)
                except SpecError:
                    continue
                free = memory.kv_capacity(self.model, trial, self.formats, self.machine, self.engine, self.mem_fraction)
                if free > 0:
                    return f"--tp {tp}" + (f" --pp {pp}" if pp > 1 else "") + f" ({trial.devices} devices)"
        return "a narrower --weight-dtype or devices with more memory"


@dataclass(frozen=True)
class Parts:
    """One step: expected seconds, bounds, spread (sigma of the logarithm), bottleneck, busy seconds by resource.

    lower: perfect overlap at datasheet rates. upper: no overlap at all, with every parameter at its p90 together.
    """

    seconds: float
    lower: float
    upper: float
    sigma: float
    bottleneck: str
    busy: dict[str, float]
    sensitivity: dict[str, float]

    @property
    def interval(self) -> tuple[float, float]:
        """p10 and p90, inside the bounds."""
        spread = float(np.exp(calibration.P90 * self.sigma))
        return max(self.seconds / spread, self.lower), self.seconds * spread
