"""Fine-tunes that share a base model: low-rank adapters, and adapters that replace a few experts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cached import copy
from perfmodel.ops.moe import touched
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.parameters import block_weights
from perfmodel.spec.model import Block, Model, Moe
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Technique, knob

_ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj")
_FFN = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class LoraAdapters(Technique):
    """A batch mixes requests of several low-rank adapters over one base model (S-LoRA, arXiv:2311.03285).

    Of an adapted matrix of k inputs and n outputs: FLOPs a token = 2 r (k + n), elements read = d r (k + n), in two
    grouped products over the d distinct adapters of the batch (d given, or N (1 - (1 - 1/N)^B) of N hosted ones).
    `resident` of them lie on the device, the others in host memory; a share `cold` of d crosses the host link in a pass,
    ahead of use.
    """

    kind: ClassVar[str] = "lora-adapters"
    reference: ClassVar[str] = "arXiv:2311.03285"
    repeats: ClassVar[bool] = True
    order: ClassVar[float] = 0.2
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"

    rank: int = knob(16, "rank of an adapter", "1", low=1, high=4096)
    adapters: int = knob(1, "adapters hosted", "1", low=0, high=1_000_000)
    distinct: float = knob(0.0, "distinct adapters in a batch (no more than sequences); 0: as even requests give", "1", low=0,
                           high=1_000_000)  # fmt: skip
    resident: int | None = knob(None, "adapters with room on the device; none: all hosted", "1", low=0, high=1_000_000)
    matrices: Literal["attention", "ffn", "all"] = knob("attention", "matrices that have adapters")
    width: float = knob(2.0, "bytes of an adapter's element", "byte", low=0.25, high=4)
    cold: float = knob(0.0, "share of the distinct adapters fetched from host memory in a pass", low=0, high=1)
    ahead: bool = knob(True, "fetched beside the layer before")

    def _adapted(self, name: str) -> bool:
        names = {"attention": _ATTENTION, "ffn": _FFN, "all": _ATTENTION + _FFN}[self.matrices]
        return any(part in names for part in name.split("+"))

    def _in_batch(self, shard: Shard) -> Num:
        sequences = sum((g.n for g in shard.groups), start=0.0)
        found = minimum(self.distinct, self.adapters) if self.distinct else touched(self.adapters, 1, sequences)
        return minimum(found, sequences)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        if not self.adapters:
            return ops
        distinct = self._in_batch(shard)
        found: list[Op] = []
        fetched: Num = 0.0
        for op in ops:
            found.append(op)
            if op.kind == "gemm" and self._adapted(op.name):
                m, n, k = op.shape["m"], op.shape["n"], op.shape["k"]
                found += [self._product(f"{op.name}.lora_a", m, self.rank, k, distinct, shard),
                          self._product(f"{op.name}.lora_b", m, n, self.rank, distinct, shard)]  # fmt: skip
                fetched = fetched + self.cold * distinct * self.rank * (n + k)
        if self.cold and len(found) > len(ops):
            found.insert(0, copy("adapters_fetch", "host", fetched, self.width, tensor="weights", contextual=False,
                                 aside=self.ahead))  # fmt: skip
        return found

    def _product(self, name: str, m: Num, n: Num, k: Num, distinct: Num, shard: Shard) -> Op:
        """Rows gathered by adapter: one small product each, in one kernel."""
        act = shard.formats.act
        traffic = (
            read("weights", distinct * n * k, self.width), read("activations", m * k, act.width),
            write("activations", m * n, act.width),
        )  # fmt: skip
        shape = {"m": m / maximum(distinct, 1.0), "n": n, "k": k, "groups": maximum(distinct, 1.0)}
        return Op(name, "grouped_gemm", {str(act.matrix): 2 * m * n * k}, traffic, shape, reference=self.reference)

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        one = adapter_elements(model, self._adapted) * self.rank / (par.tp * par.pp)
        here = self.adapters if self.resident is None else min(self.resident, self.adapters)
        found = [("adapters", here, "hbm"), ("adapters", self.adapters - here, "host")]
        return [*stored, *(Residency("weights", name, many * one, self.width, tier) for name, many, tier in found if many)]

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not adapter_elements(model, self._adapted):
            raise SpecError(f"lora-adapters: {model.name} has no {self.matrices} matrices to adapt; matrices=all or attention")
        here = self.adapters if self.resident is None else self.resident
        if here < self.adapters and not machine.host_link:
            raise SpecError("lora-adapters: adapters outside the device need a host link; resident= all of them")


def adapter_elements(model: Model, adapted: object) -> float:
    """Elements of one adapter of rank 1 over the whole model: inputs and outputs of every adapted matrix.

    Llama-2-7B, q, k, v, o of 4096 x 4096 in 32 layers: 4 x 8192 x 32 = 1,048,576; at rank 16 in 16 bits 33.6 MB.
    """
    assert callable(adapted)
    total = 0.0
    for name, count in model.block_counts().items():
        for w in block_weights(model.blocks[name], model.hidden):
            if w.matrix and w.part != "experts" and adapted(w.name):
                total += count * w.copies * (w.rows + w.cols)
    return total


class ExpertAdapters(Technique):
    """Fine-tunes that replace a few experts of each layer share all other weights (ExpertWeave, arXiv:2508.17624).

    stored = base + N e expert bytes per layer. Experts touched in a pass = those of the base by tokens that were not
    rerouted + those of each adapter: E (1 - (1 - k/E)^(T (1 - e/E))) + N e (1 - (1 - k/E)^(T/N)). `reroute` index
    operations per token and choice map choices to an adapter's experts.
    """

    kind: ClassVar[str] = "expert-adapters"
    reference: ClassVar[str] = "arXiv:2508.17624"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"

    adapters: int = knob(0, "fine-tunes hosted beside each other", "1", low=0, high=10_000)
    replaced: float = knob(4.0, "experts of each layer that one of them replaces", "1", low=0, high=4096)
    reroute: float = knob(8.0, "index operations per token and choice", "op", low=0, high=1e6)
    launches: float = knob(1.0, "kernels that reroute, per layer", "1", low=0, high=100)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        moe, par = block.ffn, shard.par
        if not isinstance(moe, Moe) or not self.adapters:
            return ops
        tokens = shard.tokens * par.dp * par.cp
        replaced = min(self.replaced, moe.experts)
        base = touched(moe.experts, moe.top_k, tokens * (1 - replaced / moe.experts))
        own = self.adapters * touched(moe.experts, moe.top_k, tokens / self.adapters) * replaced / moe.experts
        more = maximum((base + own) / touched(moe.experts, moe.top_k, tokens), 1.0)
        held = 1 + self.adapters * replaced / moe.experts
        choices = tokens * moe.top_k / par.ep
        traffic = (read("activations", choices, 4), write("activations", choices, 4))
        mapped = Op("reroute", "elementwise", {"vector": self.reroute * choices}, traffic, {"elements": choices},
                    launches=self.launches)  # fmt: skip
        found = [_spread(op, more, held) if op.kind == "grouped_gemm" else op for op in ops]
        at = next(i for i, op in enumerate(found) if op.kind == "expert_passes")
        return [*found[:at], mapped, *found[at:]]

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        found = []
        for r in stored:
            block = model.blocks.get(r.name.partition(".")[0])
            moe = block.ffn if block is not None else None
            if r.tensor == "experts" and isinstance(moe, Moe):
                r = replace(r, elements=r.elements * (1 + self.adapters * min(self.replaced, moe.experts) / moe.experts))
            found.append(r)
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not any(isinstance(b.ffn, Moe) for b in model.blocks.values()):
            raise SpecError(f"expert-adapters: {model.name} has no routed experts; lora-adapters serves dense models")


def _spread(op: Op, more: Num, held: Num) -> Op:
    """A grouped product over `more` times as many touched experts, of `held` times as many stored ones."""
    if not any(t.tensor == "experts" for t in op.traffic):
        return op
    traffic = tuple(replace(t, elements=t.elements * more) if t.tensor == "experts" else t for t in op.traffic)
    shape = {**op.shape, "groups": op.shape["groups"] * more, "m": op.shape["m"] / more}
    if "experts" in shape:
        shape["experts"] = shape["experts"] * held
    return replace(op, traffic=traffic, shape=shape)
