"""Attention on some devices, feed-forward layers on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Path, Rates
from perfmodel.machine import Machine
from perfmodel.ops.cached import copy
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, Traffic
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.spec.model import Model, Moe
from perfmodel.techniques.base import Technique, knob

_POOL = "ffn-pool"
_WAY = "ffn-link"
_FFN = ("gate_proj", "up_proj", "down_proj", "experts.", "shared", "router")
_BETWEEN = "post_norm"


class AttentionFfnSplit(Technique):
    """Attention devices hand the normed input of every feed-forward part to a pool of devices that holds its weights.

    Each of the pool's `ffn` devices per attention device does 1/ffn of the feed-forward work; `copies` tokens x hidden go
    there and tokens x hidden return, once a layer. The batch goes as `micro` micro-batches (weights are read for each):
    1: T = attention + transfer + ffn; 2: T = max(attention, ffn) + transfer; 3 or more hide the transfers too,
    T = max of the three (MegaScale-Infer, arXiv:2504.02263; Step-3, arXiv:2507.19427). Devices of the pool are like those
    of the instance; a mean of micro-batches is timed, without the first and last of a pass.
    """

    kind: ClassVar[str] = "attention-ffn-split"
    reference: ClassVar[str] = "arXiv:2504.02263"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 3
    excludes: ClassVar[dict[str, str]] = {
        "nano-batching": "both divide the batch to overlap it: give `micro` alone",
        "moe-offload": "the devices of the pool hold the experts that they compute",
        "weight-offload": "the devices of the pool hold the feed-forward weights that they compute",
    }

    ffn: float = knob(1.0, "feed-forward devices per attention device", low=0.01, high=100)
    micro: int = knob(3, "micro-batches in turn", low=1, high=64)
    copies: float = knob(1.0, "copies of a token that are sent: devices its experts lie on", low=1, high=64)
    dtype: str = knob("bf16", "arithmetic of the feed-forward matrices")
    bandwidth: float | None = knob(None, "bytes/s per direction; none: of network or link", "byte/s", low=1, high=1e15)
    latency: float | None = knob(None, "seconds of one message; none: of network or link", "s", low=0, high=10)

    def clash(self, other: Technique) -> str:
        banks = other.kind == "near-memory" and getattr(other, "place", "") != "attention"
        return super().clash(other) or ("the pool multiplies with weights of its own: place=attention" if banks else "")

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        for name, block in model.blocks.items():
            if block.mixer is None or block.ffn is None or block.parallel or block.norms < 2:
                raise SpecError(
                    f"attention-ffn-split: {name} layers of {model.name} have no feed-forward part that follows attention and "
                    "a norm of its own"
                )
        if self.copies > 1 and not any(isinstance(b.ffn, Moe) for b in model.blocks.values()):
            raise SpecError(f"attention-ffn-split: {model.name} has no experts; copies must be 1")

    def machine(self, machine: Machine) -> Machine:
        far = machine.network > 0
        wide = machine.network * machine.network_efficiency if far else machine.link * machine.link_efficiency
        latency = machine.network_latency if far else machine.link_latency
        way = Path(
            float(wide) if self.bandwidth is None else self.bandwidth,
            float(wide) if self.bandwidth is None else self.bandwidth,
            float(latency) if self.latency is None else self.latency,
        )
        pool = Rates(
            machine.bandwidth * float(machine.bandwidth_efficiency),
            float(machine.matrix_rate(self.dtype)),
            float(machine.kernel_latency),
        )
        return replace(machine, elsewhere=machine.elsewhere | {_POOL: pool}, paths=machine.paths | {_WAY: way})

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        def moved(r: Residency) -> bool:
            block, _, name = r.name.partition(".")
            return block in model.blocks and name.startswith(_FFN)

        return [replace(r, tier=_POOL) if moved(r) else r for r in stored]

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        groups = tuple(replace(g, n=g.n / self.micro) for g in shard.groups)
        part = replace(shard, groups=groups)
        whole = build(part)
        node, *others = whole.branches if isinstance(whole, Par) else (whole,)
        if not isinstance(node, Seq):
            raise SpecError("attention-ffn-split needs a layer whose operators follow each other; give it before other schedules")
        cut = 1 + next(i for i, x in enumerate(node.items) if isinstance(x, Op) and x.name == _BETWEEN)
        attention: Node = Seq(node.items[:cut], "attention")
        pool = Seq(tuple(self._there(x) for x in node.items[cut:]), "ffn")
        hidden, width = part.tokens * shard.hidden, shard.formats.act.width
        there = copy("to_ffn", _WAY, hidden * self.copies, width, tensor="activations", direction="write", contextual=False)
        back = copy("from_ffn", _WAY, hidden, width, tensor="activations", contextual=False)
        hops = Seq((there, back), "hand-over")
        if others:
            attention = Par((attention, *others), ("hbm", "host_link"))
        lanes = [Repeat(x, self.micro) for x in (attention, pool, hops)]
        if self.micro == 1:
            return Seq(tuple(lanes))
        if self.micro == 2:
            return Seq((Par(tuple(lanes[:2])), lanes[2]))
        return Par(tuple(lanes))

    def _there(self, node: Node) -> Node:
        """A feed-forward operator on one device of the pool; sums over tensor-parallel ranks stay among its devices."""
        if not isinstance(node, Op) or node.kind in ("collective", "p2p"):
            return node
        flops = {u: f / self.ffn for u, f in node.flops.items() if u not in ("vector", "exp")}
        traffic = tuple(Traffic(t.tensor, t.elements / self.ffn, t.width, _POOL, t.direction) for t in node.traffic)
        return replace(node, kind="elsewhere", flops=flops, traffic=traffic, shape={}, launches=0, on=_POOL)
