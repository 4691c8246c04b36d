"""One forward pass: model x parallelism x phase -> operators of one device on a schedule.

Prefill, decode, a chunk, a speculative verification and a mixed batch are the same pass with other numbers
of new and cached tokens per group of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from perfmodel.ops import elementwise
from perfmodel.ops.attention import attention, attention_cache
from perfmodel.ops.cached import cache_site, edited, stored_cache
from perfmodel.ops.collective import collective
from perfmodel.ops.convolution import convolution, cross_attention
from perfmodel.ops.gemm import gemm, linear
from perfmodel.ops.mla import latent_attention, latent_cache
from perfmodel.ops.moe import dense_ffn, moe_ffn
from perfmodel.ops.shard import Formats, Group, Parallelism, Shard, checkpoint_formats
from perfmodel.ops.ssm import recurrent_mixer, recurrent_state
from perfmodel.ops.traffic import Op, Residency, Traffic, copied_over, write
from perfmodel.parameters import block_weights, outer_weights
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.spec.model import Block, Model
from perfmodel.symbols import Num, ceil, is_one, minimum

# Matrices that tensor parallelism does not cut: every rank keeps them whole.
_REPLICATED = {
    "q_a_proj",
    "kv_a_proj",
    "router",
    "shared_gate",
    "indexer.q_proj",
    "indexer.k_proj",
    "indexer.weights_proj",
}


@dataclass(frozen=True, slots=True)
class Phase:
    """What one forward pass is given. `logits`: serving computes the head for the last position only."""

    groups: tuple[Group, ...]
    logits: Literal["last", "all"] = "last"
    causal: bool = True


def prefill(batch: Num, new: Num, context: Num = 0) -> Phase:
    """`batch` sequences of `new` prompt tokens each, on top of `context` cached ones."""
    return Phase((Group(batch, new, context),))


def decode(batch: Num, context: Num) -> Phase:
    """One token for each of `batch` sequences that have `context` cached tokens."""
    return Phase((Group(batch, 1, context, decode=True),))


def mixed(batch: Num, context: Num, chunk: Num, chunk_context: Num, prompts: Num = 1) -> Phase:
    """A decode batch and a chunk of one prompt (or of several) in the same pass (Sarathi-Serve, arXiv:2403.02310)."""
    return Phase((Group(batch, 1, context, decode=True), Group(prompts, chunk, chunk_context)))


@dataclass(frozen=True, slots=True)
class Program:
    """The operators of one device and what it must store beside them."""

    schedule: Node


def lower(model: Model, phase: Phase, par: Parallelism, formats: Formats) -> Program:
    """Operators of one forward pass on one device of the slowest rank and stage.

    Counts are per device. With data parallelism the batch is padded to the largest rank; with pipeline
    parallelism the pass goes through all stages, each as long as the longest.
    """
    groups = tuple(replace(g, n=_share(g.n, par.dp)) for g in phase.groups)
    shard = Shard(model.hidden, groups, par, formats, phase.causal, model=model)
    items: list[Node] = [_embed(model, shard)]
    layers: Num = sum(count for count in model.block_counts().values())
    longest_stage = ceil(layers / par.pp) * par.pp / layers
    for name, count in model.block_counts().items():
        for layers, some in _alike(count, shard):
            body = _arranged(model.blocks[name], _at_its_scale(model.blocks[name], some), name, layers)
            items.append(Repeat(body, layers * longest_stage, name))
    items.append(_head(model, shard, phase))
    for technique in formats.techniques:
        items = technique.whole(items, shard)
    if not is_one(par.pp):
        hidden = shard.tokens * model.hidden / par.tp
        hop = collective("stage_hop", "p2p", hidden, formats.act.width, par.pp, stride=par.group)
        items.append(Repeat(hop, par.pp - 1, "pipeline"))
    return Program(Seq(tuple(items), "pass"))


def _at_its_scale(block: Block, s: Shard) -> Shard:
    """The pass as a layer sees it that has a width or a resolution of its own."""
    if is_one(block.shrink) and not block.width:
        return s
    area = block.shrink**2
    groups = tuple(replace(g, q=g.q / area, c=g.c / area) for g in s.groups)
    return replace(s, hidden=block.width or s.hidden, groups=groups)


def _alike(count: Num, s: Shard) -> list[tuple[Num, Shard]]:
    """Layers of one kind in groups that the same techniques apply to: those that spare the first layers split them."""
    spared = sorted({0, *(t.spared_layers(count) for t in s.formats.techniques)})
    if spared == [0]:
        return [(count, s)]
    groups = []
    for first, after in zip(spared, [*spared[1:], count], strict=True):
        mine = tuple(t for t in s.formats.techniques if t.spared_layers(count) <= first)
        if after > first:
            groups.append((after - first, replace(s, formats=replace(s.formats, techniques=mine))))
    return groups


def _arranged(block: Block, s: Shard, name: str, layers: Num) -> Node:
    """One of `layers` layers of a kind, ordered and overlapped as the techniques say."""

    def build(part: Shard) -> Node:
        return layer(_block(block, part, name, layers), name)

    arranged: Callable[[Shard], Node] = build
    for technique in s.formats.techniques:
        arranged = partial(technique.arrange, arranged)
    return arranged(s)


def layer(ops: list[Op], name: str) -> Node:
    """One layer: its operators in order, and beside them what is fetched ahead or computed elsewhere."""
    own = [op for op in ops if not op.aside]
    # Lanes by where in the layer they may start: at its beginning, or behind the operator they wait for.
    lanes: dict[int, dict[str, list[Op]]] = {}
    for op in ops:
        if op.aside:
            start = next((i + 1 for i, x in enumerate(own) if x.name == op.after), 0)
            lanes.setdefault(start, {}).setdefault(op.on or copied_over(op), []).append(op)
    end, tail = len(own), Seq((), name)
    for start in sorted(lanes, reverse=True):
        beside = (Seq(tuple(x), n) for n, x in lanes[start].items())
        shared = ("hbm", "host_link", *(n for n in lanes[start] if n != "host_link"))
        tail = Seq((Par((Seq((*own[start:end], *tail.items), name), *beside), shared, name=name),), name)
        end = start
    whole = (*own[:end], *tail.items)
    return whole[0] if len(whole) == 1 and isinstance(whole[0], Par) else Seq(whole, name)


def _share(n: Num, ranks: Num) -> Num:
    return n if is_one(ranks) else ceil(n / ranks)


def _all_reduce(name: str, s: Shard) -> list[Op]:
    if is_one(s.par.tp):
        return []
    elements, width, ranks = s.tokens * s.hidden, s.formats.act.width, s.par.tp
    if s.par.sequence:
        # The same ring bytes: 2 (t - 1)/t = (t - 1)/t + (t - 1)/t.
        return [
            collective(f"{name}.scatter", "reduce_scatter", elements, width, ranks),
            collective(f"{name}.gather", "all_gather", elements, width, ranks),
        ]
    return [collective(name, "all_reduce", elements, width, ranks)]


def _embed(model: Model, s: Shard) -> Seq:
    f = s.formats
    table = f.stored("embedding").width
    ops = [elementwise.embedding(s.tokens, model.embedding_dim or model.hidden, table, f.act.width)]
    if model.embedding_dim:
        ops += gemm("project_in", s.tokens, model.hidden, model.embedding_dim, weight=f.stored("embedding"), act=f.act,
                    dtype=f.compute("embedding"))  # fmt: skip
    if model.embedding_norm:
        ops.append(elementwise.norm("embedding_norm", s.tokens, s.hidden, f.act.width, residual=False))
    # Vocabulary-parallel tables leave each rank with the rows it owns; the sum completes them.
    return Seq((*ops, *_all_reduce("embedding_all_reduce", s)), "embedding")


def _block(block: Block, s: Shard, name: str, layers: Num) -> list[Op]:
    """Operators of one of `layers` layers of a kind, edited by the techniques."""
    groups = s.groups
    for technique in s.formats.techniques:
        groups = tuple(technique.shortened(g) for g in groups)
    s = replace(s, groups=groups, block=name, layers=layers)
    ops = [*_fetches(block.mixer, s), *_block_operators(block, s)]
    for technique in sorted(s.formats.techniques, key=lambda t: int(t.cache_turn)):
        ops = technique.layer(ops, block, s)
    return ops


def _fetches(mixer: Any, s: Shard) -> list[Op]:
    """Copies of one layer's cached keys, values and states that farther tiers hold, and their decoding on arrival."""
    ops: list[Op] = []
    loads = [(g.n, load) for g in s.groups for load in g.loads]
    for i, (n, load) in enumerate(loads):
        held = _mixer_cache(mixer, n, load.tokens, s.par, s.formats, s.block, s.hidden, s.layers)
        # What another technique leaves on a farther tier is not brought in by this.
        for tensor in sorted({r.tensor for r in held if r.tier == "hbm"}):
            size = sum((r.bytes for r in held if r.tier == "hbm" and r.tensor == tensor), start=0.0)
            size = size * minimum(load.tokens, 1)  # no state is fetched where no token is
            moved = Traffic(tensor, size, load.ratio, load.tier), write(tensor, size, 1)
            ops.append(Op(f"{tensor}_load_{load.tier}_{i}", "copy", {}, moved, {"page": load.page}, contextual=True,
                          aside=load.ahead))  # fmt: skip
            if load.codec:
                decoded = (Traffic(tensor, size, 1, load.codec),)
                ops.append(Op(f"{tensor}_decode_{i}", "elsewhere", {}, decoded, launches=0, contextual=True, on=load.codec,
                              aside=load.ahead))  # fmt: skip
    return ops


def _block_operators(block: Block, s: Shard) -> list[Op]:
    ops: list[Op] = []
    width = s.formats.act.width
    norms_left = block.norms

    def norm(name: str) -> list[Op]:
        nonlocal norms_left
        if norms_left <= 0 or (block.norm == "none" and not block.modulation):
            return []
        norms_left -= 1
        return [elementwise.norm(name, s.tokens / s.par.tp if s.par.sequence else s.tokens, s.hidden, width)]

    if block.modulation:
        ops += _modulation(block, s)
    ops += norm("input_norm")
    if block.mixer is not None:
        ops += _mixer(block.mixer, s)
        # Parallel branches are summed before one shared all-reduce.
        if not (block.parallel and block.ffn is not None):
            ops += _all_reduce("mixer_all_reduce", s)
    if block.cross is not None:
        ops += [*norm("cross_norm"), *cross_attention(block.cross, s), *_all_reduce("cross_all_reduce", s)]
    if block.ffn is not None:
        if block.mixer is not None:
            ops += norm("post_norm")
        ops += dense_ffn(block.ffn.inter, block.ffn.gated, s) if block.ffn.kind == "mlp" else moe_ffn(block.ffn, s)
        ops += _all_reduce("ffn_all_reduce", s)
    for extra in range(norms_left):
        ops += norm(f"extra_norm_{extra}")
    return ops


def _modulation(block: Block, s: Shard) -> list[Op]:
    """Scales, shifts and gates of a layer, projected from one condition per sequence."""
    f = s.formats
    weight = next(w for w in block_weights(block, s.hidden) if w.name == "modulation")
    sequences: Num = sum((g.n for g in s.groups), start=0)
    return linear("modulation", sequences, [weight], s.par.tp, "column", weight=f.stored("other"), act=f.act,
                  dtype=f.compute("other"))  # fmt: skip


def _mixer(mixer: Any, s: Shard) -> list[Op]:
    match mixer.kind:
        case "attention":
            return attention(mixer, s)
        case "latent":
            return latent_attention(mixer, s)
        case "convolution":
            return convolution(mixer, s)
        case _:
            return recurrent_mixer(mixer, s)


def _head(model: Model, s: Shard, phase: Phase) -> Seq:
    f, tp = s.formats, s.par.tp
    if phase.logits == "last":
        # The verification of a draft needs the logits of every new token.
        rows: Num = sum((g.tokens if g.decode else g.n for g in s.groups), start=0)
    else:
        rows = s.tokens
    stored, dtype = f.stored("head"), f.compute("head")
    ops: list[Op] = [elementwise.norm("final_norm", rows, s.hidden, f.act.width)]
    width = model.embedding_dim or model.hidden
    if model.embedding_dim:
        ops += gemm("project_out", rows, width, s.hidden, weight=stored, act=f.act, dtype=dtype)
    ops += gemm("lm_head", rows, model.vocab / tp, width, weight=stored, act=f.act, dtype=dtype)
    if not is_one(tp):
        ops.append(collective("logits_gather", "all_gather", rows * model.vocab, f.act.width, tp))
    ops.append(elementwise.sampler(rows, model.vocab))
    return Seq(tuple(ops), "head")


def weight_residency(model: Model, par: Parallelism, formats: Formats) -> list[Residency]:
    """Stored weights of the fullest device: sharded matrices, replicated vectors, its stage's layers."""
    stored: list[Residency] = []
    layers = model.n_layers
    stage = ceil(layers / par.pp) / layers
    for name, count in model.block_counts().items():
        block = model.blocks[name]
        kv_heads = getattr(block.mixer, "kv_heads", None)
        for w in block_weights(block, model.hidden):
            elements = w.elements / _cut(w.name, w.part, w.matrix, par, kv_heads)
            width = formats.stored(w.part).width if w.matrix else formats.act.width
            kind: Literal["weights", "experts"] = "experts" if w.part == "experts" else "weights"
            stored.append(Residency(kind, f"{name}.{w.name}", count * stage * elements, width))
    outer = {w.name: w for w in outer_weights(model)}
    # First and last stage hold the table and the head; without pipelining one device holds both.
    names = list(outer)
    if not is_one(par.pp) and "head" in outer:
        names.remove("head")
    for key in names:
        w = outer[key]
        cut = par.tp if key in ("embedding", "head") else 1
        stored.append(Residency("weights", key, w.elements / cut, formats.stored(w.part).width))
    for technique in formats.techniques:
        stored = technique.stored(stored, model, par)
        for c in technique.companions(model):
            own = replace(checkpoint_formats(c.model), techniques=c.techniques)
            kept = weight_residency(c.model, replace(par, ep=1), own) if c.weights != "none" else []
            stored += [_renamed(r) for r in kept if c.weights == "all" or "." in r.name]
    return stored


def _renamed(r: Residency) -> Residency:
    """A record of a model that stands beside: its name must not be taken for a layer's."""
    return replace(r, name="beside " + r.name.replace(".", " "))


def _cut(name: str, part: str, matrix: bool, par: Parallelism, kv_heads: Num | None) -> Num:
    if part == "experts":
        return par.ep * par.moe_tp
    if not matrix or name in _REPLICATED:
        return 1
    if name in ("k_proj", "v_proj") and kv_heads is not None:
        return minimum(par.tp, kv_heads)
    return par.tp


def cache_residency(model: Model, par: Parallelism, formats: Formats, sequences: Num, tokens: Num) -> list[Residency]:
    """Keys, values and recurrent states on the fullest device for `sequences` of `tokens` cached tokens each."""
    stored: list[Residency] = []
    stage = ceil(model.n_layers / par.pp) / model.n_layers
    per_rank = _share(sequences, par.dp)
    for technique in formats.techniques:
        per_rank = technique.held(per_rank)
    for name, count in model.block_counts().items():
        mixer = model.blocks[name].mixer
        shard = Shard(model.hidden, (), par, formats)
        for layers, some in _alike(count, shard):
            room = _room(mixer, tokens, par, some.formats, name, model.hidden, layers)
            for r in _mixer_cache(mixer, per_rank, room, par, some.formats, name, model.hidden, layers):
                stored.append(replace(r, elements=r.elements * layers * stage))
    for c in (c for t in formats.techniques for c in t.companions(model)):
        own = replace(checkpoint_formats(c.model), techniques=c.techniques)
        kept = cache_residency(c.model, par, own, sequences, minimum(tokens, c.tokens))
        stored += [replace(r, name=f"beside.{r.name}") for r in kept]
    return stored


def _room(mixer: Any, tokens: Num, par: Parallelism, f: Formats, name: str, hidden: Num, layers: Num) -> Num:
    """Tokens a layer allocates for a sequence of `tokens`."""
    if mixer is not None and mixer.kind in ("attention", "latent"):
        for technique in f.techniques:
            tokens = technique.allocated(tokens, cache_site(mixer, name, hidden, layers, par, f))
    return tokens


def _edited_cache(
    mixer: Any, sequences: Num, tokens: Num, par: Parallelism, f: Formats, name: str, hidden: Num, layers: Num
) -> list[Residency]:
    """What techniques leave of one layer's cache, by tier."""
    site = cache_site(mixer, name, hidden, layers, par, f)
    cache = edited(f, site, tokens, owned=not getattr(mixer, "shares_kv", False))
    return stored_cache(cache, site, sequences)


def _mixer_cache(
    mixer: Any, sequences: Num, tokens: Num, par: Parallelism, f: Formats, name: str, hidden: Num, layers: Num
) -> list[Residency]:
    if mixer is None or mixer.kind == "convolution":
        return []
    total = sequences * tokens / par.cp
    if f.techniques and mixer.kind in ("attention", "latent"):
        return _edited_cache(mixer, sequences, tokens, par, f, name, hidden, layers)
    if mixer.kind == "attention":
        return attention_cache(mixer, total, sequences, par.tp, f.kv.width, name)
    if mixer.kind == "latent":
        return latent_cache(mixer, total, sequences, par.tp, f.kv.width, name)
    return recurrent_state(mixer, sequences, par.tp, f.state_width, f.act.width, name)
