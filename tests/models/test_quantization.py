"""`torch_dtype` and `quantization_config` become the formats of a Model; what is kept at 16 bits is found by name."""

from __future__ import annotations

import pytest

from perfmodel import catalog
from perfmodel.errors import SpecError
from perfmodel.import_hf import from_config

DENSE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 100, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 100, "torch_dtype": "bfloat16",
}  # fmt: skip
USUAL = ("embedding", "head", "router")


def load(quantization=None, base=DENSE, **keys):
    data = {**base, **keys}
    if quantization is not None:
        data["quantization_config"] = quantization
    return from_config(data, file="config.json", name="model")


def group(**weights):
    return {"group_0": {"weights": weights}}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "int4_g64"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "int4"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "q8_0"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int4_g64"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    ],
)
def test_methods(quantization, dtype):
    model = load(quantization)
    assert (model.dtype, model.unquantized) == (dtype, USUAL)


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        (group(num_bits=8, type="float", strategy="channel"), "fp8"),
        (group(num_bits=8, type="float", strategy="block"), "fp8_block"),
        (group(num_bits=4, type="float", group_size=16), "nvfp4"),
        (group(num_bits=4, type="float", group_size=32), "mxfp4"),
        (group(num_bits=4, type="int", group_size=128), "int4"),
        ({"group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}}, "int8"),
        # Without quantised activations nothing runs on the INT8 units.
        (group(num_bits=8, type="int", strategy="channel"), "q8_0"),
    ],
)
def test_compressed_tensors(groups, dtype):
    model = load({"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]})
    assert (model.dtype, model.unquantized) == (dtype, USUAL)


def test_plain_dtypes():
    assert load().dtype == "bf16"
    assert load(torch_dtype=None, dtype="float16").dtype == "fp16"
    assert load(torch_dtype="float32").dtype == "fp32"
    assert load(torch_dtype=None).dtype == "bf16"  # a silent configuration is served at 16 bits


def test_kv_cache_formats():
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    assert load({"quant_method": "fp8", "kv_cache_scheme": scheme}).kv_dtype == "fp8"
    assert load({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}).kv_dtype == "fp8"
    assert load({"quant_method": "fp8"}).kv_dtype is None


@pytest.mark.parametrize(
    "names",
    [
        ["lm_head", "model.layers.2.self_attn*"],
        ["re:.*self_attn.*"],
        ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(4))],
        ["self_attn"],
    ],
)
def test_excluded_attention_stays_at_16_bits_however_it_is_spelled(names):
    model = load({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": names})
    assert model.unquantized == (*USUAL, "attention")


def test_names_of_other_modules_exclude_nothing():
    names = ["model.layers.2.input_layernorm", "model.layers.2.self_attn.q_norm", "lm_head", "model.layers.2.mlp.gate"]
    assert load({"quant_method": "fp8", "modules_to_not_convert": names}).unquantized == USUAL


def test_first_layer_alone_does_not_decide_for_all():
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert load({"quant_method": "fp8", "modules_to_not_convert": names}).unquantized == USUAL


def test_quantised_head_is_believed():
    model = load({"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": True})
    assert model.unquantized == ("embedding", "router")


def test_mxfp4_and_experts_only_quantisation_leave_the_rest():
    model = load({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, base=MIXTURE)
    assert (model.dtype, model.expert_dtype) == ("bf16", "mxfp4")
    ignored = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"]
    experts = {"quant_method": "compressed-tensors", "ignore": ignored}
    experts["config_groups"] = group(num_bits=4, type="int", group_size=128)
    model = load(experts, base=MIXTURE)
    assert (model.dtype, model.expert_dtype) == ("bf16", "int4")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptqq", "bits": 4}, "config.json: unknown quant_method 'gptqq' (did you mean 'gptq'?)"),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": 128},
            "no storage format for 3-bit integers in groups of 128",
        ),
        ({"quant_method": "awq"}, "missing key 'bits' in quantization_config"),
        ({"quant_method": "fp8", "weight_block_size": [1, 64]}, "weight_block_size [1, 64]"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors without config_groups.*.weights"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP5"}, "unknown quant_algo 'NVFP5' (did you mean 'NVFP4'?)"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes needs load_in_8bit or load_in_4bit"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        ("fp8", "'quantization_config' must be an object"),
    ],
)
def test_errors_name_the_file_and_the_reason(quantization, message):
    with pytest.raises(SpecError) as error:
        load(quantization)
    assert str(error.value).startswith("config.json: ")
    assert message in str(error.value)


def test_unknown_dtype_is_an_error():
    with pytest.raises(SpecError, match="config.json: torch_dtype: unknown number format 'bfloat17'"):
        load(torch_dtype="bfloat17")


def test_catalogue_variants():
    """What the model cards say: FP8 or NVFP4 linear layers, the head left alone, an FP8 KV cache."""
    fp8, nvfp4 = catalog.load_model("nvidia/Llama-3.1-8B-Instruct-FP8"), catalog.load_model("nvidia/Qwen3-32B-NVFP4")
    assert (fp8.dtype, fp8.kv_dtype, fp8.unquantized) == ("fp8", "fp8", USUAL)
    assert (nvfp4.dtype, nvfp4.kv_dtype, nvfp4.unquantized) == ("nvfp4", "fp8", USUAL)
    assert catalog.load_model("llama-3.1-8b").dtype == "bf16"
