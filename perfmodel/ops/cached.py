"""Attention over an edited cache: the operators that read, fetch, restore and choose keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perfmodel.ops.cache import DEVICE, Cache, Run, Scan, Segment, columns_share
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.ops.traffic import Op, Residency, Traffic, read, write
from perfmodel.symbols import Num, is_one, maximum, minimum


@dataclass(frozen=True, slots=True)
class Site:
    """Where a cache stands: one layer of one kind on one device."""

    block: str
    mixer: Any
    """Attention or LatentAttention of the model."""
    hidden: Num
    tp: Num
    kv_heads: Num
    """On this device."""
    kv_elements: Num
    """Cached elements per token and layer on this device, before any edit."""
    layers: Num
    """Layers of this kind."""
    width: Num
    """Bytes of a cached element before any edit."""
    wide: Num
    """Bytes of an activation element."""
    pp: Num = 1
    cp: Num = 1
    new: Num | None = None
    """New prompt tokens per sequence of the pass; 0: a decode step; none: not a pass, but what is stored."""

    @property
    def prefilling(self) -> bool:
        """Whether the pass brings a prompt."""
        return self.new is not None and not (isinstance(self.new, (int, float)) and self.new == 0)


def cache_site(mixer: Any, block: str, hidden: Num, layers: Num, par: Parallelism, f: Formats) -> Site:
    """The place of one layer's cache on a device: latents are replicated over tp, KV heads once tp exceeds them."""
    if mixer.kind == "latent":
        heads, elements = 1, mixer.kv_rank + mixer.rope_dim
    else:
        heads = maximum(mixer.kv_heads / par.tp, 1)
        elements = 2 * heads * mixer.head_dim
    return Site(block, mixer, hidden, par.tp, heads, elements, layers, f.kv.width, f.act.width, par.pp, par.cp)


def stored_cache(cache: Cache, site: Site, sequences: Num = 1) -> list[Residency]:
    """What `sequences` store in one layer on one device, segments and metadata, by tier.

    The cache is that of whole sequences; context parallelism gives every device its share of each part.
    """
    found: list[Residency] = []
    for i, (run, s) in enumerate(_segments(cache)):
        if s.owned:
            elements = _copies(s, sequences) * s.tokens * _elements(run, s, site)
            found.append(Residency("kv", f"{site.block}.{run.columns}{i}", elements, s.width, s.tier))
    for i, (run, s) in enumerate(_segments(cache)):
        if s.owned and s.tier != DEVICE and not s.on:
            # At least what a step reads of the copies is here.
            share = minimum(maximum(s.held, s.near * s.read), 1.0)
            copies = _copies(s, sequences) * s.tokens * share * _elements(run, s, site)
            if not isinstance(copies, float) or copies:
                found.append(Residency("kv", f"{site.block}.{run.columns}{i}.copy", copies, s.width))
    longest = cache.longest
    for scan in cache.scans:
        elements = sequences * longest * scan.heads * scan.elements * site.kv_elements
        found.append(Residency("kv", f"{site.block}.{scan.name}", elements, scan.width, scan.tier))
    return found if is_one(site.cp) else [replace(r, elements=r.elements / site.cp) for r in found]


def edited(formats: Formats, site: Site, tokens: Num, *, owned: bool = True) -> Cache:
    """The cache of one layer and sequence of `tokens` tokens after every technique.

    Each has its turn (tokens stored, tokens read, widths and places), so that the order of listing changes nothing.
    """
    cache = Cache.whole(tokens, site.width, owned=owned)
    for technique in sorted(formats.techniques, key=lambda t: int(t.cache_turn)):
        cache = technique.cache(cache, site)
    return cache


def cached_attention(op: Op, group: Group, cache: Cache, site: Site, suffix: str = "") -> list[Op]:
    """One attention of a plain cache, edited: `op` was built for everything visible at one width."""
    visible = op.shape["kv_len"] * op.shape["n"]
    unit = next(u for u in op.flops if u not in ("vector", "exp"))
    ops = [x for s in cache.scans for x in _scan(s, group, cache, site, unit, suffix)] if group.decode else []
    for tier, ahead, page, elements, width in _fetched(group, cache, site):
        ops.append(copy(f"kv_fetch_{tier}{suffix}", tier, elements, width, page=page, aside=ahead))
    if group.decode:
        shared, cache = cache.only(lambda s: s.together), cache.only(lambda s: not s.together)
        ops += _together(op, group, shared, site, visible, suffix)
    device = _on_device(op, group, cache, site, visible)
    for where in sorted({s.on for _, s in _segments(cache)} - {""}):
        ops += _elsewhere(op, group, cache, site, where, suffix)
    return [*ops, device] if device is not None else ops


def copy(
    name: str, tier: str, elements: Num, width: Num, *, page: Num = 0.0, aside: bool = False, tensor: Any = "kv",
    direction: Any = "read", contextual: bool = True,
) -> Op:  # fmt: skip
    """Bytes between the device and a farther tier; what arrives is written to device memory (what leaves is read)."""
    here: Any = write if direction == "read" else read
    traffic = (Traffic(tensor, elements, width, tier, direction), here(tensor, elements, width))
    return Op(name, "copy", {}, traffic, {"page": page}, launches=1, contextual=contextual, aside=aside)


def _segments(cache: Cache) -> Iterator[tuple[Run, Segment]]:
    for run in cache.runs:
        for segment in run.segments:
            yield run, segment


def _elements(run: Run, s: Segment, site: Site) -> Num:
    """Stored elements of one token."""
    return site.kv_elements * columns_share(run.columns) * run.heads * s.elements


def _fetched(group: Group, cache: Cache, site: Site) -> Iterator[tuple[str, bool, Num, Num, Num]]:
    for run, s in _segments(cache):
        if s.tier != DEVICE and not s.on:
            share = s.read * (1 - s.near) if group.decode else 1.0
            yield s.tier, s.ahead, s.page, _copies(s, group.n) * s.tokens * share * _elements(run, s, site), s.width * s.wire


def _copies(s: Segment, sequences: Num) -> Num:
    """Copies of a segment that `sequences` hold together."""
    return sequences if isinstance(s.sharers, float) and s.sharers == 1 else sequences / minimum(s.sharers, sequences)


def _share(cache: Cache, *, columns: str, on: str, decode: bool) -> Num:
    """Tokens one query attends, mean over the heads, in one place."""
    return sum(
        (run.heads * s.tokens * (s.read if decode else 1.0)
         for run, s in _segments(cache) if run.columns in ("kv", columns) and s.on == on),
        start=0.0,
    )  # fmt: skip


def _on_device(op: Op, group: Group, cache: Cache, site: Site, visible: Num) -> Op | None:
    """The kernel on the device: new tokens of a prefill at full width, cached ones as they are stored."""
    n, q = group.n, group.q
    length: Num = 0.0
    pairs: Num = 0.0
    worked: Num = 0.0
    for run, part in ((r, p) for r in cache.runs for p in _parts(r, op)):
        attended = sum((s.tokens * (s.read if group.decode else 1.0) for s in run.segments if not s.on), start=0.0)
        if group.decode:
            met = n * q * attended
        else:
            met = (op.shape["pairs"] - n * q * (visible / n - q - attended)) * run.scored
            attended = attended + q
        length = length + part * attended
        pairs = pairs + part * met
        worked = worked + part * met * run.work
    if isinstance(length, (int, float)) and length == 0:
        return None
    unit = next(u for u in op.flops if u not in ("vector", "exp"))
    flops = {u: count * (worked if u == unit else pairs) / op.shape["pairs"] for u, count in op.flops.items()}
    traffic = [t for t in op.traffic if t.tensor != "kv"]
    vector: Num = 0.0
    matrix: Num = 0.0
    copied: Num = 0.0
    lag: Num = 0.0
    for run, s in _segments(cache):
        if s.on:
            continue
        tokens = n * s.tokens * (s.read if group.decode else 1.0)
        elements = tokens * _elements(run, s, site)
        traffic.append(read("kv", elements, s.width))
        if not isinstance(s.copied, float) or s.copied:
            traffic.append(read("kv", elements, s.copied))
            copied, lag = copied + elements * s.copied, lag + elements * s.lag
        vector = vector + s.unpack * elements
        matrix = matrix + s.rebuild * tokens * run.heads
    if not group.decode:
        traffic.append(read("kv", n * q * site.kv_elements, site.wide))
    flops[unit] = flops[unit] + matrix
    # Unpacking and rebuilding are per element of the cache, whatever the tile of queries pads.
    shape = {**op.shape, "kv_len": length, "pairs": pairs, "unpack": vector, "rebuild": matrix}
    # Copies are written by a kernel of their own, which streams whatever the attention kernel can make of its items.
    apart = any(not isinstance(s.copied, (int, float)) or s.copied > 0 for _, s in _segments(cache) if not s.on)
    shape |= {"copied": copied, "lag": lag} if apart else {}
    return replace(op, flops=flops, traffic=tuple(traffic), shape=shape, launches=op.launches + apart)


def _parts(run: Run, op: Op) -> Iterator[Num]:
    """Share of the attention's matrix work that belongs to a run: its heads, weighted by its columns' dimensions."""
    dims = {"k": op.shape["head_dim"], "v": op.shape["v_dim"]}
    for column in run.columns:
        yield run.heads * dims[column] / (dims["k"] + dims["v"])


def _together(op: Op, group: Group, cache: Cache, site: Site, visible: Num, suffix: str) -> list[Op]:
    """Attention of all queries that share a prefix over one copy of it, and the merge of the partial outputs.

    n / g kernels' worth of g q queries each: the keys and values of the prefix are read n / g times, not n (Hydragen,
    arXiv:2402.05099; ChunkAttention, arXiv:2402.15220). A prefix taken in pieces leaves a partial output for each.
    """
    found: list[Op] = []
    for i, sharers in enumerate(sorted({s.sharers for _, s in _segments(cache) if not s.on})):
        many = minimum(sharers, group.n)
        merged = replace(group, n=group.n / many, q=group.q * many)
        regrouped = replace(op, name=f"shared_attention_{i}{suffix}", shape={**op.shape, "n": merged.n, "q": merged.q})
        part = cache.only(lambda s, g=sharers: s.sharers == g)  # type: ignore[misc]
        kernel = _on_device(regrouped, merged, part, site, visible)
        if kernel is not None:
            piece = max((s.piece for _, s in _segments(part)), default=0.0)
            pieces = maximum(kernel.shape["kv_len"] / piece, 1.0) if piece else 1.0
            found.append(replace(kernel, shape={**kernel.shape, "pieces": pieces}) if piece else kernel)
            outputs = group.tokens * op.shape["heads"] * op.shape["v_dim"]
            # The partial outputs of a kernel, in FP32, join the one before it.
            traffic = (write("activations", pieces * outputs, 4), read("activations", (pieces + 1) * outputs, 4))
            found.append(Op(f"merge_{i}{suffix}", "elementwise", {"vector": 4 * outputs}, traffic, {"elements": outputs},
                            contextual=True))  # fmt: skip
    return found


def _scan(scan: Scan, group: Group, cache: Cache, site: Site, unit: str, suffix: str) -> list[Op]:
    """Scores of the metadata and the choice among them, once in `every` steps; on a farther tier they are fetched first."""
    stored = cache.longest
    share = scan.active / scan.every
    elements = group.n * stored * scan.heads * scan.elements * site.kv_elements * scan.scanned * share
    scores = group.tokens * stored * scan.heads * scan.pick * site.kv_heads * scan.scanned * share
    traffic: tuple[Traffic, ...] = (write("activations", scores, 4), read("activations", scores, 4))
    if scan.tier == DEVICE:
        traffic = (read("kv", elements, scan.width), *traffic)
    met = scan.flops * elements * group.q
    flops = {unit: met, "vector": 4 * scores} if scan.matrix else {"vector": met + 4 * scores}
    fetched = [] if scan.tier == DEVICE else [copy(f"{scan.name}_fetch{suffix}", scan.tier, elements, scan.width)]
    return [*fetched, Op(f"{scan.name}{suffix}", "selection", flops, traffic, {"elements": elements}, contextual=True,
                         launches=scan.launches * share)]  # fmt: skip


def _elsewhere(op: Op, group: Group, cache: Cache, site: Site, where: str, suffix: str) -> list[Op]:
    """Attention over segments that another part of the machine holds: queries go there, partial outputs come back."""
    attended = _share(cache, columns="k", on=where, decode=group.decode)
    full = op.shape["pairs"] / (group.n * group.q)
    flops = {unit: count * attended / full for unit, count in op.flops.items()}
    mine = [(run, s) for run, s in _segments(cache) if s.on == where]
    traffic = tuple(
        Traffic("kv", group.n * s.tokens * s.read * s.amplified * _elements(run, s, site), s.width, where)
        for run, s in mine
    )
    aside = all(s.aside for _, s in mine)
    tier = where if mine[0][1].tier == DEVICE else mine[0][1].tier
    # Queries of heads (or requests) that have nothing there stay.
    asked = sum((r.heads for r in cache.runs if r.columns in ("kv", "k") and any(s.on == where for s in r.segments)),
                start=0.0)  # fmt: skip
    # Nor do any where nothing is cached yet.
    heads, dims = op.shape["heads"] * asked * minimum(attended, 1.0), (op.shape["head_dim"], op.shape["v_dim"])
    # Partial outputs travel with the maximum and the sum of their softmax (arXiv:2311.01282).
    sent = copy(f"queries_to_{where}{suffix}", tier, group.tokens * heads * dims[0], site.wide, tensor="activations",
                direction="write", aside=aside)  # fmt: skip
    back = copy(f"outputs_from_{where}{suffix}", tier, group.tokens * heads * (dims[1] + 2), site.wide,
                tensor="activations", aside=aside)  # fmt: skip
    work = Op(f"attention_on_{where}{suffix}", "elsewhere", flops, traffic, {"pieces": len(mine)}, launches=0,
              contextual=True, on=where, aside=aside)  # fmt: skip
    return [sent, work, back]
