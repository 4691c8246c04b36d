"""Readers for dense decoders: one feed-forward per layer, grouped-query attention.

Keys a configuration leaves out take the default of the architecture's configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perfmodel.errors import SpecError
from perfmodel.import_hf import layout
from perfmodel.import_hf.reader import Config, family

Fields = dict[str, Any]


def renamed(config: Config, **spellings: str) -> Config:
    """The configuration with its own spellings (values) also under the usual keys (names); absent ones stay absent."""
    usual = {key: config.data[own] for key, own in spellings.items() if config.data.get(own) is not None}
    return Config({**config.data, **usual}, config.file)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A switch, or its default."""
    return bool(config.get(key, default=default))


def attention(config: Config, **others: Any) -> Fields:
    """Grouped-query attention; without head_dim the heads must divide the hidden size."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if heads < 1:
        raise SpecError("'num_attention_heads' must be at least 1", file=config.file)
    if "head_dim" not in config and "head_dim" not in others and hidden % heads:
        raise SpecError(
            f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), and there is no head_dim",
            file=config.file,
        )
    return layout.attention(config, **others)


def mlp(config: Config, **others: Any) -> Fields:
    """Gated feed-forward under the usual key."""
    return {"kind": "mlp", "inter": config.integer("intermediate_size"), **others}


def decoder(
    config: Config,
    mixer: Fields,
    ffn: Fields,
    *,
    window: int | None = None,
    local: Sequence[bool] | None = None,
    tied: bool = False,
    norm: str = "rms",
    norms: int = 2,
    parallel: bool = False,
    **others: Any,
) -> Fields:
    """A decoder of like layers; with a `window`, those marked `local` (by default all) slide over it."""
    n = config.integer("num_hidden_layers")
    shared = {"ffn": ffn, "norm": norm, "norms": norms, "parallel": parallel}
    blocks = {"full": {"mixer": mixer, **shared}, "local": {"mixer": {**mixer, "window": window}, **shared}}
    flags = [False] * n if window is None else [True] * n if local is None else local
    order = ["local" if is_local else "full" for is_local in flags]
    others = {"final_norm": norm, "tied_embeddings": flag(config, "tie_word_embeddings", tied), **others}
    return layout.model_fields(config, blocks, order, **others)


def local_layers(config: Config, default: Sequence[bool]) -> Sequence[bool]:
    """Which layers slide: `layer_types` where the configuration lists them, else the architecture's pattern."""
    if "layer_types" not in config:
        return default
    meaning = {"sliding_attention": "local", "full_attention": "full"}
    return [kind == "local" for kind in layout.per_layer(config, "layer_types", meaning)]


def every(config: Config, period: int) -> list[bool]:
    """Local layers with a full one closing each period: period 6 is five local, one full."""
    return [(layer + 1) % period != 0 for layer in range(config.integer("num_hidden_layers"))]


@family("LlamaForCausalLM", "YiForCausalLM", "AquilaForCausalLM", "BaichuanForCausalLM", "BaiChuanForCausalLM")
def llama(config: Config) -> Fields:
    """Llama (arXiv:2302.13971, 2307.09288, 2407.21783) and the models stored in its shape."""
    config = renamed(config, max_position_embeddings="model_max_length") if _is_baichuan(config) else config
    bias = flag(config, "attention_bias")
    return decoder(
        config,
        attention(config, qkv_bias=bias, out_bias=bias),
        mlp(config, bias=flag(config, "mlp_bias")),
    )


def _is_baichuan(config: Config) -> bool:
    return config.architecture.lower().startswith("baichuan") and "max_position_embeddings" not in config


@family("GraniteForCausalLM")
def granite(config: Config) -> Fields:
    """IBM Granite 3: Llama's shape with scaling constants."""
    return llama(config)


@family("SmolLM3ForCausalLM")
def smollm3(config: Config) -> Fields:
    """SmolLM3: Llama's shape, tied, some layers without rotary positions; 4 KV heads by default."""
    bias = flag(config, "attention_bias")
    config = Config({"num_key_value_heads": 4, **config.data}, config.file)
    return decoder(config, attention(config, qkv_bias=bias, out_bias=bias), mlp(config), tied=True)


@family("InternLMForCausalLM", "InternLM2ForCausalLM", "InternLM3ForCausalLM")
def internlm(config: Config) -> Fields:
    """InternLM (arXiv:2403.17297): `bias` puts biases on all four attention projections (on all linears in 3)."""
    first, third = config.architecture == "InternLMForCausalLM", config.architecture == "InternLM3ForCausalLM"
    bias = flag(config, "bias", default=first)
    qkv = flag(config, "qkv_bias") if third else bias
    return decoder(config, attention(config, qkv_bias=qkv, out_bias=bias), mlp(config, bias=bias and third))


@family("DeciLMForCausalLM")
def decilm(config: Config) -> Fields:
    """DeciLM-7B: Llama's shape with a number of KV heads for each layer."""
    counts = config.get("num_key_value_heads_per_layer")
    n = config.integer("num_hidden_layers")
    if not isinstance(counts, list) or len(counts) != n:
        raise SpecError(f"'num_key_value_heads_per_layer' must list {n} layers", file=config.file)
    plain = attention(Config({**config.data, "num_key_value_heads": 1}, config.file))
    blocks = {f"kv{k}": {"mixer": {**plain, "kv_heads": k}, "ffn": mlp(config)} for k in sorted(set(counts))}
    return layout.model_fields(config, blocks, [f"kv{k}" for k in counts])


@family("MistralForCausalLM", "MinistralForCausalLM")
def mistral(config: Config) -> Fields:
    """Mistral (arXiv:2310.06825): grouped queries and, in version 0.1, a sliding window; 8 KV heads by default."""
    # Absent means 4096; an explicit null (version 0.2 on) means none.
    config = Config({"sliding_window": 4096, "num_key_value_heads": 8, **config.data}, config.file)
    window = layout.window(config)
    everywhere = [True] * config.integer("num_hidden_layers")
    return decoder(config, attention(config), mlp(config), window=window, local=local_layers(config, everywhere))


@family("QWenLMHeadModel")
def qwen(config: Config) -> Fields:
    """Qwen 1 (arXiv:2309.16609): biases on q, k, v; the stored intermediate size counts gate and up together."""
    config = renamed(config, head_dim="kv_channels", max_position_embeddings="seq_length")
    bias = not flag(config, "no_bias", default=True)
    inter = config.integer("intermediate_size") // 2
    return decoder(config, attention(config, qkv_bias=True, out_bias=bias), mlp(config, inter=inter, bias=bias))


def _qwen_window(config: Config) -> Fields:
    """Qwen's window is off unless switched on, and then only from `max_window_layers` on."""
    if not flag(config, "use_sliding_window"):
        return {}
    n, first = config.integer("num_hidden_layers"), config.integer("max_window_layers", default=28)
    return {"window": layout.window(config), "local": local_layers(config, [layer >= first for layer in range(n)])}


@family("Qwen2ForCausalLM")
def qwen2(config: Config) -> Fields:
    """Qwen1.5, Qwen2 and Qwen2.5 (arXiv:2407.10671): biases on q, k, v."""
    return decoder(config, attention(config, qkv_bias=True), mlp(config), **_qwen_window(config))


@family("Qwen3ForCausalLM")
def qwen3(config: Config) -> Fields:
    """Qwen3 (arXiv:2505.09388): RMSNorm on each query and key head; head_dim 128 by default."""
    config = Config({"head_dim": 128, **config.data}, config.file)
    bias = flag(config, "attention_bias")
    mixer = attention(config, qk_norm="head", qkv_bias=bias, out_bias=bias)
    return decoder(config, mixer, mlp(config), **_qwen_window(config))


@family("Phi3ForCausalLM")
def phi3(config: Config) -> Fields:
    """Phi-3 and Phi-4 (arXiv:2404.14219, 2412.08905): Llama's shape with fused projections, no biases."""
    return decoder(config, attention(config), mlp(config), window=layout.window(config))


@family("GemmaForCausalLM")
def gemma(config: Config) -> Fields:
    """Gemma (arXiv:2403.08295): tied, heads wider than hidden / heads; defaults are those of the 7B."""
    config = Config({"head_dim": 256, "num_key_value_heads": 16, **config.data}, config.file)
    bias = flag(config, "attention_bias")
    return decoder(config, attention(config, qkv_bias=bias, out_bias=bias), mlp(config), tied=True)


@family("Gemma2ForCausalLM")
def gemma2(config: Config) -> Fields:
    """Gemma 2 (arXiv:2408.00118): four norms a layer, every other layer slides, starting with the first."""
    defaults = {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}
    config = Config({**defaults, **config.data}, config.file)
    bias = flag(config, "attention_bias")
    return decoder(
        config, attention(config, qkv_bias=bias, out_bias=bias), mlp(config),
        window=layout.window(config), local=local_layers(config, every(config, 2)), tied=True, norms=4,
    )  # fmt: skip


@family("Gemma3ForCausalLM", "Gemma3TextModel")
def gemma3(config: Config) -> Fields:
    """Gemma 3 (arXiv:2503.19786): five local layers to each full one, RMSNorm on each query and key head."""
    defaults = {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 131072,
    }  # fmt: skip
    config = Config({**defaults, **config.data}, config.file)
    bias = flag(config, "attention_bias")
    local = local_layers(config, every(config, config.integer("sliding_window_pattern", default=6)))
    return decoder(
        config, attention(config, qk_norm="head", qkv_bias=bias, out_bias=bias), mlp(config),
        window=layout.window(config), local=local, tied=True, norms=4,
    )  # fmt: skip


@family("GlmForCausalLM", "Glm4ForCausalLM")
def glm(config: Config) -> Fields:
    """GLM-4 dense: biases on q, k, v; the 0414 versions (Glm4) have four norms a layer."""
    mixer = attention(config, qkv_bias=flag(config, "attention_bias"))
    return decoder(config, mixer, mlp(config), norms=4 if config.architecture.startswith("Glm4") else 2)


@family("ChatGLMModel", "ChatGLMForConditionalGeneration")
def chatglm(config: Config) -> Fields:
    """ChatGLM 2 to GLM-4 in their original code (arXiv:2406.12793): same shape, other keys."""
    config = renamed(
        config, num_hidden_layers="num_layers", intermediate_size="ffn_hidden_size", head_dim="kv_channels",
        vocab_size="padded_vocab_size", max_position_embeddings="seq_length",
    )  # fmt: skip
    if flag(config, "multi_query_attention"):
        config = renamed(config, num_key_value_heads="multi_query_group_num")
    bias = flag(config, "add_bias_linear")
    mixer = attention(config, qkv_bias=bias or flag(config, "add_qkv_bias"), out_bias=bias)
    return decoder(config, mixer, mlp(config, bias=bias))


@family("Olmo2ForCausalLM", "Olmo3ForCausalLM")
def olmo(config: Config) -> Fields:
    """OLMo 2 and 3 (arXiv:2501.00656): norms after the sub-layers, RMSNorm over all queries and over all keys."""
    bias = flag(config, "attention_bias")
    mixer = attention(config, qk_norm="full", qkv_bias=bias, out_bias=bias)
    if config.architecture == "Olmo2ForCausalLM":
        return decoder(config, mixer, mlp(config))
    config = Config({"sliding_window": 4096, **config.data}, config.file)
    local = local_layers(config, every(config, 4))
    return decoder(config, mixer, mlp(config), window=layout.window(config), local=local)


@family("CohereForCausalLM", "Cohere2ForCausalLM")
def cohere(config: Config) -> Fields:
    """Command R: parallel branches under one LayerNorm without bias, which has as many parameters as an RMSNorm."""
    bias = flag(config, "attention_bias")
    mixer = attention(config, qkv_bias=bias, out_bias=bias, qk_norm="full" if flag(config, "use_qk_norm") else "none")
    sliding: Fields = {}
    if config.architecture == "Cohere2ForCausalLM":
        config = Config({"sliding_window": 4096, **config.data}, config.file)
        pattern = config.integer("sliding_window_pattern", default=4)
        sliding = {"window": layout.window(config), "local": local_layers(config, every(config, pattern))}
    return decoder(config, mixer, mlp(config), tied=True, norms=1, parallel=True, **sliding)
