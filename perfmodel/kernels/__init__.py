"""One file per family of kernels: from an operator's counts and shape to seconds on each resource of a device."""

from __future__ import annotations

from collections.abc import Callable

from perfmodel.kernels.attention import attention
from perfmodel.kernels.base import STORED, Demands, streaming
from perfmodel.kernels.matrix import gemm, grouped_gemm
from perfmodel.kernels.scan import scan
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op

LAWS: dict[str, Callable[[Op, Machine], Demands]] = {
    "gemm": gemm,
    "grouped_gemm": grouped_gemm,
    "attention": attention,
    "elementwise": streaming,
    "gather": streaming,
    "scan": scan,
}

__all__ = ["LAWS", "STORED", "Demands"]
