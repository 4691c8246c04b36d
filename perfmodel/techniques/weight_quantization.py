"""Fewer bits per weight and activation: what is stored, what is multiplied, and what unpacking costs."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.shard import Formats, Parallelism, Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.spec.formats import Format
from perfmodel.spec.model import Block, Model
from perfmodel.symbols import Num, ceil
from perfmodel.techniques.base import Technique, knob


class WeightQuantization(Technique):
    """Weights of `bits` with group scales, multiplied with activations of `act_bits`.

    bytes per weight = bits / 8 + scale_bits / (8 group). Matrix products run at the peak of the activation's width where
    the device has it; of the input channels a share `high_share` runs at `high_bits` instead (COMET, arXiv:2410.12168):
    FLOPs (1 - h) at the low and h at the high peak, the busiest unit `imbalance` over the mean. Unpacking costs `unpack`
    vector operations per weight and tile of `tile` rows, n k ceil(m / tile), a third roof (QServe, arXiv:2405.04532).
    Not `fused`, a pass of its own reads the stored weights and writes 16-bit ones, which the product reads: stored + 2 x
    16 bits cross memory (bitsandbytes; DFloat11, arXiv:2504.11651, whose entropy coding is `lossless`).
    """

    kind: ClassVar[str] = "weight-quantization"
    reference: ClassVar[str] = "arXiv:2405.04532"
    order: ClassVar[float] = 0.4
    excludes: ClassVar[dict[str, str]] = {"weight-quantization": "a weight has one number of bits"}

    bits: float = knob(4.0, "bits of a stored weight", "bit", low=1, high=16)
    group: int = knob(0, "weights that share a scale; 0: per channel, not counted", "element", low=0, high=65536)
    scale_bits: float = knob(16.0, "bits of scale and zero point of one group", "bit", low=0, high=64)
    act_bits: float = knob(16.0, "bits of the activations that meet them", "bit", low=4, high=16)
    number: Literal["int", "float"] = knob("int", "integers or floating point in the matrix units")
    high_share: float = knob(0.0, "share of the input channels whose activations have `high_bits`", low=0, high=1)
    high_bits: float = knob(8.0, "bits of those activations", "bit", low=4, high=16)
    imbalance: float = knob(1.0, "work of the busiest unit over the mean where precisions mix", low=1, high=4)
    unpack: float | None = knob(None, "vector operations per weight and row tile; none: 2 from 8 bits on, else 4, once",
                                "op", low=0, high=1024)  # fmt: skip
    tile: int = knob(128, "rows of a tile that unpacks its weights once", "1", low=1, high=1024)
    fused: bool = knob(True, "unpacked inside the product; false: a pass writes 16-bit weights")
    lossless: bool = knob(False, "an entropy code of the same weights")
    experts: bool = knob(True, "routed experts as well")
    keep: str = knob("embedding+head+router", "parts that stay at 16 bits, joined by +")

    def effects(self) -> Literal["exact", "lossy"]:
        return "exact" if self.lossless or (self.bits >= 16 and self.act_bits >= 16) else "lossy"

    def _matrix(self, bits: float) -> str:
        """Dtype of the matrix units for activations of so many bits."""
        return f"{'int' if self.number == 'int' else 'fp'}{4 if bits <= 4 else 8}"

    def formats(self, formats: Formats, machine: Machine) -> Formats:
        if self.bits >= 16 and self.act_bits >= 16:
            return formats
        narrow = self.act_bits < 16
        made = Format(f"w{self.bits:g}a{self.act_bits:g}", self.bits, self.group, self.scale_bits,
                      self._matrix(self.act_bits) if narrow else None, "technique")  # fmt: skip
        kept = tuple(dict.fromkeys((*formats.unquantized, *(p for p in self.keep.split("+") if p))))
        return replace(
            formats, weight=made, expert=made if self.experts else formats.expert, unquantized=kept, quantise=narrow
        )

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        return [x for op in ops for x in self._edited(op, shard.formats)]

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        return [self._outside(item, shard.formats) for item in items]

    def _outside(self, node: Node, f: Formats) -> Node:
        """Products outside the layers (the head, where it is not kept)."""
        match node:
            case Seq():
                parts = (self._edited(x, f) if isinstance(x, Op) else [self._outside(x, f)] for x in node.items)
                return replace(node, items=tuple(y for x in parts for y in x))
            case Par():
                return replace(node, branches=tuple(self._outside(x, f) for x in node.branches))
            case Repeat() | Op():
                return node

    def _edited(self, op: Op, f: Formats) -> list[Op]:
        stored = [t for t in op.traffic if t.tensor in ("weights", "experts") and t.path == "hbm"]
        width = f.weight.width
        if op.kind == "elementwise" and op.name.endswith(".quantise") and self.act_bits < 16:
            return [replace(op, traffic=tuple(
                replace(t, width=self._act_width()) if t.direction == "write" else t for t in op.traffic))]  # fmt: skip
        if op.kind not in ("gemm", "grouped_gemm") or not stored or abs(stored[0].width - width) > 1e-12 or width >= 2:
            return [op]
        if not self.fused:
            return self._unfused(op, f)
        elements = sum((t.elements for t in stored), start=0.0)
        flops = dict(op.flops)
        if self.unpack is not None:
            flops["vector"] = self.unpack * elements * ceil(op.shape["m"] / self.tile)
        if self.act_bits >= 16:
            return [replace(op, flops=flops)]
        # Activations have a width of their own.
        traffic = tuple(
            replace(t, width=self._act_width()) if t.tensor == "activations" and t.direction == "read" else t for t in op.traffic
        )
        op = replace(op, flops=flops, traffic=traffic)
        return self._mixed(op) if self.high_share > 0 else [op]

    def _act_width(self) -> float:
        mean = (1 - self.high_share) * self.act_bits + self.high_share * self.high_bits
        return mean / 8

    def _mixed(self, op: Op) -> list[Op]:
        """The product cut along its inputs in two, each at the peak of its activations."""
        low, high = self._matrix(self.act_bits), self._matrix(self.high_bits)
        return [self._part(op, low, low, 1 - self.high_share, 1), self._part(op, low, high, self.high_share, 0)]

    def _part(self, op: Op, was: str, dtype: str, share: float, launches: int) -> Op:
        traffic = tuple(
            replace(t, elements=t.elements * (share if t.direction == "read" else launches)) for t in op.traffic
        )
        flops = {dtype if unit == was else unit: count * share for unit, count in op.flops.items()}
        # The busiest unit works on a longer loop over k.
        shape = {**op.shape, "k": op.shape["k"] * share * self.imbalance}
        name = op.name if launches else f"{op.name}.high"
        return replace(op, name=name, traffic=traffic, flops=flops, shape=shape, launches=op.launches * launches)

    def _unfused(self, op: Op, f: Formats) -> list[Op]:
        """A pass that writes the weights in 16 bits, and the product over those."""
        wide = f.act.width
        elements = sum((t.elements for t in op.traffic if t.tensor in ("weights", "experts")), start=0.0)
        operations: Num = (self.unpack if self.unpack is not None else 2.0 if self.bits >= 8 else 4.0) * elements
        kind = next(t.tensor for t in op.traffic if t.tensor in ("weights", "experts"))
        unpacked = Op(f"{op.name}.dequantise", "elementwise", {"vector": operations},
                      (read(kind, elements, f.weight.width), write(kind, elements, wide)), {"elements": elements},
                      contextual=op.contextual)  # fmt: skip
        traffic = tuple(replace(t, width=wide) if t.tensor == kind else t for t in op.traffic)
        flops = {unit: count for unit, count in op.flops.items() if unit != "vector"}
        shape = {**op.shape, "expands": False} if "expands" in op.shape else op.shape
        return [unpacked, replace(op, flops=flops, traffic=traffic, shape=shape)]

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.act_bits < 16:
            wanted = [self.act_bits, *([self.high_bits] if self.high_share else [])]
            missing = [self._matrix(b) for b in wanted if b < 16 and not machine.native(self._matrix(b))]
            if missing:
                raise SpecError(
                    f"weight-quantization: {machine.device.name} does not multiply {missing[0]} "
                    f"(it has {', '.join(machine.matrix)}); act_bits=16 expands weights instead"
                )
            if not self.fused:
                raise SpecError("weight-quantization: weights unpacked to 16 bits meet 16-bit activations; act_bits=16")
        if self.high_share and self.act_bits >= 16:
            raise SpecError("weight-quantization: high_share mixes narrow activations; give act_bits=4 or 8")
