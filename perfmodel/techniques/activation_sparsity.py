"""Weights that no active channel needs are not read."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency
from perfmodel.spec.model import Block, Mlp, Model
from perfmodel.symbols import Num, minimum
from perfmodel.techniques.base import Technique, knob

_INWARD = ("gate_up_proj", "up_proj")
_QKV = ("qkv_proj", "q_proj", "kv_a_proj", "q_a_proj+kv_a_proj")


class ActivationSparsity(Technique):
    """A token needs a share a = 1 - s of the channels of a matrix; a batch of T needs their union.

    union = 1 - (1 - a)^(1 + (T - 1)(1 - correlation)); bytes and FLOPs x min(1, union / efficiency), where scattered rows
    are read at `efficiency` of the rate of whole matrices. `ffn`: channels between up and down (ReLU zeros of ProSparse,
    arXiv:2402.13516): of `down` always, of `up` once the gate is known, of the gate only where a `predictor` of that
    rank chose before (Deja Vu, arXiv:2310.17157), 2 r (h + f) FLOPs a token. `inputs` and `attention`: channels of the
    input of feed-forward and attention matrices below a threshold (TEAL, arXiv:2408.14690; CHESS, arXiv:2409.01366).
    """

    kind: ClassVar[str] = "activation-sparsity"
    reference: ClassVar[str] = "arXiv:2402.13516"
    order: ClassVar[float] = 0.3

    ffn: float = knob(0.0, "share of the intermediate channels a token skips", low=0, high=1)
    inputs: float = knob(0.0, "share of the input channels of up and gate a token skips", low=0, high=1)
    attention: float = knob(0.0, "share of the input channels of q, k, v and o a token skips", low=0, high=1)
    correlation: float = knob(0.0, "1: all tokens of a batch need the same channels; 0: independent ones", low=0, high=1)
    predictor: int = knob(0, "rank of the predictor of active channels; 0: none", "1", low=0, high=65536)
    recall: float = knob(1.0, "share of the active channels a predictor finds; it names more to miss none", low=0.1, high=1)
    efficiency: float = knob(1.0, "rate of sparse products over that of whole matrices", low=0.05, high=1)

    def _union(self, skipped: float, tokens: Num) -> Num:
        """Share of a matrix that a batch reads."""
        together = 1 + (tokens - 1) * (1 - self.correlation)
        return minimum((1 - skipped**together) / self.efficiency, 1.0) if skipped else 1.0

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        dense = isinstance(block.ffn, Mlp)
        tokens = shard.tokens
        found: list[Op] = []
        for op in ops:
            if op.kind == "gemm" and dense and op.name in _INWARD:
                found += [*self._predicted(op, shard), self._inward(op, tokens)]
            elif op.kind == "gemm" and dense and op.name == "down_proj":
                found.append(_thinned(op, self._union(self._missed(), tokens)))
            elif op.kind == "gemm" and (op.name in _QKV or op.name == "o_proj"):
                found.append(_thinned(op, self._union(self.attention, tokens)))
            else:
                found.append(op)
        return found

    def _missed(self) -> float:
        """Channels skipped: a predictor of recall r names 1/r as many as are active."""
        return max(1 - (1 - self.ffn) / (self.recall if self.predictor else 1.0), 0.0)

    def _inward(self, op: Op, tokens: Num) -> Op:
        active = self._union(self._missed(), tokens)
        if op.name == "gate_up_proj" and not self.predictor:
            active = (1 + active) / 2  # the gate itself is computed whole
        elif not self.predictor:
            active = 1.0
        # Rows of inactive outputs and columns of inactive inputs are skipped alike.
        return _thinned(op, active * self._union(self.inputs, tokens))

    def _predicted(self, op: Op, shard: Shard) -> list[Op]:
        if not self.predictor or not self.ffn:
            return []
        f, outputs = shard.formats, op.shape["n"] / (2 if op.name == "gate_up_proj" else 1)
        made = [
            x for name, n, k in (("in", self.predictor, shard.hidden), ("out", outputs, self.predictor))
            for x in gemm(f"sparsity_predictor_{name}", shard.tokens, n, k, weight=f.act, act=f.act, dtype=str(f.act.matrix))
        ]  # fmt: skip
        return [*made, pointwise("sparsity_choice", shard.tokens * outputs, f.act.width, flops=2)]

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        if not self.predictor or not self.ffn:
            return stored
        found = list(stored)
        for name, count in model.block_counts().items():
            ffn = model.blocks[name].ffn
            if isinstance(ffn, Mlp):
                elements = count / par.pp * self.predictor * (model.hidden + ffn.inter / par.tp)
                # Predictors stay in 16 bits.
                found.append(Residency("weights", f"sparsity_predictor_{name}", elements, 2.0))
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if (self.ffn or self.inputs) and not any(isinstance(b.ffn, Mlp) for b in model.blocks.values()):
            raise SpecError(f"activation-sparsity: {model.name} has no dense feed-forward part; a router already picks experts")


def _thinned(op: Op, share: Num) -> Op:
    """A product that reads a share of its stored matrix."""
    if isinstance(share, float) and share == 1:
        return op
    traffic = tuple(replace(t, elements=t.elements * share) if t.tensor == "weights" else t for t in op.traffic)
    flops = {unit: count * share for unit, count in op.flops.items()}
    return replace(op, flops=flops, traffic=traffic, shape={**op.shape, "k": op.shape["k"] * share})
