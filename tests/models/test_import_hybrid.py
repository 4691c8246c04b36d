"""Hybrid and state-space models, and every catalogue mixture, against PyTorch modules built from the same configuration."""

from __future__ import annotations

from typing import Any

import need
import pytest
from architectures import HYBRIDS, LATENT, MIXTURES, SMALL, by_part

from perfmodel import catalog
from perfmodel.errors import SpecError
from perfmodel.import_hf import from_config
from perfmodel.parameters import parameters_active, parameters_total
from perfmodel.spec import yaml
from perfmodel.spec.model import Attention, GatedDeltaNet, Mamba1, Model, Moe


@pytest.mark.parametrize("name", HYBRIDS)
def test_total_is_the_published_one(name: str) -> None:
    model = catalog.load_model(name)
    published = model.published
    assert published is not None
    if published.exact:
        assert parameters_total(model) == published.total
    else:
        assert parameters_total(model) == pytest.approx(published.total, rel=published.tolerance)


@pytest.mark.parametrize(
    ("name", "left_out", "tolerance"),
    [
        ("granite-4.0-h-small", set(), 0.025),
        ("jamba-1.5-large", set(), 0.01),
        ("jamba-v0.1", set(), 0.01),
        ("minimax-text-01", {"embedding", "head"}, 0.002),
        ("nemotron-3-nano-30b-a3b", {"embedding"}, 0.01),
        ("qwen3.5-397b-a17b", {"vision"}, 0.025),
        # "A3B" is one digit: 2.5 to 3.5 billion.
        ("qwen3-next-80b-a3b", {"embedding", "head"}, 0.167),
    ],
)
def test_active_is_the_published_one(name: str, left_out: set[str], tolerance: float) -> None:
    model = catalog.load_model(name)
    assert model.published is not None
    counts = by_part(model)
    active = parameters_active(model) - sum(counts[part] for part in left_out)
    assert active == pytest.approx(model.published.active, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "stored"),
    # Elements of the whole checkpoint as its safetensors metadata counts them, prediction module included.
    [("qwen3.5-397b-a17b", 403_397_928_944), ("qwen3.5-27b", 27_781_427_952)],
)
def test_prediction_modules_complete_the_checkpoint(name: str, stored: int) -> None:
    model = catalog.load_model(name)
    assert parameters_total(model) + model.mtp_parameters == stored


def test_prediction_module_of_qwen3_next() -> None:
    # Qwen3-Next stores 81,324,862,720 elements, Qwen3-Coder-Next the same model without the module: 79,674,391,296.
    path = catalog.find("models", "qwen3-next")
    config = {**yaml.read(path).data["config"], "mtp_num_hidden_layers": 1}
    assert read(config).mtp_parameters == 81_324_862_720 - 79_674_391_296


def test_qwen35_parts_are_those_of_its_checkpoint() -> None:
    model = catalog.load_model("Qwen/Qwen3.5-397B-A17B")
    assert model.vision is not None
    assert model.vision.parameters == 456_010_480
    assert parameters_total(model) - model.vision.parameters == 396_346_350_336
    assert model.mtp_parameters == 6_595_568_128


def test_mamba2_by_hand() -> None:
    inner = 2 * 2560  # 80 heads of 64
    channels = inner + 2 * 128  # x, B and C of one group: 5376
    in_proj = 2560 * (inner + channels + 80)  # gate, x B C, dt: 27,074,560
    conv = channels * 4 + channels  # kernel of 4 and bias: 26,880
    vectors = 3 * 80 + inner  # A, D and dt bias per head; gated norm: 5360
    out_proj = inner * 2560  # 13,107,200
    layer = in_proj + conv + vectors + out_proj + 2560  # and its one norm: 40,216,560
    total = 64 * layer + 50288 * 2560 + 2560  # tied embedding, final norm
    assert total == 2_702_599_680
    assert parameters_total(catalog.load_model("mamba2-2.7b")) == total


def test_jamba_has_one_attention_layer_in_eight_and_a_mixture_on_every_other() -> None:
    model = catalog.load_model("ai21labs/Jamba-v0.1")
    # Layers 4, 12, 20, 28 attend (even: dense); odd layers are mixtures.
    assert model.block_counts() == {"attention_dense": 4, "mamba_dense": 12, "mamba_moe": 16}
    assert [group.repeat for group in model.layers] == [4]
    mixer = model.blocks["mamba_moe"].mixer
    assert isinstance(mixer, Mamba1)
    assert (mixer.inner, mixer.dt_rank, mixer.inner_norms) == (8192, 256, True)


def test_layer_orders_of_hybrids() -> None:
    assert catalog.load_model("qwen3-next").block_counts() == {"attention_moe": 12, "deltanet_moe": 36}
    assert catalog.load_model("minimax-text-01").block_counts() == {"lightning": 70, "attention": 10}
    # arXiv:2504.03624, Table 1: 52 layers, of which 4 attention, 24 MLP and 24 Mamba-2.
    assert catalog.load_model("nemotron-h-8b").block_counts() == {"mamba": 24, "attention": 4, "mlp": 24}
    # Only every fourth layer of Qwen3.5 keeps keys and values: 15 of 60.
    model = catalog.load_model("qwen3.5-397b-a17b")
    assert sum(n for name, n in model.block_counts().items() if isinstance(model.blocks[name].mixer, Attention)) == 15


def test_nemotron_layers_are_one_part_each() -> None:
    model = catalog.load_model("nemotron-3-nano-30b-a3b")
    for block in model.blocks.values():
        assert (block.mixer is None) != (block.ffn is None)
        assert block.norms == 1
    ffn = model.blocks["moe"].ffn
    assert isinstance(ffn, Moe)
    assert not ffn.gated


# --- Small configurations: errors, and variants that no catalogue model has.

HYBRID: dict[str, Any] = {**SMALL, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
QWEN_NEXT: dict[str, Any] = {
    **SMALL, "architectures": ["Qwen3NextForCausalLM"], "head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    **SMALL, "architectures": ["NemotronHForCausalLM"], "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 16, "n_groups": 2, "hybrid_override_pattern": "M-M*",
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "num_hidden_layers": 4, "vocab_size": 100,
}  # fmt: skip
JAMBA = {key: value for key, value in SMALL.items() if key != "num_local_experts"} | {
    "architectures": ["JambaForCausalLM"],
    "num_hidden_layers": 16,
}
VARIANTS: list[dict[str, Any]] = [
    {**SMALL, "head_dim": 32, "tie_word_embeddings": True},
    {**SMALL, "architectures": ["GptOssForCausalLM"], "head_dim": 32, "sliding_window": 128, "attention_bias": False},
    {**SMALL, "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 32, "qkv_bias": False,
     "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
    {**SMALL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 32, "head_dim": 24,
     "attention_bias": True, "mlp_only_layers": [0, 2]},
    {**SMALL, "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "lm_head_bias": False},
    {**SMALL, "architectures": ["Glm4MoeForCausalLM"], "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
     "n_shared_experts": 2, "first_k_dense_replace": 2, "attention_bias": True, "use_qk_norm": True},
    {**LATENT, "q_lora_rank": 24, "attention_bias": True, "n_group": 2, "topk_group": 1},
    LATENT,
    {**LATENT, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy", "n_shared_experts": 2},
    {**LATENT, "architectures": ["DeepseekV32ForCausalLM"], "q_lora_rank": 24, "index_topk": 4, "index_n_heads": 2,
     "index_head_dim": 16},
    MAMBA,
    {**MAMBA, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    {"architectures": ["MambaForCausalLM"], "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 100},
    {**JAMBA, "num_experts": 4, "attn_layer_offset": 3,
     "attn_layer_period": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_proj_bias": True},
    {**HYBRID, "architectures": ["BambaForCausalLM"], "attn_layer_indices": [1, 3], "attention_bias": True},
    {**HYBRID, "architectures": ["GraniteMoeHybridForCausalLM"], "shared_intermediate_size": 48, "num_local_experts": 0,
     "layer_types": ["mamba", "attention", "mamba", "mamba"]},
    NEMOTRON,
    QWEN_NEXT,
    {**QWEN_NEXT, "mlp_only_layers": [1], "full_attention_interval": 2},
    {**QWEN_NEXT, "architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True},
    {**SMALL, "architectures": ["MiniMaxForCausalLM"], "head_dim": 32,
     "layer_types": ["linear_attention", "full_attention"] * 2},
    {**SMALL, "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 32},
]  # fmt: skip


def read(config: dict[str, Any], **changes: Any) -> Model:
    return from_config({**config, **changes}, file="config.json", name="small")


def test_deltanet_shapes() -> None:
    model = read(QWEN_NEXT)
    assert model.layers[0].blocks == ("deltanet_moe",)
    mixer = model.blocks["deltanet_moe"].mixer
    assert isinstance(mixer, GatedDeltaNet)
    assert (mixer.key_heads, mixer.value_heads) == (2, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**NEMOTRON, "hybrid_override_pattern": "M-M"}, "one entry for each of the 4 layers, got 3"),
        ({**NEMOTRON, "hybrid_override_pattern": "M-ME"}, r"unknown kind of layer 'E'; known: M, \*, -"),
        ({**NEMOTRON, "moe_latent_size": 32}, "'moe_latent_size'.* not supported"),
        ({**MAMBA, "num_heads": 0}, "'num_heads' must be at least 1"),
        ({**QWEN_NEXT, "full_attention_interval": 0}, "'full_attention_interval' must be at least 1"),
        ({**QWEN_NEXT, "linear_num_key_heads": None}, "missing key 'linear_num_key_heads'"),
        ({**SMALL, "architectures": ["MiniMaxText01ForCausalLM"]}, "missing key 'attn_type_list'"),
        (
            {**SMALL, "architectures": ["MiniMaxText01ForCausalLM"], "attn_type_list": [0, 1, 2, 0]},
            "unknown kind of layer 2",
        ),
        (
            {**SMALL, "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": []},
            "'text_config' must be an object",
        ),
    ],
)
def test_errors_name_the_file_and_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        read(config)
    assert str(caught.value).startswith("config.json: ")


# --- The same configuration in transformers: modules without data on the meta device.

CLASSES = {
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "MiniMaxText01ForCausalLM": "MiniMaxForCausalLM",
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
}
# Their keys, where the published configuration uses others.
KINDS = {0: "linear_attention", 1: "full_attention"}


def parameters_in_transformers(config: dict[str, Any]) -> int:
    """Parameters of the module that transformers builds; load-balancing biases are buffers there."""
    torch, transformers = need.torch(), need.transformers()
    data = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    architecture = data.pop("architectures")[0]
    name = CLASSES.get(architecture, architecture)
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if "attn_type_list" in data:
        data["layer_types"] = [KINDS[kind] for kind in data["attn_type_list"]]
    for part in ("text_config", "vision_config"):
        if part in data:
            data[part] = {k: v for k, v in data[part].items() if k not in ("architectures", "quantization_config")}
    kind = getattr(transformers, name)
    with torch.device("meta"):
        module = kind(kind.config_class(**data))
    biases = sum(b.numel() for key, b in module.named_buffers() if key.endswith("e_score_correction_bias"))
    return int(sum(p.numel() for p in module.parameters())) + biases


@pytest.mark.parametrize("name", sorted(set(MIXTURES) | set(HYBRIDS)))
def test_catalogue_models_agree_with_transformers(name: str) -> None:
    config = yaml.read(catalog.find("models", name)).data["config"]
    assert parameters_total(catalog.load_model(name)) == parameters_in_transformers(config)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config["architectures"][0])
def test_small_variants_agree_with_transformers(config: dict[str, Any]) -> None:
    assert parameters_total(read(config)) == parameters_in_transformers(config)
