"""Readers for hybrids of attention and recurrent mixers, and for pure state-space models."""

from __future__ import annotations

from typing import Any

from perfmodel.errors import SpecError
from perfmodel.import_hf.layout import Fields, attention, model_fields, per_layer, positive
from perfmodel.import_hf.moe import bias, mixture, multimodal, prediction_module, qwen_ffns, sparse_layers
from perfmodel.import_hf.reader import Config, family


def mamba2(config: Config, **spellings: str) -> Fields:
    """A Mamba-2 mixer; `spellings` name the keys that differ between families."""

    def key(name: str) -> str:
        return spellings.get(name, name)

    hidden = config.integer("hidden_size")
    heads = positive(config, key("num_heads"))
    head_dim = config.get(key("head_dim"), default="auto")
    if head_dim == "auto":
        head_dim = config.integer(key("expand")) * hidden // heads
    return {
        "kind": "mamba2",
        "heads": heads,
        "head_dim": head_dim,
        "state": config.integer(key("state_size")),
        "groups": config.integer(key("n_groups"), default=1),
        "conv": config.integer(key("conv_kernel"), default=4),
        "conv_bias": bool(config.get(key("use_conv_bias"), default=True)),
        "proj_bias": bool(config.get(key("use_bias"), default=False)),
    }


def mamba1(config: Config, keys: dict[str, str], **others: Any) -> Fields:
    """A Mamba-1 mixer; `keys` maps its fields to the keys of a family. Defaults are those of both families' classes."""
    hidden = config.integer("hidden_size")
    rank = config.get(keys["dt_rank"], default="auto")
    return {
        "kind": "mamba1",
        "inner": config.integer(keys["expand"], default=2) * hidden,
        "state": config.integer(keys["state"], default=16),
        "dt_rank": -(-hidden // 16) if rank == "auto" else config.integer(keys["dt_rank"]),
        "conv": config.integer(keys["conv"], default=4),
        "conv_bias": bool(config.get(keys["conv_bias"], default=True)),
        "proj_bias": bool(config.get(keys["proj_bias"], default=False)),
        **others,
    }


_MAMBA_KEYS = {
    "expand": "expand", "state": "state_size", "dt_rank": "time_step_rank", "conv": "conv_kernel",
    "conv_bias": "use_conv_bias", "proj_bias": "use_bias",
}  # fmt: skip
_JAMBA_KEYS = {
    "expand": "mamba_expand", "state": "mamba_d_state", "dt_rank": "mamba_dt_rank", "conv": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias", "proj_bias": "mamba_proj_bias",
}  # fmt: skip


@family("Mamba2ForCausalLM")
def mamba2_lm(config: Config) -> Fields:
    """Mamba-2: one mixer and one norm per layer, no feed-forward (arXiv:2405.21060)."""
    blocks = {"mamba": {"mixer": mamba2(config), "norms": 1}}
    return model_fields(config, blocks, ["mamba"] * config.integer("num_hidden_layers"))


@family("MambaForCausalLM")
def mamba1_lm(config: Config) -> Fields:
    """Mamba: one mixer and one norm per layer, no feed-forward, tied by default (arXiv:2312.00752)."""
    blocks = {"mamba": {"mixer": mamba1(config, _MAMBA_KEYS), "norms": 1}}
    tied = bool(config.get("tie_word_embeddings", default=True))
    return model_fields(config, blocks, ["mamba"] * config.integer("num_hidden_layers"), tied_embeddings=tied)


@family("JambaForCausalLM")
def jamba(config: Config) -> Fields:
    """Jamba: one attention layer in every period, Mamba elsewhere; mixtures on every other layer (arXiv:2403.19887)."""
    mixers = {
        "attention": attention(config),
        "mamba": mamba1(config, _JAMBA_KEYS, inner_norms=bool(config.get("mamba_inner_layernorms", default=True))),
    }
    inter = config.integer("intermediate_size")
    # The defaults are those of JambaConfig.
    filled = Config({"num_experts": 16, "num_experts_per_tok": 2, **config.data}, config.file)
    ffns = {"dense": {"kind": "mlp", "inter": inter}, "moe": mixture(filled, experts="num_experts")}

    def chosen(layer: int, what: str, period: int, offset: int) -> bool:
        every = positive(config, f"{what}_layer_period", default=period)
        return layer % every == config.integer(f"{what}_layer_offset", default=offset)

    order = []
    for layer in range(config.integer("num_hidden_layers")):
        mixer = "attention" if chosen(layer, "attn", 8, 4) else "mamba"
        sparse = ffns["moe"]["experts"] > 1 and chosen(layer, "expert", 2, 1)
        order.append(f"{mixer}_{'moe' if sparse else 'dense'}")
    blocks = {f"{m}_{f}": {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns}
    return model_fields(config, blocks, order)


@family("NemotronHForCausalLM")
def nemotron_h(config: Config) -> Fields:
    """Nemotron-H: each layer is one Mamba-2, attention, MLP or mixture part with one norm (arXiv:2504.03624)."""
    if "moe_latent_size" in config:
        raise SpecError("experts in a latent dimension ('moe_latent_size') are not supported", file=config.file)
    names = {"num_heads": "mamba_num_heads", "head_dim": "mamba_head_dim", "state_size": "ssm_state_size"}
    mlp_bias = bool(config.get("mlp_bias", default=False))
    parts: dict[str, Fields] = {
        "mamba": {"mixer": mamba2(config, **names)},
        "attention": {"mixer": attention(config, **bias(config, out=True))},
        "mlp": {"ffn": {"kind": "mlp", "inter": config.integer("intermediate_size"), "gated": False, "bias": mlp_bias}},
    }
    if config.integer("n_routed_experts", default=0):
        experts = mixture(
            config,
            experts="n_routed_experts",
            inter="moe_intermediate_size",
            shared_inter=config.integer("moe_shared_expert_intermediate_size"),
            gated=False,
            router_bias=True,
            groups=config.integer("n_group", default=1),
            top_groups=config.integer("topk_group", default=1),
        )
        parts["moe"] = {"ffn": experts}
    blocks = {name: {**part, "norms": 1} for name, part in parts.items()}
    letters = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    meaning = {letters[name]: name for name in blocks}
    return model_fields(config, blocks, per_layer(config, "hybrid_override_pattern", meaning))


def qwen_hybrid(config: Config, ffns: dict[str, Fields], order: list[str]) -> Fields:
    """Gated DeltaNet on three layers of four, gated attention on the fourth; `order` names each layer's feed-forward.

    A multi-token-prediction module (`mtp_num_hidden_layers`) is an attention layer; it shares embedding and head.
    """
    every = positive(config, "full_attention_interval", default=4)
    meaning = {"linear_attention": "deltanet", "full_attention": "attention"}
    kinds = per_layer(config, "layer_types", meaning, lambda layer: "deltanet" if (layer + 1) % every else "attention")
    mixers = {
        "attention": attention(config, qk_norm="head", output_gate=True, **bias(config, out=True)),
        "deltanet": {
            "kind": "deltanet",
            "key_heads": config.integer("linear_num_key_heads"),
            "value_heads": config.integer("linear_num_value_heads"),
            "key_dim": config.integer("linear_key_head_dim"),
            "value_dim": config.integer("linear_value_head_dim"),
            "conv": config.integer("linear_conv_kernel_dim", default=4),
        },
    }
    blocks = {f"{m}_{f}": {"mixer": mixers[m], "ffn": ffns[f]} for m in mixers for f in ffns}
    names = [f"{m}_{f}" for m, f in zip(kinds, order, strict=True)]
    module = prediction_module(config, blocks[f"attention_{order[-1]}"], copies=False)
    mtp = config.integer("mtp_num_hidden_layers", default=0) * module
    return model_fields(config, blocks, names, mtp_parameters=mtp)


@family("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM")
def qwen3_next(config: Config) -> Fields:
    """Qwen3-Next and the text part of Qwen3.5-MoE, where every layer is a mixture."""
    order = sparse_layers(config)
    return qwen_hybrid(config, qwen_ffns(config, order), order)


@family("Qwen3_5MoeForConditionalGeneration")
def qwen3_5_moe(config: Config) -> Fields:
    """Qwen3.5-MoE with its vision encoder."""
    return multimodal(config, qwen3_next)


@family("Qwen3_5ForCausalLM")
def qwen3_5_text(config: Config) -> Fields:
    """The text part of a dense Qwen3.5."""
    dense = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    return qwen_hybrid(config, {"dense": dense}, ["dense"] * config.integer("num_hidden_layers"))


@family("Qwen3_5ForConditionalGeneration")
def qwen3_5(config: Config) -> Fields:
    """Dense Qwen3.5 with its vision encoder."""
    return multimodal(config, qwen3_5_text)


@family("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxForCausalLM")
def minimax_01(config: Config) -> Fields:
    """MiniMax-01: lightning attention, with softmax attention on every eighth layer (arXiv:2501.08313)."""
    full = attention(config)
    mixers = {
        "lightning": {"kind": "lightning", "heads": full["heads"], "head_dim": full["head_dim"]},
        "attention": full,
    }
    ffn = mixture(config, shared_inter=config.integer("shared_intermediate_size", default=0))
    blocks = {name: {"mixer": mixer, "ffn": ffn} for name, mixer in mixers.items()}
    if "layer_types" in config:
        order = per_layer(config, "layer_types", {"linear_attention": "lightning", "full_attention": "attention"})
    else:
        order = per_layer(config, "attn_type_list", {0: "lightning", 1: "attention"})
    return model_fields(config, blocks, order)


# Mamba-2 keys of Bamba and Granite.
_MAMBA_D = {
    "num_heads": "mamba_n_heads", "head_dim": "mamba_d_head", "state_size": "mamba_d_state",
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "use_conv_bias": "mamba_conv_bias",
    "use_bias": "mamba_proj_bias", "expand": "mamba_expand",
}  # fmt: skip


@family("BambaForCausalLM")
def bamba(config: Config) -> Fields:
    """Bamba: Mamba-2 layers with a few attention layers, all followed by a dense feed-forward."""
    ffn = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    chosen = config.get("attn_layer_indices")
    layers = range(config.integer("num_hidden_layers"))
    return mamba2_and_attention(config, ffn, ["attention" if layer in chosen else "mamba" for layer in layers])


@family("GraniteMoeHybridForCausalLM")
def granite_hybrid(config: Config) -> Fields:
    """Granite 4 hybrid: a shared expert in every layer, beside a mixture or alone."""
    shared = config.integer("shared_intermediate_size")
    if config.integer("num_local_experts", default=0):
        ffn = mixture(config, shared_inter=shared)
    else:
        ffn = {"kind": "mlp", "inter": shared}
    meaning = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
    return mamba2_and_attention(config, ffn, per_layer(config, "layer_types", meaning))


def mamba2_and_attention(config: Config, ffn: Fields, order: list[str]) -> Fields:
    """Layers of either mixer, all with the same feed-forward."""
    mixers = {"mamba": mamba2(config, **_MAMBA_D), "attention": attention(config, **bias(config, out=True))}
    return model_fields(config, {name: {"mixer": mixer, "ffn": ffn} for name, mixer in mixers.items()}, order)
