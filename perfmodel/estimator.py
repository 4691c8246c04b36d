"""The estimator: one model on one instance, as array methods and as one complete Estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, reduce
from typing import Any

import numpy as np

from perfmodel import calibration, catalog, graph, memory, roofline
from perfmodel.degrees import check_parallelism, check_reach
from perfmodel.errors import Infeasible, SpecError
from perfmodel.formats import choose_formats
from perfmodel.machine import Machine, from_node, machine
from perfmodel.memory import Memory
from perfmodel.ops.shard import Group, Load, Parallelism
from perfmodel.parts import Parts, spread
from perfmodel.spec.hardware import Node
from perfmodel.spec.model import Model
from perfmodel.symbols import Num
from perfmodel.techniques.base import Draft, Request, Round, Technique, requests, rounds

_REMEMBERED = 4096  # shapes whose token-wise cost a built estimator keeps
_ROWS = 32_768  # configurations evaluated at once: arrays stay in the processor's cache


def build_techniques(specs: Sequence[str | dict[str, Any] | Technique]) -> tuple[Technique, ...]:
    """Techniques from text or mappings; the registry is read on first use."""
    from perfmodel.techniques.registry import techniques

    return techniques(specs)


def _fastest(seconds: list[Any]) -> Any:
    """Elementwise least of equally good ways."""
    found = reduce(np.minimum, seconds)
    return found if np.ndim(found) else float(found)


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
        techniques: Sequence[str | dict[str, Any] | Technique] = (),
    ) -> None:
        self.techniques = build_techniques(techniques) if techniques else ()
        self.model = catalog.load_model(model) if isinstance(model, str) else model
        base = machine(hardware) if isinstance(hardware, str) else from_node(hardware)
        for technique in self.techniques:
            self.model, base = technique.of_model(self.model), technique.machine(base)
        self.engine_name, self.engine = engine, calibration.engine(engine)
        for technique in self.techniques:
            self.engine = technique.engine(self.engine)
        driven = base.with_engine(self.engine)
        # Kernels of a step queue up behind each other, so part of each launch is hidden.
        self.machine = replace(driven, kernel_latency=driven.kernel_latency * driven.law["queued_launch"])
        self.par = Parallelism(tp, pp, dp, ep, cp, sequence_parallel)
        check_parallelism(self.model, self.par)
        check_reach(self.model, self.par, self.machine)
        formats = choose_formats(self.model, self.machine, weight_dtype, act_dtype, kv_dtype)
        self.techniques = tuple(t.bound(self.model, self.machine, self.par) for t in self.techniques)
        for technique in self.techniques:
            technique.check(self.model, self.machine, self.par)
            formats = technique.formats(formats, self.machine)
        self.formats = replace(formats, techniques=self.techniques)
        if mem_fraction is not None and not 0 < mem_fraction <= 1:
            raise SpecError(f"--mem-fraction must lie in (0, 1], got {mem_fraction}")
        self.mem_fraction = mem_fraction
        self.hardware = hardware
        self._dtypes = {"weight_dtype": weight_dtype, "act_dtype": act_dtype, "kv_dtype": kv_dtype}
        self._remembered: dict[tuple[float, float, bool], roofline.Cost] = {}
        self._drafts: dict[tuple[str, tuple[str, ...], int], Estimator] = {}

    def prefill(self, batch: Num, new_tokens: Num, context: Num = 0) -> Any:
        """Seconds of one unchunked pass over `batch` sequences of `new_tokens`, on top of `context` cached tokens."""
        ways = requests(self.techniques, Request(new_tokens, context))
        return _fastest([self._request_seconds(batch, way) for way in ways])

    def prefill_pass(self, batch: Num, new_tokens: Num, context: Num = 0) -> Any:
        """Seconds of the pass alone over tokens that are computed, whatever techniques spare a request or make it wait for."""
        return self._many(batch, new_tokens, context, is_decode=False)

    def request(self, new_tokens: Num, context: Num = 0) -> Request:
        """What techniques leave to do of a prompt of `new_tokens` behind `context` cached tokens."""
        return requests(self.techniques, Request(new_tokens, context))[0]

    def _request_seconds(self, batch: Num, request: Request) -> Any:
        """Seconds of one way to prefill: waits, passes of other models, and the pass itself with what it fetches."""
        total = self._many(batch, request.new, request.cached, is_decode=False, loads=request.loads) + request.wait
        for draft in request.before:
            new = request.new if draft.prompt else draft.new
            total = total + draft.times * self._draft(draft)._many(batch, new, request.cached, is_decode=False)
        return total

    def fetching(self, new_tokens: float) -> tuple[float, dict[str, float]]:
        """What a prompt of `new_tokens` waits for look-ups and fetched tokens beyond the pass that computes the rest [s].

        Of the fastest way; with it the seconds that each resource works which the pass alone leaves idle (links, decoders).
        """
        ways = requests(self.techniques, Request(new_tokens))
        way = min(ways, key=lambda w: float(self._request_seconds(1, w)))
        if not way.loads:
            return float(way.wait), {}
        whole, alone = (self._many(1, way.new, way.cached, is_decode=False, loads=x) for x in (way.loads, ()))
        busy, used = (
            roofline.cost(self.lower(self._phase(1.0, float(way.new), float(way.cached), False, x)).schedule, self.machine).busy
            for x in (way.loads, ())
        )
        links = {name: float(x) for name, x in busy.items() if name not in used or not float(used[name])}
        return float(whole - alone + way.wait), links

    def decode(self, batch: Num, context: Num) -> Any:
        """Seconds per token of `batch` sequences that attend `context` tokens each, the new one included.

        One decode step; of a round that emits several tokens a sequence, the seconds of all its passes per token.
        """
        if not self.techniques:
            return self._many(batch, 1, np.asarray(context) - 1, is_decode=True)
        return _fastest([self._round_seconds(r, batch, context) / r.tokens for r in rounds(self.techniques, batch)])

    def round(self, batch: Num) -> Round:
        """Passes and emitted tokens of a decode round of `batch` sequences, the longest where there is a choice."""
        return rounds(self.techniques, batch)[0]

    def round_seconds(self, batch: Num, context: Num) -> Any:
        """Seconds of all passes of one decode round, of the best one where there is a choice."""
        ways = rounds(self.techniques, batch)
        seconds = [self._round_seconds(r, batch, context) for r in ways]
        best = np.argmin(np.stack(np.broadcast_arrays(*(t / r.tokens for t, r in zip(seconds, ways, strict=True)))), axis=0)
        chosen = np.choose(best, np.broadcast_arrays(*seconds))
        return chosen if chosen.ndim else float(chosen)

    def _round_seconds(self, r: Round, batch: Num, context: Num) -> Any:
        """Seconds of one round: drafts, then the model's pass; runs in flight follow at the pace of the slowest stage.

        With f runs in the pipeline the interval is i = max(pass / f, drafts beside it). A plain run after a rejection takes
        its whole pass of one token, and the rest of a stage that a void run holds: (1 - broken) i + broken (plain + stuck i).
        """
        context = np.asarray(context)
        whole = self._many(batch, r.new, context - 1, is_decode=True)
        waited: Num = 0.0
        beside: Num = 0.0
        for draft in r.before:
            times = draft.times * (r.tokens if draft.per_token else 1)
            passes = times * self._draft_seconds(draft, batch, context)
            waited, beside = (waited, beside + passes) if draft.aside else (waited + passes, beside)
        interval = np.maximum((whole + waited) / np.minimum(r.in_flight, self.par.pp / self._micro(batch)), beside)
        if r.broken:
            plain = np.maximum(self._many(batch, 1, context - 1, is_decode=True), interval) + r.stuck * interval
            interval = (1 - r.broken) * interval + r.broken * plain
        return interval if np.ndim(interval) else float(interval)

    def _chosen(self, batch: float, new: float, context: float, is_decode: bool) -> tuple[float, Request | Round]:
        """The best way to do it with techniques, and its seconds."""
        if is_decode:
            ways = [(self._round_seconds(r, batch, context + 1), r) for r in rounds(self.techniques, batch)]
            seconds, r = min(ways, key=lambda x: x[0] / x[1].tokens)
            return float(seconds), r
        first = requests(self.techniques, Request(new, context))
        seconds, way = min(((self._request_seconds(batch, w), w) for w in first), key=lambda x: x[0])
        return float(seconds), way

    def _least(self, way: Request | Round, batch: float, context: float, least: float) -> float:
        """Lower bound with the drafts that are waited for; runs in flight share a pipeline."""
        for draft in way.before:
            if draft.techniques is not None and not draft.aside:
                runs, new = self._draft(draft), way.new if draft.prompt else draft.new
                phase = runs._phase(float(batch), float(new), float(context), isinstance(way, Round))
                times = draft.times * (way.tokens if draft.per_token and isinstance(way, Round) else 1)
                least += float(times * roofline.cost(runs.lower(phase).schedule, runs.machine).lower)
        return least / min(way.in_flight, self.par.pp / self._micro(batch)) if isinstance(way, Round) else least

    def _draft_seconds(self, draft: Draft, batch: Num, context: Any) -> Any:
        """Seconds of one pass of a draft."""
        runs = self._draft(draft)
        if draft.prompt:
            return runs._many(1, context, 0, is_decode=False)
        return runs._many(batch, draft.new, context - 1, is_decode=True)

    def _draft(self, draft: Draft) -> Estimator:
        """The estimator of a draft on this instance."""
        if draft.techniques is None:
            return self
        key = (draft.model, draft.techniques, draft.tp)
        if key not in self._drafts:
            p = self.par
            same: dict[str, Any] = {} if draft.model else self._dtypes
            self._drafts[key] = Estimator(
                draft.model or self.model, self.hardware, tp=draft.tp or p.tp, pp=1 if draft.tp else p.pp, dp=p.dp,
                cp=p.cp, engine=self.engine_name, techniques=draft.techniques, **same,
            )  # fmt: skip
        return self._drafts[key]

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

    def _many(self, batch: Num, new: Num, context: Num, *, is_decode: bool, loads: tuple[Load, ...] = ()) -> Any:
        """Evaluate over broadcast arrays: token-wise operators once per distinct (batch, new), attention per row."""
        arrays = np.broadcast_arrays(*(np.asarray(x, float) for x in (batch, new, context, *(x.tokens for x in loads))))
        flat = [a.ravel() for a in arrays]
        if flat[0].size and (flat[0].min() < 1 or flat[1].min() < 1 or flat[2].min() < 0):
            raise SpecError("batch and new tokens must be at least 1, and context at least 1 for decode, 0 for prefill")
        out = np.empty(flat[0].size)
        for start in range(0, out.size, _ROWS):
            part = [a[start : start + _ROWS] for a in flat]
            brought = tuple(replace(x, tokens=tokens) for x, tokens in zip(loads, part[3:], strict=True))
            out[start : start + _ROWS] = self._rows(*part[:3], is_decode=is_decode, loads=brought)
        result = out.reshape(arrays[0].shape)
        return result if result.ndim else float(result)

    def _rows(self, batch: Any, new: Any, context: Any, *, is_decode: bool, loads: tuple[Load, ...]) -> Any:
        if self.techniques:
            # Layers with branches side by side are costed whole: their times do not add up.
            whole = roofline.cost(self.lower(self._phase(batch, new, context, is_decode, loads)).schedule, self.machine)
            return self._finish(whole, batch, new, is_decode, self.machine)
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

    def _phase(self, batch: Num, new: Num, context: Num, is_decode: bool, loads: tuple[Load, ...] = ()) -> graph.Phase:
        n = batch / self._micro(batch)
        if is_decode and self.par.dp > 1:
            n = self._captured(np.ceil(n / self.par.dp)) * self.par.dp
        return graph.Phase((Group(n, new, context, decode=is_decode, loads=loads),))

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
        """Expected time, bounds, spread and bottleneck of one step; context in cached tokens before the step.

        With techniques: of a request as they leave it, or of a whole decode round, `beside` being what is not the pass.
        """
        whole, way = self._chosen(batch, new, context, is_decode) if self.techniques else (None, Round())
        loads = way.loads if isinstance(way, Request) else ()
        if whole is not None:
            new, context = float(way.new), float(way.cached) if isinstance(way, Request) else context
        phase = self._phase(float(batch), float(new), float(context), is_decode, loads)
        program = self.lower(phase)
        total = roofline.cost(program.schedule, self.machine)
        expected = float(self._finish(total, batch, new, is_decode, self.machine))
        passes = float(self._passes(batch, is_decode))
        host = float(self.host_seconds(batch))
        busy = {k: float(v) * passes for k, v in total.busy.items()} | {"host": host}
        if whole is not None:
            busy |= {"beside": whole - expected} if whole > expected else {}
            expected = whole
        shaken = self.machine.perturbed()
        rows = roofline.cost(program.schedule, shaken)
        seconds = np.broadcast_to(self._finish(rows, batch, new, is_decode, shaken), (len(self.machine.sigma) + 1,))
        steps = np.log(seconds[1:] / seconds[0])
        sigma = spread(steps, "decode" if is_decode else "prefill", self.machine)
        return Parts(
            expected,
            self._least(way, batch, context, float(total.lower) * passes),
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
        """Most sequences of `tokens` tokens that fit on every tier."""
        block = self.engine.block_tokens
        near = memory.most_sequences(self.model, self.par, self.formats, self.kv_free, tokens, block)
        far = memory.far_limits(self.model, self.par, self.formats, self.machine, tokens, block) if self.techniques else {}
        most = min((near, *far.values()))
        return max(0, int(most) * self.par.dp) if most < math.inf else self.engine.max_sequences

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
