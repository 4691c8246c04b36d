"""What runs: the pools of instances of a plan, as `plan --json` writes them and `replay`, `report` and `estimate` read them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from perfmodel.errors import SpecError
from perfmodel.spec import yaml
from perfmodel.spec.base import Count, Fraction, Natural, Spec

Role = Literal["colocated", "prefill", "decode", "encode"]
Policy = Literal["chunked", "whole", "static", "layered", "split"]
Routing = Literal["random", "round-robin", "least-loaded", "prefix-affine"]


class Route(Spec):
    """Input lengths, both ends included, and the weight with which their requests come to a pool."""

    input_tokens: tuple[float, float]
    share: float = Field(default=1.0, gt=0)


class PoolSpec(Spec):
    """Equal instances behind one router."""

    role: Role = "colocated"
    hardware: str
    """A node of the catalogue."""
    replicas: Count = 1
    tp: Count = 1
    pp: Count = 1
    ep: Count = 1
    dp: Count = 1
    cp: Count = 1
    weight_dtype: str | None = None
    """None: the checkpoint's own."""
    kv_dtype: str | None = None
    techniques: tuple[str, ...] = ()
    """Such as ``kv-quantization:bits=4`` or a preset's name (`perfmodel techniques list`)."""
    policy: Policy = "chunked"
    """How prefill and decode share the device: in chunks beside decode steps, whole prompts between them, batches that start and
    end together, one group of layers a step, or a split of its compute units."""
    encodes: bool | None = None
    """Whether its instances encode the images of their prompts themselves; None: unless there are encode pools."""
    encode_share: Fraction = 0.0
    """Of a TTFT limit, which the plan gave to encode pools; 0: this pool has nothing to do with any."""
    prefill_share: Fraction = 0.5
    """Compute units that prefill gets under the policy `split`."""
    max_batch: Natural = 0
    """Sequences an instance decodes at most; 0: the engine's default."""
    chunk: Natural = 0
    """Tokens of a step; 0: the engine's default."""
    input_tokens: tuple[float, float] | None = None
    """Input lengths the router sends here; None: all."""
    share: Fraction = 1.0
    """Share of those requests that comes here; the rest goes to the other pools of that range and role."""
    routes: tuple[Route, ...] = ()
    """In place of input_tokens and share where lengths come with different weights."""


class Deployment(Spec):
    """A model on pools of instances."""

    model: str
    engine: str = "vllm"
    pools: tuple[PoolSpec, ...] = Field(min_length=1)
    routing: Routing = "round-robin"
    """How a pool's requests are dealt to its instances."""
    prefix_caching: bool = False
    mem_fraction: float | None = Field(default=None, gt=0, le=1)
    image: tuple[Count, Count] | None = None
    """Pixels of the images that it was planned for, height and width; None: for none."""

    def fed(self, pool: PoolSpec) -> bool:
        """Whether a pool's prompts come with embeddings that an encode pool has made."""
        if pool.role not in ("colocated", "prefill") or pool.encodes:
            return False
        return pool.encodes is False or any(p.role == "encode" for p in self.pools)

    @model_validator(mode="after")
    def _whole(self) -> Deployment:
        roles = {p.role for p in self.pools}
        if ("prefill" in roles) != ("decode" in roles):
            missing = "decode" if "prefill" in roles else "prefill"
            raise ValueError(f"prefill and decode pools need each other: there is no {missing} pool")
        if "encode" not in roles and any(p.encodes is False for p in self.pools):
            raise ValueError("a pool with `encodes: false` needs an encode pool, and there is none")
        if not roles & {"colocated", "prefill"}:
            raise ValueError("no pool takes requests: add a colocated or a prefill pool")
        return self


def read(path: str | Path) -> Deployment:
    """The deployment in a plan's JSON (its key `deployment`), or a file that is one. Raises SpecError with the line."""
    document = yaml.read(path)
    if isinstance(document.data, dict) and "deployment" in document.data:
        document = document.part("deployment")
    elif isinstance(document.data, dict) and {"fleet", "workload"} & set(document.data):
        raise SpecError(
            "this is a planning job, not a plan: run `perfmodel plan` on it and give the plan.json it writes",
            file=document.file, line=1,
        )  # fmt: skip
    return yaml.validate(document, Deployment)
