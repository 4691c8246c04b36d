"""Which rank holds which experts: how even the load is, and how far tokens travel."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.moe import slowest
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency
from perfmodel.spec.model import Block, Model, Moe
from perfmodel.symbols import Num
from perfmodel.techniques.base import Quality, Technique, knob


class ExpertPlacement(Technique):
    """Experts are dealt to expert-parallel ranks by load and by what follows what.

    tokens of the fullest rank = imbalance x mean, instead of mean + sqrt(2 mean ln ranks) of random placement under even
    routing. Dispatched and combined bytes x `locality` (MoETuner, arXiv:2502.06643). `redundant` copies of popular
    experts on each rank are stored, and touched as often as others (EPLB of DeepSeek-V3, arXiv:2412.19437, 3.4).
    """

    kind: ClassVar[str] = "expert-placement"
    reference: ClassVar[str] = "arXiv:2502.06643"
    quality: ClassVar[Quality] = "exact"

    imbalance: float | None = knob(None, "tokens of the fullest rank over the mean; none: random", low=1, high=64)
    locality: float = knob(1.0, "bytes sent to other ranks over those of random placement", low=0, high=4)
    redundant: int = knob(0, "further copies of experts on each rank", "1", low=0, high=1024)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        moe, par = block.ffn, shard.par
        if not isinstance(moe, Moe):
            return ops
        mean = shard.tokens * par.dp * par.cp * moe.top_k / par.ep
        load = 1.0 if self.imbalance is None else self.imbalance * mean / slowest(mean, par.ep)
        more = 1 + self.redundant * par.ep / moe.experts
        return [self._placed(op, load, more) for op in ops]

    def _placed(self, op: Op, load: Num, more: Num) -> Op:
        if op.kind in ("grouped_gemm", "expert_passes"):
            traffic = tuple(replace(t, elements=t.elements * (more if t.tensor == "experts" else load)) for t in op.traffic)
            shape = dict(op.shape)
            if op.kind == "grouped_gemm":
                shape |= {"m": shape["m"] * load / more, "groups": shape["groups"] * more}
            if "experts" in shape:
                shape["experts"] = shape["experts"] * more if op.kind == "grouped_gemm" else shape["experts"]
            return replace(op, flops={u: f * load for u, f in op.flops.items()}, traffic=traffic, shape=shape)
        if op.name in ("dispatch", "combine") and op.kind == "collective":
            scaled = {k: op.shape[k] * self.locality for k in ("all_to_all", "held") if k in op.shape}
            traffic = tuple(replace(t, elements=t.elements * self.locality) for t in op.traffic)
            return replace(op, traffic=traffic, shape={**op.shape, **scaled})
        return op

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        found = []
        for r in stored:
            block = model.blocks.get(r.name.partition(".")[0])
            moe = block.ffn if block is not None else None
            routed = r.tensor == "experts" and isinstance(moe, Moe)
            more = 1 + self.redundant * par.ep / moe.experts if routed and isinstance(moe, Moe) else 1.0
            found.append(replace(r, elements=r.elements * more) if routed else r)
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if not any(isinstance(b.ffn, Moe) for b in model.blocks.values()):
            raise SpecError(f"expert-placement: {model.name} has no routed experts to place")
        if par.ep == 1:
            raise SpecError("expert-placement: one rank holds all experts; give --ep 2 or more")
        if self.imbalance is not None and self.imbalance > par.ep:
            raise SpecError(f"expert-placement: imbalance={self.imbalance:g} exceeds the {par.ep} ranks, its largest value")
