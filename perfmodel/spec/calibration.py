"""What hardware achieves: parameters shared by all devices, by a class, by one device, and by an engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perfmodel.spec.base import Natural, Spec


class Parameter(Spec):
    """One physical number in base SI, its spread (standard deviation of its logarithm), and where it is from."""

    value: float
    sigma: float = Field(ge=0)
    meaning: str = ""
    source: str


class Law(Spec):
    """Parameters shared by every device."""

    kind: Literal["law"]
    parameters: dict[str, Parameter]
    residual: dict[Literal["prefill", "decode"], float]
    """Spread of what the law itself cannot explain, as a standard deviation of the logarithm."""


class Classes(Spec):
    """Priors by architecture, memory technology and link technology; `default` serves a class without an entry."""

    kind: Literal["classes"]
    architecture: dict[str, dict[str, Parameter]]
    memory: dict[str, dict[str, Parameter]]
    link: dict[str, dict[str, Parameter]]


class Engine(Spec):
    """Host behaviour and memory accounting of one serving engine."""

    title: str
    documentation: str
    parameters: dict[str, Parameter]
    chunk_tokens: Natural
    """Default limit of tokens in one step (vLLM: max_num_batched_tokens)."""
    max_sequences: Natural
    """Default limit of sequences in one step."""
    memory_fraction: float = Field(gt=0, le=1)
    """Share of device memory the engine plans with (vLLM: gpu_memory_utilization)."""
    block_tokens: Natural
    """Tokens in one KV block."""
    graph_batch: Natural
    """Largest decode batch replayed from a captured graph; 0: no graphs."""


class Engines(Spec):
    """All engines."""

    kind: Literal["engines"]
    engines: dict[str, Engine]


class DeviceCalibration(Spec):
    """Fitted parameters of one device that replace its class priors."""

    kind: Literal["device"]
    device: str
    stack: str
    date: str
    rows: Natural
    parameters: dict[str, Parameter]
