"""What the tests of the mixture and hybrid importers share: model lists, counts by part, small configurations."""

from __future__ import annotations

from typing import Any

from perfmodel.parameters import block_weights, outer_weights
from perfmodel.spec.model import Model

MIXTURES = [
    "dbrx", "deepseek-r1", "deepseek-r1-nvfp4", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.1-nvfp4",
    "deepseek-v3.2", "glm-4.5", "glm-4.5-air", "glm-4.6", "glm-5", "glm-5-fp8", "gpt-oss-120b", "gpt-oss-20b", "kimi-k2",
    "kimi-k2.5", "llama-4-maverick", "llama-4-scout", "minimax-m2", "minimax-m2.5", "mixtral-8x22b", "mixtral-8x7b",
    "olmoe-1b-7b", "phi-3.5-moe", "phi-mini-moe", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b", "qwen3-235b-a22b",
    "qwen3-235b-a22b-fp8", "qwen3-30b-a3b", "qwen3-coder-480b-a35b",
]  # fmt: skip
HYBRIDS = [
    "granite-4.0-h-small", "jamba-1.5-large", "jamba-1.5-mini", "jamba-v0.1", "mamba2-130m", "mamba2-2.7b",
    "minimax-text-01", "nemotron-3-nano-30b-a3b", "nemotron-h-8b", "nemotron-nano-9b-v2", "qwen3-next-80b-a3b",
    "qwen3.5-27b", "qwen3.5-397b-a17b",
]  # fmt: skip

SMALL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 100,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_hidden_layers": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "vocab_size": 100,
}  # fmt: skip


def by_part(model: Model) -> dict[str, int]:
    """Stored parameters of each part of a model."""
    counts: dict[str, int] = {}
    weights = [(w, 1) for w in outer_weights(model)]
    for name, layers in model.block_counts().items():
        weights += [(w, layers) for w in block_weights(model.blocks[name], model.hidden)]
    for weight, layers in weights:
        counts[weight.part] = counts.get(weight.part, 0) + layers * weight.elements
    return counts
