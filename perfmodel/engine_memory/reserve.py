"""What an engine sets aside beside weights and cache: activations, the sampler, graphs, what lies outside tensors."""

from __future__ import annotations

import math

from perfmodel.engine_memory.instance import Instance
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.parameters import outer_weights
from perfmodel.spec.model import Attention, LatentAttention, Model
from perfmodel.symbols import Num

_STREAMS = 5  # tensors of the hidden width alive beside a layer's widest one: residual, normed, mixer, reduced, input


def activations(i: Instance) -> float:
    """Peak of the step an engine reserves for: a layer's intermediates, or the sampler's buffers over all logits."""
    if i.account.budget == "context":
        return _compute_buffer(i)
    logits = math.ceil(i.profiled_sequences / i.par.dp) * i.model.vocab * i.number("memory_sampler")
    return max(layer_activations(i.model, i.par, i.formats, i.profiled_tokens), logits)


def layer_activations(model: Model, par: Parallelism, formats: Formats, tokens: Num) -> float:
    """Residual stream and the widest intermediate of any layer [byte]."""
    widest = 0.0
    for block in model.blocks.values():
        ffn, mixer = block.ffn, block.mixer
        if ffn is not None and ffn.kind == "mlp":
            widest = max(widest, 3 * ffn.inter / par.tp)
        elif ffn is not None:
            widest = max(widest, 3 * ffn.inter * ffn.top_k / par.moe_tp)
        if isinstance(mixer, LatentAttention):
            # Expanded prefill rebuilds keys and values of every head.
            widest = max(widest, mixer.heads * (2 * mixer.nope_dim + mixer.rope_dim + 2 * mixer.v_dim) / par.tp)
        if isinstance(mixer, Attention):
            widest = max(widest, (2 * mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim / par.tp)
    return float(tokens / par.cp * (_STREAMS * model.hidden + widest) * formats.act.width)


def _compute_buffer(i: Instance) -> float:
    """llama.cpp's graph buffer: FP32 scores of a micro-batch over the context, its logits, or the feed-forward part."""
    u, context = i.profiled_tokens, i.longest
    heads = max((b.mixer.heads for b in i.model.blocks.values() if isinstance(b.mixer, (Attention, LatentAttention))),
                default=0)  # fmt: skip
    inter = max((b.ffn.inter for b in i.model.blocks.values() if b.ffn is not None), default=0)
    mask = 4.0 * context * u
    scores = 0.0 if i.flash else 4.0 * heads * context * u
    widest = max(scores + 12.0 * u * i.model.hidden, 4.0 * u * (2 * inter + 2 * i.model.hidden))
    return max(widest + mask, 4.0 * u * (i.model.vocab + i.model.hidden) + mask)


def overhead(i: Instance) -> float:
    """What an engine counts outside tensors: context and libraries, and communication buffers [byte]."""
    return i.number("memory_context") + i.number("memory_parallel") * math.log2(float(i.par.tp))


def graphs(i: Instance) -> float:
    """Captured graphs of the decode steps [byte]."""
    return i.number("memory_graphs") * i.model.n_layers / float(i.par.pp) if i.graphs else 0.0


def has_encoder(model: Model) -> bool:
    """Whether the reserved step also holds images, whose number and size are a setting of their own."""
    return any(w.part == "vision" for w in outer_weights(model))
