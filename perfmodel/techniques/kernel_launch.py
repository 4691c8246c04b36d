"""How many kernels a pass is cut into, what travels between them, and who starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.machine import Machine
from perfmodel.ops.shard import Shard
from perfmodel.ops.traffic import Op, Traffic
from perfmodel.schedule import EVERYTHING, Node, Par, Repeat, Seq
from perfmodel.spec.calibration import Engine, Parameter
from perfmodel.spec.model import Block
from perfmodel.symbols import Num
from perfmodel.techniques.base import Technique, edit_ops, knob

# More tokens than any step has: every step replays a captured graph.
_EVERY_STEP = 1_000_000_000
_EXCHANGES = ("collective", "p2p", "copy", "elsewhere")
# Kernels of parts of a layer as modules of Transformers write them, and the bytes they move over those of one fused kernel,
# counted in modeling_llama.py and modeling_opt.py, 4.37. The sum before a norm, then of RMSNorm the cast, square, mean, plus
# epsilon, root, product, cast and weight. Rotary: two look-ups; product, half turned and joined, product and sum of queries
# and of keys; two concatenations, which are all that models with LayerNorm are taken to do.
_RMS_NORM, _LAYER_NORM = (9.0, 5.25), (2.0, 1.25)
_ROTARY, _APPEND = (14.0, 5.0), (2.0, 1.0)
_GATED, _PLAIN = (2.0, 5 / 3), (1.0, 1.0)
_APART = {"qkv_proj": 3.0, "gate_up_proj": 2.0}
# Around the products of one expert, in a loop over those that tokens reach: its tokens gathered, activation and product, their
# routing weights looked up and multiplied, the result spread and added (modeling_mixtral.py, 4.37; DeepSeekMoE's own code).
_EXPERT = 7.0


class KernelLaunch(Technique):
    """Fusion, captured graphs or eager launches, persistent kernels, and dataflow pipelines.

    elementwise: kernels and passes over memory per element-wise operator of the engine; 0 merges all of them with their
    neighbours (arithmetic stays), several stand for an eager framework. modules: norms, rotary positions, activations and
    projections are the kernels that modules of Transformers are, e.g. 9 for a sum and its RMS norm, 3 for q, k and v; experts
    that tokens reach run one after the other, 10 kernels each.
    launches ``eager``: a step lasts max(device, launches x issue) (arXiv:2504.11750, launch-bound region); ``graph``: every
    step replays a captured graph.
    gap: a stream starts the next kernel later than a captured graph does, 3.8 us from one to the next instead of 3.4 (NVIDIA,
    Getting Started with CUDA Graphs).
    merged: share of the kernel boundaries of a layer that go (persistent kernels). dataflow: operators of a layer form one
    pipeline on chip, activations between them never reach memory and all run at once,
    T = max over resources of their sum at bytes / (bandwidth e) and FLOPs / (peak e) (SN40L, arXiv:2405.07518).
    """

    kind: ClassVar[str] = "kernel-launch"
    reference: ClassVar[str] = "arXiv:2504.11750"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 4

    elementwise: float = knob(1.0, "kernels per element-wise operator of the engine; 0: all merged", low=0, high=32)
    modules: bool = knob(False, "norms, rotary, activations, projections and experts as modules of Transformers write them")
    merged: float = knob(0.0, "share of a layer's kernel boundaries that go", low=0, high=1)
    dataflow: bool = knob(False, "a layer is one pipeline on chip")
    launches: Literal["engine", "graph", "eager"] = knob("engine", "captured graphs, single launches, or as the engine")
    issue: float | None = knob(None, "host seconds of one launch; none: as calibrated", "s", low=0, high=0.01)
    gap: float = knob(0.0, "device seconds between two kernels of a stream over those of a graph", "s", low=0, high=1e-3)
    host: float = knob(1.0, "host seconds over those of the engine on its usual processor", low=0, high=20)

    def engine(self, engine: Engine) -> Engine:
        if self.launches != "engine":
            engine = engine.model_copy(update={"graph_batch": _EVERY_STEP if self.launches == "graph" else 0})
        if self.issue is None:
            return engine
        issue = Parameter(value=self.issue, sigma=0.0, source="technique kernel-launch")
        return engine.model_copy(update={"parameters": engine.parameters | {"eager_issue": issue}})

    def machine(self, machine: Machine) -> Machine:
        if self.gap and self.launches != "graph":
            alone = self.gap / machine.law["queued_launch"]
            machine = replace(machine, kernel_latency=machine.kernel_latency + alone)
        if self.host == 1:
            return machine
        return replace(machine, law=machine.law | {"host_slowdown": machine.law["host_slowdown"] * self.host})

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        if self.modules:
            ops = edit_ops(ops, lambda op: op.name in _APART, lambda op: replace(op, launches=op.launches * _APART[op.name]))
            ops = _looped(ops)
        ops = edit_ops(ops, lambda op: op.kind == "elementwise", lambda op: self._recut(op, block))
        if self.merged:
            ops = edit_ops(ops, _kernel, lambda op: replace(op, launches=op.launches * (1 - self.merged)))
        return ops

    def _recut(self, op: Op, block: Block) -> Op:
        """One element-wise operator as several kernels, each of which reads and writes the tensor; of weights, as it is."""
        if op.traffic and not any(t.tensor == "activations" for t in op.traffic):
            return op
        kernels, passes = self._written(op, block) or (self.elementwise, self.elementwise)
        return replace(passing(op, passes), launches=op.launches * kernels)

    def _written(self, op: Op, block: Block) -> tuple[float, float] | None:
        """Kernels and passes of an operator as a module of its own; none: not one of those counted."""
        if not self.modules:
            return None
        if op.name.endswith("_norm") and "rows" in op.shape:
            return _RMS_NORM if block.norm == "rms" else _LAYER_NORM
        if op.name == "rope_and_cache":
            return _ROTARY if block.norm == "rms" else _APPEND
        if op.name == "activation":
            return _GATED if "rows" in op.shape else _PLAIN
        return None

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        node = build(shard)
        return pipelined(node) if self.dataflow else node


def _looped(ops: list[Op]) -> list[Op]:
    """Routed experts one after the other, gate and up apart."""
    found = list(ops)
    reached: Num = 0.0
    for i, op in enumerate(ops):
        if op.kind == "grouped_gemm" and op.name.startswith("experts."):
            reached = op.shape["groups"]
            found[i] = replace(op, launches=op.launches * reached * _APART.get(op.name.removeprefix("experts."), 1.0))
    return [replace(op, launches=op.launches + _EXPERT * reached) if op.kind == "expert_passes" else op for op in found]


def _kernel(op: Op) -> bool:
    return op.kind not in _EXCHANGES


def passing(op: Op, factor: Num, *, kept: str = "") -> Op:
    """Activations that an operator moves through device memory, times a factor; those in direction `kept` stay."""

    def edit(t: Traffic) -> Traffic:
        mine = t.tensor == "activations" and t.path == "hbm" and t.direction != kept
        return replace(t, elements=t.elements * factor) if mine else t

    return replace(op, traffic=tuple(edit(t) for t in op.traffic))


def pipelined(node: Node) -> Node:
    """Operators of a layer as stages of one pipeline: one launch, nothing between them in memory, all at work at once.

    What enters and leaves the layer still passes memory: the input of the first operator, the output of the last.
    """
    if isinstance(node, Par):
        return replace(node, branches=tuple(pipelined(b) for b in node.branches))
    if isinstance(node, Repeat):
        return replace(node, body=pipelined(node.body))
    if not isinstance(node, Seq):
        return node
    stages: list[Node] = []
    run: list[Op] = []
    for item in flat(node):
        if isinstance(item, Op):
            run.append(item)
        else:
            stages += [*_stage(run), pipelined(item)]
            run = []
    stages += _stage(run)
    return stages[0] if len(stages) == 1 else Seq(tuple(stages), node.name)


def flat(node: Seq) -> Iterator[Node]:
    """What runs one after the other, parts of parts included."""
    for item in node.items:
        if isinstance(item, Seq):
            yield from flat(item)
        else:
            yield item


def _stage(ops: list[Op]) -> list[Node]:
    """Operators that follow each other, as one pipeline."""
    kernels = [i for i, op in enumerate(ops) if _kernel(op)]
    if len(kernels) < 2:
        return list(ops)
    found = list(ops)
    for i in kernels:
        end = "read" if i == kernels[0] else "write" if i == kernels[-1] else ""
        laid_out = {**ops[i].shape, "stage": 1.0}
        found[i] = replace(passing(ops[i], 0.0, kept=end), launches=ops[i].launches * (i == kernels[0]), shape=laid_out)
    return [Par(tuple(found), EVERYTHING)]
