"""The plan file: what is asked of the planner."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from perfmodel.spec.base import Count, Price, Spec
from perfmodel.spec.workload import Workload

Role = Literal["colocated", "prefill", "decode"]


class FleetItem(Spec):
    """A node type that may be bought or rented."""

    node: str
    max_nodes: Count | None = None
    price: Price | None = None
    """Per whole node; else from the catalogue's price lists."""


class Choices(Spec):
    """What the planner may vary."""

    roles: tuple[Role, ...] = ("colocated",)
    weight_dtype: tuple[str, ...] = ()
    """Empty: the checkpoint's own format."""
    kv_dtype: str | None = None
    tp: tuple[Count, ...] = ()
    """Empty: every power of two that fits in a node."""
    pp: tuple[Count, ...] = (1,)
    ep: tuple[Count, ...] = ()
    """Empty: none, and for a mixture of experts also ep = tp."""
    engine: str = "vllm"
    techniques: tuple[str, ...] = ()
    mem_fraction: float | None = Field(default=None, gt=0, le=1)
    tp_across_nodes: bool = False

    @model_validator(mode="after")
    def _techniques(self) -> Choices:
        if self.techniques:
            raise ValueError(f"no technique is known by the name {self.techniques[0]!r}: leave the list empty")
        return self


class PlanFile(Spec):
    """One planning job."""

    model: str
    workload: Workload
    fleet: tuple[FleetItem, ...] = Field(min_length=1)
    choices: Choices = Choices()
    objective: Literal["cost", "devices", "energy"] = "cost"
    seed: int = 1
