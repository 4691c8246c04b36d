"""Some KV heads keep only the first and the newest tokens; the others keep all."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, budgeted
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism
from perfmodel.spec.model import Attention, Model
from perfmodel.symbols import Num, ceil, minimum
from perfmodel.techniques.base import Technique, knob
from perfmodel.techniques.matrices import fullest_share, seen_share


class StreamingHeads(Technique):
    """A share of KV heads stores and reads min(T, sinks + recent + extra + kept x T) tokens.

    Tokens per head = (1 - s) T + s min(T, ...), s the share. Heads are whole: of H heads round(share x H) stream, and the
    rank with most full heads sets time and memory under tensor parallelism. With `prefill` a query of a streaming head
    meets no more keys than that. RazorAttention (arXiv:2407.15891: one compensation token, extra 1), DuoAttention
    (arXiv:2410.10819), LServe (arXiv:2502.14866), FastGen (arXiv:2310.01801: special tokens, kept), S2-attention
    (arXiv:2407.17678: strided shards, kept 1/stride).
    """

    kind: ClassVar[str] = "streaming-heads"
    reference: ClassVar[str] = "arXiv:2410.10819"
    cache_turn: ClassVar[int] = -1

    share: float = knob(0.0, "share of the KV heads that stream", low=0, high=1)
    sinks: int = knob(4, "first tokens they keep", "token", low=0, high=1_000_000)
    recent: int = knob(1024, "newest tokens they keep", "token", low=1, high=10_000_000)
    extra: int = knob(0, "further tokens that stand for the dropped ones", "token", low=0, high=1_000_000)
    kept: float = knob(0.0, "share of all tokens that they keep besides", low=0, high=1)
    prefill: bool = knob(True, "they stream in prefill too; false: they are cut after it")
    balanced: bool = knob(True, "tensor-parallel ranks get equally many; false: full heads may all be on one")

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.share else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.share and not any(isinstance(b.mixer, Attention) for b in model.blocks.values()):
            raise SpecError(f"streaming-heads: {model.name} has no KV heads (its heads share one latent, or keep a state)")

    def cache(self, cache: Cache, site: Site) -> Cache:
        if site.mixer.kind != "attention" or not self.share:
            return cache
        if site.prefilling and not self.prefill:
            return cache
        full, streaming = cache.divided(fullest_share(1 - self.share, site, self.balanced))
        most = self.sinks + self.recent + self.extra + self.kept * cache.total
        cut = [budgeted(r, ceil(most), self.sinks) for r in streaming]
        if site.prefilling:
            # Of the pairs beyond the window, a share `kept` remains.
            seen = seen_share(site, minimum(cache.total, most), self.sinks + self.recent + self.extra)
            cut = [replace(r, scored=r.scored * (self.kept + (1 - self.kept) * seen)) for r in cut]
        return replace(cache, runs=tuple(r for r in (*full, *cut) if not _none(r.heads)))


def _none(heads: Num) -> bool:
    return isinstance(heads, (int, float)) and heads <= 0
