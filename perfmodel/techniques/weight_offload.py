"""Weights outside device memory, streamed through it in every pass."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from perfmodel.machine import Machine
from perfmodel.ops.cached import copy
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, Traffic
from perfmodel.schedule import Node, Par, Repeat, Seq, operators
from perfmodel.spec.model import Block, Model
from perfmodel.symbols import Num
from perfmodel.techniques.base import Quality, Technique, knob
from perfmodel.techniques.kv_offload import require_path


class WeightOffload(Technique):
    """A share of each layer's weights lies in a farther tier and is copied to the device once per pass.

    Seconds of a layer = max(its own work, share x bytes / path rate) where it is fetched `ahead`, else the sum; the
    device has room for `window` layers. Experts stream whole, whichever tokens reach (MoE-Lens, arXiv:2504.09345).
    `block`: the batch is worked off in so many parts that share one load of a layer (FlexGen's block schedule,
    arXiv:2303.06865), each of which reads the layer from device memory again. `swapped`: the system pages memory that no
    file backs, so what comes in first pushes as much out. ZeRO-Inference (arXiv:2207.00032), TPI-LLM (arXiv:2410.00531).
    """

    kind: ClassVar[str] = "weight-offload"
    reference: ClassVar[str] = "arXiv:2303.06865"
    quality: ClassVar[Quality] = "exact"
    order: ClassVar[float] = 0.1
    excludes: ClassVar[dict[str, str]] = {
        "near-memory": "both say where the weights lie",
        "moe-offload": "both bring the experts; moe-offload:slots=0 streams all that are reached",
    }

    share: float = knob(1.0, "share of every matrix that lies outside", low=0, high=1)
    attention: float | None = knob(None, "the same for token mixers, where it differs", low=0, high=1)
    ffn: float | None = knob(None, "the same for dense feed-forward parts and routers, where it differs", low=0, high=1)
    experts: float | None = knob(None, "the same for routed experts, where it differs", low=0, high=1)
    outer: float = knob(0.0, "the same for embedding table and head", low=0, high=1)
    tier: str = knob("host", "where they lie: host, drive, remote, or a path the machine was given")
    ahead: bool = knob(True, "fetched while other layers compute")
    window: int = knob(2, "layers the device has room for beside what stays", "layer", low=1, high=1000)
    swapped: float = knob(0.0, "bytes written out for each byte fetched: 0 files, 1 memory that the system swaps", low=0, high=1)
    block: int = knob(1, "parts of the batch that share one load of a layer", "1", low=1, high=4096)

    def _share(self, name: str, tensor: str) -> float:
        """Share outside, of an operator or a stored matrix by its name."""
        given = self.experts if tensor == "experts" else self.ffn if is_ffn(name) else self.attention
        return self.share if given is None else given

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        streamed: Num = 0.0
        size: Num = 0.0
        for op in ops:
            for t in op.traffic:
                if t.path == "hbm" and t.tensor in ("weights", "experts") and t.direction == "read":
                    elements = whole_elements(op, t) * self._share(op.name, t.tensor)
                    streamed, size = streamed + elements, size + elements * t.width
        if isinstance(streamed, float) and streamed == 0:
            return ops
        ops = [again(op, self.block) for op in ops] if self.block > 1 else ops
        # One copy a layer, of weights at their mean width.
        return [*self._fetch("weight", streamed, size / streamed, aside=self.ahead), *ops]

    def _fetch(self, name: str, elements: Num, width: Num, *, aside: bool) -> list[Op]:
        """Weights on their way to the device, after those that make room for them."""
        def moved(verb: str, share: float, direction: str) -> Op:
            return copy(f"{name}_{verb}", self.tier, elements * share, width, tensor="weights", aside=aside, contextual=False,
                        direction=direction)  # fmt: skip

        out = [moved("swap", self.swapped, "write")] if self.swapped else []
        return [*out, moved("stream", 1.0, "read")]

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        return [self._outer(item) for item in items] if self.outer else items

    def _outer(self, item: Node) -> Node:
        if isinstance(item, (Op, Repeat)) or item.name not in ("embedding", "head"):
            return item
        moved = [t for op, _, _ in operators(item) for t in op.traffic if t.tensor == "weights" and t.path == "hbm"]
        elements = sum((t.elements for t in moved), start=0.0) * self.outer
        width = max((t.width for t in moved), default=1.0)
        stream = self._fetch(item.name, elements, width, aside=False)
        if self.ahead and item.name == "head":
            return Par((item, Seq(tuple(stream)) if len(stream) > 1 else stream[0]), name=item.name)
        # The rows of the table are known with the tokens only.
        return Seq((*stream, item), item.name)

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        found = []
        for r in stored:
            tensor = r.name.partition(".")[2]
            share = self._share(tensor, r.tensor) if tensor else self.outer if r.name in ("embedding", "head") else 0.0
            if r.tier != "hbm" or not share:
                found.append(r)
                continue
            if share < 1:
                found.append(replace(r, elements=r.elements * (1 - share)))
            found.append(replace(r, elements=r.elements * share, tier=self.tier))
            if tensor:
                # A window runs over layers of all kinds.
                room = min(self.window / (model.n_layers / par.pp), 1.0)
                found.append(replace(r, elements=r.elements * share * room))
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        require_path(machine, self.tier)


def is_ffn(name: str) -> bool:
    """Whether an operator or matrix belongs to a feed-forward part."""
    return any(part in name for part in ("gate", "up_proj", "down_proj", "router", "shared", "experts"))


def whole_elements(op: Op, t: Traffic) -> Num:
    """Elements of a stored matrix on this device, read or not: of routed experts also those that no token reaches."""
    if t.tensor == "experts" and "experts" in op.shape:
        return op.shape["experts"] * op.shape["n"] * op.shape["k"]
    return t.elements


def again(op: Op, parts: int) -> Op:
    """An operator run in so many parts, each of which reads the weights from device memory."""
    if not any(t.tensor in ("weights", "experts") for t in op.traffic):
        return replace(op, launches=op.launches * parts)
    traffic = tuple(
        replace(t, elements=t.elements * parts) if t.tensor in ("weights", "experts") and t.path == "hbm" else t
        for t in op.traffic
    )
    return replace(op, traffic=traffic, launches=op.launches * parts)
