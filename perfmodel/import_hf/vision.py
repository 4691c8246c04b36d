"""Vision encoders, and the readers of dense models that carry one.

`vision_fields` is for every reader of a multimodal model: it turns `vision_config` into the `vision` record, its
parameters counted tensor by tensor (encoder, merger and projector). Text configurations may leave out what their
class in transformers defaults to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.import_hf.dense import gemma3, llama, mistral, qwen2, qwen3
from perfmodel.import_hf.layout import positive
from perfmodel.import_hf.reader import Config, family

Fields = dict[str, Any]


def vision_fields(config: Config, text_hidden: int) -> Fields | None:
    """The `vision` record of a Model, or None where the configuration has no encoder.

    `config` is the whole configuration, `text_hidden` the width of the language model the projector leads to.
    Raises SpecError for an encoder nobody has described.
    """
    if "vision_config" not in config:
        return None
    vision = config.sub("vision_config")
    kinds = [str(c.get("model_type", default="")) for c in (vision, config)]
    for kind in kinds:
        if kind in _ENCODERS:
            return _ENCODERS[kind](vision, config, text_hidden)
    name = kinds[0] or kinds[1]
    raise SpecError(f"unknown vision encoder {name!r}{did_you_mean(name, _ENCODERS)}", file=config.file)


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Parameters of a linear map."""
    return inputs * outputs + (outputs if bias else 0)


def _layers(n: int, hidden: int, inter: int, *, gated: bool = False, bias: bool = True, norm: int = 2) -> int:
    """n transformer layers: q, k, v, o; feed-forward; two norms of `norm` vectors (LayerNorm 2, RMSNorm 1)."""
    attention = 4 * linear(hidden, hidden, bias)
    ffn = (2 if gated else 1) * linear(hidden, inter, bias) + linear(inter, hidden, bias)
    return n * (attention + ffn + 2 * norm * hidden)


def _record(vision: Config, **others: Any) -> Fields:
    """Fields under the keys most encoders use."""
    return {
        "layers": vision.integer("num_hidden_layers", "depth"),
        "hidden": vision.integer("hidden_size"),
        "heads": vision.integer("num_attention_heads", "num_heads"),
        "inter": vision.integer("intermediate_size"),
        "patch": vision.integer("patch_size"),
        "channels": vision.integer("num_channels", "in_channels", "in_chans", default=3),
        **others,
    }


def _patches(vision: Config) -> int:
    """Patches of a square image."""
    return (vision.integer("image_size") // positive(vision, "patch_size")) ** 2


def _clip(vision: Config, config: Config, text_hidden: int) -> Fields:
    """CLIP ViT (arXiv:2103.00020) under LLaVA's two-layer projector (arXiv:2310.03744)."""
    f = _record(vision, positions=_patches(vision) + 1)
    hidden = f["hidden"]
    embedding = hidden * f["channels"] * f["patch"] ** 2 + hidden + f["positions"] * hidden  # patches, class, positions
    norms = 2 * 2 * hidden  # before and after the layers
    projector = linear(hidden, text_hidden) + linear(text_hidden, text_hidden)
    newline = text_hidden if config.architecture.startswith("LlavaNext") else 0
    f["parameters"] = embedding + norms + _layers(f["layers"], hidden, f["inter"]) + projector + newline
    return f


def _siglip(vision: Config, config: Config, text_hidden: int) -> Fields:
    """SigLIP ViT (arXiv:2303.15343) without its pooling head, under Gemma 3's pooled projector (arXiv:2503.19786)."""
    patches = _patches(vision)
    side = round(patches**0.5)
    tokens_side = round(positive(config, "mm_tokens_per_image", default=256) ** 0.5)
    f = _record(vision, positions=patches, merge=side // tokens_side)
    hidden = f["hidden"]
    embedding = linear(f["channels"] * f["patch"] ** 2, hidden) + patches * hidden
    projector = hidden + linear(hidden, text_hidden, bias=False)  # RMSNorm and one matrix
    f["parameters"] = embedding + 2 * hidden + _layers(f["layers"], hidden, f["inter"]) + projector
    return f


def _pixtral(vision: Config, config: Config, text_hidden: int) -> Fields:
    """Pixtral ViT (arXiv:2410.07073): RMSNorm, gated, no biases; Mistral 3 merges 2x2 patches before its projector."""
    merge = config.integer("spatial_merge_size", default=2)
    bias = bool(config.get("multimodal_projector_bias", default=False))
    f = _record(vision, gated=True, bias=False, merge=merge)
    hidden = f["hidden"]
    embedding = hidden * f["channels"] * f["patch"] ** 2 + hidden  # patches, norm
    projector = hidden + linear(hidden * merge**2, hidden, bias=False)  # norm, merger
    projector += linear(hidden, text_hidden, bias) + linear(text_hidden, text_hidden, bias)
    layers = _layers(f["layers"], hidden, f["inter"], gated=True, bias=False, norm=1)
    f["parameters"] = embedding + layers + projector
    return f


def _qwen_merger(hidden: int, merge: int, out: int, norm: int) -> int:
    """Concatenate merge x merge patches, two linear layers to the width of the language model."""
    wide = hidden * merge**2
    return norm + linear(wide, wide) + linear(wide, out)


def _qwen2_vl(vision: Config, config: Config, text_hidden: int) -> Fields:
    """Qwen2-VL (arXiv:2409.12191): here `hidden_size` is the width of the language model."""
    hidden = vision.integer("embed_dim", default=1280)
    inter = hidden * vision.integer("mlp_ratio", default=4)
    renamed = Config({**vision.data, "hidden_size": hidden, "intermediate_size": inter}, vision.file)
    return _qwen_vit(renamed, text_hidden, norm=2, gated=False)


def _qwen25_vl(vision: Config, config: Config, text_hidden: int) -> Fields:
    """Qwen2.5-VL (arXiv:2502.13923): RMSNorm and a gated feed-forward, most layers attend within windows."""
    return _qwen_vit(vision, text_hidden, norm=1, gated=True)


def _qwen_vit(vision: Config, text_hidden: int, *, norm: int, gated: bool) -> Fields:
    defaults = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = Config({**defaults, **vision.data}, vision.file)
    temporal, merge = vision.integer("temporal_patch_size"), vision.integer("spatial_merge_size")
    f = _record(vision, temporal_patch=temporal, merge=merge, gated=gated)
    hidden = f["hidden"]
    embedding = hidden * f["channels"] * temporal * f["patch"] ** 2
    layers = _layers(f["layers"], hidden, f["inter"], gated=gated, norm=norm)
    f["parameters"] = embedding + layers + _qwen_merger(hidden, merge, text_hidden, norm * hidden)
    return f


def _qwen3_vl(vision: Config, config: Config, text_hidden: int) -> Fields:
    """Qwen3-VL and Qwen3.5: learned positions; a further merger for each `deepstack_visual_indexes` entry."""
    merge, temporal = vision.integer("spatial_merge_size"), vision.integer("temporal_patch_size")
    f = _record(vision, temporal_patch=temporal, merge=merge, positions=vision.integer("num_position_embeddings"))
    hidden = f["hidden"]
    embedding = linear(f["channels"] * temporal * f["patch"] ** 2, hidden) + f["positions"] * hidden
    deepstack = len(vision.get("deepstack_visual_indexes", default=[]))
    mergers = _qwen_merger(hidden, merge, text_hidden, 2 * hidden)
    # The deepstack mergers normalise after the patches are concatenated.
    mergers += deepstack * _qwen_merger(hidden, merge, text_hidden, 2 * hidden * merge**2)
    f["parameters"] = embedding + _layers(f["layers"], hidden, f["inter"]) + mergers
    return f


def _llama4(vision: Config, config: Config, text_hidden: int) -> Fields:
    """Llama 4: pixel shuffle by `pixel_shuffle_ratio`, a two-layer adapter and a projector, none with bias."""
    ratio = vision.get("pixel_shuffle_ratio", default=0.5)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise SpecError(f"'pixel_shuffle_ratio' must lie between 0 and 1, got {ratio!r}", file=config.file)
    f = _record(vision, positions=_patches(vision) + 1, merge=round(1 / ratio))
    hidden = f["hidden"]
    embedding = hidden * f["channels"] * f["patch"] ** 2 + hidden + f["positions"] * hidden
    inner, out = vision.integer("projector_input_dim"), vision.integer("projector_output_dim")
    adapter = linear(round(hidden / ratio**2), inner, bias=False) + linear(inner, out, bias=False)
    projector = linear(vision.integer("vision_output_dim"), text_hidden, bias=False)
    layers = _layers(f["layers"], hidden, f["inter"])
    f["parameters"] = embedding + 2 * 2 * hidden + layers + adapter + projector
    return f


def _kimi(vision: Config, config: Config, text_hidden: int) -> Fields:
    """MoonViT of Kimi K2.5: learned positions of a grid, 2x2 merging before a two-layer projector."""
    spellings = {
        "num_hidden_layers": "vt_num_hidden_layers", "hidden_size": "vt_hidden_size",
        "num_attention_heads": "vt_num_attention_heads", "intermediate_size": "vt_intermediate_size",
    }  # fmt: skip
    own = {key: vision.data[name] for key, name in spellings.items() if name in vision}
    vision = Config({**vision.data, **own}, vision.file)
    rows = vision.integer("pos_emb_height", "init_pos_emb_height")
    columns = vision.integer("pos_emb_width", "init_pos_emb_width")
    merge = vision.get("merge_kernel_size", default=[2, 2])[0]
    f = _record(vision, positions=rows * columns, merge=merge)
    hidden = f["hidden"]
    # The time embedding is sinusoidal and not stored.
    embedding = linear(f["channels"] * f["patch"] ** 2, hidden) + f["positions"] * hidden
    wide = hidden * merge**2
    projector = 2 * hidden + linear(wide, wide) + linear(wide, text_hidden)
    f["parameters"] = embedding + 2 * hidden + _layers(f["layers"], hidden, f["inter"]) + projector
    return f


_ENCODERS: dict[str, Callable[[Config, Config, int], Fields]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "pixtral": _pixtral,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen25_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
    "qwen3_5": _qwen3_vl,
    "qwen3_5_moe": _qwen3_vl,
    "llama4_vision_model": _llama4,
    "kimi_k25": _kimi,
}

# What LlamaConfig and MistralConfig default to, for text configurations that only name their class.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
_MISTRAL_DEFAULTS = {**_LLAMA_DEFAULTS, "intermediate_size": 14336, "max_position_embeddings": 131072}


def text_config(config: Config, defaults: Fields | None = None) -> Config:
    """The language model's part of a configuration (all of it, in older files), with class defaults filled in."""
    text = config.sub("text_config") if "text_config" in config else config
    tied = {"tie_word_embeddings": config.data["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return Config({**(defaults or {}), **text.data, **tied}, config.file)


def _with_vision(config: Config, text: Config, reader: Callable[[Config], Fields]) -> Fields:
    fields = reader(text)
    return {**fields, "vision": vision_fields(config, fields["hidden"])}


@family("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
def qwen2_vl(config: Config) -> Fields:
    """Qwen2-VL and Qwen2.5-VL: a Qwen2 text model."""
    return _with_vision(config, text_config(config), qwen2)


@family("Qwen3VLForConditionalGeneration")
def qwen3_vl(config: Config) -> Fields:
    """Qwen3-VL dense: a Qwen3 text model."""
    return _with_vision(config, text_config(config), qwen3)


@family("Gemma3ForConditionalGeneration")
def gemma3_vl(config: Config) -> Fields:
    """Gemma 3 from 4B on."""
    return _with_vision(config, text_config(config), gemma3)


@family("Mistral3ForConditionalGeneration")
def mistral3(config: Config) -> Fields:
    """Mistral Small 3.1 and later with Pixtral's encoder; checkpoints store a head, whatever the class's default."""
    return _with_vision(config, text_config(config, _MISTRAL_DEFAULTS), mistral)


@family("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
def llava(config: Config) -> Fields:
    """LLaVA over a Llama, Mistral or Qwen2 text model."""
    readers = {"llama": (llama, _LLAMA_DEFAULTS), "mistral": (mistral, _MISTRAL_DEFAULTS), "qwen2": (qwen2, {})}
    kind = str(config.sub("text_config").get("model_type", default="llama"))
    if kind not in readers:
        raise SpecError(f"LLaVA over {kind!r} is not described{did_you_mean(kind, readers)}", file=config.file)
    reader, defaults = readers[kind]
    return _with_vision(config, text_config(config, defaults), reader)
