"""Small language models of transformers, counted by PyTorch's own FLOP counter.

Attention is eager and counted without its mask, so a prefill is the full rectangle of queries and keys. Dense models run
on the meta device, which does no arithmetic; mixtures route for real, so they run on the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from need import torch as need_torch
from need import transformers as need_transformers

from perfmodel.import_hf import from_config
from perfmodel.spec.model import Model

_SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96,
    "max_position_embeddings": 512,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_head": 8, "n_layer": 2, "vocab_size": 96, "n_positions": 512}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 6, "moe_intermediate_size": 32}
_LATENT = {
    **_SIZES, "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_head": 8, "n_layer": 2, "vocab_size": 96},
    "cohere": _GQA,  # one norm, parallel branches
    "deepseek_v2": {**_LATENT, "head_dim": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "falcon": {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 96, "multi_query": True,
               "parallel_attn": True, "bias": False, "new_decoder_architecture": False, "alibi": False},
    "gemma2": {**_GQA, "head_dim": 16, "sliding_window": 6},
    "gemma3_text": {**_GQA, "head_dim": 16, "sliding_window": 6, "num_hidden_layers": 6},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,  # multi-query
    "gpt_neox": _SIZES,
    "gpt_oss": {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "gptj": {**_GPT, "rotary_dim": 4},
    "llama": _GQA,
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 96,
               "n_groups": 8},
    "mistral": {**_GQA, "sliding_window": 6},
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _GQA,
    "opt": {"hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96,
            "max_position_embeddings": 512, "word_embed_proj_dim": 48},  # the projections of OPT-350m
    "phi": {**_SIZES, "partial_rotary_factor": 0.5},
    "qwen2": _GQA,
    "qwen2_moe": {**_GQA, **_EXPERTS, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48},
    "qwen3": {**_GQA, "head_dim": 16},
    "qwen3_moe": {**_GQA, **_EXPERTS, "num_experts_per_tok": 3, "head_dim": 16},
    "qwen3_next": {**_GQA, **_EXPERTS, "num_hidden_layers": 4, "head_dim": 16, "num_experts_per_tok": 3,
                   "shared_expert_intermediate_size": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "stablelm": _GQA,
    "starcoder2": _GQA,
}  # fmt: skip
RECURRENT = ("mamba2", "qwen3_next")
SOFTMAX = tuple(kind for kind in CONFIGS if kind not in RECURRENT)
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def has_experts(kind: str) -> bool:
    """Whether tokens are routed, so that the reference must compute."""
    return any(key in CONFIGS[kind] for key in _EXPERT_KEYS)


@lru_cache(maxsize=64)
def module(kind: str) -> Any:
    """The reference module with random or no weights."""
    torch, transformers = need_torch(), need_transformers()
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    options = {"experts_implementation": "eager"} if has_experts(kind) else {}
    with torch.device("cpu" if has_experts(kind) else "meta"):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options).eval()


@lru_cache(maxsize=64)
def model(kind: str) -> Model:
    """Our description of the same configuration, through the importer.

    Keys are written as published configurations spell them; the rest are the defaults the configuration class fills in.
    """
    config = {**module(kind).config.to_dict(), **CONFIGS[kind], "architectures": [type(module(kind)).__name__]}
    return from_config(config, file=f"{kind}/config.json", name=kind)


class Run(NamedTuple):
    """FLOPs of one pass by PyTorch operator (mm, addmm, bmm, convolution), and the cache it left."""

    flops: dict[str, int]
    cache: Any

    @property
    def total(self) -> int:
        return sum(self.flops.values())


def run(kind: str, sequences: int, new: int, cached: int) -> Run:
    """Count one forward pass of `new` tokens for each of `sequences` that have `cached` tokens in the cache."""
    torch = need_torch()
    from torch.utils.flop_counter import FlopCounterMode

    reference = module(kind)
    device = next(reference.parameters()).device

    def tokens(length: int) -> Any:
        return torch.zeros(sequences, length, dtype=torch.long, device=device)

    with torch.no_grad():
        past = reference(tokens(cached), use_cache=True).past_key_values if cached else None
        with FlopCounterMode(display=False) as counter:
            output = reference(tokens(new), past_key_values=past, use_cache=True)
    counts = counter.get_flop_counts()["Global"]
    flops = {str(op).removeprefix("aten."): int(n) for op, n in counts.items()}
    return Run(flops, getattr(output, "past_key_values", None))
