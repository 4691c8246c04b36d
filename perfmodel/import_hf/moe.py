"""Readers for mixture-of-experts decoders with ordinary (grouped-query) attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perfmodel.errors import SpecError
from perfmodel.import_hf.layout import Fields, attention, model_fields, per_layer, positive, window
from perfmodel.import_hf.reader import Config, family
from perfmodel.import_hf.vision import text_config, vision_fields
from perfmodel.parameters import block_weights
from perfmodel.spec.model import Block


def mixture(
    config: Config, *, experts: str = "num_local_experts", inter: str = "intermediate_size", **others: Any
) -> Fields:
    """A mixture of experts; `experts` and `inter` name the keys, which differ between families."""
    return {
        "kind": "moe",
        "experts": config.integer(experts),
        "top_k": config.integer("num_experts_per_tok", "experts_per_token"),
        "inter": config.integer(inter),
        **others,
    }


def uniform(config: Config, mixer: Fields, ffn: Fields, **others: Any) -> Fields:
    """A model whose layers are all alike; their norms are of the kind of the last one."""
    layers = config.integer("num_hidden_layers")
    norm = others.get("final_norm", "rms")
    return model_fields(config, {"moe": {"mixer": mixer, "ffn": ffn, "norm": norm}}, ["moe"] * layers, **others)


def bias(config: Config, *, out: bool = False) -> Fields:
    """`attention_bias` on the query, key and value projections, and on the output projection where `out`."""
    has = bool(config.get("attention_bias", default=False))
    return {"qkv_bias": has, "out_bias": has and out}


def multimodal(config: Config, reader: Callable[[Config], Fields]) -> Fields:
    """The text part read by `reader`, and the vision encoder."""
    fields = reader(text_config(config))
    return {**fields, "vision": vision_fields(config, fields["hidden"])}


@family("MixtralForCausalLM")
def mixtral(config: Config) -> Fields:
    """Mixtral: every feed-forward is a mixture (arXiv:2401.04088)."""
    return uniform(config, attention(config, window=window(config)), mixture(config))


@family("PhiMoEForCausalLM", "PhimoeForCausalLM")
def phi_moe(config: Config) -> Fields:
    """Phi-3.5-MoE and its slim versions: LayerNorm with bias, biases on attention and head (arXiv:2404.14219)."""
    mixer = attention(config, window=window(config), **bias(config, out=True))
    head_bias = bool(config.get("lm_head_bias", default=False))
    return uniform(config, mixer, mixture(config), final_norm="layer", head_bias=head_bias)


@family("OlmoeForCausalLM")
def olmoe(config: Config) -> Fields:
    """OLMoE: RMSNorm over all query and all key heads (arXiv:2409.02060)."""
    mixer = attention(config, qk_norm="full", **bias(config, out=True))
    return uniform(config, mixer, mixture(config, experts="num_experts"))


def sparse_layers(config: Config) -> list[str]:
    """Qwen's rule: every `decoder_sparse_step`-th layer is a mixture, except those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=[])
    layers = range(config.integer("num_hidden_layers"))
    return ["moe" if step and layer not in dense and (layer + 1) % step == 0 else "dense" for layer in layers]


def qwen_ffns(config: Config, order: list[str]) -> dict[str, Fields]:
    """The feed-forward kinds in `order`; a shared expert has a scalar gate."""
    shared = config.integer("shared_expert_intermediate_size", default=0)
    ffns = {"moe": mixture(config, experts="num_experts", inter="moe_intermediate_size")}
    ffns["moe"] |= {"shared_inter": shared, "shared_gate": shared > 0}
    if "dense" in order:
        ffns["dense"] = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    return ffns


@family("Qwen2MoeForCausalLM")
def qwen2_moe(config: Config) -> Fields:
    """Qwen1.5-MoE and Qwen2-MoE: biases on query, key and value, a shared expert (arXiv:2407.10671)."""
    sliding = window(config) if config.get("use_sliding_window", default=False) else None
    mixer = attention(config, qkv_bias=bool(config.get("qkv_bias", default=True)), window=sliding)
    order = sparse_layers(config)
    return model_fields(config, {k: {"mixer": mixer, "ffn": f} for k, f in qwen_ffns(config, order).items()}, order)


@family("Qwen3MoeForCausalLM")
def qwen3_moe(config: Config) -> Fields:
    """Qwen3-MoE: norms on query and key heads, no shared expert (arXiv:2505.09388)."""
    sliding = window(config) if config.get("use_sliding_window", default=False) else None
    mixer = attention(config, qk_norm="head", window=sliding, **bias(config, out=True))
    order = sparse_layers(config)
    return model_fields(config, {k: {"mixer": mixer, "ffn": f} for k, f in qwen_ffns(config, order).items()}, order)


@family("Qwen3VLMoeForConditionalGeneration")
def qwen3_vl_moe(config: Config) -> Fields:
    """Qwen3-VL with a Qwen3-MoE text model."""
    return multimodal(config, qwen3_moe)


@family("GptOssForCausalLM")
def gpt_oss(config: Config) -> Fields:
    """gpt-oss: sliding and full attention in turn, attention sinks, biases everywhere (arXiv:2508.10925)."""
    ffn = mixture(config, expert_bias=True, router_bias=True)
    has_bias = bool(config.get("attention_bias", default=True))
    full = attention(config, qkv_bias=has_bias, out_bias=has_bias, sinks=True)
    blocks = {
        "sliding": {"mixer": {**full, "window": config.integer("sliding_window")}, "ffn": ffn},
        "full": {"mixer": full, "ffn": ffn},
    }
    meaning = {"sliding_attention": "sliding", "full_attention": "full"}
    order = per_layer(config, "layer_types", meaning, lambda layer: "full" if layer % 2 else "sliding")
    return model_fields(config, blocks, order)


@family("Llama4ForCausalLM")
def llama4_text(config: Config) -> Fields:
    """Llama 4: attention in chunks except on layers without rotary positions, mixtures every so many layers.

    The norm of queries and keys has no weights. Each mixture has one shared expert as large as a routed one.
    """
    layers = config.integer("num_hidden_layers")
    full = attention(config, **bias(config, out=True))
    chunk = config.integer("attention_chunk_size", default=8192)
    mixers = {"chunked": {**full, "window": chunk}, "full": full}
    ffns = {
        "dense": {"kind": "mlp", "inter": config.integer("intermediate_size_mlp")},
        "moe": mixture(config, shared_inter=config.integer("intermediate_size")),
    }
    step = positive(config, "interleave_moe_layer_step", default=1)
    mixtures = config.get("moe_layers", default=range(step - 1, layers, step))
    # Hugging Face writes 1 for a layer with rotary positions; an empty list means every fourth has none.
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    rotary = config.get("no_rope_layers", default=None) or every_fourth
    if len(rotary) < layers:
        raise SpecError(f"'no_rope_layers' must list {layers} layers, got {len(rotary)}", file=config.file)
    order = [
        f"{'chunked' if rotary[layer] else 'full'}_{'moe' if layer in mixtures else 'dense'}" for layer in range(layers)
    ]
    blocks = {f"{m}_{f}": {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns}
    return model_fields(config, blocks, order)


@family("Llama4ForConditionalGeneration")
def llama4(config: Config) -> Fields:
    """Llama 4 with its vision encoder."""
    return multimodal(config, llama4_text)


@family("Glm4MoeForCausalLM")
def glm4_moe(config: Config) -> Fields:
    """GLM-4.5 and 4.6: leading dense layers, then mixtures with a shared expert (arXiv:2508.06471)."""
    norm = "head" if config.get("use_qk_norm", default=False) else "none"
    return leading_dense(config, attention(config, qk_norm=norm, **bias(config)), router_bias=True)


@family("DeepseekForCausalLM")
def deepseek_moe(config: Config) -> Fields:
    """DeepSeekMoE 16B: ordinary attention, one dense layer, then mixtures with shared experts (arXiv:2401.06066)."""
    return leading_dense(config, attention(config, **bias(config)), router_bias=False)


def leading_dense(config: Config, mixer: Fields, *, router_bias: bool, copies: bool = True) -> Fields:
    """DeepSeek's layout: `first_k_dense_replace` dense layers, then mixtures with shared experts.

    `router_bias` is the per-expert correction that balances load without an auxiliary loss (arXiv:2408.15664);
    `copies`: the checkpoint stores the embedding and the head again with each multi-token-prediction module.
    """
    shared = config.integer("moe_intermediate_size") * config.integer("n_shared_experts", default=0)
    experts = mixture(
        config,
        experts="n_routed_experts",
        inter="moe_intermediate_size",
        shared_inter=shared,
        router_bias=router_bias,
        groups=config.integer("n_group", default=1),
        top_groups=config.integer("topk_group", default=1),
    )
    dense = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    first = config.integer("first_k_dense_replace", default=0)
    step = positive(config, "moe_layer_freq", default=1)
    order = [
        "moe" if layer >= first and layer % step == 0 else "dense"
        for layer in range(config.integer("num_hidden_layers"))
    ]
    blocks = {"dense": {"mixer": mixer, "ffn": dense}, "moe": {"mixer": mixer, "ffn": experts}}
    modules = config.integer("num_nextn_predict_layers", default=0)
    mtp = modules * prediction_module(config, blocks["moe"], copies=copies)
    return model_fields(config, blocks, order, mtp_parameters=mtp)


def prediction_module(config: Config, block: Fields, *, copies: bool) -> int:
    """Parameters of one multi-token-prediction module (arXiv:2412.19437, section 2.2) as stored.

    A layer, a projection of two hidden states to one and three norms; with `copies` the embedding and the head too.
    """
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    layer = sum(weight.elements for weight in block_weights(Block.model_validate(block), hidden))
    return int(layer + 2 * hidden * hidden + 3 * hidden + (2 * vocab * hidden if copies else 0))


@family("MiniMaxM2ForCausalLM")
def minimax_m2(config: Config) -> Fields:
    """MiniMax-M2: full attention, RMSNorm over all query and all key heads, small experts."""
    shared = config.integer("shared_intermediate_size", default=0)
    ffn = mixture(config, shared_inter=shared, router_bias=bool(config.get("use_routing_bias", default=True)))
    norm = "full" if config.get("use_qk_norm", default=True) else "none"
    return uniform(config, attention(config, qk_norm=norm), ffn)


@family("DbrxForCausalLM")
def dbrx(config: Config) -> Fields:
    """DBRX: LayerNorm without bias, so it is counted like an RMSNorm."""
    heads, experts = config.sub("attn_config"), config.sub("ffn_config")
    usual = {
        "hidden_size": config.integer("d_model"),
        "num_hidden_layers": config.integer("n_layers"),
        "num_attention_heads": config.integer("n_heads"),
        "num_key_value_heads": heads.integer("kv_n_heads", default=1),
        "max_position_embeddings": config.integer("max_seq_len", default=0),
        "num_local_experts": experts.integer("moe_num_experts"),
        "num_experts_per_tok": experts.integer("moe_top_k"),
        "intermediate_size": experts.integer("ffn_hidden_size"),
    }
    return mixtral(Config({**config.data, **usual}, config.file))
