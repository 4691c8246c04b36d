"""The plan file: what is asked of the planner."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from perfmodel import units
from perfmodel.spec.base import Count, Price, Spec, Time

Role = Literal["colocated", "prefill", "decode"]


class Columns(Spec):
    """Names of a trace's columns. `where` keeps only the rows whose column has that value."""

    arrival_s: str = "arrival_s"
    input: str = "input"
    output: str = "output"
    where: dict[str, str] = {}


class Trace(Spec):
    """A request trace: CSV (optionally .gz) with arrival seconds, input and output tokens."""

    file: str
    columns: Columns = Columns()


class Lengths(Spec):
    """Fixed lengths instead of a trace."""

    input: Count
    output: Count


def _percentiles(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not re.fullmatch(r"p\d{1,2}(\.\d+)?", str(key)):
                raise ValueError(f"{key!r} is not a percentile; write it like 'p95'")
    return value


Limits = Annotated[dict[str, Time], BeforeValidator(_percentiles)]


class Objectives(Spec):
    """Latency limits by percentile of requests."""

    ttft: Limits = {}
    """Arrival to first token at the client, queueing included."""
    tpot: Limits = {}
    """(last - first token)/(output - 1) per request, KV hand-off included."""


def _rate(value: Any) -> Any:
    if value in ("peak", "mean"):
        return value
    rate = units.parse(value, "rate")
    if rate <= 0:
        raise ValueError(f"rate {value!r} must be positive")
    return rate


class Workload(Spec):
    """What arrives."""

    trace: Trace | None = None
    lengths: Lengths | None = None
    rate: Annotated[Literal["peak", "mean"] | float, BeforeValidator(_rate)] = "peak"
    """peak: the busiest five minutes of the trace; mean: the whole trace; or requests per second."""
    load: tuple[float, ...] = (1.0,)
    """Multiples of the rate to plan for; k > 1 superposes k shifted copies, which smooths bursts."""
    objectives: Objectives

    @model_validator(mode="after")
    def _one_source(self) -> Workload:
        if (self.trace is None) == (self.lengths is None):
            raise ValueError("give either 'trace' or 'lengths'")
        if self.lengths is not None and isinstance(self.rate, str):
            raise ValueError(f"rate {self.rate!r} needs a trace; with 'lengths' write a number such as \"8.5 /s\"")
        if not self.load or any(k <= 0 for k in self.load):
            raise ValueError("load must list positive multiples")
        return self


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
