"""Everything stays stored; a step reads the part that a cheap score of summaries chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Scan, split_newest, split_oldest, stored_tokens
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Group, Parallelism, Shard
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.model import Attention, Block, Model
from perfmodel.symbols import Num, ceil, maximum, minimum
from perfmodel.techniques.base import Technique, knob, require_cache
from perfmodel.techniques.matrices import seen_share


class KvSelection(Technique):
    """A decode step reads `budget` tokens (or a share) in whole pages; it first reads summaries of every page.

    read = min(T, ceil(union x budget / page) page) tokens; summaries: `summaries` key vectors per page stored, of which a share
    `scanned` is read, 2 FLOPs per element and query head, then a top-k over one score per page and query head; both once in
    `every` steps. Quest (arXiv:2406.10774): minimum and maximum, summaries 2. InfLLM (arXiv:2402.04617), ShadowKV
    (arXiv:2410.21465): landmarks, summaries 1. MagicPIG (arXiv:2410.16179): `hash_bits` per token and KV head, sampling.
    Prefill: a query meets `prefill_budget` keys in blocks of `prefill_page`, chosen for `prefill_rows` queries together by
    2 d heads q c / (rows page) FLOPs and `prefill_choice` vector operations a score: MoBA (arXiv:2502.13189), MInference
    (arXiv:2407.02490), FlexPrefill (arXiv:2502.20766).
    """

    kind: ClassVar[str] = "kv-selection"
    reference: ClassVar[str] = "arXiv:2406.10774"
    cache_turn: ClassVar[int] = 1
    excludes: ClassVar[dict[str, str]] = {"kv-selection": "a layer selects once; give both budgets to one"}

    budget: int = knob(0, "tokens read per KV head and step; 0: given as a share", "token", low=0, high=10_000_000)
    share: float = knob(1.0, "share of the stored tokens read where no budget is given", low=0.0001, high=1)
    page: int = knob(16, "tokens of a page; 1: single tokens", "token", low=1, high=1_000_000)
    sinks: int = knob(0, "first tokens of the budget, always read", "token", low=0, high=1_000_000)
    recent: int = knob(0, "newest tokens of the budget, always read", "token", low=0, high=1_000_000)
    union: float = knob(1.0, "tokens chosen by all query heads of a KV head over those of one", low=1, high=64)
    summaries: float = knob(2.0, "key vectors stored per page", "vector", low=0, high=64)
    summary_bits: float = knob(16.0, "bits of an element of a summary", "bit", low=1, high=32)
    summary_rank: float = knob(1.0, "elements of a summary over those of a key", low=0.001, high=1)
    hash_bits: float = knob(0.0, "bits stored per token and KV head (hash codes, tables)", "bit", low=0, high=65536)
    scanned: float = knob(1.0, "share of the summaries that one selection reads (index, clusters)", low=0, high=1)
    tensor_cores: bool = knob(False, "summaries are scored as a matrix product; else on the vector units")
    every: int = knob(1, "decode steps that share one selection", "step", low=1, high=10_000)
    fused: bool = knob(True, "attention reads pages in place; false: they are gathered into a copy first")
    prefill_budget: int = knob(0, "keys a query of a prefill meets; 0: all", "token", low=0, high=10_000_000)
    prefill_page: int = knob(128, "keys of a block of a prefill", "token", low=1, high=1_000_000)
    prefill_rows: int = knob(1, "queries that share one choice of blocks", "token", low=1, high=100_000)
    prefill_gathered: bool = knob(False, "blocks gather their queries: partial outputs pass memory once per chosen block")
    prefill_choice: float = knob(4.0, "vector operations per block score of a prefill, to choose among them", low=0, high=1000)
    prefill_streamed: bool = knob(True, "block scores stay on chip; false: they are written and read again")

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self._selects or self.prefill_budget else "exact"

    @property
    def _selects(self) -> bool:
        return bool(self.budget) or self.share < 1

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        require_cache(self.kind, model)
        if self.budget and self.sinks + self.recent > self.budget:
            raise SpecError(
                f"kv-selection: {self.sinks} sinks and {self.recent} recent tokens exceed the budget of {self.budget}; "
                f"raise the budget or keep fewer"
            )

    def cache(self, cache: Cache, site: Site) -> Cache:
        if site.prefilling:
            return cache.each(lambda run: self._scored(run, site))
        if not self._selects:
            return cache
        chosen = cache.each(lambda run: self._read(run, site))
        longest = maximum(cache.longest, 1)
        # Summaries are kept and scored for the runs that keep more than is read, as far as they reach.
        heads = sum((r.heads * _keys(r) * stored_tokens(r) / longest for r in cache.runs), start=0.0)
        active = sum((r.heads * _keys(r) * stored_tokens(r) / longest * self._choosing(r) for r in cache.runs), start=0.0)
        for scan in self._scans(site):
            chosen = chosen.with_scan(replace(scan, heads=heads, active=active / maximum(heads, 1e-9), scanned=self.scanned))
        return chosen

    def _kept(self, tokens: Num) -> Num:
        asked = self.union * (self.budget if self.budget else self.share * tokens)
        return minimum(tokens, ceil(asked / self.page) * self.page)

    def _choosing(self, run: Run) -> Num:
        tokens = stored_tokens(run)
        return minimum(maximum(tokens - self._kept(tokens), 0), 1)

    def _read(self, run: Run, site: Site) -> Run:
        """The run with its middle thinned out; sinks and recent tokens are read whole."""
        tokens = stored_tokens(run)
        first, rest = split_oldest(run.segments, self.sinks) if self.sinks else ([], list(run.segments))
        middle, last = split_newest(tuple(rest), self.recent) if self.recent else (rest, [])
        among = maximum(sum((s.tokens for s in middle), start=0.0), 1)
        share = minimum(maximum(self._kept(tokens) - self.sinks - self.recent, 0) / among, 1)
        # A gather reads each page, and writes and reads a copy as wide as an activation.
        copied = 0.0 if self.fused else 2 * site.wide * self._choosing(run)
        thin = [replace(s, read=s.read * share, copied=s.copied + copied) for s in middle]
        return replace(run, segments=(*first, *thin, *last))

    def _scans(self, site: Site) -> list[Scan]:
        attends = site.mixer.kind == "attention"
        group = site.mixer.heads / site.tp / site.kv_heads
        # Elements of a key over those of a token's keys and values; a latent is its own key.
        key = 0.5 if attends else 1.0
        found = []
        if self.summaries:
            found.append(Scan(
                "kv_summaries", key * self.summaries * self.summary_rank / self.page, self.summary_bits / 8,
                flops=2 * group, matrix=self.tensor_cores, every=self.every, pick=group / self.page,
            ))  # fmt: skip
        if self.hash_bits:
            elements = self.hash_bits / 8 / (2 * site.mixer.head_dim if attends else site.kv_elements)
            found.append(Scan("kv_hashes", elements, 1, flops=group, every=self.every, pick=0.0 if found else group))
        return found

    def _scored(self, run: Run, site: Site) -> Run:
        """Fewer query-key pairs in prefill; everything is stored."""
        if not self.prefill_budget:
            return run
        return replace(run, scored=run.scored * seen_share(site, stored_tokens(run), self.prefill_budget))

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        if not self.prefill_budget or not isinstance(block.mixer, Attention):
            return ops
        prompts = [g for g in shard.groups if not g.decode]
        extra = [self._routing(block.mixer, shard, g) for g in prompts]
        extra += [self._gathering(block.mixer, shard, g) for g in prompts if self.prefill_gathered]
        return [*ops, *extra]

    def _gathering(self, a: Attention, shard: Shard, group: Group) -> Op:
        """Queries read, and FP32 partial outputs read and written, once for each block that they chose."""
        blocks = minimum(self.prefill_budget, group.visible(a.window) / group.n) / self.prefill_page
        elements = group.tokens * blocks * a.heads / shard.par.tp * a.head_dim / shard.par.cp
        moved = (read("activations", elements, shard.formats.act.width), read("activations", elements, 4),
                 write("activations", elements, 4))  # fmt: skip
        return Op("prefill_gather", "elementwise", {"vector": 2 * elements}, moved, {"elements": elements}, contextual=True,
                  reference="arXiv:2511.11571")  # fmt: skip

    def _routing(self, a: Attention, shard: Shard, group: Group) -> Op:
        """Scores of all causal blocks by pooled queries, and the choice among them."""
        heads, kv_heads = a.heads / shard.par.tp, maximum(a.kv_heads / shard.par.tp, 1)
        pairs = heads * group.pairs(a.window, shard.causal) / (self.prefill_page * self.prefill_rows) / shard.par.cp
        unit, width = str(shard.formats.act.matrix), shard.formats.act.width
        # Keys are read once to be averaged over their blocks.
        moved = [read("kv", group.visible(a.window) * kv_heads * a.head_dim, shard.formats.kv.width)]
        if not self.prefill_streamed:
            moved += [write("activations", pairs, 4), read("activations", pairs, 4)]
        moved.append(read("activations", group.tokens * heads * a.head_dim, width))
        pooled = group.visible(a.window) * kv_heads * a.head_dim
        flops = {unit: 2 * a.head_dim * pairs, "vector": self.prefill_choice * pairs + pooled}
        return Op("prefill_routing", "selection", flops, tuple(moved), {"elements": pairs}, launches=3, contextual=True,
                  reference="arXiv:2502.13189")  # fmt: skip


def _keys(run: Run) -> float:
    """Whether a run has keys to summarise: 1 or 0."""
    return 0.0 if run.columns == "v" else 1.0
