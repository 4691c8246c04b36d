"""One forward pass: model x parallelism x phase -> operators of one device on a schedule.

Prefill, decode, a chunk, a speculative verification and a mixed batch are the same pass with other numbers
of new and cached tokens per group of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from perfmodel.ops import elementwise
from perfmodel.ops.attention import attention, attention_cache
from perfmodel.ops.collective import collective
from perfmodel.ops.gemm import gemm
from perfmodel.ops.mla import latent_attention, latent_cache
from perfmodel.ops.moe import dense_ffn, moe_ffn
from perfmodel.ops.shard import Formats, Group, Parallelism, Shard
from perfmodel.ops.ssm import recurrent_mixer, recurrent_state
from perfmodel.ops.traffic import Op, Residency
from perfmodel.parameters import block_weights, outer_weights
from perfmodel.schedule import Node, Repeat, Seq
from perfmodel.spec.model import Block, Model
from perfmodel.symbols import Num, ceil, is_one, minimum, symbol

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
    shard = Shard(model.hidden, groups, par, formats, phase.causal)
    items: list[Node] = [_embed(model, shard)]
    layers: Num = sum(count for count in model.block_counts().values())
    longest_stage = ceil(layers / par.pp) * par.pp / layers
    for name, count in model.block_counts().items():
        body = Seq(tuple(_block(model.blocks[name], shard)), name)
        items.append(Repeat(body, count * longest_stage, name))
    items.append(_head(model, shard, phase))
    if not is_one(par.pp):
        hidden = shard.tokens * model.hidden / par.tp
        hop = collective("stage_hop", "p2p", hidden, formats.act.width, par.pp, stride=par.group)
        items.append(Repeat(hop, par.pp - 1, "pipeline"))
    return Program(Seq(tuple(items), "pass"))


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


def _block(block: Block, s: Shard) -> list[Op]:
    ops: list[Op] = []
    width = s.formats.act.width
    norms_left = block.norms

    def norm(name: str) -> list[Op]:
        nonlocal norms_left
        if norms_left <= 0 or block.norm == "none":
            return []
        norms_left -= 1
        return [elementwise.norm(name, s.tokens / s.par.tp if s.par.sequence else s.tokens, s.hidden, width)]

    ops += norm("input_norm")
    if block.mixer is not None:
        ops += _mixer(block.mixer, s)
        # Parallel branches are summed before one shared all-reduce.
        if not (block.parallel and block.ffn is not None):
            ops += _all_reduce("mixer_all_reduce", s)
    if block.ffn is not None:
        if block.mixer is not None:
            ops += norm("post_norm")
        ops += dense_ffn(block.ffn.inter, block.ffn.gated, s) if block.ffn.kind == "mlp" else moe_ffn(block.ffn, s)
        ops += _all_reduce("ffn_all_reduce", s)
    for extra in range(norms_left):
        ops += norm(f"extra_norm_{extra}")
    return ops


def _mixer(mixer: Any, s: Shard) -> list[Op]:
    match mixer.kind:
        case "attention":
            return attention(mixer, s)
        case "latent":
            return latent_attention(mixer, s)
        case _:
            return recurrent_mixer(mixer, s)


def _head(model: Model, s: Shard, phase: Phase) -> Seq:
    f, tp = s.formats, s.par.tp
    if phase.logits == "last":
        rows: Num = sum((g.n for g in s.groups), start=0)
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
    return stored


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
    for name, count in model.block_counts().items():
        mixer = model.blocks[name].mixer
        for r in _mixer_cache(mixer, per_rank, tokens / par.cp, par, formats, name):
            stored.append(replace(r, elements=r.elements * count * stage))
    return stored


def _mixer_cache(mixer: Any, sequences: Num, tokens: Num, par: Parallelism, f: Formats, name: str) -> list[Residency]:
    if mixer is None:
        return []
    total = sequences * tokens
    if mixer.kind == "attention":
        return attention_cache(mixer, total, sequences, par.tp, f.kv.width, name)
    if mixer.kind == "latent":
        return latent_cache(mixer, total, sequences, par.tp, f.kv.width, name)
    return recurrent_state(mixer, sequences, par.tp, f.state_width, f.act.width, name)


# Sizes that no count depends on: they only enter the expected number of ranks, R.
_STRUCTURAL = {"top_groups"}


def symbolic_model(model: Model) -> Any:
    """The same model with its sizes replaced by symbols, block by block; flags and zeros stay."""
    counts = model.block_counts()
    single = len(counts) == 1
    blocks = {}
    for i, name in enumerate(counts):
        index = "" if single else str(i)
        block = model.blocks[name]
        blocks[name] = SimpleNamespace(
            **{k: v for k, v in block if k not in ("mixer", "ffn")},
            mixer=_symbolic_record(block.mixer, index),
            ffn=_symbolic_record(block.ffn, index),
        )
    layers = {name: symbol("L", "" if single else str(i)) for i, name in enumerate(counts)}
    return SimpleNamespace(
        **{k: v for k, v in model if k not in ("blocks", "layers", "hidden", "vocab")},
        hidden=symbol("h"),
        vocab=symbol("V"),
        blocks=blocks,
        block_counts=lambda: layers,
    )


def _symbolic_record(record: Any, index: str) -> Any:
    if record is None:
        return None
    fields: dict[str, Any] = {}
    for key, value in record:
        size = isinstance(value, int) and not isinstance(value, bool) and value > 0 and key not in _STRUCTURAL
        fields[key] = symbol(key, index) if size else value
    return SimpleNamespace(**fields)


def values_of(model: Model) -> dict[str, float]:
    """Numbers of the symbols that `symbolic_model` introduces."""
    counts = model.block_counts()
    values: dict[str, float] = {"h": model.hidden, "V": model.vocab}
    for i, (name, count) in enumerate(counts.items()):
        index = "" if len(counts) == 1 else f"_{i}"
        values[f"L{index}"] = count
        for record in (model.blocks[name].mixer, model.blocks[name].ffn):
            for key, value in record or ():
                if isinstance(value, int) and not isinstance(value, bool) and value > 0 and key not in _STRUCTURAL:
                    values[f"{key}{index}"] = value
    return values
