"""The records everything else is made of: Op, Traffic and Residency. Counts are per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from perfmodel.symbols import Num

TensorKind = Literal["weights", "experts", "kv", "activations", "state", "logits"]
OpKind = Literal[
    "gemm",
    "grouped_gemm",
    "expert_passes",
    "attention",
    "latent_attention",
    "elementwise",
    "selection",
    "scan",
    "gather",
    "collective",
    "p2p",
    "copy",
    "elsewhere",
]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved by one operator: `elements` of `width` bytes over `path` (hbm, link or network)."""

    tensor: TensorKind
    elements: Num
    width: Num
    path: str = "hbm"
    direction: Literal["read", "write"] = "read"

    @property
    def bytes(self) -> Num:
        return self.elements * self.width


@dataclass(frozen=True, slots=True)
class Residency:
    """What must be stored on one device: `elements` of `width` bytes in `tier`."""

    tensor: TensorKind
    name: str
    elements: Num
    width: Num
    tier: str = "hbm"

    @property
    def bytes(self) -> Num:
        return self.elements * self.width


@dataclass(frozen=True, slots=True)
class Op:
    """One operator on one device.

    flops: FLOPs by unit: a matrix dtype (``bf16``, ``fp8`` …), ``vector`` for the SIMD units, ``exp`` for
    special-function results. shape: what efficiency depends on (m, n, k; groups; rows; message, ranks).
    launches: kernels started. reference: paper or documentation of the formula.
    """

    name: str
    kind: OpKind
    flops: Mapping[str, Num] = field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()
    shape: Mapping[str, Num] = field(default_factory=dict)
    launches: Num = 1
    reference: str = ""
    routing: Any = None
    """The mixture of experts (spec.model.Moe) whose routing decides how many nodes an all-to-all reaches."""
    contextual: bool = False
    """Depends on the cached context, not only on the new tokens."""
    on: str = ""
    """Another part of the machine that runs it (``cpu``, ``csd``, ``pim``); empty: the device."""
    aside: bool = False
    """Runs beside the other operators of its layer: a prefetch, or work elsewhere for other requests."""
    after: str = ""
    """Where it runs aside: the operator whose end it waits for (a fetch that the router decides); empty: none."""

    def bytes(self, path: str = "hbm", tensor: TensorKind | None = None) -> Num:
        """Total bytes over one path, of one tensor kind or all."""
        return sum((t.bytes for t in self.traffic if t.path == path and tensor in (None, t.tensor)), start=0)


def copied_over(op: Op) -> str:
    """The resource that a copy between the device and a farther memory keeps busy: links have lanes in each direction."""
    moved = next((t for t in op.traffic if t.path != "hbm"), op.traffic[0])
    resource = {"host": "host_link", "remote": "network"}.get(moved.path, moved.path)
    return f"{resource}_out" if moved.path in ("host", "remote") and moved.direction == "write" else resource


def read(tensor: TensorKind, elements: Num, width: Num) -> Traffic:
    """Device-memory read."""
    return Traffic(tensor, elements, width)


def write(tensor: TensorKind, elements: Num, width: Num) -> Traffic:
    """Device-memory write."""
    return Traffic(tensor, elements, width, direction="write")
