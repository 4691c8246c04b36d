"""The one home of stored-tensor shapes: which weights a layer and a model hold, and how many parameters that makes.

A matrix of shape (rows, cols) maps cols inputs to rows outputs, as stored by Hugging Face checkpoints. Tensors a
checkpoint fuses (query-key-value, gate-up) are listed apart: the counts are the same. Everything is plain arithmetic
on the attributes, so the same functions accept integers, NumPy arrays or SymPy symbols; only flags and structural
zeros (`q_rank = 0`: no such projection) decide which tensors exist.

Llama-3.1-8B, one attention projection of 32 heads of 128 on a hidden size of 4096 [parameters]:

>>> from perfmodel.spec.model import Attention
>>> weights = mixer_weights(Attention(heads=32, kv_heads=8, head_dim=128), 4096)
>>> [(w.name, w.rows, w.cols) for w in weights][:2]
[('q_proj', 4096, 4096), ('k_proj', 1024, 4096)]
>>> sum(w.elements for w in weights)  # 2 * 4096 * 4096 + 2 * 1024 * 4096
41943040
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from perfmodel.spec.model import (
    Attention,
    Block,
    Convolution,
    CrossAttention,
    GatedDeltaNet,
    Indexer,
    LatentAttention,
    Lightning,
    Mamba1,
    Mamba2,
    Mixer,
    Mlp,
    Model,
    Moe,
)

Part = Literal[
    "attention", "latent", "ssm", "dense_ffn", "experts", "shared", "router", "norm", "embedding", "head", "vision",
    "convolution", "other",
]  # fmt: skip
# An integer, a NumPy array or a SymPy expression.
Number = Any


class Weight(NamedTuple):
    """A stored tensor of shape (copies, rows, cols) [parameters]."""

    name: str
    rows: Number
    cols: Number
    copies: Number
    part: Part
    matrix: bool
    """True where activations are multiplied by it; vectors, tables and convolution kernels are not matrices."""

    @property
    def elements(self) -> Number:
        """copies * rows * cols [parameters]."""
        return self.copies * self.rows * self.cols


def _matrix(name: str, rows: Number, cols: Number, part: Part, copies: Number = 1) -> Weight:
    return Weight(name, rows, cols, copies, part, True)


def _table(name: str, rows: Number, cols: Number, part: Part) -> Weight:
    return Weight(name, rows, cols, 1, part, False)


def _vector(name: str, length: Number, part: Part, copies: Number = 1) -> Weight:
    return Weight(name, length, 1, copies, part, False)


def _absent(size: Number) -> bool:
    """A structural zero; a symbol or an array is a size, whatever its value."""
    return isinstance(size, int) and size == 0


def mixer_weights(mixer: Mixer | None, hidden: Number) -> list[Weight]:
    """Tensors of a layer's token mixer, its norms over heads or ranks included."""
    if mixer is None:
        return []
    match mixer.kind:
        case "attention":
            return _attention(mixer, hidden)
        case "latent":
            return _latent(mixer, hidden)
        case "mamba2":
            return _mamba2(mixer, hidden)
        case "mamba1":
            return _mamba1(mixer, hidden)
        case "deltanet":
            return _deltanet(mixer, hidden)
        case "lightning":
            return _lightning(mixer, hidden)
        case "convolution":
            return _convolution(mixer, hidden)


def _attention(a: Attention, hidden: Number) -> list[Weight]:
    """Grouped-query attention: q (heads * head_dim), k and v (kv_heads * head_dim each), o back to hidden."""
    part: Part = "attention"
    q_rows = a.heads * a.head_dim
    kv_rows = a.kv_heads * a.head_dim
    # The output gate is computed by the query projection, which doubles.
    q_out = q_rows * (2 if a.output_gate else 1)
    own_kv = not a.shares_kv
    if _absent(a.q_rank):
        weights = [_matrix("q_proj", q_out, hidden, part)]
    else:
        weights = [_matrix("q_a_proj", a.q_rank, hidden, part), _matrix("q_b_proj", q_out, a.q_rank, part)]
    if own_kv:
        weights += [_matrix("k_proj", kv_rows, hidden, part), _matrix("v_proj", kv_rows, hidden, part)]
    weights.append(_matrix("o_proj", hidden, q_rows, part))
    if a.qkv_bias:
        weights.append(_vector("q_bias", q_out, part))
        if own_kv:
            weights += [_vector("k_bias", kv_rows, part), _vector("v_bias", kv_rows, part)]
    if a.out_bias:
        weights.append(_vector("o_bias", hidden, part))
    if a.qk_norm != "none":
        full = a.qk_norm == "full"
        vectors = 2 if a.qk_norm == "layernorm-head" else 1
        weights.append(_vector("q_norm", (q_rows if full else a.head_dim) * vectors, "norm"))
        if own_kv:
            weights.append(_vector("k_norm", (kv_rows if full else a.head_dim) * vectors, "norm"))
    if a.sinks:
        weights.append(_vector("sinks", a.heads, part))
    return weights


def _convolution(c: Convolution, width: Number) -> list[Weight]:
    """Kernels of kernel^2 x inputs x width as matrices that map a window to a vector, and what stands beside them."""
    part: Part = "convolution"
    weights = []
    for i in range(c.convolutions):
        inputs = width if i else c.inputs
        if i < c.norms:
            weights.append(_vector(f"group_norm_{i}", 2 * inputs, "norm"))
        weights += [_matrix(f"conv_{i}", width, inputs * c.kernel**2, part), _vector(f"conv_{i}_bias", width, part)]
    if c.condition:
        weights += [_matrix("condition", width, c.condition, "other"), _vector("condition_bias", width, "other")]
    if c.shortcut:
        weights += [_matrix("shortcut", width, c.inputs, part), _vector("shortcut_bias", width, part)]
    return weights


def cross_weights(c: CrossAttention | None, hidden: Number) -> list[Weight]:
    """Projections of cross-attention: queries from the layer's width, keys and values from the other encoder's."""
    if c is None:
        return []
    rows = c.heads * c.head_dim
    inward = [("cross_q_proj", hidden), ("cross_k_proj", c.context), ("cross_v_proj", c.context)]
    matrices = [_matrix(name, rows, cols, "attention") for name, cols in inward]
    return [*matrices, _matrix("cross_o_proj", hidden, rows, "attention"), _vector("cross_o_bias", hidden, "attention")]


def _latent(a: LatentAttention, hidden: Number) -> list[Weight]:
    """Multi-head latent attention, arXiv:2405.04434, equations 9-19: down- and up-projections of q and kv."""
    part: Part = "latent"
    q_rows = a.heads * (a.nope_dim + a.rope_dim)
    kv_down = a.kv_rank + a.rope_dim
    weights = []
    if _absent(a.q_rank):
        weights.append(_matrix("q_proj", q_rows, hidden, part))
    else:
        weights += [
            _matrix("q_a_proj", a.q_rank, hidden, part),
            _vector("q_a_norm", a.q_rank, "norm"),
            _matrix("q_b_proj", q_rows, a.q_rank, part),
        ]
        if a.bias:
            weights.append(_vector("q_a_bias", a.q_rank, part))
    weights += [
        _matrix("kv_a_proj", kv_down, hidden, part),
        _vector("kv_a_norm", a.kv_rank, "norm"),
        _matrix("kv_b_proj", a.heads * (a.nope_dim + a.v_dim), a.kv_rank, part),
        _matrix("o_proj", hidden, a.heads * a.v_dim, part),
    ]
    if a.bias:
        weights += [_vector("kv_a_bias", kv_down, part), _vector("o_bias", hidden, part)]
    if a.indexer is not None:
        weights += _indexer(a.indexer, hidden, hidden if _absent(a.q_rank) else a.q_rank)
    return weights


def _indexer(i: Indexer, hidden: Number, query_input: Number) -> list[Weight]:
    """Lightning indexer of DeepSeek-V3.2: queries from the query latent, one shared key, one weight per head."""
    part: Part = "latent"
    return [
        _matrix("indexer.q_proj", i.heads * i.head_dim, query_input, part),
        _matrix("indexer.k_proj", i.head_dim, hidden, part),
        _vector("indexer.k_norm", 2 * i.head_dim, "norm"),  # LayerNorm: weight and bias
        _matrix("indexer.weights_proj", i.heads, hidden, part),
    ]


def _mamba2(m: Mamba2, hidden: Number) -> list[Weight]:
    """Mamba-2, arXiv:2405.21060: one input projection to gate, x, B, C and dt; a convolution over x, B, C."""
    part: Part = "ssm"
    inner = m.heads * m.head_dim
    channels = inner + 2 * m.groups * m.state
    projected = inner + channels + m.heads
    weights = [_matrix("in_proj", projected, hidden, part), _table("conv1d", channels, m.conv, part)]
    if m.conv_bias:
        weights.append(_vector("conv1d_bias", channels, part))
    weights += [_vector(name, m.heads, part) for name in ("dt_bias", "A_log", "D")]
    if m.gated_norm:
        weights.append(_vector("norm", inner, "norm"))
    weights.append(_matrix("out_proj", hidden, inner, part))
    if m.proj_bias:
        weights += [_vector("in_bias", projected, part), _vector("out_bias", hidden, part)]
    return weights


def _mamba1(m: Mamba1, hidden: Number) -> list[Weight]:
    """Mamba, arXiv:2312.00752: dt, B and C are projected from the convolved input, per channel."""
    part: Part = "ssm"
    weights = [_matrix("in_proj", 2 * m.inner, hidden, part), _table("conv1d", m.inner, m.conv, part)]
    if m.conv_bias:
        weights.append(_vector("conv1d_bias", m.inner, part))
    weights += [
        _matrix("x_proj", m.dt_rank + 2 * m.state, m.inner, part),
        _matrix("dt_proj", m.inner, m.dt_rank, part),
        _vector("dt_bias", m.inner, part),
        _table("A_log", m.inner, m.state, part),
        _vector("D", m.inner, part),
        _matrix("out_proj", hidden, m.inner, part),
    ]
    if m.inner_norms:
        weights += [_vector("dt_norm", m.dt_rank, "norm"), _vector("b_norm", m.state, "norm")]
        weights.append(_vector("c_norm", m.state, "norm"))
    if m.proj_bias:
        weights += [_vector("in_bias", 2 * m.inner, part), _vector("out_bias", hidden, part)]
    return weights


def _deltanet(m: GatedDeltaNet, hidden: Number) -> list[Weight]:
    """Gated delta net, arXiv:2412.06464: q, k, v and gate z; beta and decay per value head; convolution over qkv."""
    part: Part = "ssm"
    key = m.key_heads * m.key_dim
    value = m.value_heads * m.value_dim
    return [
        _matrix("in_proj_qkvz", 2 * key + 2 * value, hidden, part),
        _matrix("in_proj_ba", 2 * m.value_heads, hidden, part),
        _table("conv1d", 2 * key + value, m.conv, part),
        _vector("dt_bias", m.value_heads, part),
        _vector("A_log", m.value_heads, part),
        _vector("norm", m.value_dim, "norm"),  # one RMSNorm shared by all heads
        _matrix("out_proj", hidden, value, part),
    ]


def _lightning(m: Lightning, hidden: Number) -> list[Weight]:
    """Lightning attention of MiniMax-01, arXiv:2501.08313: q, k, v, a sigmoid output gate and a norm over all heads."""
    part: Part = "ssm"
    inner = m.heads * m.head_dim
    return [
        _matrix("qkv_proj", 3 * inner, hidden, part),
        _matrix("gate", inner, hidden, part),
        _vector("norm", inner, "norm"),
        _matrix("out_proj", hidden, inner, part),
    ]


def ffn_weights(ffn: Mlp | Moe | None, hidden: Number) -> list[Weight]:
    """Tensors of a layer's feed-forward part."""
    if ffn is None:
        return []
    if ffn.kind == "mlp":
        return _feed_forward("", ffn.inter, hidden, "dense_ffn", ffn.gated, ffn.bias)
    weights = [_matrix("router", ffn.experts, hidden, "router")]
    if ffn.router_bias:
        weights.append(_vector("router_bias", ffn.experts, "router"))
    weights += _feed_forward("experts.", ffn.inter, hidden, "experts", ffn.gated, ffn.expert_bias, ffn.experts)
    if not _absent(ffn.shared_inter):
        weights += _feed_forward("shared.", ffn.shared_inter, hidden, "shared", ffn.gated, False)
    if ffn.shared_gate:
        weights.append(_matrix("shared_gate", 1, hidden, "router"))
    if not _absent(ffn.dense_inter):
        weights += _feed_forward("", ffn.dense_inter, hidden, "dense_ffn", ffn.gated, False)
    return weights


def _feed_forward(
    prefix: str, inter: Number, hidden: Number, part: Part, gated: bool, bias: bool, copies: Number = 1
) -> list[Weight]:
    inward = ["gate", "up"] if gated else ["up"]
    weights = [_matrix(f"{prefix}{name}_proj", inter, hidden, part, copies) for name in inward]
    weights.append(_matrix(f"{prefix}down_proj", hidden, inter, part, copies))
    if bias:
        weights += [_vector(f"{prefix}{name}_bias", inter, part, copies) for name in inward]
        weights.append(_vector(f"{prefix}down_bias", hidden, part, copies))
    return weights


# Vectors of width `hidden` in one norm: LayerNorm has weight and bias.
_NORM_VECTORS = {"rms": 1, "layer": 2, "none": 0}


def block_weights(block: Block, hidden: Number) -> list[Weight]:
    """Every tensor of one layer; `hidden` is the model's, which the layer's own width prevails over."""
    hidden = hidden if _absent(block.width) else block.width
    weights = mixer_weights(block.mixer, hidden) + cross_weights(block.cross, hidden) + ffn_weights(block.ffn, hidden)
    if vectors := _NORM_VECTORS[block.norm]:
        weights += [_vector(f"norm_{i}", vectors * hidden, "norm") for i in range(block.norms)]
    if not _absent(block.modulation):
        rows = block.modulation * hidden
        weights += [_matrix("modulation", rows, hidden, "other"), _vector("modulation_bias", rows, "other")]
    if not _absent(block.extra_parameters):
        weights.append(_vector("extra", block.extra_parameters, "other"))
    return weights


def outer_weights(model: Model) -> list[Weight]:
    """Every tensor outside the layers; a tied head is the embedding and is not listed again."""
    hidden, width = model.hidden, model.embedding_dim or model.hidden
    weights = [_table("embedding", model.vocab, width, "embedding")]
    if not _absent(model.learned_positions):
        weights.append(_table("positions", model.learned_positions, hidden, "embedding"))
    if model.embedding_dim:
        weights += [_matrix("project_in", hidden, width, "embedding"), _matrix("project_out", width, hidden, "head")]
    if model.embedding_norm:
        weights.append(_vector("embedding_norm", 2 * hidden, "norm"))
    if vectors := _NORM_VECTORS[model.final_norm]:
        weights.append(_vector("final_norm", vectors * hidden, "norm"))
    if not model.tied_embeddings:
        weights.append(_matrix("head", model.vocab, width, "head"))
    if model.head_bias:
        weights.append(_vector("head_bias", model.vocab, "head"))
    if model.vision is not None:
        weights.append(_vector("vision", model.vision.parameters, "vision"))
    if not _absent(model.extra_parameters):
        weights.append(_vector("extra", model.extra_parameters, "other"))
    return weights


def parameters_total(model: Model) -> int:
    """Stored parameters, each tensor once (tied embeddings once); multi-token-prediction modules are not counted."""
    total = sum(w.elements for w in outer_weights(model))
    for name, layers in model.block_counts().items():
        total += layers * sum(w.elements for w in block_weights(model.blocks[name], model.hidden))
    return int(total)


def parameters_active(model: Model) -> int:
    """Parameters a token meets: all but the routed experts it is not sent to."""
    idle = 0
    for name, layers in model.block_counts().items():
        ffn = model.blocks[name].ffn
        if isinstance(ffn, Moe):
            experts = sum(w.elements for w in ffn_weights(ffn, model.hidden) if w.part == "experts")
            idle += layers * (experts // ffn.experts) * (ffn.experts - ffn.top_k)
    return parameters_total(model) - idle
