"""Fewer prompt tokens: image tokens pruned or merged, before the model or from a layer on; prompts compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel import catalog
from perfmodel.ops.cache import Cache, budgeted
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.schedule import Node
from perfmodel.spec.model import Model
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Companion, Draft, Quality, Request, Technique, knob


class TokenReduction(Technique):
    """Of `tokens` prompt tokens that follow the first `after`, the share `keep` goes on; the rest is neither computed
    nor cached in the layers beyond `spare_layers`.

    In those layers q' = q - (1 - keep) x overlap, and T' likewise. With spare_layers 0 they are dropped before the model
    (a projector that pools, prompt compression by a `compressor` that reads them first: LLMLingua, arXiv:2310.05736);
    else after that layer (FastV, arXiv:2403.06764). `selection`: scores that choose, unfused, once in the pass: of the
    last query, of all pairs, or of half with half (token merging, arXiv:2210.09461).
    """

    kind: ClassVar[str] = "token-reduction"
    reference: ClassVar[str] = "arXiv:2403.06764"
    repeats: ClassVar[bool] = True
    # Its positions are those of the prompt, before evictions.
    cache_turn: ClassVar[int] = -2

    tokens: int = knob(0, "prompt tokens that can be dropped, as those of images", "token", low=0, high=10_000_000)
    after: int = knob(0, "tokens before them", "token", low=0, high=10_000_000)
    keep: float = knob(1.0, "share of them that goes on", low=0, high=1)
    selection: Literal["none", "last", "halves", "pairs"] = knob("none", "scores that choose")
    compressor: str = knob("", "model that reads the tokens first, by catalogue name")

    def effects(self) -> Quality:
        return "exact" if self.keep == 1 else "lossy"

    def _dropped(self, begin: Num, end: Num) -> Num:
        """Tokens dropped among those from `begin` to `end`."""
        inside = maximum(minimum(end, self.after + self.tokens) - maximum(begin, self.after), 0)
        return (1 - self.keep) * inside

    def shortened(self, group: Group) -> Group:
        if group.decode or not self.tokens or self.keep == 1:
            return group
        return replace(group, q=maximum(group.q - self._dropped(group.c, group.c + group.q), 1))

    def cache(self, cache: Cache, site: Site) -> Cache:
        if not self.tokens or self.keep == 1:
            return cache
        kept = cache.total - self._dropped(0, cache.total)
        return cache.each(lambda run: budgeted(run, kept, self.after))

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        if self.selection == "none" or not self.tokens or self.keep == 1:
            return items
        return [*items, *(self._scores(i, g, shard) for i, g in enumerate(shard.groups) if not g.decode)]

    def _scores(self, i: int, group: Group, shard: Shard) -> Op:
        """Scores of one layer: 2 h FLOPs a pair on this device's heads, written and read once."""
        among = minimum(group.q, self.tokens)
        pairs = group.n * {"last": among, "halves": among**2 / 4, "pairs": among**2}[self.selection]
        unit = str(shard.formats.act.matrix)
        flops = {unit: 2 * shard.hidden / shard.par.tp * pairs, "vector": 4 * pairs}
        traffic = (write("activations", pairs, 4), read("activations", pairs, 4))
        return Op(f"token_scores_{i}", "elementwise", flops, traffic, {"elements": pairs}, launches=3)

    def request(self, request: Request) -> Request:
        if not self.compressor:
            return request
        reading = Draft(self.compressor, 1, minimum(request.new, self.tokens))
        return replace(request, before=(*request.before, reading))

    def companions(self, model: Model) -> tuple[Companion, ...]:
        return (Companion(catalog.load_model(self.compressor), tokens=0),) if self.compressor else ()
