"""Read `torch_dtype` and `quantization_config` into the storage formats of a Model.

A quantised checkpoint names what it left alone (`ignore`, `modules_to_not_convert`, `exclude_modules`): exact module
names, globs or regular expressions. Each part of a Model is kept at 16 bits when the module that stands for it, in a
middle layer, is on that list.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.spec.formats import FORMATS, get_format

if TYPE_CHECKING:
    from perfmodel.import_hf.reader import Config

# Every known quantiser leaves these at 16 bits unless it says otherwise.
_ALWAYS = ("embedding", "head", "router")
# The module that stands for each part; {i} is a layer.
_MODULES = {
    "attention": ("layers.{i}.self_attn.o_proj",),
    "shared": ("layers.{i}.mlp.shared_experts.down_proj", "layers.{i}.mlp.shared_expert.down_proj"),
    "dense_ffn": ("layers.{i}.mlp.down_proj",),
}
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")


def quantization_fields(config: Config) -> dict[str, Any]:
    """`dtype`, `expert_dtype`, `kv_dtype` and `unquantized` of a Model; only those the configuration states.

    Raises SpecError for an unknown method, or a width the format table does not have.
    """
    fields = _plain_dtype(config)
    quantization = _find(config)
    if not quantization:
        return fields
    file = config.file
    method = str(quantization.get("quant_method") or quantization.get("quant_algo") or "").lower()
    if method not in _METHODS:
        raise SpecError(f"unknown quant_method {method!r}{did_you_mean(method, _METHODS)}", file=file)
    name = _METHODS[method](quantization, file)
    if kv := _kv_dtype(quantization, file):
        fields["kv_dtype"] = kv
    kept = _kept(quantization, config)
    if method == "mxfp4" or {"attention", "shared", "dense_ffn"} <= set(kept):
        # Only the routed experts are quantised.
        return {**fields, "expert_dtype": name}
    always = [p for p in _ALWAYS if not (p == "head" and quantization.get("lm_head") is True)]
    return {**fields, "dtype": name, "unquantized": (*always, *kept)}


def _plain_dtype(config: Config) -> dict[str, Any]:
    """`dtype` as stored; a configuration that is silent (GPT-2) keeps the Model's 16-bit default."""
    for part in _parts(config):
        for key in ("torch_dtype", "dtype"):
            if part.get(key, default="auto") != "auto":
                return {"dtype": _named(part.get(key), config.file, key)}
    return {}


def _find(config: Config) -> dict[str, Any] | None:
    for part in _parts(config):
        if "quantization_config" in part:
            return part.sub("quantization_config").data
    return None


def _parts(config: Config) -> list[Config]:
    """The configuration and, in a multimodal model, that of its language model."""
    return [config, config.sub("text_config")] if "text_config" in config else [config]


def _named(name: Any, file: str, key: str) -> str:
    try:
        return get_format(name).name
    except SpecError as error:
        raise SpecError(str(error), file=file, path=key) from None


def _integer_format(bits: Any, group: Any, file: str) -> str:
    """Name of a weight-only integer format; `group` -1 or None is one scale per channel."""
    if bits == 8:
        # 8-bit weights without 8-bit arithmetic, at 8.5 bits where GPTQ takes 8.1 to 8.6.
        return "q8_0"
    # One scale per channel costs even less than one per 128, which is the nearest format.
    name = f"int{bits}" if group in (None, -1, 128) else f"int{bits}_g{group}"
    if name not in FORMATS:
        raise SpecError(f"no storage format for {bits}-bit integers in groups of {group}", file=file)
    return name


def _fp8(q: dict[str, Any], file: str) -> str:
    block = q.get("weight_block_size")
    if block is None:
        return "fp8"
    if block != [128, 128]:
        raise SpecError(f"no storage format for FP8 with weight_block_size {block}", file=file)
    return "fp8_block"


def _compressed_tensors(q: dict[str, Any], file: str) -> str:
    groups = q.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    scheme = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(scheme, dict):
        raise SpecError("compressed-tensors without config_groups.*.weights", file=file)
    bits, group = scheme.get("num_bits"), scheme.get("group_size")
    if scheme.get("type") == "int":
        return "int8" if bits == 8 and first.get("input_activations") else _integer_format(bits, group, file)
    if bits == 8:
        return "fp8_block" if scheme.get("strategy") == "block" else "fp8"
    if bits == 4:
        return "mxfp4" if group == 32 else "nvfp4"
    raise SpecError(f"no storage format for {bits}-bit floating point", file=file)


def _modelopt(q: dict[str, Any], file: str) -> str:
    algorithm = str(q.get("quant_algo", "")).upper()
    names = {
        "FP8": "fp8", "FP8_PB_WO": "fp8_block", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4",
        "NVFP4_AWQ": "nvfp4", "W4A16_AWQ": "int4", "W4A8_AWQ": "int4", "W8A8_SQ_PER_CHANNEL": "int8",
    }  # fmt: skip
    if algorithm not in names:
        raise SpecError(f"unknown quant_algo {algorithm!r}{did_you_mean(algorithm, names)}", file=file)
    return names[algorithm]


def _bitsandbytes(q: dict[str, Any], file: str) -> str:
    if q.get("load_in_8bit"):
        return "int8"
    if q.get("load_in_4bit"):
        # NF4 and FP4 take 4.13 bits with double quantisation and 4.5 without; groups of 64 lie between.
        return "int4_g64"
    raise SpecError("bitsandbytes needs load_in_8bit or load_in_4bit", file=file)


def _awq_gptq(q: dict[str, Any], file: str) -> str:
    bits = q.get("bits", q.get("w_bit"))
    if bits is None:
        raise SpecError("missing key 'bits' in quantization_config", file=file)
    return _integer_format(bits, q.get("group_size", q.get("q_group_size", 128)), file)


_METHODS = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq_gptq,
    "gptq": _awq_gptq,
    "auto-round": _awq_gptq,
    "mxfp4": lambda q, file: "mxfp4",
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "nvfp4": _modelopt,
    "bitsandbytes": _bitsandbytes,
}


def _kv_dtype(q: dict[str, Any], file: str) -> str | None:
    if algorithm := q.get("kv_cache_quant_algo"):
        return _named(algorithm, file, "kv_cache_quant_algo")
    scheme = q.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return None
    if scheme.get("num_bits") == 4:
        return "nvfp4"
    return "fp8" if scheme.get("type", "float") == "float" else "int8"


def _kept(q: dict[str, Any], config: Config) -> list[str]:
    """Parts beyond the usual three that the list of exclusions covers."""
    patterns: list[str] = []
    for key in ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules"):
        names = q.get(key) or []
        if not isinstance(names, list):
            raise SpecError(f"{key!r} must be a list of module names", file=config.file)
        patterns += [str(name) for name in names]
    text = _parts(config)[-1]
    middle = text.integer("num_hidden_layers", default=1) // 2
    # A mixture of experts may start with dense layers; their feed-forward stands for the dense part.
    layer = {"dense_ffn": 0 if text.get("first_k_dense_replace", default=0) else middle}
    kept = []
    for part, modules in _MODULES.items():
        names = [p + m.format(i=layer.get(part, middle)) for m in modules for p in _PREFIXES]
        if any(_matches(pattern, name) for pattern in patterns for name in names):
            kept.append(part)
    return kept


def _matches(pattern: str, name: str) -> bool:
    """A regular expression (`re:` prefix), a glob, or a name that is the module or contains it."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
