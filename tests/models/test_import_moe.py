"""Mixtures of experts and latent attention: published counts, stored sizes, hand arithmetic, importer errors."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import LATENT, MIXTURES, SMALL, by_part

from perfmodel import catalog
from perfmodel.errors import SpecError
from perfmodel.import_hf import from_config
from perfmodel.import_hf.layout import layer_groups
from perfmodel.parameters import block_weights, parameters_active, parameters_total
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Attention, LatentAttention, Model, Moe


@pytest.mark.parametrize("name", MIXTURES)
def test_total_is_the_published_one(name: str) -> None:
    model = catalog.load_model(name)
    published = model.published
    assert published is not None
    if published.exact:
        assert parameters_total(model) == published.total
    else:
        assert parameters_total(model) == pytest.approx(published.total, rel=published.tolerance)


# What the authors leave out of their active count. Published figures are rounded to one or two digits.
NOT_ACTIVE = {
    "deepseek-r1": ("embedding",),
    "deepseek-v2-lite": ("embedding",),
    "deepseek-v3": ("embedding",),
    "deepseek-v3.2": ("embedding",),
    "glm-4.5": ("embedding", "head"),
    "glm-4.5-air": ("embedding", "head"),
    "glm-4.6": ("embedding", "head"),
    "glm-5": ("embedding", "head"),
    "glm-5-fp8": ("embedding", "head"),
    "gpt-oss-120b": ("embedding",),
    "gpt-oss-20b": ("embedding",),
    "kimi-k2": ("embedding",),
    "kimi-k2.5": ("embedding", "vision"),
    "llama-4-maverick": ("vision",),
    "llama-4-scout": ("vision",),
    "minimax-m2": ("embedding", "head"),
    "minimax-m2.5": ("embedding", "head"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_active_is_the_published_one(name: str) -> None:
    model = catalog.load_model(name)
    assert model.published is not None
    assert model.published.active is not None
    counts = by_part(model)
    active = parameters_active(model) - sum(counts[part] for part in NOT_ACTIVE.get(name, ()))
    assert active == pytest.approx(model.published.active, rel=0.025)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        # Elements of the whole checkpoint, scales excluded, as its safetensors metadata counts them.
        ("deepseek-r1", 684_489_845_504),
        ("deepseek-v3.2", 685_355_329_792),
        ("glm-4.5", 358_337_791_296),
        ("glm-4.6", 356_785_898_816),
        ("glm-4.5-air", 110_468_824_832),
        ("glm-5", 753_864_139_008),
    ],
)
def test_prediction_modules_complete_the_checkpoint(name: str, stored: int) -> None:
    model = catalog.load_model(name)
    assert parameters_total(model) + model.mtp_parameters == stored


def test_gpt_oss_parts_are_those_of_its_model_card() -> None:
    # arXiv:2508.10925, Table 1, billions: MLP 114.71, attention 0.96, embedding and head 1.16.
    counts = by_part(catalog.load_model("gpt-oss-120b"))
    assert (counts["experts"] + counts["router"]) / 1e9 == pytest.approx(114.71, abs=0.006)
    assert counts["attention"] / 1e9 == pytest.approx(0.96, abs=0.006)
    assert (counts["embedding"] + counts["head"]) / 1e9 == pytest.approx(1.16, abs=0.006)


def test_mixtral_by_hand() -> None:
    # q and o: 4096 x 4096 each; k and v: 1024 x 4096 each.
    attention = 2 * 16_777_216 + 2 * 4_194_304  # 41,943,040
    # gate, up, down of 8 experts, and the router.
    ffn = 8 * 3 * 4096 * 14336 + 8 * 4096  # 1,409,318,912
    norms = 2 * 4096
    layers = 32 * (attention + ffn + norms)  # 46,440,644,608
    outside = 2 * 32000 * 4096 + 4096  # embedding, head, final norm: 262,148,096
    assert layers + outside == 46_702_792_704
    model = catalog.load_model("mixtral-8x7b")
    assert parameters_total(model) == layers + outside
    # Six of eight experts rest: 32 * 6 * 176,160,768 = 33,822,867,456.
    assert parameters_active(model) == 46_702_792_704 - 33_822_867_456


def test_deepseek_v3_by_hand() -> None:
    queries = 7168 * 1536 + 1536 + 1536 * 128 * 192  # down, norm, up: 48,760,320
    latent = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)  # down, norm, up: 20,906,496
    out = 128 * 128 * 7168  # 117,440,512
    norms = 2 * 7168
    attention = queries + latent + out + norms  # 187,121,664
    dense = 3 * 7168 * 18432  # 396,361,728
    router = 256 * 7168 + 256  # 1,835,264, load-balancing bias included
    mixture = router + 257 * 3 * 7168 * 2048  # 256 routed experts and one shared: 11,320,361,216
    outside = 2 * 129280 * 7168 + 7168  # 1,853,365,248
    total = 61 * attention + 3 * dense + 58 * mixture + outside
    assert total == 671_026_419_200
    model = catalog.load_model("deepseek-v3")
    assert parameters_total(model) == total
    # The prediction module: one such layer, two hidden states to one, three norms, embedding and head again.
    module = attention + mixture + 2 * 7168 * 7168 + 3 * 7168 + 2 * 129280 * 7168
    assert model.mtp_parameters == module


def test_deepseek_caches_a_latent_of_576() -> None:
    model = catalog.load_model("DeepSeek-V3 MLA")
    mixers = [block.mixer for block in model.blocks.values()]
    assert all(isinstance(m, LatentAttention) and (m.kv_rank, m.rope_dim) == (512, 64) for m in mixers)
    # vLLM's start-up log gives 70,272 bytes a token: 61 layers of 576 at two bytes.
    assert model.n_layers * (512 + 64) * 2 == 70_272
    assert model.layers[0].blocks == ("dense",)
    assert [group.repeat for group in model.layers] == [3, 58]


def test_v32_adds_an_indexer() -> None:
    # Per layer: queries 1536 x 64 x 128, one key 7168 x 128 with LayerNorm 2 x 128, head weights 7168 x 64.
    indexer = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64  # 13,959,424
    v32, v3 = catalog.load_model("deepseek-v3.2"), catalog.load_model("deepseek-v3")
    assert parameters_total(v32) - parameters_total(v3) == 61 * indexer
    mixer = v32.blocks["moe"].mixer
    assert isinstance(mixer, LatentAttention)
    assert mixer.indexer is not None
    assert mixer.indexer.top_k == 2048


def test_gpt_oss_alternates_windows() -> None:
    model = catalog.load_model("gpt-oss-120b")
    assert model.block_counts() == {"sliding": 18, "full": 18}
    assert model.layers[0].blocks == ("sliding", "full")
    sliding, full = (model.blocks[name].mixer for name in ("sliding", "full"))
    assert isinstance(sliding, Attention)
    assert isinstance(full, Attention)
    assert (sliding.window, full.window) == (128, None)
    assert sliding.sinks
    assert (model.dtype, model.expert_dtype) == ("bf16", "mxfp4")
    # vLLM's log, which pays every layer in full: 73,728 bytes a token.
    assert 36 * 2 * full.kv_heads * full.head_dim * 2 == 73_728


def test_llama4_attends_in_chunks_on_three_layers_of_four() -> None:
    scout, maverick = catalog.load_model("llama-4-scout"), catalog.load_model("llama-4-maverick")
    assert scout.block_counts() == {"chunked_moe": 36, "full_moe": 12}
    # Mixtures on layers 1, 3, 5...; full attention on 3, 7, 11...: every full layer is a mixture.
    assert maverick.block_counts() == {"chunked_dense": 24, "chunked_moe": 12, "full_moe": 12}
    chunked = scout.blocks["chunked_moe"].mixer
    assert isinstance(chunked, Attention)
    assert chunked.window == 8192


def test_nvfp4_checkpoint_size_says_what_stays_at_16_bits() -> None:
    # nvidia/DeepSeek-R1-NVFP4 stores 396,767,013,632 elements: two FP4 weights in one byte, one FP8 scale per 16,
    # everything else, prediction module included, one BF16 element each.
    model = catalog.load_model("nvidia/DeepSeek-R1-NVFP4")
    counts = by_part(model)
    packed = counts["experts"] + counts["shared"] + counts["dense_ffn"]
    rest = parameters_total(model) - packed + model.mtp_parameters
    assert rest + packed // 2 + packed // 16 == 396_767_013_632
    assert model.dtype == "nvfp4"
    assert {"attention", "embedding", "head", "router"} == set(model.unquantized)


def test_int4_checkpoint_size_of_kimi_k25() -> None:
    # Payload of moonshotai/Kimi-K2.5: 595,148,192,736 bytes. Besides the weights it holds a shape of two 32-bit
    # integers for each packed matrix, and its 60 x 384 router biases take four bytes instead of two.
    model = catalog.load_model("moonshotai/Kimi-K2.5")
    experts = by_part(model)["experts"]
    assert model.expert_dtype == "int4_g32"
    weights = experts * get_format("int4_g32").width + (parameters_total(model) - experts) * get_format("bf16").width
    assert weights + 60 * 384 * 3 * 2 * 4 + 60 * 384 * 2 == 595_148_192_736


@pytest.mark.parametrize(
    ("name", "scales", "modules"),
    [
        # 41,555,600 FP32 elements less 59 x 256 router biases, module included. The latent down-projections have
        # 576 rows, so the last of 5 blocks is half full: half of 7168 / 128 scales more for each of 62.
        ("deepseek-r1", 41_555_600 - 59 * 256 - 62 * 28, 1),
        # Qwen/Qwen3-235B-A22B-Instruct-2507-FP8 stores 235,107,904,512 elements.
        ("qwen3-235b-a22b-fp8", 235_107_904_512 - 235_093_634_560, 0),
    ],
)
def test_fp8_block_scales_of_checkpoints(name: str, scales: int, modules: int) -> None:
    model = catalog.load_model(name)
    counts = by_part(model)
    matrices = sum(counts.get(part, 0) for part in ("attention", "latent", "dense_ffn", "experts", "shared"))
    if modules:
        matrices += sum(
            w.elements
            for w in block_weights(model.blocks["moe"], model.hidden)
            if w.matrix and w.part in ("latent", "experts", "shared")
        )
    assert matrices == scales * 128 * 128
    assert model.dtype == "fp8_block"
    assert set(model.unquantized) == {"embedding", "head", "router"}


# --- The importer on small configurations.


def read(config: dict[str, Any], **changes: Any) -> Model:
    return from_config({**config, **changes}, file="config.json", name="small")


def test_sparse_step_and_dense_layers_of_qwen() -> None:
    qwen = {**SMALL, "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 32}
    model = read(qwen, shared_expert_intermediate_size=48, decoder_sparse_step=2, mlp_only_layers=[3])
    assert model.block_counts() == {"moe": 1, "dense": 3}
    ffn = model.blocks["moe"].ffn
    assert isinstance(ffn, Moe)
    assert (ffn.shared_inter, ffn.shared_gate) == (48, True)


def test_router_bias_follows_topk_method() -> None:
    def has_bias(**changes: Any) -> bool:
        ffn = read(LATENT, **changes).blocks["moe"].ffn
        assert isinstance(ffn, Moe)
        return ffn.router_bias

    assert has_bias()
    assert has_bias(topk_method="noaux_tc")
    assert not has_bias(topk_method="greedy")
    assert not has_bias(architectures=["DeepseekV2ForCausalLM"])


def test_window_as_long_as_the_context_is_none() -> None:
    def window(**changes: Any) -> int | None:
        mixer = read(SMALL, **changes).blocks["moe"].mixer
        assert isinstance(mixer, Attention)
        return mixer.window

    assert window(sliding_window=4096, max_position_embeddings=32768) == 4096
    assert window(sliding_window=131072, max_position_embeddings=131072) is None
    assert window(sliding_window=None) is None


def test_layer_groups_keep_the_order() -> None:
    for names in (list("aabab"), list("abcabcd"), list("aaaa"), ["x"], []):
        written = [name for group in layer_groups(names) for name in group["blocks"] * group["repeat"]]
        assert written == names


OSS = {**SMALL, "architectures": ["GptOssForCausalLM"], "sliding_window": 128}
LLAMA4 = {**SMALL, "architectures": ["Llama4ForCausalLM"], "intermediate_size_mlp": 96}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SMALL, "architectures": ["MixtralForCausalLm"]}, "did you mean 'MixtralForCausalLM'"),
        ({**SMALL, "num_local_experts": None}, "missing key 'num_local_experts'"),
        ({**SMALL, "num_experts_per_tok": 9}, r"top_k \(9\) exceeds experts \(8\)"),
        ({**SMALL, "num_attention_heads": 0}, "'num_attention_heads' must be at least 1"),
        ({**SMALL, "num_key_value_heads": 3}, "must be a multiple of kv_heads"),
        ({**SMALL, "intermediate_size": 96.5}, "'intermediate_size' must be a whole number"),
        ({**LATENT, "kv_lora_rank": None}, "missing key 'kv_lora_rank'"),
        ({**LATENT, "n_group": 3, "topk_group": 1}, "groups must divide experts"),
        ({**LATENT, "moe_layer_freq": 0}, "'moe_layer_freq' must be at least 1"),
        (
            {**LATENT, "architectures": ["GlmMoeDsaForCausalLM"], "indexer_types": ["full", "shared"]},
            "share an indexer",
        ),
        ({**OSS, "layer_types": ["full_attention"] * 3}, "one entry for each of the 4 layers, got 3"),
        ({**OSS, "layer_types": ["full_atention"] * 4}, "unknown kind of layer 'full_atention'.*did you mean"),
        ({**OSS, "sliding_window": None}, "missing key 'sliding_window'"),
        ({**LLAMA4, "interleave_moe_layer_step": 0}, "'interleave_moe_layer_step' must be at least 1"),
        ({**LLAMA4, "no_rope_layers": [1, 0]}, "'no_rope_layers' must list 4 layers, got 2"),
    ],
)
def test_errors_name_the_file_and_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        read(config)
    assert str(caught.value).startswith("config.json: ")
