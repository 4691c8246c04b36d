"""Readers for mixture-of-experts decoders with ordinary (grouped-query) attention."""

from __future__ import annotations

from typing import Any

from perfmodel.errors import SpecError
from perfmodel.import_hf.layout import Fields, attention, model_fields, per_layer, window
from perfmodel.import_hf.reader import Config, family
from perfmodel.parameters import block_weights
from perfmodel.spec.model import Block


def uniform(config: Config, mixer: Fields, ffn: Fields, **others: Any) -> Fields:
    """A model whose layers are all alike."""
    layers = config.integer("num_hidden_layers")
    norm = others.get("final_norm", "rms")
    return model_fields(config, {"moe": {"mixer": mixer, "ffn": ffn, "norm": norm}}, ["moe"] * layers, **others)


def bias(config: Config, *, out: bool = False) -> Fields:
    """`attention_bias` on the query, key and value projections, and on the output projection where `out`."""
    has = bool(config.get("attention_bias", default=False))
    return {"qkv_bias": has, "out_bias": has and out}


@family("MixtralForCausalLM")
def mixtral(config: Config) -> Fields:
    """Mixtral: every feed-forward is a mixture (arXiv:2401.04088)."""
    ffn = {
        "kind": "moe",
        "experts": config.integer("num_local_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": config.integer("intermediate_size"),
    }
    return uniform(config, attention(config, window=window(config)), ffn)


@family("PhiMoEForCausalLM", "PhimoeForCausalLM")
def phi_moe(config: Config) -> Fields:
    """Phi-3.5-MoE and its slim versions: LayerNorm with bias, biases on attention and head (arXiv:2404.14219)."""
    ffn = {
        "kind": "moe",
        "experts": config.integer("num_local_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": config.integer("intermediate_size"),
    }
    mixer = attention(config, window=window(config), **bias(config, out=True))
    return uniform(config, mixer, ffn, final_norm="layer", head_bias=bool(config.get("lm_head_bias", default=False)))


@family("OlmoeForCausalLM")
def olmoe(config: Config) -> Fields:
    """OLMoE: RMSNorm over all query and all key heads (arXiv:2409.02060)."""
    ffn = {
        "kind": "moe",
        "experts": config.integer("num_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": config.integer("intermediate_size"),
    }
    return uniform(config, attention(config, qk_norm="full", **bias(config, out=True)), ffn)


def sparse_layers(config: Config) -> list[str]:
    """Qwen's rule: every `decoder_sparse_step`-th layer is a mixture, except those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=[])
    layers = range(config.integer("num_hidden_layers"))
    return ["moe" if step and layer not in dense and (layer + 1) % step == 0 else "dense" for layer in layers]


def qwen_ffn(config: Config) -> tuple[Fields, Fields]:
    """The dense and the mixture feed-forward of a Qwen model; a shared expert has a scalar gate."""
    shared = config.integer("shared_expert_intermediate_size", default=0)
    mixture = {
        "kind": "moe",
        "experts": config.integer("num_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": config.integer("moe_intermediate_size"),
        "shared_inter": shared,
        "shared_gate": shared > 0,
    }
    return {"kind": "mlp", "inter": config.integer("intermediate_size", default=1)}, mixture


@family("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
def qwen_moe(config: Config) -> Fields:
    """Qwen1.5-MoE, Qwen2-MoE (biases, shared expert) and Qwen3-MoE (query and key norms, no shared expert)."""
    dense, mixture = qwen_ffn(config)
    if config.architecture == "Qwen2MoeForCausalLM":
        qwen2_window = window(config) if config.get("use_sliding_window", default=False) else None
        mixer = attention(config, qkv_bias=bool(config.get("qkv_bias", default=True)), window=qwen2_window)
    else:
        mixer = attention(config, qk_norm="head", window=window(config), **bias(config, out=True))
        mixture = {**mixture, "shared_inter": 0, "shared_gate": False}
    blocks = {"dense": {"mixer": mixer, "ffn": dense}, "moe": {"mixer": mixer, "ffn": mixture}}
    return model_fields(config, blocks, sparse_layers(config))


@family("GptOssForCausalLM")
def gpt_oss(config: Config) -> Fields:
    """gpt-oss: sliding and full attention in turn, attention sinks, biases everywhere (arXiv:2508.10925)."""
    ffn = {
        "kind": "moe",
        "experts": config.integer("num_local_experts", "num_experts"),
        "top_k": config.integer("num_experts_per_tok", "experts_per_token"),
        "inter": config.integer("intermediate_size"),
        "expert_bias": True,
        "router_bias": True,
    }
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
        "moe": {
            "kind": "moe",
            "experts": config.integer("num_local_experts"),
            "top_k": config.integer("num_experts_per_tok"),
            "inter": config.integer("intermediate_size"),
            "shared_inter": config.integer("intermediate_size"),
        },
    }
    step = config.integer("interleave_moe_layer_step", default=1)
    if step < 1:
        raise SpecError("'interleave_moe_layer_step' must be at least 1", file=config.file)
    mixtures = config.get("moe_layers", default=range(step - 1, layers, step))
    # Hugging Face writes 1 for a layer with rotary positions; an empty list means every fourth has none.
    rotary = config.get("no_rope_layers", default=None) or [int((i + 1) % 4 != 0) for i in range(layers)]
    order = [
        f"{'chunked' if rotary[layer] else 'full'}_{'moe' if layer in mixtures else 'dense'}" for layer in range(layers)
    ]
    blocks = {f"{m}_{f}": {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns}
    return model_fields(config, blocks, order)


@family("Glm4MoeForCausalLM")
def glm4_moe(config: Config) -> Fields:
    """GLM-4.5 and 4.6: leading dense layers, then mixtures with a shared expert (arXiv:2508.06471)."""
    norm = "head" if config.get("use_qk_norm", default=False) else "none"
    return leading_dense(config, attention(config, qk_norm=norm, **bias(config)), router_bias=True)


def leading_dense(config: Config, mixer: Fields, *, router_bias: bool) -> Fields:
    """DeepSeek's layout: `first_k_dense_replace` dense layers, then mixtures with shared experts.

    `router_bias` is the per-expert correction that balances load without an auxiliary loss (arXiv:2408.15664).
    """
    inter = config.integer("moe_intermediate_size")
    mixture = {
        "kind": "moe",
        "experts": config.integer("n_routed_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": inter,
        "shared_inter": inter * config.integer("n_shared_experts", default=0),
        "router_bias": router_bias,
        "groups": config.integer("n_group", default=1),
        "top_groups": config.integer("topk_group", default=1),
    }
    dense = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    first = config.integer("first_k_dense_replace", default=0)
    step = max(1, config.integer("moe_layer_freq", default=1))
    order = [
        "moe" if layer >= first and layer % step == 0 else "dense"
        for layer in range(config.integer("num_hidden_layers"))
    ]
    blocks = {"dense": {"mixer": mixer, "ffn": dense}, "moe": {"mixer": mixer, "ffn": mixture}}
    return model_fields(config, blocks, order, mtp_parameters=prediction_modules(config, blocks["moe"]))


def prediction_modules(config: Config, block: Fields) -> int:
    """Parameters of `num_nextn_predict_layers` multi-token-prediction modules as checkpoints store them.

    arXiv:2412.19437 section 2.2: a layer, a projection of two hidden states to one, three norms, and copies of the
    embedding and the head. For DeepSeek-V3: 685 billion stored, 671 billion of them the main model.
    """
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    layer = sum(weight.elements for weight in block_weights(Block.model_validate(block), hidden))
    module = layer + 2 * hidden * hidden + 3 * hidden + 2 * vocab * hidden
    return int(config.integer("num_nextn_predict_layers", default=0) * module)


@family("MiniMaxM2ForCausalLM")
def minimax_m2(config: Config) -> Fields:
    """MiniMax-M2: full attention, RMSNorm over all query and all key heads, small experts."""
    ffn = {
        "kind": "moe",
        "experts": config.integer("num_local_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "inter": config.integer("intermediate_size"),
        "shared_inter": config.integer("shared_intermediate_size", default=0),
        "router_bias": bool(config.get("use_routing_bias", default=True)),
    }
    norm = "full" if config.get("use_qk_norm", default=True) else "none"
    return uniform(config, attention(config, qk_norm=norm), ffn)


@family("DbrxForCausalLM")
def dbrx(config: Config) -> Fields:
    """DBRX: LayerNorm without bias, so it is counted like an RMSNorm."""
    heads = config.sub("attn_config")
    experts = config.sub("ffn_config")
    hidden, n_heads = config.integer("d_model"), config.integer("n_heads")
    mixer = {
        "kind": "attention",
        "heads": n_heads,
        "kv_heads": heads.integer("kv_n_heads", default=1),
        "head_dim": hidden // n_heads,
    }
    ffn = {
        "kind": "moe",
        "experts": experts.integer("moe_num_experts"),
        "top_k": experts.integer("moe_top_k"),
        "inter": experts.integer("ffn_hidden_size"),
    }
    names = {"hidden_size": hidden, "num_hidden_layers": config.integer("n_layers")}
    renamed = Config({**config.data, **names}, config.file)
    return uniform(renamed, mixer, ffn, max_positions=config.integer("max_seq_len", default=0))
