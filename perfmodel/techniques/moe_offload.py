"""Routed experts in host memory, with a cache of experts on the device, prefetching, and the CPU's help."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import PrivateAttr

from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Rates, rates
from perfmodel.kernels.transfer import host_copy_seconds
from perfmodel.machine import Machine
from perfmodel.ops.cached import copy
from perfmodel.ops.gemm import gemm
from perfmodel.ops.moe import touched
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, Traffic, read, write
from perfmodel.spec.model import Block, Model, Moe
from perfmodel.symbols import Num, maximum, minimum, symbolic
from perfmodel.techniques.base import Technique, knob
from perfmodel.techniques.kv_offload import require_path

# HQQ's expansion of a 4-bit matrix in PyTorch, of each element: a packed byte holds two. Masks, shift and copies read 2.5 bytes
# and write 3.5, the difference to zero and the product with the scale 4 each.
_EXPAND_KERNELS, _EXPAND_READ, _EXPAND_WRITE = 7.0, 6.5, 7.5


class MoeOffload(Technique):
    """Experts lie in `tier`; the device holds `slots` of each layer's and gets the others when tokens need them.

    needed = experts that the pass's tokens reach (their union: E (1 - (1 - k/E)^T) under even routing), misses = needed x
    (1 - hit), or, without a given hit rate, those reached beyond the `slots` most popular, sum over i > slots of
    1 - (1 - q_i)^T with q_i = min(1, k i^-z / H) and z = `popularity`. Of the misses a share `accuracy` was fetched
    while earlier layers ran (never in the first `lead` layers; wrong guesses cross the link as well), the CPU computes
    `cpu` of the others where they lie and the rest is fetched on demand, all three side by side once the router has
    chosen: the stall is max(0, fetch, CPU) beyond the device's own experts. `balanced`: the share x of the CPU at which it
    and the link finish together, x max(b / c, F / f) = (1 - x) b / r: bytes b, FLOPs F, CPU memory c, CPU arithmetic f,
    link r, anew for every pass (Fiddler, arXiv:2402.07033; HybriMoE, arXiv:2504.05897; Fate, arXiv:2502.12224). `undivided`: of n
    misses c go to the CPU, min over c of max(c t_cpu, (n - c) t_link), n binomial (an expert is one task in HybriMoE's IV.B).
    `expanded` before every use: the device keeps few bits, and each matrix becomes 16 bits in 7 passes of PyTorch, 14 bytes an
    element (hqq/core/bitpack.py and quantize.py: two halves masked, one shifted, both copied, zero subtracted, scaled).
    """

    kind: ClassVar[str] = "moe-offload"
    reference: ClassVar[str] = "arXiv:2402.07033"
    order: ClassVar[float] = 0.1
    excludes: ClassVar[dict[str, str]] = {
        "near-memory": "experts in banks are not fetched",
    }

    slots: float = knob(0.0, "experts of each layer on the device (of each expert-parallel rank)", "1", low=0, high=100_000)
    hit: float | None = knob(None, "share of the needed experts found there; none: from slots and popularity", low=0, high=1)
    popularity: float = knob(0.0, "exponent of Zipf's law of how often experts are chosen; 0: even", low=0, high=4)
    accuracy: float = knob(0.0, "share of the misses that a predictor had fetched ahead", low=0, high=1)
    lead: int = knob(1, "layers by which the predictor is ahead", "layer", low=1, high=64)
    predictor: bool = knob(True, "the predictor is the coming layer's router, run once more")
    bits: float = knob(0.0, "bits of an expert's weight in the tier and on the way; 0: as stored", "bit", low=0, high=16)
    expanded: Literal["arrival", "use"] = knob("arrival", "few bits become 16 once, on the device, or before every use (HQQ)")
    cpu: float | Literal["balanced"] = knob(0.0, "share (0 to 1) of the remaining misses that the CPU computes, or `balanced`")
    undivided: bool = knob(False, "a balanced split deals whole experts: each is computed where it lies or fetched")
    gather: float = knob(1.0, "share of the memory rate that the CPU reaches on experts", low=0.01, high=1)
    pinned: bool = knob(False, "experts on the device never change, so that the tier keeps only the others")
    buffers: float = knob(2.0, "experts the device has room for beside the slots, to fetch into", "1", low=0, high=10_000)
    grouping: float = knob(1.0, "distinct experts over those of a random batch (tokens regrouped)", low=0.01, high=1)
    tier: str = knob("host", "where the experts lie: host, drive, remote, or a path the machine was given")

    # What a balanced split needs to know of the machine: the CPU, and bytes/s of the link.
    _cpu: Rates | None = PrivateAttr(None)
    _link: float = PrivateAttr(0.0)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.bits else "exact"

    def bound(self, model: Model, machine: Machine, par: Parallelism) -> MoeOffload:
        """A balanced split: of a batch so small that CPU and link only move bytes, x = c / (c + r)."""
        if self.cpu != "balanced":
            return self
        one = 1e9  # bytes long enough for the rate of the link
        link = one / float(host_copy_seconds(machine, one))
        there = rates("cpu", machine)
        found = self.model_copy(update={"cpu": there.bandwidth / (there.bandwidth + link)})
        found._cpu, found._link = replace(there, bandwidth=there.bandwidth * self.gather), link
        return found

    def _split(self, products: list[Op], missed: Num, needed: Num, size: Num, width: float) -> tuple[Num, Num]:
        """Share of the late misses, `size` bytes of weights of `width` bytes, that the CPU computes, and the seconds until both
        it and the link are done over those of the CPU."""
        if self._cpu is None:
            return (float(self.cpu) if self.cpu != "balanced" else 0.0), 1.0
        flops = sum((f for op in products for u, f in op.flops.items() if u not in ("vector", "exp")), start=0.0)
        there = flops * missed / maximum(needed, 1e-9)
        busy = maximum(size / self._cpu.bandwidth, there / self._cpu.rate(products[0].shape["m"], width))
        copied = size / self._link
        if self.undivided and not symbolic(copied) and not symbolic(busy):
            each = np.maximum(missed, 1e-9)
            there, done = dealt(needed, missed / np.maximum(needed, 1e-9), busy / each, copied / each)
            return there / each, done / np.maximum(there * busy / each, 1e-30)
        return copied / maximum(copied + busy, 1e-30), 1.0

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        products = [op for op in ops if op.kind == "grouped_gemm" and any(t.tensor == "experts" for t in op.traffic)]
        moe = block.ffn
        if not products or not isinstance(moe, Moe):
            return ops
        held = products[0].shape["experts"]
        needed = self._needed(moe, shard, held)
        missed = self._missed(moe, shard, held, needed)
        each = sum((op.shape["n"] * op.shape["k"] for op in products), start=0.0)
        width = self.bits / 8 if self.bits else next(t.width for t in products[0].traffic if t.tensor == "experts")
        # A wrong guess is an expert that no token reaches: a pass that needs all of them has none.
        wrong = minimum(missed * (1 - self.accuracy), maximum(held - needed, 0.0)) / maximum(missed, 1e-9)
        guessed = (1 - wrong) * maximum(1 - self.lead / shard.layers, 0.0) if self.accuracy else 0.0
        late = missed * (1 - guessed)
        share, wait = self._split(products, late, needed, late * each * width, width)
        # The predictor asks for as many experts as miss; those that were wrong crossed the link for nothing.
        early = missed * maximum(1 - self.lead / shard.layers, 0.0) if self.accuracy else 0.0 * missed
        ahead = copy("experts_ahead", self.tier, early * each, width, tensor="experts", contextual=False, aside=True)
        router = next(op.name for op in ops if "router" in op.name and "quantise" not in op.name)
        fetch = copy("experts_fetch", self.tier, late * (1 - share) * each, width, tensor="experts", contextual=False,
                     aside=True)  # fmt: skip
        found = [ahead] if self.accuracy else []
        found.append(replace(fetch, after=router))
        there = late * share / maximum(needed, 1e-9)
        if self.cpu:
            found += self._on_cpu(products, there, width, shard, router, wait)
        arrived = (missed - late * share) / maximum(needed, 1e-9)
        kept = [x for op in ops for x in (self._used(self._kept(op, there, arrived)) if op in products else [op])]
        return [*found, *self._predicted(moe, shard), *kept]

    def _used(self, op: Op) -> list[Op]:
        """A grouped product, after the passes that make its matrices 16 bits wide where they are kept in few."""
        if not 0 < self.bits < 16 or self.expanded == "arrival":
            return [op]
        elements = op.shape["groups"] * op.shape["n"] * op.shape["k"]
        matrices = 2.0 if "gate_up" in op.name else 1.0
        expand = Op(f"{op.name}.expand", "elementwise", {"vector": 6 * elements},
                    (read("experts", elements, _EXPAND_READ), write("experts", elements, _EXPAND_WRITE)),
                    {"elements": elements}, launches=_EXPAND_KERNELS * matrices * op.shape["groups"])  # fmt: skip
        return [expand, op]

    def _needed(self, moe: Moe, shard: Shard, held: Num) -> Num:
        """Distinct experts of this rank that the pass reaches."""
        tokens = shard.tokens * shard.par.dp * shard.par.cp
        return touched(moe.experts, moe.top_k, tokens) * held / moe.experts * self.grouping

    def _missed(self, moe: Moe, shard: Shard, held: Num, needed: Num) -> Num:
        if self.hit is not None:
            return needed * (1 - self.hit)
        tokens = np.asarray(shard.tokens * shard.par.dp * shard.par.cp, float)
        weight = np.arange(1, moe.experts + 1) ** -self.popularity
        chosen = np.minimum(moe.top_k * weight / weight.sum(), 1.0)
        # Every rank holds equally many of each popularity.
        outside = chosen[round(min(self.slots / held, 1.0) * moe.experts) :]
        reached = (1 - (1 - outside) ** tokens[..., None]).sum(axis=-1) * held / moe.experts
        return minimum(reached * self.grouping, needed)

    def _kept(self, op: Op, elsewhere: Num, arrived: Num) -> Op:
        """A grouped product without the experts that the CPU computes, over a regrouped batch; shares of the experts."""
        here = 1 - elsewhere
        pull = here * self.grouping
        traffic = tuple(
            replace(t, elements=t.elements * (pull if t.tensor == "experts" else here)) for t in op.traffic
        )
        shape = {**op.shape, "groups": maximum(op.shape["groups"] * pull, 1.0), "m": op.shape["m"] / self.grouping}
        flops = {unit: count * here for unit, count in op.flops.items()}
        if 0 < self.bits < 16 and self.expanded == "arrival":
            # What arrives in few bits is expanded before it is multiplied.
            elements = op.shape["groups"] * arrived * op.shape["n"] * op.shape["k"]
            flops["vector"] = flops.get("vector", 0.0) + 4 * elements
        return replace(op, flops=flops, traffic=traffic, shape=shape)

    def _on_cpu(self, products: list[Op], there: Num, width: Num, shard: Shard, router: str, wait: Num) -> list[Op]:
        """Missed experts computed where they lie, for `wait` times as long as they take; their tokens and results travel."""
        flops: dict[str, Num] = {}
        size: Num = 0.0
        for op in products:
            for unit, count in op.flops.items():
                if unit not in ("vector", "exp"):
                    flops[unit] = flops.get(unit, 0.0) + count * there
            size = size + sum((t.elements for t in op.traffic if t.tensor == "experts"), start=0.0) * there
        rows = products[0].shape["m"]
        moved = rows * products[0].shape["groups"] * there * shard.hidden
        wide = shard.formats.act.width
        work = Op("experts_on_cpu", "elsewhere", flops, (Traffic("experts", size / self.gather, width, "cpu"),),
                  {"rows": rows, "lasts": wait}, launches=0, on="cpu", aside=True, after=router)  # fmt: skip
        ways = [copy(f"tokens_{name}_cpu", "host", moved, wide, tensor="activations", direction=way, contextual=False,
                     aside=True) for name, way in (("to", "write"), ("from", "read"))]  # fmt: skip
        return [work, *(replace(way, after=router) for way in ways)]

    def _predicted(self, moe: Moe, shard: Shard) -> list[Op]:
        if not (self.accuracy and self.predictor):
            return []
        f = shard.formats
        return gemm("expert_predictor", shard.tokens, moe.experts, shard.hidden, weight=f.stored("router"), act=f.act,
                    dtype=f.compute("router"))  # fmt: skip

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        found = []
        for r in stored:
            block, _, tensor = r.name.partition(".")
            moe = model.blocks[block].ffn if tensor and block in model.blocks else None
            if r.tensor != "experts" or r.tier != "hbm" or not isinstance(moe, Moe):
                found.append(r)
                continue
            held = moe.experts / par.ep
            here = min(self.slots / held, 1.0)
            layers = model.block_counts()[block] / par.pp
            width = self.bits / 8 if self.bits else r.width
            found.append(replace(r, elements=r.elements * (1 - here if self.pinned else 1.0), width=width, tier=self.tier))
            room = min(here + (self.buffers / held / layers if here < 1 else 0.0), 1.0)
            found.append(replace(r, elements=r.elements * room, width=width if self.expanded == "use" else r.width))
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not any(isinstance(b.ffn, Moe) for b in model.blocks.values()):
            raise SpecError(f"moe-offload: {model.name} has no routed experts; weight-offload streams dense layers")
        least = max(b.ffn.top_k for b in model.blocks.values() if isinstance(b.ffn, Moe)) / par.ep * (self.hit or 0.0)
        if self.slots < least:
            raise SpecError(f"moe-offload: hit={self.hit} needs slots={math.ceil(least)} at least, got slots={self.slots:g}")
        if not isinstance(self.cpu, str) and not 0 <= self.cpu <= 1:
            raise SpecError(f"moe-offload: cpu must be `balanced` or lie in [0, 1], got {self.cpu}")
        if self.cpu:
            rates("cpu", machine)
        require_path(machine, self.tier)


_MOST_DEALT = 32
"""Experts that a pass needs, beyond which dealing whole ones costs no more than sharing them out."""


def dealt(needed: Num, rate: Num, cpu: Num, link: Num) -> tuple[Num, Num]:
    """Experts computed by the CPU and seconds until all are done, in the mean, where whole ones are dealt.

    Each of `needed` misses at the `rate`; an expert takes the CPU or the link so many seconds.
    """
    needed, rate, cpu, link = (np.asarray(x, float) for x in np.broadcast_arrays(needed, rate, cpu, link))
    number, rate = np.minimum(np.rint(needed), _MOST_DEALT), np.clip(rate, 0.0, 1 - 1e-12)
    chance = (1 - rate) ** number
    there, done = np.zeros_like(chance), np.zeros_like(chance)
    for n in range(_MOST_DEALT + 1):
        few = np.floor(n * link / np.maximum(cpu + link, 1e-30))
        more = np.minimum(few + 1, n)
        longest = [np.maximum(c * cpu, (n - c) * link) for c in (few, more)]
        there = there + chance * np.where(longest[1] < longest[0], more, few)
        done = done + chance * np.minimum(*longest)
        chance = chance * np.maximum(number - n, 0) / (n + 1) * rate / (1 - rate)
    there, done = (x * needed / np.maximum(number, 1) for x in (there, done))
    large = needed > _MOST_DEALT
    shared = needed * rate * link / np.maximum(cpu + link, 1e-30)
    return np.where(large, shared, there), np.where(large, shared * cpu, done)
