"""What the readers of mixtures, latent-attention and hybrid models share: layer order, attention and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from perfmodel.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from perfmodel.import_hf.reader import Config

Fields = dict[str, Any]


def layer_groups(names: Sequence[str]) -> list[Fields]:
    """Write a layer order as repeated patterns: at each point the pattern that covers most layers.

    >>> layer_groups(["dense", "moe", "moe", "moe"])
    [{'blocks': ['dense'], 'repeat': 1}, {'blocks': ['moe'], 'repeat': 3}]
    >>> layer_groups(["local", "full"] * 18)
    [{'blocks': ['local', 'full'], 'repeat': 18}]
    """
    groups: list[Fields] = []
    start = 0
    while start < len(names):
        period, repeat = 1, 1
        for size in range(1, (len(names) - start) // 2 + 1):
            pattern, count = names[start : start + size], 1
            while names[start + count * size : start + (count + 1) * size] == pattern:
                count += 1
            if count > 1 and count * size > period * repeat:
                period, repeat = size, count
        groups.append({"blocks": list(names[start : start + period]), "repeat": repeat})
        start += period * repeat
    return groups


def model_fields(config: Config, blocks: dict[str, Fields], order: Sequence[str], **others: Any) -> Fields:
    """Fields of a Model that every decoder has, from its blocks and the order of its layers."""
    return {
        "hidden": config.integer("hidden_size"),
        "vocab": config.integer("vocab_size"),
        "blocks": {name: block for name, block in blocks.items() if name in order},
        "layers": layer_groups(order),
        "tied_embeddings": bool(config.get("tie_word_embeddings", default=False)),
        "max_positions": config.integer("max_position_embeddings", default=0),
        **others,
    }


def positive(config: Config, *keys: str, default: Any = None) -> int:
    """A whole number that something is divided by."""
    value = config.integer(*keys) if default is None else config.integer(*keys, default=default)
    if value < 1:
        raise SpecError(f"{keys[0]!r} must be at least 1", file=config.file)
    return value


def attention(config: Config, **others: Any) -> Fields:
    """Grouped-query attention under Hugging Face's usual keys; head_dim defaults to hidden / heads."""
    heads = positive(config, "num_attention_heads")
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", default=heads),
        "head_dim": config.integer("head_dim", "attention_head_dim", default=config.integer("hidden_size") // heads),
        **others,
    }


def per_layer(
    config: Config, key: str, meaning: dict[Any, str], default: Callable[[int], str] | None = None
) -> list[str]:
    """One name per layer from a list such as `layer_types`; without the list, `default(layer)`.

    Raises SpecError for a list of another length than the layers, or an entry that `meaning` does not know.
    """
    layers = config.integer("num_hidden_layers")
    if default is not None and key not in config:
        return [default(layer) for layer in range(layers)]
    entries = config.get(key)
    if not isinstance(entries, (list, str)) or len(entries) != layers:
        found = len(entries) if isinstance(entries, (list, str)) else repr(entries)
        raise SpecError(f"{key!r} must have one entry for each of the {layers} layers, got {found}", file=config.file)
    for entry in entries:
        if entry not in meaning:
            known = [str(word) for word in meaning]
            hint = did_you_mean(str(entry), known) or f"; known: {', '.join(known)}"
            raise SpecError(f"{key!r} has an unknown kind of layer {entry!r}{hint}", file=config.file)
    return [meaning[entry] for entry in entries]


def window(config: Config) -> int | None:
    """Sliding window in tokens; a window as long as the longest context, or one switched off, is none."""
    size = config.get("sliding_window", default=None)
    longest = config.integer("max_position_embeddings", default=0)
    if size is None or not config.get("use_sliding_window", default=True) or (longest and size >= longest):
        return None
    return config.integer("sliding_window")
