"""Readers for dense decoders of the LayerNorm era: plain feed-forward, biases, learned or ALiBi positions.

Keys a configuration leaves out take the default of the architecture's configuration class in transformers.
"""

from __future__ import annotations

from typing import Any

from perfmodel.import_hf.dense import attention, decoder, flag, local_layers, renamed
from perfmodel.import_hf.layout import window
from perfmodel.import_hf.reader import Config, family

Fields = dict[str, Any]

_GPT_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip


def plain_mlp(config: Config, *, bias: bool = True) -> Fields:
    """Feed-forward without a gate; four times the hidden size where nothing else is said."""
    inter = config.integer("intermediate_size", default=4 * config.integer("hidden_size"))
    return {"kind": "mlp", "inter": inter, "gated": False, "bias": bias}


@family("GPT2LMHeadModel", "GPTBigCodeForCausalLM")
def gpt2(config: Config) -> Fields:
    """GPT-2 and GPT-3 (arXiv:2005.14165): learned positions, biases everywhere; StarCoder (GPTBigCode): one KV head."""
    config = renamed(config, **_GPT_KEYS)
    multi_query = config.architecture == "GPTBigCodeForCausalLM" and flag(config, "multi_query", default=True)
    mixer = attention(config, qkv_bias=True, out_bias=True, **({"kv_heads": 1} if multi_query else {}))
    positions = config.integer("max_position_embeddings", default=1024)
    return decoder(
        config, mixer, plain_mlp(config), norm="layer", tied=True, learned_positions=positions, max_positions=positions
    )


@family("GPTJForCausalLM")
def gptj(config: Config) -> Fields:
    """GPT-J: parallel branches under one LayerNorm, biases on the feed-forward and the head only."""
    config = renamed(config, **_GPT_KEYS)
    return decoder(config, attention(config), plain_mlp(config), norm="layer", norms=1, parallel=True, head_bias=True)


@family("GPTNeoXForCausalLM")
def gpt_neox(config: Config) -> Fields:
    """GPT-NeoX and Pythia (arXiv:2204.06745): parallel branches, each with a LayerNorm of its own."""
    bias = flag(config, "attention_bias", default=True)
    parallel = flag(config, "use_parallel_residual", default=True)
    mixer = attention(config, qkv_bias=bias, out_bias=bias)
    return decoder(config, mixer, plain_mlp(config), norm="layer", parallel=parallel)


@family("OPTForCausalLM")
def opt(config: Config) -> Fields:
    """OPT (arXiv:2205.01068): learned positions with an offset of 2; the 350m embeds at another width, norms last."""
    config = renamed(config, intermediate_size="ffn_dim")
    bias = flag(config, "enable_bias", default=True)
    norm = "layer" if flag(config, "layer_norm_elementwise_affine", default=True) else "none"
    hidden = config.integer("hidden_size")
    width = config.integer("word_embed_proj_dim", default=hidden)
    has_final = flag(config, "do_layer_norm_before", default=True) and not flag(config, "_remove_final_layer_norm")
    positions = config.integer("max_position_embeddings", default=2048)
    return decoder(
        config, attention(config, qkv_bias=bias, out_bias=bias), plain_mlp(config, bias=bias), norm=norm, tied=True,
        final_norm=norm if has_final else "none", learned_positions=positions + 2, max_positions=positions,
        embedding_dim=width if width != hidden else 0,
    )  # fmt: skip


@family("BloomForCausalLM", "BloomModel")
def bloom(config: Config) -> Fields:
    """BLOOM (arXiv:2211.05100): ALiBi positions, a LayerNorm after the embedding, biases everywhere."""
    config = renamed(
        config, hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head",
        max_position_embeddings="seq_length",
    )  # fmt: skip
    mixer = attention(config, qkv_bias=True, out_bias=True)
    return decoder(config, mixer, plain_mlp(config), norm="layer", tied=True, embedding_norm=True)


@family("FalconForCausalLM", "RWForCausalLM")
def falcon(config: Config) -> Fields:
    """Falcon (arXiv:2311.16867): 7B is multi-query under one norm, the new architecture has KV groups and two norms."""
    config = renamed(
        config, hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head",
        num_key_value_heads="num_kv_heads",
    )  # fmt: skip
    new = flag(config, "new_decoder_architecture") or (config.architecture == "RWForCausalLM" and "n_head_kv" in config)
    parallel = new or flag(config, "parallel_attn", default=True)
    bias = flag(config, "bias")
    heads: Fields = {}
    if new:
        config = renamed(config, num_key_value_heads="n_head_kv")
    elif flag(config, "multi_query", default=True):
        heads = {"kv_heads": 1}
    else:
        heads = {"kv_heads": config.integer("num_attention_heads")}
    norms = config.integer("num_ln_in_parallel_attn", default=2 if new or not parallel else 1)
    mixer = attention(config, qkv_bias=bias, out_bias=bias, **heads)
    inter = config.integer("ffn_hidden_size", default=4 * config.integer("hidden_size"))
    ffn = {"kind": "mlp", "inter": inter, "gated": False, "bias": bias}
    return decoder(config, mixer, ffn, norm="layer", norms=norms, parallel=parallel, tied=True)


@family("PhiForCausalLM")
def phi(config: Config) -> Fields:
    """Phi-1, 1.5 and 2 (arXiv:2309.05463): parallel branches under one LayerNorm, biases everywhere, head included."""
    qk_norm = "layernorm-head" if flag(config, "qk_layernorm") else "none"
    mixer = attention(config, qkv_bias=True, out_bias=True, qk_norm=qk_norm)
    return decoder(config, mixer, plain_mlp(config), norm="layer", norms=1, parallel=True, head_bias=True)


@family("StableLmForCausalLM", "StableLMEpochForCausalLM")
def stablelm(config: Config) -> Fields:
    """StableLM (arXiv:2402.17834): gated feed-forward without biases under LayerNorm."""
    parallel = flag(config, "use_parallel_residual")
    # Its norms on query and key heads hold a weight for every head and no bias.
    qk_norm = "full" if flag(config, "qk_layernorm") else "none"
    mixer = attention(config, qkv_bias=flag(config, "use_qkv_bias"), qk_norm=qk_norm)
    ffn = {"kind": "mlp", "inter": config.integer("intermediate_size")}
    return decoder(config, mixer, ffn, norm="layer", norms=1 if parallel else 2, parallel=parallel)


@family("Starcoder2ForCausalLM")
def starcoder2(config: Config) -> Fields:
    """StarCoder 2 (arXiv:2402.19173): LayerNorm and biases with grouped queries and a sliding window."""
    config = Config({"num_key_value_heads": 2, **config.data}, config.file)
    bias = flag(config, "use_bias", default=True)
    everywhere = [True] * config.integer("num_hidden_layers")
    return decoder(
        config, attention(config, qkv_bias=bias, out_bias=bias), plain_mlp(config, bias=bias), norm="layer", tied=True,
        window=window(config), local=local_layers(config, everywhere),
    )  # fmt: skip


@family("MptForCausalLM", "MPTForCausalLM")
def mpt(config: Config) -> Fields:
    """MPT: no biases at all, ALiBi; a LayerNorm without bias has as many parameters as an RMSNorm."""
    config = renamed(
        config, hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
    )  # fmt: skip
    inter = config.integer("expansion_ratio", default=4) * config.integer("hidden_size")
    kv_heads = (config.get("attn_config", default=None) or {}).get("kv_n_heads")
    mixer = attention(config, **({"kv_heads": kv_heads} if kv_heads else {}))
    return decoder(config, mixer, {"kind": "mlp", "inter": inter, "gated": False}, tied=True)


@family("NemotronForCausalLM")
def nemotron(config: Config) -> Fields:
    """Nemotron-4 and Minitron (arXiv:2402.16819): squared ReLU without a gate, LayerNorm, no biases."""
    bias = flag(config, "attention_bias")
    mixer = attention(config, qkv_bias=bias, out_bias=bias)
    return decoder(config, mixer, plain_mlp(config, bias=flag(config, "mlp_bias")), norm="layer")
