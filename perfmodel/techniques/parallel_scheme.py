"""How devices that share one context or one layer exchange what they need of each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.attention import KERNELS
from perfmodel.ops.collective import collective
from perfmodel.ops.shard import Group, Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.spec.model import Attention, Model
from perfmodel.symbols import Num, maximum
from perfmodel.techniques.base import Technique, knob


class ParallelScheme(Technique):
    """Exchanges of context parallelism (degree p = cp) and of tensor parallelism.

    prefill ``ring``: p - 1 hops of KV/p (arXiv:2310.01889); ``gather``: one all-gather of KV; ``chain``: the last process
    receives what all before it made, (p - 1)/p KV in one message, half the traffic of a gather over all processes
    (KV-Runahead, arXiv:2405.05329); ``ulysses``: queries, keys and values change from tokens to heads and the outputs back,
    two all-to-alls of tokens/p x (heads + 2 kv_heads) x d and tokens/p x heads x d (arXiv:2309.14509).
    decode ``gather``: partial outputs of all; ``tree``: all-reduce of the maxima, then of numerators and denominators
    (arXiv:2408.04093); ``ring``: keys and values of p - 1 others pass by.
    even: chunks of equal length, whose last one attends most: (c + q - q/p + (q/p + 1)/2) / (c + (q + 1)/2) of the mean;
    otherwise chunks are cut so that all finish together. Unfused kernels attend whole rectangles, of equal area in a gather, and
    in a chain no further than a process's own tokens: (c + q (p + 1) / 2p) / (c + q) of the area.
    overlap: exchanges travel while attention computes.
    all_reduce ``star``: ranks send to a hub that returns the sum, 2 hops and 2 (t - 1) messages at the hub (TPI-LLM,
    arXiv:2410.00531); `start` hops to begin one, instead of those of GPU libraries.
    """

    kind: ClassVar[str] = "parallel-scheme"
    reference: ClassVar[str] = "arXiv:2310.01889"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 1

    prefill: Literal["engine", "ring", "gather", "chain", "ulysses"] = knob("engine", "how a divided prompt's keys meet")
    decode: Literal["gather", "tree", "ring"] = knob("gather", "how a divided context's attention is joined")
    even: bool = knob(False, "chunks of equal length")
    overlap: bool = knob(False, "exchanges beside attention")
    all_reduce: Literal["library", "star"] = knob("library", "how tensor-parallel sums are made")
    start: float = knob(0.0, "hops that begin a message of a star", low=0, high=20)

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        changed = self.prefill != "engine" or self.decode != "gather" or self.even or self.overlap
        if changed and par.cp == 1:
            raise SpecError("parallel-scheme: nothing divides the context; give --cp 2 or more")
        if self.all_reduce == "star" and par.tp == 1:
            raise SpecError("parallel-scheme: all_reduce=star needs ranks that add up: give --tp 2 or more")
        if self.prefill == "ulysses":
            for name, block in model.blocks.items():
                if not isinstance(block.mixer, Attention):
                    raise SpecError(f"parallel-scheme: ulysses cuts heads, and {name} layers share one latent or state")
                heads = block.mixer.heads
                if heads % (par.tp * par.cp):
                    raise SpecError(f"parallel-scheme: tp x cp = {par.tp * par.cp} does not divide the {heads} heads ({name})")

    def machine(self, machine: Machine) -> Machine:
        if self.all_reduce != "star":
            return machine
        return replace(machine, law=machine.law | {"library_hops": self.start})

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        return self._rebuilt(build(shard), shard)

    def _rebuilt(self, node: Node, shard: Shard) -> Node:
        match node:
            case Repeat():
                return replace(node, body=self._rebuilt(node.body, shard))
            case Par():
                return replace(node, branches=tuple(self._rebuilt(b, shard) for b in node.branches))
            case Seq():
                items: list[Node] = []
                for item in node.items:
                    new = self._rebuilt(item, shard)
                    if isinstance(item, Op) and item.name.startswith(("ring_kv", "cp_gather")):
                        kernels = [i for i, x in enumerate(items) if isinstance(x, Op) and x.kind in KERNELS]
                        # Where all of a context is attended elsewhere, partial outputs are gathered as ever.
                        if kernels:
                            new = self._joined(items[kernels[-1] :], item, _group(item, shard))
                            items = items[: kernels[-1]]
                    items.append(new)
                return replace(node, items=tuple(items))
            case Op():
                return _star(node) if self.all_reduce == "star" and "all_reduce" in node.shape else node

    def _joined(self, own: list[Node], exchange: Op, group: Group) -> Node:
        """An attention, operators that belong to it, and its exchange."""
        attention, *others = own
        assert isinstance(attention, Op)
        if group.decode:
            steps = self._decode(attention, exchange)
        else:
            ranks = exchange.shape["ranks"]
            unfused = any(isinstance(x, Op) and x.name.endswith("_scores") for x in others)
            if unfused and self.prefill == "chain":
                attention, *others = (_before(x, group, ranks) if isinstance(x, Op) else x for x in own)
                assert isinstance(attention, Op)
            elif self.even and not unfused and self.prefill != "ulysses":
                attention = _longest(attention, group, ranks)
            attention, steps = self._prefill(attention, exchange, group)
        if self.overlap:
            return Par((Seq((attention, *others)), Seq(steps)), ("hbm",))
        return Seq((attention, *others, *steps))

    def _prefill(self, attention: Op, exchange: Op, group: Group) -> tuple[Op, tuple[Node, ...]]:
        ranks, stride = exchange.shape["ranks"], exchange.shape["stride"]
        passed = exchange.shape["p2p"]
        whole = passed * ranks / (ranks - 1)
        match self.prefill:
            case "ring":
                return attention, (Repeat(_message("ring_hop", whole / ranks, exchange), ranks - 1),)
            case "gather":
                gather = collective("kv_gather", "all_gather", whole, 1, ranks, stride=stride)
                return attention, (replace(gather, contextual=True),)
            case "ulysses":
                return _by_heads(attention, exchange, group)
        return attention, (exchange,)

    def _decode(self, attention: Op, exchange: Op) -> tuple[Node, ...]:
        ranks, stride = exchange.shape["ranks"], exchange.shape["stride"]
        if self.decode == "tree":
            partial = exchange.shape["all_gather"] / ranks
            s = attention.shape
            maxima = collective("tree_maxima", "all_reduce", s["n"] * s["q"] * s["heads"], 4, ranks, stride=stride)
            sums = collective("tree_sums", "all_reduce", partial, 1, ranks, stride=stride)
            return replace(maxima, contextual=True), replace(sums, contextual=True)
        if self.decode == "ring":
            mine = attention.bytes("hbm", "kv")
            return (Repeat(_message("ring_hop", mine, exchange), ranks - 1),)
        return (exchange,)


def _group(op: Op, shard: Shard) -> Group:
    """The group of sequences that an exchange belongs to: its name ends with the number where there are several."""
    return shard.groups[int(op.name.rsplit("_", 1)[1]) if len(shard.groups) > 1 else 0]


def _message(name: str, size: Num, like: Op) -> Op:
    op = collective(name, "p2p", size, 1, like.shape["ranks"], stride=like.shape["stride"])
    return replace(op, contextual=True)


def _before(op: Op, group: Group, ranks: Num) -> Op:
    """Unfused attention of one process of a chain: rectangles end at its own tokens, (c + q (p + 1) / 2p) / (c + q) of all."""
    c, q = group.c, group.q
    less = (c + q * (ranks + 1) / (2 * ranks)) / (c + q)
    shape = {**op.shape, **{k: op.shape[k] * less for k in ("pairs", "elements") if k in op.shape}}
    traffic = tuple(replace(t, elements=t.elements * less) for t in op.traffic) if "elements" in op.shape else op.traffic
    return replace(op, flops={unit: f * less for unit, f in op.flops.items()}, shape=shape, traffic=traffic)


def _longest(op: Op, group: Group, ranks: Num) -> Op:
    """Attention of the last of `ranks` chunks of equal length: of the mean, more where its keys are more."""
    c, q = group.c, group.q
    more = (c + q - q / ranks + (q / ranks + 1) / 2) / (c + (q + 1) / 2)
    flops = {unit: f * more for unit, f in op.flops.items()}
    return replace(op, flops=flops, shape={**op.shape, "pairs": op.shape["pairs"] * more})


def _by_heads(op: Op, exchange: Op, group: Group) -> tuple[Op, tuple[Node, ...]]:
    """Attention over a share of the heads and all tokens, between two all-to-alls."""
    s, ranks, stride = op.shape, exchange.shape["ranks"], exchange.shape["stride"]
    tokens = s["n"] * s["q"]
    width = next(t.width for t in op.traffic if t.tensor == "activations")
    inward = tokens * (s["heads"] * s["head_dim"] + s["kv_heads"] * (s["head_dim"] + s["v_dim"]))
    outward = tokens * s["heads"] * s["v_dim"]
    steps = tuple(
        replace(collective(name, "all_to_all", elements, width, ranks, stride=stride), contextual=True)
        for name, elements in (("to_heads", inward), ("to_tokens", outward))
    )
    kept = maximum(s["kv_heads"] / ranks, 1)
    traffic = tuple(
        replace(t, elements=t.elements * kept / s["kv_heads"]) if t.tensor == "kv" else t for t in op.traffic
    )
    shape = {**s, "q": group.q, "heads": s["heads"] / ranks, "kv_heads": kept}
    return replace(op, traffic=traffic, shape=shape), steps


def _star(op: Op) -> Node:
    """An all-reduce through a hub: what the others send, and what it sends back."""
    message = op.shape["all_reduce"] * (op.shape["ranks"] - 1)
    hub = collective(f"{op.name}_star", "p2p", message, 1, op.shape["ranks"], stride=op.shape["stride"])
    return Repeat(replace(hub, contextual=op.contextual), 2)
