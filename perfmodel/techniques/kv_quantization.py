"""Fewer bits per cached key and value."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Segment, columns_share, split_newest, split_oldest
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, read, write
from perfmodel.spec.model import Attention, Block, LatentAttention, Model
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Technique, knob, require_cache
from perfmodel.techniques.matrices import fullest_share


class KvQuantization(Technique):
    """Old tokens at `bits` with group scales; the newest `residual` and the first `sinks` tokens keep their width.

    bytes per element = (bits + scale_bits / group) / 8 + outliers x outlier_bits / 8 + 2 error_rank / head_dim, averaged
    with `high_bits` over the share `salient` of tokens; a share `wide_heads` of KV heads is not narrowed.
    Unpacking costs vector operations per element read. `fused: false`: unpacking is a pass of its own that writes and
    re-reads 16-bit elements, and so is quantising new tokens. KIVI (arXiv:2402.02750), KVQuant (arXiv:2401.18079),
    ZipCache (arXiv:2405.14256), GEAR (arXiv:2403.05527: `error_rank`).
    """

    kind: ClassVar[str] = "kv-quantization"
    reference: ClassVar[str] = "arXiv:2402.02750"
    excludes: ClassVar[dict[str, str]] = {"kv-quantization": "a cache is quantised once"}

    bits: float = knob(4.0, "bits of one stored element", "bit", low=0.5, high=16)
    key_bits: float | None = knob(None, "bits of a key where they differ", "bit", low=0.5, high=16)
    value_bits: float | None = knob(None, "bits of a value where they differ", "bit", low=0.5, high=16)
    group: int = knob(0, "elements that share a scale; 0: one per channel or token, not counted", "element", low=0, high=65536)
    scale_bits: float = knob(32.0, "bits of scale and zero point of one group", "bit", low=0, high=64)
    residual: int = knob(0, "newest tokens at full width", "token", low=0, high=1_000_000)
    sinks: int = knob(0, "first tokens at full width", "token", low=0, high=100_000)
    salient: float = knob(0.0, "share of the old tokens at `high_bits`", low=0, high=1)
    high_bits: float = knob(16.0, "bits of the salient tokens", "bit", low=1, high=16)
    wide_heads: float = knob(0.0, "share of KV heads at full width", low=0, high=1)
    outliers: float = knob(0.0, "share of elements stored apart as well", low=0, high=0.2)
    outlier_bits: float = knob(32.0, "bits of one outlier: value and index", "bit", low=8, high=64)
    error_rank: int = knob(0, "rank per head of a 16-bit correction of the quantisation error", "element", low=0, high=1024)
    predictor: float = knob(0.0, "matrix FLOPs per token read, layer and KV head that predict what is not stored", "FLOP",
                             low=0, high=1e12)  # fmt: skip
    codebook: float = knob(0.0, "bytes of codebooks per layer and KV head", "byte", low=0, high=1e9)
    unpack: float | None = knob(None, "vector operations per element read; none: 2 from 8 bits on, else 4", "op", low=0, high=64)
    pack: float = knob(3.0, "vector operations per new element: range, scale, round", "op", low=0, high=64)
    fused: bool = knob(True, "unpacked inside attention; false: a pass writes 16-bit copies and attention reads those")
    probes: float = knob(0.0, "share of a prompt's queries whose scores are computed again to find salient tokens", low=0, high=1)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self._narrows(16.0) else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        require_cache(self.kind, model)

    def _bits(self) -> tuple[float, float]:
        return (self.key_bits or self.bits, self.value_bits or self.bits)

    def _narrows(self, full: float) -> bool:
        return min(self._bits()) < full and self.wide_heads < 1 and self.salient < 1 + (self.high_bits < full)

    def cache(self, cache: Cache, site: Site) -> Cache:
        keys, values = self._bits()
        if not self._narrows(8 * site.width):
            return cache
        if keys != values:
            cache = cache.apart()
        runs: list[Run] = []
        for run in cache.runs:
            bits = values if run.columns == "v" else keys
            wide = fullest_share(self.wide_heads, site) if self.wide_heads else 0.0
            runs += [replace(run, heads=run.heads * wide)] if self.wide_heads else []
            runs.append(self._narrowed(replace(run, heads=run.heads * (1 - wide)), bits, site))
        return replace(cache, runs=tuple(runs))

    def _narrowed(self, run: Run, bits: float, site: Site) -> Run:
        sinks, rest = split_oldest(run.segments, self.sinks) if self.sinks else ([], list(run.segments))
        old, recent = split_newest(tuple(rest), self.residual) if self.residual else (rest, [])
        # Keys and values each: 2 rank head_dim FLOPs per head.
        flops = (self.predictor + 4 * self.error_rank * _head_dim(site)) * site.kv_heads * columns_share(run.columns)
        narrow = [replace(self._stored(s, bits, site), rebuild=s.rebuild + flops) for s in old]
        return replace(run, segments=(*sinks, *narrow, *recent))

    def _stored(self, s: Segment, bits: float, site: Site) -> Segment:
        """A segment at the mean width of its tokens, salient ones among the others whatever their age."""
        full = 8 * site.width
        width: Num = 0.0
        unpack = 0.0
        for share, wanted in ((1 - self.salient, bits), (self.salient, self.high_bits)):
            width = width + share * (self._bytes(wanted, site) if wanted < full else site.width)
            unpack += share * (self._unpacking(wanted) if wanted < full else 0.0)
        # A pass of its own writes a full-width copy, which attention then reads.
        copied = 0.0 if self.fused else 2.0 * site.wide
        # What another technique narrowed stays narrow in proportion.
        return replace(s, width=width * s.width / site.width, unpack=s.unpack + unpack, copied=s.copied + copied)

    def _bytes(self, bits: float, site: Site) -> Num:
        scales = self.scale_bits / self.group if self.group else 0.0
        return (bits + scales + self.outliers * self.outlier_bits) / 8 + 2 * self.error_rank / _head_dim(site)

    def _unpacking(self, bits: float) -> float:
        return self.unpack if self.unpack is not None else 2.0 if bits >= 8 else 4.0

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        mixer, full = block.mixer, 8 * shard.formats.kv.width
        if not isinstance(mixer, (Attention, LatentAttention)) or not self._narrows(full):
            return ops
        keys, values = self._bits()
        narrow = (minimum(keys, full) + minimum(values, full)) / 16
        done: list[Op] = []
        for op in ops:
            done.append(op)
            if op.name == "rope_and_cache":
                new = sum((t.elements for t in op.traffic if t.tensor == "kv"), start=0.0)
                done[-1:] = self._written(op, new, narrow)
        return [*done, *(_probes(self.probes, mixer, shard) if self.probes else [])]

    def _written(self, op: Op, new: Num, narrow: float) -> list[Op]:
        """New keys and values on their way into the cache."""
        work = self.pack * new
        if self.fused:
            traffic = tuple(replace(t, width=narrow) if t.tensor == "kv" and not self.residual else t for t in op.traffic)
            return [replace(op, flops={**op.flops, "vector": op.flops["vector"] + work}, traffic=traffic)]
        full = next(t.width for t in op.traffic if t.tensor == "kv")
        moved = (read("activations", new, full), write("kv", new, narrow))
        return [op, Op("kv_quantise", "elementwise", {"vector": work}, moved, {"elements": new})]

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        if not self.codebook:
            return stored
        heads = sum(n * maximum(m.kv_heads / par.tp, 1) for n, m in _attentions(model)) / par.pp
        return [*stored, Residency("weights", "kv_codebooks", heads * self.codebook, 1)]


def _head_dim(site: Site) -> Num:
    return site.mixer.head_dim if site.mixer.kind == "attention" else site.mixer.kv_rank


def _attentions(model: Model) -> list[tuple[int, Attention]]:
    found = ((n, model.blocks[name].mixer) for name, n in model.block_counts().items())
    return [(n, m) for n, m in found if isinstance(m, Attention)]


def _probes(share: float, mixer: Attention | LatentAttention, shard: Shard) -> list[Op]:
    """Scores of a share of the prompt's queries over all keys, beside fused attention."""
    prompts = [g for g in shard.groups if not g.decode]
    return [x for g in prompts for x in score_pass("probe_scores", mixer, shard, g.n, share * g.q, g.c + g.q)]


def score_pass(
    name: str, mixer: Attention | LatentAttention, shard: Shard, n: Num, rows: Num, keys: Num, heads_share: float = 1.0
) -> list[Op]:
    """Attention's score matrix of `rows` queries of `n` sequences over the mean of `keys` keys, unfused.

    2 d FLOPs, one exponential and four vector operations per pair and head; scores are written once and read twice (softmax,
    sum over the queries).
    """
    dim = mixer.head_dim if isinstance(mixer, Attention) else mixer.nope_dim + mixer.rope_dim
    pairs = n * rows * keys * heads_share * mixer.heads / shard.par.tp
    width = shard.formats.act.width
    flops = {str(shard.formats.act.matrix): 2 * dim * pairs, "exp": pairs, "vector": 4 * pairs}
    traffic = (write("activations", pairs, width), read("activations", 2 * pairs, width))
    return [Op(name, "selection", flops, traffic, {"elements": pairs}, launches=3, contextual=True)]
