"""What a check says: one finding with its reason and number, and a report of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Finding:
    """error: the server will not start, or not as meant. warning: it wastes or risks something. info: worth knowing."""

    severity: Severity
    code: str
    message: str
    option: str | None = None
    """The word of the command it is about."""
    number: float | None = None
    """What it costs, in the message's unit (base SI)."""
    fix: tuple[tuple[str, str | None], ...] = ()
    """(setting, new value as its option takes it); None removes the option."""


@dataclass(frozen=True)
class Fit:
    """What the command will hold, per device in bytes and per data-parallel rank in tokens."""

    devices: int
    device: str
    weights: float
    activations: float
    overhead: float
    graphs: float
    kv_pool: float
    """Bytes left for keys, values and states; negative: the weights do not fit."""
    visible: float
    kv_tokens: int
    ranks: int
    context: int
    concurrency_at_context: float
    """Sequences of the longest context that fit, all ranks together."""
    lengths: tuple[int, int] | None
    """(prompt, output) tokens of the workload."""
    concurrency_at_lengths: float | None
    limit_sequences: int
    """Sequences the scheduler runs at once, all ranks together."""
    step_tokens: int
    binding: str
    """memory, scheduler or compute: what stops one more request."""
    binding_why: str


@dataclass(frozen=True)
class Report:
    """Everything about one command."""

    command: str
    engine: str
    model: str | None
    hardware: str | None
    fit: Fit | None
    findings: tuple[Finding, ...]
    better: str | None
    """A command without the errors and wastes; None where nothing would change."""
    source: dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> Severity | None:
        """Severity of the gravest finding."""
        return min((f.severity for f in self.findings), key=lambda s: _ORDER[s], default=None)

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """Gravest first, otherwise as found, each once."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda f: _ORDER[f.severity]))
