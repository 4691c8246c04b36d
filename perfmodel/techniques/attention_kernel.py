"""Generations of attention kernels: scores in memory or on chip, achieved rates, paged caches, uneven work."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Segment
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.calibration import Engine
from perfmodel.spec.model import Attention, Block, Model
from perfmodel.symbols import ceil, maximum
from perfmodel.techniques.base import Technique, knob


class AttentionKernel(Technique):
    """Another attention kernel than the one the device was calibrated with.

    unfused: S = Q K^T and P = softmax(S) cross memory, `passes` x n heads q (c + q) elements of `score_width` bytes in
    `kernels` more kernels, over the full rectangle (no kernel skips what the mask hides), and the products are a library's,
    which multiplies few rows on the vector units; fused kernels keep scores on chip (FlashAttention, arXiv:2205.14135).
    efficiency: share of the matrix peak inside attention; published on A100:
    0.25-0.40 for FlashAttention, 0.50-0.73 for FlashAttention-2 (arXiv:2307.08691); load_rate: the kernel's own rate of
    loads, where engines' kernels differ on one device. read_loss, compute_loss: time of the
    kernel's reads and products over those of the calibrated kernels, minus one; those read through block tables, so a kernel
    for contiguous caches has less than none (PagedAttention, arXiv:2309.06180, takes 20-26 % longer than one).
    imbalance: work of the fullest unit over the mean of a ragged batch (FlashInfer, arXiv:2501.01005, brings it to one).
    block: tokens of a cache page; its rounding enters the memory. copies: an eager framework appends by concatenation,
    which writes and reads the cache as stored (old tokens of another width stay), at `copy_rate` of a stream's rate;
    repeated: it then copies every KV head once per query head of its group, 2 x group x bytes of an activation per element,
    before attention reads them.
    packs: decode serves the query heads of a group together only in groups of this size; in others every head goes by
    itself on the vector units, where it unpacks a narrow cache anew (TensorRT-LLM 0.8: shouldUse of decoderXQARunner.h).
    mapping: host seconds a step to attach pages where that is not hidden (vAttention, arXiv:2405.04437). fast_memory M:
    tiles of M / 4 bytes of keys stay while queries and outputs pass, ceil(4 keys d w / M) times in all, the order of the
    lower bound N^2 d^2 / M (arXiv:2205.14135; arXiv:2402.07443); a causal mask spares a row the tiles behind it, and
    outputs that wait for the next tile have `partial_width` bytes an element. key_warps: each tile is shared out by keys
    among so many warps, whose partial outputs of 4 bytes are added up through shared memory at `shared_rate`, beside the
    products of another item alone: 8 x warps x rows x v_dim bytes a tile (arXiv:2307.08691, section 3.3).
    """

    kind: ClassVar[str] = "attention-kernel"
    reference: ClassVar[str] = "arXiv:2307.08691"
    cache_turn: ClassVar[int] = 3
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"

    unfused: bool = knob(False, "scores are written to memory and read again")
    passes: float = knob(4.0, "times that scores cross memory: S and P, each written and read", low=2, high=24)
    kernels: float = knob(2.0, "kernels beside the two products: softmax, mask", low=1, high=24)
    score_width: float = knob(2.0, "bytes of one score", "byte", low=1, high=8)
    efficiency: float | None = knob(None, "share of the matrix peak inside attention; none: as calibrated", low=0.01, high=1)
    load_rate: float | None = knob(None, "bytes/s one unit loads; none: as calibrated", "byte/s", low=1e6, high=1e13)
    read_loss: float = knob(0.0, "time of reading the cache over that of the calibrated kernels, minus one", low=-0.5, high=10)
    compute_loss: float = knob(0.0, "time of the products over those of a contiguous cache, minus one", low=0, high=10)
    imbalance: float = knob(1.0, "work of the fullest unit over the mean", low=1, high=64)
    block: int = knob(0, "tokens of one cache page; 0: as the engine", "token", low=0, high=65536)
    copies: float = knob(0.0, "times that a decode step copies the whole cache before attention reads it", low=0, high=8)
    copy_rate: float = knob(1.0, "rate of those copies over that of a stream", low=0.01, high=1)
    repeated: bool = knob(False, "KV heads are copied once per query head of their group, and attention reads the copies")

    packs: int = knob(0, "query heads of a KV head that decode serves together; 0: any number", low=0, high=1024)

    def cache(self, cache: Cache, site: Site) -> Cache:
        decodes = isinstance(site.new, (int, float)) and site.new == 0
        if not decodes or not (self.copies or self.repeated):
            return cache
        group = site.mixer.heads / site.tp / site.kv_heads if site.mixer.kind == "attention" else 1.0
        expanded = 2 * group * site.wide if self.repeated and group > 1 else 0.0

        def copied(s: Segment, run: Run) -> Segment:
            # Old tokens of another width were appended in groups, and a borrowed cache is not appended to.
            grown = s.owned and s.width == run.segments[-1].width
            moved = 2 * self.copies * s.width if grown else 0.0
            return replace(s, copied=s.copied + moved + expanded, lag=s.lag + moved * (1 / self.copy_rate - 1))

        return cache.each(lambda run: replace(run, segments=tuple(copied(s, run) for s in run.segments)))

    mapping: float = knob(0.0, "host seconds of a step to attach pages", "s", low=0, high=1)
    fast_memory: float = knob(0.0, "bytes on chip for the tiles of one head; 0: keys pass once", "byte", low=0, high=1e10)
    partial_width: float = knob(0.0, "bytes of an element of an unfinished output; 0: as activations", "byte", low=0, high=8)
    key_warps: int = knob(1, "warps that share out the keys of a tile and add up their outputs", low=1, high=32)
    shared_rate: float = knob(1.9e13, "bytes/s of the shared memory of all units", "byte/s", low=1e9, high=1e16)

    def engine(self, engine: Engine) -> Engine:
        if self.block:
            engine = engine.model_copy(update={"block_tokens": self.block})
        if not self.mapping:
            return engine
        base = engine.parameters["host_base"]
        longer = engine.parameters | {"host_base": base.model_copy(update={"value": base.value + self.mapping})}
        return engine.model_copy(update={"parameters": longer})

    def machine(self, machine: Machine) -> Machine:
        if self.load_rate is not None:
            machine = replace(machine, law=machine.law | {"attention_load_rate": self.load_rate})
        achieved = machine.attention_efficiency if self.efficiency is None else self.efficiency
        if self.efficiency is None and not self.compute_loss:
            return machine
        return replace(machine, attention_efficiency=achieved / (1 + self.compute_loss))

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not any(isinstance(b.mixer, Attention) for b in model.blocks.values()):
            raise SpecError(f"attention-kernel: {model.name} has no softmax attention over keys and values of its own")

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        found: list[Op] = []
        for op in ops:
            found += self._changed(op) if op.kind == "attention" else [op]
        return found

    def _changed(self, op: Op) -> list[Op]:
        slower = {k: v for k, v in (("uneven", self.imbalance), ("scattered", 1 + self.read_loss)) if v != 1}
        slower |= {"packs": float(self.packs)} if self.packs else {}
        op = replace(op, shape={**op.shape, **slower})
        if self.fast_memory and not self.unfused:
            op = self._tiled(op)
        if not self.unfused:
            return [op]
        s = op.shape
        every = s["n"] * s["q"] * s["kv_len"]
        scores = every * s["heads"]
        aside = {"vector", "exp"}
        more = every / maximum(s["pairs"], 1e-9)  # none where all keys are shared
        products = {unit: f * more for unit, f in op.flops.items() if unit not in aside}
        softmax = {unit: f * more for unit, f in op.flops.items() if unit in aside}
        traffic = (write("activations", scores * self.passes / 2, self.score_width),
                   read("activations", scores * self.passes / 2, self.score_width))  # fmt: skip
        between = Op(f"{op.name}_scores", "elementwise", softmax, traffic, {"elements": scores}, launches=self.kernels,
                     reference="arXiv:2205.14135", contextual=True)  # fmt: skip
        # Two products, each a kernel of a library, which multiplies few rows on the vector units.
        return [replace(op, flops=products, shape={**s, "pairs": every, "library": 1.0}, launches=2), between]

    def _tiled(self, op: Op) -> Op:
        """Queries and outputs pass again for every further tile of keys; warps add up their outputs at every tile."""
        s = op.shape
        wide = next(t.width for t in op.traffic if t.tensor == "activations")
        rows = s["n"] * s["q"] * s["heads"]
        seen = s["pairs"] / maximum(s["n"] * s["q"] * s["kv_len"], 1e-9)  # half where a causal mask hides the rest
        again = (ceil(4 * s["kv_len"] * s["head_dim"] * wide / self.fast_memory) - 1) * seen
        unfinished = self.partial_width or wide
        q, o = rows * again * s["head_dim"], rows * again * s["v_dim"]
        passing = (read("activations", q, wide), read("activations", o, unfinished), write("activations", o, unfinished))
        joined = 2 * 4 * self.key_warps * rows * (again + 1) * s["v_dim"] if self.key_warps > 1 else 0.0
        shape = {**s, "joined": joined / self.shared_rate} if self.key_warps > 1 else s
        return replace(op, traffic=(*op.traffic, *passing), shape=shape)
