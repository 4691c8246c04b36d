"""What the planner may vary: how one instance is built, and what its router sees."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from perfmodel.spec.base import Count, Fraction, Spec
from perfmodel.spec.deployment import Routing

PlannedPolicy = Literal["chunked", "whole", "static", "layered", "split"]
PlannedRole = Literal["colocated", "prefill", "decode", "encode"]
Seen = Literal["input", "cached", "tenant", "model", "max_tokens", "images"]


class Choices(Spec):
    """Every list is a choice; the planner tries the product."""

    roles: tuple[PlannedRole, ...] = ("colocated",)
    """encode: pools of vision towers alone, which serve colocated and prefill instances that leave the encoding to them."""
    weight_dtype: tuple[str, ...] = ()
    """Empty: the checkpoint's own format. Formats narrower than that must also be named under `allow`."""
    kv_dtype: str | None = None
    allow: tuple[str, ...] = ()
    """Lossy formats and techniques that may be used."""
    tp: tuple[Count, ...] = ()
    """Empty: every power of two that fits in a node."""
    pp: tuple[Count, ...] = (1,)
    ep: tuple[Count, ...] = ()
    """Empty: none, and for a mixture of experts also all devices of the instance."""
    dp: tuple[Count, ...] = (1,)
    """Data-parallel attention ranks inside one instance, which share its experts."""
    cp: tuple[Count, ...] = (1,)
    policy: tuple[PlannedPolicy, ...] = ("chunked",)
    """Batch policies of colocated instances."""
    chunk: tuple[Count, ...] = ()
    """Tokens of a step; empty: the engine's default."""
    prefill_share: tuple[Fraction, ...] = (0.3, 0.5, 0.7)
    """Shares of the compute units for prefill that the policy `split` may take."""
    encode_share: tuple[Fraction, ...] = (0.3, 0.5, 0.7)
    """Shares of a TTFT limit that encode pools may take; the hand-off of embeddings and prefill get the rest."""
    engine: str = "vllm"
    techniques: tuple[str | tuple[str, ...], ...] = ()
    """Each item, a technique or several together, is tried beside none at all. Lossy ones must also be named under `allow`."""
    mem_fraction: float | None = Field(default=None, gt=0, le=1)
    tp_across_nodes: bool = False
    buckets: int = Field(default=4, ge=1, le=64)
    """Groups of requests that may be routed apart."""
    bucket_by: tuple[Seen, ...] = ("input",)
    """What the router sees on arrival; never the output length, which stays a distribution in each bucket."""
    routing: Literal["random", "round-robin", "least-loaded", "prefix-affine", "oracle"] = "round-robin"
    """How requests are dealt to the instances of a pool. oracle: also splits buckets by the output length, which nobody knows on
    arrival: the price of not knowing it."""
    prefix_caching: bool = False
    """Reuse cached prompt blocks; the trace must say which prompts share them."""

    @property
    def seen(self) -> tuple[Seen | Literal["output"], ...]:
        """What buckets are parted by."""
        return (*self.bucket_by, "output") if self.routing == "oracle" else self.bucket_by

    @property
    def dealt(self) -> Routing:
        """How requests are dealt inside a pool; an oracle knows lengths, and deals in turn."""
        return "round-robin" if self.routing == "oracle" else self.routing

    @model_validator(mode="after")
    def _consistent(self) -> Choices:
        if not self.roles or ("prefill" in self.roles) != ("decode" in self.roles):
            raise ValueError("roles: prefill and decode pools need each other; write [colocated], [prefill, decode] or all three")
        if "encode" in self.roles and not {"colocated", "prefill"} & set(self.roles):
            raise ValueError("encode pools serve others: add colocated, or prefill and decode, to the roles")
        if not self.encode_share or not all(0 < share < 1 for share in self.encode_share):
            raise ValueError("encode_share lists shares between 0 and 1")
        if "cached" in self.bucket_by and not self.prefix_caching:
            raise ValueError("bucket_by cached needs prefix_caching: true")
        return self
