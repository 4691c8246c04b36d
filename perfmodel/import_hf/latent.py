"""Readers for models with multi-head latent attention: DeepSeek V2 to V3.2, Kimi-K2 and GLM-5."""

from __future__ import annotations

from perfmodel.errors import SpecError
from perfmodel.import_hf.layout import Fields
from perfmodel.import_hf.moe import leading_dense, multimodal
from perfmodel.import_hf.reader import Config, family


def latent_attention(config: Config) -> Fields:
    """The compressed projections; `q_lora_rank: null` projects queries directly (DeepSeek-V2-Lite)."""
    indexer = None
    if "index_topk" in config:
        indexer = {
            "heads": config.integer("index_n_heads"),
            "head_dim": config.integer("index_head_dim"),
            "top_k": config.integer("index_topk"),
        }
    return {
        "kind": "latent",
        "heads": config.integer("num_attention_heads"),
        "q_rank": config.integer("q_lora_rank", default=0),
        "kv_rank": config.integer("kv_lora_rank"),
        "nope_dim": config.integer("qk_nope_head_dim"),
        "rope_dim": config.integer("qk_rope_head_dim"),
        "v_dim": config.integer("v_head_dim"),
        "indexer": indexer,
        "bias": bool(config.get("attention_bias", default=False)),
    }


@family("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
def deepseek(config: Config) -> Fields:
    """DeepSeek V2 (arXiv:2405.04434), V3 (arXiv:2412.19437), V3.2 (sparse indexer) and Kimi-K2.

    From V3 on the router has a per-expert bias; `topk_method` says so where it is given.
    """
    v2 = config.architecture == "DeepseekV2ForCausalLM"
    method = config.get("topk_method", default="greedy" if v2 else "noaux_tc")
    return leading_dense(config, latent_attention(config), router_bias=method == "noaux_tc")


@family("GlmMoeDsaForCausalLM")
def glm_dsa(config: Config) -> Fields:
    """GLM-5: DeepSeek-V3.2's shape; its prediction module shares the embedding and the head."""
    if "shared" in config.get("indexer_types", default=[]):
        raise SpecError("layers that share an indexer ('indexer_types') are not supported", file=config.file)
    return leading_dense(config, latent_attention(config), router_bias=True, copies=False)


@family("KimiK25ForConditionalGeneration")
def kimi_k25(config: Config) -> Fields:
    """Kimi K2.5: Kimi-K2 with a vision encoder."""
    return multimodal(config, deepseek)
