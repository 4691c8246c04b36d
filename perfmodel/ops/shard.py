"""What an operator builder needs to know about one device's share of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfmodel.spec.formats import Format, get_format
from perfmodel.spec.model import Model
from perfmodel.symbols import Num, maximum, minimum


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Degrees of an instance: devices = tp * pp * dp * cp; ep divides tp * dp * cp and adds none."""

    tp: Num = 1
    pp: Num = 1
    dp: Num = 1
    ep: Num = 1
    cp: Num = 1
    sequence: bool = False
    """Sequence parallelism (arXiv:2205.05198): norms are cut over tp, all-reduces become reduce-scatter and all-gather."""

    @property
    def devices(self) -> Num:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def group(self) -> Num:
        """Devices of one pipeline stage: those that share the experts."""
        return self.tp * self.dp * self.cp

    @property
    def moe_tp(self) -> Num:
        """Over how many devices each expert is cut."""
        return self.group / self.ep


@dataclass(frozen=True, slots=True)
class Load:
    """Cached tokens of each sequence that a farther tier holds and that a pass fetches, layer by layer."""

    tokens: Num
    tier: str
    ratio: Num = 1.0
    """Bytes on the way over bytes as the device stores them."""
    page: Num = 0.0
    """Bytes of one contiguous piece; 0: a layer at once."""
    ahead: bool = True
    """The next layer's are fetched while this one computes; else every layer waits for its own."""
    codec: str = ""
    """Part of the machine that decodes what arrives."""


@dataclass(frozen=True, slots=True)
class Group:
    """n sequences that each bring q new tokens on top of c cached ones.

    Step i of q attends c + i tokens. Under context parallelism a `decode` group keeps its new tokens whole
    and its cached context is divided; other groups have their new tokens divided.
    """

    n: Num
    q: Num
    c: Num
    decode: bool = False
    loads: tuple[Load, ...] = ()

    @property
    def tokens(self) -> Num:
        return self.n * self.q

    def pairs(self, window: Num | None, causal: bool) -> Num:
        """Query-key pairs one head evaluates, all sequences: n * sum over i of min(c + i, window).

        Not causal: the full rectangle n * q * (c + q), which is what instrumented counters see.
        """
        if not causal:
            return self.n * self.q * (self.c + self.q)
        if window is None:
            return self.n * (self.q * self.c + self.q * (self.q + 1) / 2)
        return self.n * (_windowed(self.c + self.q, window) - _windowed(self.c, window))

    def visible(self, window: Num | None) -> Num:
        """Cached and new tokens whose keys and values are read: the whole context, or the window's union."""
        total = self.c + self.q
        return self.n * (total if window is None else minimum(total, window + self.q - 1))


def _windowed(x: Num, window: Num) -> Num:
    """Sum of min(j, window) for j = 1..x."""
    inside = minimum(x, window)
    return inside * (inside + 1) / 2 + maximum(x - window, 0) * window


@dataclass(frozen=True, slots=True)
class Formats:
    """Widths and arithmetic of one run. `*_width` are bytes per element, possibly arrays or symbols."""

    weight: Format
    expert: Format
    act: Format
    kv: Format
    unquantized: tuple[str, ...] = ()
    """Parts kept in the 16-bit activation format."""
    quantise: bool = False
    """Activations are cast to the weight format before each linear (W8A8, W4A4)."""
    state_width: Num = 4
    """Recurrent state is kept in FP32 by all engines we know."""
    techniques: tuple[Any, ...] = ()
    """What edits how tensors are stored, read and placed (perfmodel.techniques), in order."""

    def stored(self, part: str) -> Format:
        """Storage format of a part of the model."""
        if part == "experts":
            return self.expert
        alias = {"latent": "attention", "ssm": "attention", "norm": "router", "other": "router"}
        return self.act if alias.get(part, part) in self.unquantized or part == "norm" else self.weight

    def compute(self, part: str) -> str:
        """Matrix dtype in which a part is multiplied."""
        stored = self.stored(part)
        if self.quantise and stored.matrix is not None and stored.width < self.act.width:
            return stored.matrix
        return str(self.act.matrix)


def checkpoint_formats(model: Model) -> Formats:
    """Formats as the checkpoint stores them, whatever the machine; keys and values in 16 bits unless the model says."""
    stored = get_format(model.dtype)
    expert = get_format(model.expert_dtype or model.dtype)
    act = stored if stored.width >= 2 else get_format("bf16")
    cache = get_format(model.kv_dtype or ("bf16" if act.width > 2 else act.name))
    quantised = stored.width < act.width or expert.width < act.width
    return Formats(stored, expert, act, cache, model.unquantized if quantised else ())


@dataclass(frozen=True, slots=True)
class Shard:
    """One device's view of a forward pass."""

    hidden: Num
    groups: tuple[Group, ...]
    """Sequences of one data-parallel rank, with all their new tokens."""
    par: Parallelism
    formats: Formats
    causal: bool = True
    block: str = ""
    """Kind of layer the operators belong to, and how many layers of it are alike."""
    layers: Num = 1
    model: Any = None
    """The model whole, for techniques that edit a pass rather than a layer."""
    absorbed: bool = False
    """Latent attention multiplies the up-projections into queries and outputs instead of expanding the cache."""

    @property
    def tokens(self) -> Num:
        """New tokens this device computes in token-wise operators."""
        return sum((self.local(g) for g in self.groups), start=0)

    def local(self, group: Group) -> Num:
        """New tokens of one group on this device: context parallelism divides prefill, not decode."""
        return group.tokens if group.decode else group.tokens / self.par.cp
