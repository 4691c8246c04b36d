"""The input of a layer is cached instead of its keys and values, which every step computes again."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Segment, columns_share, split_newest
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.spec.model import Attention, Block, Model
from perfmodel.symbols import Num, maximum
from perfmodel.techniques.base import Technique, knob


class KvRematerialisation(Technique):
    """Cached per token and layer: hidden elements of X, or with `latent` the 2 kv_dim of X U (grouped queries).

    Bytes = elements x (bits + scale_bits / group) / 8. A step computes K and V of every cached token again: 2 hidden (2
    kv_dim / tp) FLOPs per token read and layer, or 2 kv_dim (2 kv_dim / tp) from the latents. Every tensor-parallel rank
    needs whole X. Cross-layer deltas (XQuant-CL): a layer stores its difference to the layer before at `bits`, and the
    running sum is read and written at `accumulator_bits`. XQuant (arXiv:2508.10395).
    """

    kind: ClassVar[str] = "kv-rematerialisation"
    reference: ClassVar[str] = "arXiv:2508.10395"
    cache_turn: ClassVar[int] = 1
    excludes: ClassVar[dict[str, str]] = {
        "kv-rematerialisation": "X is cached once",
        "kv-quantization": "give the bits of X to kv-rematerialisation",
        "kv-low-rank": "both decide what is cached instead of keys and values",
        "attention-layout": "a changed layout has no projections to rebuild from",
    }

    bits: float = knob(4.0, "bits of an element of X", "bit", low=1, high=16)
    group: int = knob(0, "elements that share a scale; 0: not counted", "element", low=0, high=65536)
    scale_bits: float = knob(32.0, "bits of scale and zero point of one group", "bit", low=0, high=64)
    latent: bool | None = knob(None, "down-projected X; none: where keys and values are smaller than X")
    recent: int = knob(0, "newest tokens whose keys and values are kept as they are", "token", low=0, high=1_000_000)
    accumulator_bits: float = knob(0.0, "bits of the running sum over layers that a step reads and writes; 0: none", "bit",
                                   low=0, high=32)  # fmt: skip
    unpack: float = knob(4.0, "vector operations per element of X read", "op", low=0, high=64)
    rotate: float = knob(4.0, "vector operations per key element that is rebuilt (rotary positions)", "op", low=0, high=64)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.bits < 16 else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not any(isinstance(b.mixer, Attention) for b in model.blocks.values()):
            raise SpecError(f"kv-rematerialisation: {model.name} has no key and value projections to run again")

    def _elements(self, a: Attention, hidden: Num) -> tuple[Num, Num]:
        """Elements cached per token, and inputs of the product that rebuilds a key or a value."""
        kv = a.kv_heads * a.head_dim
        latent = self.latent if self.latent is not None else 2 * kv < hidden
        return (2 * kv, kv) if latent else (hidden, hidden)

    def cache(self, cache: Cache, site: Site) -> Cache:
        if site.mixer.kind != "attention":
            return cache
        return cache.each(lambda run: self._inputs(run, site))

    def _inputs(self, run: Run, site: Site) -> Run:
        cached, inputs = self._elements(site.mixer, site.hidden)
        ratio = cached / site.kv_elements
        width = (self.bits + (self.scale_bits / self.group if self.group else 0.0)) / 8
        flops = 2 * inputs * site.kv_elements * columns_share(run.columns)
        unpack = self.unpack + self.rotate * 0.5 / ratio
        old, recent = split_newest(run.segments, self.recent) if self.recent else (list(run.segments), [])

        def of_input(s: Segment) -> Segment:
            return replace(s, elements=s.elements * ratio, width=width * s.width / site.width, rebuild=s.rebuild + flops,
                           unpack=s.unpack + unpack, copied=s.copied + 2 * self.accumulator_bits / 8)  # fmt: skip

        return replace(run, segments=(*(of_input(s) for s in old), *recent))

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        a = block.mixer
        if not isinstance(a, Attention) or a.shares_kv:
            return ops
        cached, _ = self._elements(a, shard.hidden)
        ratio = cached / (2 * maximum(a.kv_heads / shard.par.tp, 1) * a.head_dim)
        width = self.bits / 8
        done = []
        for op in ops:
            if op.name == "rope_and_cache":
                op = replace(op, traffic=tuple(
                    replace(t, elements=t.elements * ratio, width=width) if t.tensor == "kv" else t for t in op.traffic
                ))  # fmt: skip
            done.append(op)
        return done
