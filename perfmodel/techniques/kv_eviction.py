"""Fewer cached tokens: what is evicted is neither stored nor read again."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Scan, Segment, budgeted, stored_tokens
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.model import Attention, Block, Model
from perfmodel.symbols import Num, ceil, maximum, minimum
from perfmodel.techniques.base import Technique, knob, require_cache
from perfmodel.techniques.kv_quantization import score_pass
from perfmodel.techniques.matrices import seen_share


class KvEviction(Technique):
    """Every KV head keeps a budget of tokens: the first `sinks`, the newest, and heavy hitters among the old.

    tokens = min(T, budget) or share x T; which of the old ones survive does not change their number.
    Budgets of layers: a ramp from `pyramid` x budget in the fullest to (2 - pyramid) x budget (PyramidKV, arXiv:2406.02069);
    with b even over [lo, hi], E[min(T, b)] = T - (T - lo)^2 / (2 (hi - lo)) in between; a pipeline waits for its fullest stage.
    Budgets of heads: `imbalance` is the fullest head over the mean; a rank of h of the H heads holds at most
    (imbalance + (h - 1)(H - imbalance)/(H - 1)) / h times the mean.
    `scores`: prefill runs attention's score matrix once more for the last `window` queries (SnapKV, arXiv:2404.14469) or for
    all of them (H2O, arXiv:2306.14048, window 0), unfused. `chunk`: prefill evicts as it goes (Locret, arXiv:2410.01805), so
    a query meets budget + chunk keys at most.
    """

    kind: ClassVar[str] = "kv-eviction"
    reference: ClassVar[str] = "arXiv:2306.14048"
    excludes: ClassVar[dict[str, str]] = {"kv-eviction": "a cache has one budget"}
    cache_turn: ClassVar[int] = 0

    budget: int = knob(0, "tokens kept per head; 0: given as a share", "token", low=0, high=10_000_000)
    share: float = knob(1.0, "share of the tokens kept where no budget is given", low=0.0001, high=1)
    sinks: int = knob(0, "first tokens always kept", "token", low=0, high=100_000)
    pyramid: float = knob(1.0, "budget of the fullest layer over the mean, falling evenly over the layers", low=1, high=2)
    imbalance: float = knob(1.0, "budget of the fullest head over the mean", low=1, high=64)
    generated: bool = knob(True, "generated tokens count against the budget; false: they are kept beside it")
    prompt: int = knob(0, "prompt tokens, where generated ones are kept beside the budget", "token", low=0, high=10_000_000)
    generated_budget: int = knob(0, "generated tokens kept at most beside it; 0: all", "token", low=0, high=10_000_000)
    chunk: int = knob(0, "prompt tokens after which prefill evicts; 0: prefill sees everything", "token", low=0, high=10_000_000)
    transient: bool = knob(False, "memory holds one layer's whole prompt of every sequence until that layer is cut")
    scores: bool = knob(False, "prefill computes scores once more, outside fused attention")
    window: int = knob(0, "last queries whose scores choose; 0: all queries", "token", low=0, high=100_000)
    scoring_heads: float = knob(1.0, "share of the query heads that are scored", low=0, high=1)
    decode_scores: bool = knob(False, "a decode step writes its scores as well, outside fused attention")
    gate: float = knob(0.0, "matrix FLOPs per new token and layer of a trained scorer", "FLOP", low=0, high=1e15)
    merge: float = knob(0.0, "vector operations per element of an evicted prompt token that merges into others", "op", low=0,
                        high=1e6)  # fmt: skip
    state: float = knob(0.0, "bytes per kept token and KV head that a step reads to choose (scores, hashes)", "byte", low=0,
                        high=1e6)  # fmt: skip
    interval: int = knob(1, "decode steps between evictions; the cache grows in between", "step", low=1, high=100_000)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.budget or self.share < 1 else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.effects() == "exact" and not self.scores:
            return
        require_cache(self.kind, model)
        if not self.generated and not self.prompt:
            raise SpecError("kv-eviction: to keep generated tokens beside the budget it must know the prompt; give prompt=N")
        if self.sinks and self.budget and self.sinks > self.budget:
            raise SpecError(f"kv-eviction: {self.sinks} sinks do not fit into a budget of {self.budget} tokens")
        heads = [m.kv_heads for m in (b.mixer for b in model.blocks.values()) if isinstance(m, Attention)]
        if self.imbalance > max(heads, default=1):
            raise SpecError(
                f"kv-eviction: one of {max(heads, default=1)} KV heads of {model.name} cannot hold {self.imbalance:g} times "
                f"their mean; imbalance lies between 1 and {max(heads, default=1)}"
            )

    def cache(self, cache: Cache, site: Site) -> Cache:
        if self.effects() == "exact":
            return cache
        cache = cache.each(lambda run: self._kept(run, cache.total, site))
        if self.state:
            elements = self.state / (2 * site.mixer.head_dim if site.mixer.kind == "attention" else site.kv_elements)
            scan = Scan("eviction_state", elements, 1, flops=1.0, every=self.interval, launches=1)
            cache = cache.with_scan(scan)
        return cache

    def _kept(self, run: Run, total: Num, site: Site) -> Run:
        beside: Num = 0.0
        if not self.generated:
            beside = maximum(total - self.prompt, 0)
        left = total - beside
        if self.generated_budget:
            beside = minimum(beside, self.generated_budget)
        asked = self.budget if self.budget else self.share * left
        # Between evictions the cache grows: by half of that on average, by all of it at its peak.
        grown = (self.interval - 1) * (1.0 if site.new is None else 0.5)
        kept = minimum(total, ceil(self._mean(left, asked * self._fullest_rank(site), site) + beside + grown))
        if site.prefilling:
            if not self.chunk:
                return budgeted(run, kept, self.sinks)
            most = asked + self.chunk
            return replace(budgeted(run, kept, self.sinks), scored=run.scored * seen_share(site, kept, most))
        cut = budgeted(run, kept, self.sinks)
        if site.new is None and self.transient and not self.chunk:
            whole = maximum(stored_tokens(run) - stored_tokens(cut), 0) / site.layers
            cut = replace(cut, segments=(Segment(whole, site.width, read=0.0), *cut.segments))
        return cut

    def _fullest_rank(self, site: Site) -> Num:
        heads = getattr(site.mixer, "kv_heads", 1)
        if heads == 1 or self.imbalance == 1:
            return 1.0
        mine = site.kv_heads
        return (self.imbalance + (mine - 1) * (heads - self.imbalance) / (heads - 1)) / mine

    def _mean(self, tokens: Num, budget: Num, site: Site) -> Num:
        """E[min(tokens, b)] over the budgets of the layers of the fullest pipeline stage."""
        if self.pyramid == 1:
            return minimum(tokens, budget)
        high = self.pyramid * budget
        low = high - 2 * (self.pyramid - 1) * budget / site.pp
        over = minimum(maximum(tokens - low, 0), high - low)
        return minimum(tokens, low) + over - over**2 / maximum(2 * (high - low), 1)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        mixer, extra = block.mixer, []
        if not isinstance(mixer, Attention):
            return ops
        for group in shard.groups:
            if group.decode:
                continue
            rows = minimum(group.q, self.window) if self.window else group.q
            if self.scores:
                keys = group.c + group.q - (rows - 1) / 2
                extra += score_pass("eviction_scores", mixer, shard, group.n, rows, keys, self.scoring_heads)
            if self.merge:
                extra.append(self._merged(mixer, shard, group.n * maximum(group.q - self._budget_of(group.q), 0)))
        if self.decode_scores:
            width = shard.formats.act.width
            for op in ops:
                if op.kind == "attention" and op.name.startswith("attention") and any(g.decode for g in shard.groups):
                    count = op.shape["pairs"] * op.shape["heads"]
                    moved = (write("activations", count, width), read("activations", count, width))
                    extra.append(Op("decode_scores", "elementwise", {"vector": 4 * count}, moved, {"elements": count},
                                    contextual=True, launches=2))  # fmt: skip
        if self.gate:
            unit = str(shard.formats.act.matrix)
            tokens = shard.tokens
            inputs = (read("activations", tokens * shard.hidden, shard.formats.act.width),)
            extra.append(Op("eviction_gate", "selection", {unit: self.gate * tokens / shard.par.tp}, inputs,
                            {"elements": tokens}))  # fmt: skip
        return [*ops, *extra]

    def _budget_of(self, tokens: Num) -> Num:
        return minimum(tokens, self.budget) if self.budget else self.share * tokens

    def _merged(self, mixer: Attention, shard: Shard, dropped: Num) -> Op:
        elements = dropped * 2 * maximum(mixer.kv_heads / shard.par.tp, 1) * mixer.head_dim
        width = shard.formats.kv.width
        moved = (read("kv", elements, width), write("kv", elements, width))
        return Op("kv_merge", "elementwise", {"vector": self.merge * elements}, moved, {"elements": elements}, contextual=True)
