"""One file per family of kernels: from an operator's counts and shape to seconds on each resource of a device."""

from __future__ import annotations

from collections.abc import Callable

from perfmodel.kernels.attention import attention
from perfmodel.kernels.base import STORED, Demands, stage, streaming
from perfmodel.kernels.grouped import expert_passes, grouped_gemm
from perfmodel.kernels.latent import latent_attention
from perfmodel.kernels.matrix import gemm
from perfmodel.kernels.scan import scan
from perfmodel.kernels.selection import selection
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op

LAWS: dict[str, Callable[[Op, Machine], Demands]] = {
    "gemm": gemm,
    "grouped_gemm": grouped_gemm,
    "expert_passes": expert_passes,
    "attention": attention,
    "latent_attention": latent_attention,
    "elementwise": streaming,
    "gather": streaming,
    "scan": scan,
    "selection": selection,
    "stage": stage,
}

__all__ = ["LAWS", "STORED", "Demands"]
