"""A model on devices under one engine's memory account."""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.spec.calibration import MemoryAccount
from perfmodel.spec.hardware import Device
from perfmodel.spec.model import Model


@dataclass(frozen=True)
class Instance:
    """A model on devices under one account. `total`: bytes the device reports; `context`: longest context, tokens."""

    model: Model
    par: Parallelism
    formats: Formats
    account: MemoryAccount
    architecture: str = "default"
    total: float = 0.0
    context: int | None = None
    sequences: int | None = None
    step_tokens: int | None = None
    graphs: bool = True
    flash: bool = True
    """llama.cpp: attention without a stored score matrix."""
    file: bool = False
    """Weights come from a GGUF file, whose formats differ by tensor."""

    def number(self, name: str) -> float:
        """One number of the account; what it does not name is 0."""
        found = self.account.parameters.get(name)
        return found.value if found else 0.0

    @property
    def longest(self) -> int:
        """Longest context in tokens: as set, else the model's own."""
        return self.context or self.model.max_positions or 8192

    @property
    def _large(self) -> bool:
        big = self.account.large
        return big is not None and self.total >= big.capacity and self.architecture not in big.except_architectures

    @property
    def profiled_sequences(self) -> int:
        """Sequences the sampler's buffers are reserved for."""
        if self.account.budget == "reserve":
            return self.account.sequences  # slots of requests cost a row of a table, not logits
        default = self.account.large.sequences if self.account.large and self._large else self.account.sequences
        return self.sequences or default

    @property
    def profiled_tokens(self) -> int:
        """Tokens of the step whose activations are reserved."""
        a = self.account
        if self.step_tokens:
            return self.step_tokens
        if a.large and self._large:
            return a.large.tokens
        if a.profile_tokens:
            return a.profile_tokens
        return a.profile_chunk if a.profile_most and self.longest > a.profile_most else max(self.longest, 2048)


def visible(device: Device, reported: float, account: MemoryAccount) -> float:
    """Bytes that programs see of what a device reports: a GPU's driver keeps some."""
    kept = account.parameters.get("memory_driver")
    return reported - kept.value if kept and device.vendor in ("nvidia", "amd") else reported
