"""Dense readers: structure by hand, parameter counts against transformers' own classes, and errors that explain."""

from __future__ import annotations

import json
import warnings

import need
import pytest

from perfmodel import catalog, import_hf
from perfmodel.errors import SpecError
from perfmodel.parameters import parameters_total
from perfmodel.spec import yaml

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def load(**keys):
    return import_hf.from_config({**LLAMA, **keys}, file="config.json", name="model")


def mixers(model):
    """Each layer's mixer, in order."""
    order = [name for group in model.layers for _ in range(group.repeat) for name in group.blocks]
    return [model.blocks[name].mixer for name in order]


def windows(model):
    return [mixer.window for mixer in mixers(model)]


def test_llama_grouped_queries():
    model = catalog.load_model("llama-3.1-70b")
    (block,) = model.blocks.values()
    assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim) == (64, 8, 128)
    assert (block.ffn.inter, block.ffn.gated, block.norms, block.norm) == (28672, True, 2, "rms")
    assert (model.n_layers, model.max_positions, model.tied_embeddings) == (80, 131072, False)


def test_missing_kv_heads_means_one_for_each_head():
    model = catalog.load_model("llama-7b")
    assert mixers(model)[0].kv_heads == 32


def test_mistral_window_absent_is_4096_and_null_is_none():
    keys = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    assert windows(load(**keys)) == [4096] * 4
    assert windows(load(**keys, sliding_window=None)) == [None] * 4
    assert mixers(load(**keys, num_attention_heads=16, num_key_value_heads=8))[0].kv_heads == 8


def test_window_no_shorter_than_the_context_is_none():
    assert (
        windows(load(architectures=["Phi3ForCausalLM"], sliding_window=8192, max_position_embeddings=4096))
        == [None] * 4
    )


def test_qwen2_window_is_off_unless_switched_on():
    keys = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_position_embeddings": 1024}
    assert windows(load(**keys)) == [None] * 4
    assert windows(load(**keys, use_sliding_window=True, max_window_layers=2)) == [None, None, 32, 32]


def test_qwen1_counts_gate_and_up_together():
    (block,) = catalog.load_model("qwen-72b").blocks.values()
    assert (block.ffn.inter, block.mixer.qkv_bias, block.mixer.out_bias) == (24576, True, False)


def test_gemma2_slides_every_other_layer_from_the_first():
    model = catalog.load_model("gemma-2-9b")
    assert windows(model) == [4096, None] * 21
    assert {block.norms for block in model.blocks.values()} == {4}


def test_gemma3_has_five_local_layers_to_each_full_one():
    found = windows(catalog.load_model("gemma-3-27b"))
    assert found == ([1024] * 5 + [None]) * 10 + [1024] * 2
    assert windows(catalog.load_model("gemma-3-1b")).count(None) == 4  # layers 6, 12, 18, 24 of 26


def test_layer_types_overrule_the_pattern():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    keys = {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 32}
    assert windows(load(**keys, layer_types=kinds)) == [None, 32, 32, None]


def test_falcon_generations():
    (old,), (new,) = (catalog.load_model(f"falcon-{size}").blocks.values() for size in ("7b", "40b"))
    assert (old.mixer.kv_heads, old.norms, old.parallel) == (1, 1, True)
    assert (new.mixer.kv_heads, new.norms, new.parallel) == (8, 2, True)
    assert not old.ffn.gated
    assert old.ffn.inter == 4 * 4544


def test_parallel_blocks_share_a_norm():
    for name in ("gpt-j-6b", "phi-2"):
        model = catalog.load_model(name)
        (block,) = model.blocks.values()
        assert (block.parallel, block.norms, block.norm, model.head_bias) == (True, 1, "layer", True)
    (neox,) = catalog.load_model("gpt-neox-20b").blocks.values()
    assert (neox.parallel, neox.norms) == (True, 2)


def test_positions_and_embeddings_of_the_layernorm_era():
    opt = catalog.load_model("opt-6.7b")
    assert (opt.learned_positions, opt.max_positions, opt.tied_embeddings) == (2050, 2048, True)
    small = catalog.load_model("opt-350m")
    assert (small.embedding_dim, small.final_norm) == (512, "none")
    assert catalog.load_model("bloom-7b1").embedding_norm
    assert catalog.load_model("gpt-3-175b").learned_positions == 2048


def test_decilm_has_kv_heads_for_each_layer():
    counts = [4, 2, 2, 1]
    model = load(architectures=["DeciLMForCausalLM"], num_key_value_heads=None, num_key_value_heads_per_layer=counts)
    assert [mixer.kv_heads for mixer in mixers(model)] == counts
    # The published total of 7.04 billion leaves 67 KV heads of 2 x 128 x 4096 for the 32 layers.
    assert sum(mixer.kv_heads for mixer in mixers(catalog.load_model("decilm-7b"))) == 67


def test_vision_encoder_of_qwen25_vl_by_hand():
    vision = catalog.load_model("qwen2.5-vl-7b").vision
    patch = 1280 * 3 * 2 * 14 * 14
    attention = 4 * 1280 * 1280 + 4 * 1280
    mlp = 3 * 1280 * 3420 + 2 * 3420 + 1280
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    assert vision.parameters == patch + 32 * (attention + mlp + 2 * 1280) + merger == 676_550_144
    assert (vision.merge, vision.temporal_patch, vision.patch) == (2, 2, 14)


def test_vision_encoder_of_llava_by_hand():
    """CLIP ViT-L/14 at 336 pixels: 576 patches and a class token; the projector maps 1024 to 4096 twice."""
    vision = catalog.load_model("llava-1.5-7b").vision
    embedding = 1024 * 3 * 14 * 14 + 1024 + 577 * 1024
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert vision.parameters == embedding + 4 * 1024 + 24 * layer + projector
    assert vision.positions == 577


# One catalogue file for each class transformers has; its own count of parameters is the judge.
BY_CLASS = [
    "llama-3.1-8b", "llama-3.2-3b", "mistral-nemo-12b", "qwen2.5-7b", "qwen3-32b", "phi-2", "phi-3-mini", "phi-4-mini",
    "gemma-7b", "gemma-2-9b", "gemma-3-1b", "gemma-3-27b", "falcon-7b", "falcon-40b", "opt-350m", "opt-6.7b", "bloom-7b1",
    "gpt2", "gpt-j-6b", "gpt-neox-20b", "starcoder-15b", "starcoder2-7b", "smollm3-3b", "glm-4-32b", "command-r",
    "command-r-plus", "olmo-2-7b", "granite-3.1-8b", "granite-3b-code", "stablelm-2-1.6b", "qwen2-vl-7b", "qwen2.5-vl-7b",
    "qwen3-vl-8b", "llava-1.5-7b", "llava-1.6-mistral-7b", "mistral-small-3.1-24b",
]  # fmt: skip

# Variants and absent keys: transformers fills in its defaults, and so must we.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
VARIANTS = [
    ("LlamaForCausalLM", {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("MistralForCausalLM", {**SMALL, "num_attention_heads": 8}),
    ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "attention_bias": True}),
    ("GemmaForCausalLM", {**SMALL, "num_attention_heads": 16}),
    ("Gemma2ForCausalLM", {**SMALL}),
    ("Gemma3ForCausalLM", {"hidden_size": 64, "num_hidden_layers": 7, "vocab_size": 100}),
    ("PhiForCausalLM", {**SMALL, "qk_layernorm": True, "num_key_value_heads": 2}),
    ("FalconForCausalLM", {**SMALL, "parallel_attn": False, "multi_query": False, "bias": True, "alibi": True}),
    ("FalconForCausalLM", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("OPTForCausalLM", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "vocab_size": 100, "word_embed_proj_dim": 64, "enable_bias": False,
                        "layer_norm_elementwise_affine": False}),
    ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_inner": 80}),
    ("GPTBigCodeForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "multi_query": False}),
    ("GPTJForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "rotary_dim": 8}),
    ("GPTNeoXForCausalLM", {**SMALL, "attention_bias": False, "use_parallel_residual": False}),
    ("StableLmForCausalLM", {**SMALL, "num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True}),
    ("Starcoder2ForCausalLM", {**SMALL, "use_bias": False}),
    ("SmolLM3ForCausalLM", {**SMALL, "pad_token_id": 1}),
    ("GlmForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "pad_token_id": 1}),
    ("Glm4ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "pad_token_id": 1}),
    ("CohereForCausalLM", {**SMALL, "num_key_value_heads": 2, "attention_bias": True, "use_qk_norm": True}),
    ("Cohere2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    ("Olmo2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "attention_bias": True}),
    ("Olmo3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "pad_token_id": 1}),
    ("NemotronForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    ("MptForCausalLM", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100}),
    ("Mistral3ForConditionalGeneration", {
        "text_config": {**SMALL, "model_type": "mistral", "head_dim": 32, "num_key_value_heads": 2},
        "vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "patch_size": 14, "image_size": 56, "head_dim": 8},
        "spatial_merge_size": 2, "tie_word_embeddings": False}),
    ("LlavaNextForConditionalGeneration", {
        "text_config": {**SMALL, "model_type": "mistral", "num_key_value_heads": 2},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 56}}),
]  # fmt: skip


def count_by_transformers(config):
    """Distinct parameters of the architecture's own class, built without storage."""
    torch, transformers = need.torch(), need.transformers()
    architecture = getattr(transformers, config["architectures"][0])
    keys = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "model_type")}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = architecture(architecture.config_class(**keys))
        model.tie_weights()
    return sum({id(p): p.numel() for p in model.parameters()}.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_CLASS)
def test_catalogue_model_counts_as_transformers_does(name):
    config = yaml.read(catalog.find("models", name)).data["config"]
    assert parameters_total(catalog.load_model(name)) == count_by_transformers(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "keys"), VARIANTS, ids=[f"{i}-{a}" for i, (a, _) in enumerate(VARIANTS)])
def test_variant_counts_as_transformers_does(architecture, keys):
    config = {"architectures": [architecture], **keys}
    ours = parameters_total(import_hf.from_config(config, file="config.json", name="variant"))
    assert ours == count_by_transformers(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["LlamaForCasualLM"]}, "unknown architecture 'LlamaForCasualLM' (did you mean 'LlamaForCausalLM'?)"),
        ({"architectures": None}, "no 'architectures' entry"),
        ({"hidden_size": None}, "missing key 'hidden_size' (needed for LlamaForCausalLM)"),
        ({"num_attention_heads": 3}, "hidden_size (64) is not a multiple of num_attention_heads (3)"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be at least 1"),
        ({"num_key_value_heads": 3}, "heads (4) must be a multiple of kv_heads (3)"),
        ({"num_hidden_layers": "many"}, "'num_hidden_layers' must be a whole number, got 'many'"),
        ({"architectures": ["DeciLMForCausalLM"], "num_key_value_heads_per_layer": [4]}, "must list 4 layers"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"]}, "one entry for each of the 4 layers"),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "lama"}},
         "LLaVA over 'lama' is not described (did you mean 'llama'?)"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {"model_type": "qwen4_vl"}},
         "unknown vision encoder 'qwen4_vl' (did you mean 'qwen3_vl'?)"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": 3}, "'text_config' must be an object"),
    ],
)  # fmt: skip
def test_errors_are_one_line_that_names_the_file(keys, message):
    with pytest.raises(SpecError) as error:
        load(**keys)
    text = str(error.value)
    assert text.startswith("config.json: ")
    assert message in text
    assert "\n" not in text


def test_bad_json_names_the_line(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{\n  "hidden_size": 64,\n  "vocab_size" 100\n}\n')
    with pytest.raises(SpecError, match=r"config\.json:3: not valid JSON"):
        catalog.load_model(str(file))


def test_json_that_is_not_an_object(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[1, 2]")
    with pytest.raises(SpecError, match=r"config\.json:1: expected a JSON object"):
        catalog.load_model(str(file))


def test_folder_with_a_configuration_loads_under_its_name(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = catalog.load_model(str(folder))
    # Per layer 2 x 64 x 64 + 2 x 32 x 64 + 3 x 64 x 128 + 2 x 64; embedding, head and final norm.
    assert (model.name, parameters_total(model)) == ("my-model", 4 * 36_992 + 2 * 100 * 64 + 64)
