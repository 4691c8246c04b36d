"""Keys and values of lower rank, and keys of merged heads."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Segment, split_newest
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.spec.model import Attention, Block, Model
from perfmodel.symbols import Num, maximum
from perfmodel.techniques.base import Technique, knob
from perfmodel.techniques.matrices import with_columns, with_rows


class KvLowRank(Technique):
    """g KV heads of d elements share a latent of rank r = rank_ratio x g d; it is cached instead of keys or values.

    Elements stored and read: rank_ratio x those of the model. Rebuilding keys (needed under rotary positions) costs
    2 r g d FLOPs per token read and group of heads. Absorbed into the projection before or after, a query meets r elements
    per head: rank_ratio x g times the attention FLOPs, and the output projection has rank_ratio x g times the inputs.
    Palu (arXiv:2407.21118), Eigen attention (arXiv:2408.05646), CSKV (arXiv:2409.10593: `recent`), ShadowKV
    (arXiv:2410.21465: keys only). `merged_keys`: clusters of key heads over heads (CHAI, arXiv:2403.08058).
    """

    kind: ClassVar[str] = "kv-low-rank"
    reference: ClassVar[str] = "arXiv:2407.21118"
    cache_turn: ClassVar[int] = 1
    excludes: ClassVar[dict[str, str]] = {
        "kv-low-rank": "a projection is factored once",
        "kv-rematerialisation": "both decide what is cached instead of keys and values",
    }

    key_rank: float = knob(1.0, "rank of keys over their dimension; 1: not factored", low=0.001, high=1)
    value_rank: float = knob(1.0, "rank of values over their dimension; 1: not factored", low=0.001, high=1)
    group: int = knob(1, "KV heads that are factored together; 0: all of a layer", "head", low=0, high=1024)
    absorb_keys: bool = knob(False, "key factor absorbed into the queries; needs positions that are not rotary")
    absorb_values: bool = knob(True, "value factor absorbed into the output projection; false: values are rebuilt")
    recent: int = knob(0, "newest tokens kept in full beside their latents", "token", low=0, high=1_000_000)
    merged_keys: float = knob(1.0, "distinct key heads over key heads", low=0.01, high=1)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if min(self.key_rank, self.value_rank, self.merged_keys) < 1 else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.effects() == "exact":
            return
        mixers = [b.mixer for b in model.blocks.values() if isinstance(b.mixer, Attention)]
        if not mixers:
            raise SpecError(f"kv-low-rank: {model.name} has no keys and values to factor")
        for a in mixers:
            mine, group = max(a.kv_heads // par.tp, 1), self._group(a)
            if min(self.key_rank, self.value_rank) < 1 and (group > mine or mine % group):
                raise SpecError(
                    f"kv-low-rank: {group} heads factored together do not divide the {mine} KV heads of a rank of "
                    f"{model.name} at tp {par.tp}; use group={mine}"
                )

    def _group(self, a: Attention) -> Num:
        return self.group or a.kv_heads

    def cache(self, cache: Cache, site: Site) -> Cache:
        if site.mixer.kind != "attention" or self.effects() == "exact":
            return cache
        runs = cache.apart().runs
        return replace(cache, runs=tuple(self._factored(r, site) for r in runs))

    def _factored(self, run: Run, site: Site) -> Run:
        keys = run.columns == "k"
        ratio = self.key_rank if keys else self.value_rank
        absorbed = self._absorbed(keys, site)
        d, group = site.mixer.head_dim, self._group(site.mixer)
        merged = self.merged_keys if keys else 1.0
        work: Num = ratio * group if ratio < 1 and absorbed else 1.0
        flops = 2 * ratio * group * d * d * site.kv_heads if ratio < 1 and not absorbed else 0.0

        def narrow(s: Segment) -> Segment:
            return replace(s, elements=s.elements * ratio * merged, rebuild=s.rebuild + flops)

        old, recent = split_newest(run.segments, self.recent) if self.recent and ratio < 1 else (list(run.segments), [])
        # Recent tokens are stored both ways and read in full.
        kept = 1 + ratio if site.new is None else 1.0
        both = [replace(s, elements=s.elements * kept * merged) for s in recent]
        return replace(run, segments=(*(narrow(s) for s in old), *both), work=run.work * work * merged)

    def _absorbed(self, keys: bool, site: Site) -> bool:
        """A prefill expands what it reads: its many queries would pay for the longer dot products."""
        return (self.absorb_keys if keys else self.absorb_values) and not site.prefilling

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        a = block.mixer
        if not isinstance(a, Attention) or a.shares_kv or self.effects() == "exact":
            return ops
        mine = maximum(a.kv_heads / shard.par.tp, 1) * a.head_dim
        cached = (self.key_rank * self.merged_keys + self.value_rank) / 2
        left = (self.key_rank + self.value_rank) / 2
        done: list[Op] = []
        for op in ops:
            if op.name == "qkv_proj":
                done.append(with_rows(op, (op.shape["n"] - 2 * mine * (1 - left)) / op.shape["n"]))
                done += self._expanded(a, shard, mine)
            elif op.name == "rope_and_cache":
                traffic = tuple(replace(t, elements=t.elements * cached) if t.tensor == "kv" else t for t in op.traffic)
                done.append(replace(op, traffic=traffic))
            elif op.name == "o_proj" and self.absorb_values and self.value_rank < 1:
                done.append(with_columns(op, self.value_rank * self._group(a)))
            else:
                done.append(op)
        return done

    def _expanded(self, a: Attention, shard: Shard, mine: Num) -> list[Op]:
        """Keys and values of a prompt's new tokens from their latents."""
        tokens = sum((shard.local(g) for g in shard.groups if not g.decode), start=0.0)
        if isinstance(tokens, (int, float)) and tokens == 0:
            return []
        act, weight = shard.formats.act, shard.formats.stored("attention").width
        found = []
        for name, ratio in (("key", self.key_rank), ("value", self.value_rank)):
            if ratio < 1:
                k = ratio * self._group(a) * a.head_dim
                moved = (read("weights", k * mine, weight), read("activations", tokens * ratio * mine, act.width),
                         write("activations", tokens * mine, act.width))  # fmt: skip
                found.append(Op(f"{name}_expand", "gemm", {str(act.matrix): 2 * tokens * k * mine}, moved,
                                {"m": tokens, "n": mine, "k": k}))  # fmt: skip
        return found

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        if self.effects() == "exact":
            return stored
        return [self._factor(r, model) for r in stored]

    def _factor(self, r: Residency, model: Model) -> Residency:
        """Down-projections of rank_ratio x the rows, and up-projections of r g d elements for each group."""
        name, _, part = r.name.partition(".")
        a = model.blocks[name].mixer if name in model.blocks else None
        if not isinstance(a, Attention):
            return r
        group = self._group(a)
        up = group * a.head_dim / model.hidden
        ratio = {"k_proj": self.key_rank, "v_proj": self.value_rank}.get(part, 1.0)
        if ratio < 1:
            absorbed = self.absorb_values if part == "v_proj" else self.absorb_keys
            return replace(r, elements=r.elements * ratio * (1 if absorbed else 1 + up))
        if part == "o_proj" and self.absorb_values and self.value_rank < 1:
            return replace(r, elements=r.elements * self.value_rank * group)
        return r
