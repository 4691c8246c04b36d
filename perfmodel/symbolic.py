"""A model whose sizes are symbols, and the numbers they stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from perfmodel.spec.model import Model
from perfmodel.symbols import symbol

# Sizes that no count depends on: they only enter the expected number of ranks, R.
_STRUCTURAL = {"top_groups"}


def symbolic_model(model: Model) -> Any:
    """The same model with its sizes replaced by symbols, block by block; flags and zeros stay."""
    counts = model.block_counts()
    single = len(counts) == 1
    blocks = {}
    for i, name in enumerate(counts):
        index = "" if single else str(i)
        block = model.blocks[name]
        blocks[name] = SimpleNamespace(
            **{k: v for k, v in block if k not in ("mixer", "ffn")},
            mixer=_symbolic_record(block.mixer, index),
            ffn=_symbolic_record(block.ffn, index),
        )
    layers = {name: symbol("L", "" if single else str(i)) for i, name in enumerate(counts)}
    return SimpleNamespace(
        **{k: v for k, v in model if k not in ("blocks", "layers", "hidden", "vocab")},
        hidden=symbol("h"),
        vocab=symbol("V"),
        blocks=blocks,
        block_counts=lambda: layers,
    )


def _symbolic_record(record: Any, index: str) -> Any:
    if record is None:
        return None
    fields: dict[str, Any] = {}
    for key, value in record:
        size = isinstance(value, int) and not isinstance(value, bool) and value > 0 and key not in _STRUCTURAL
        fields[key] = symbol(key, index) if size else value
    return SimpleNamespace(**fields)


def values_of(model: Model) -> dict[str, float]:
    """Numbers of the symbols that `symbolic_model` introduces."""
    counts = model.block_counts()
    values: dict[str, float] = {"h": model.hidden, "V": model.vocab}
    for i, (name, count) in enumerate(counts.items()):
        index = "" if len(counts) == 1 else f"_{i}"
        values[f"L{index}"] = count
        for record in (model.blocks[name].mixer, model.blocks[name].ffn):
            for key, value in record or ():
                if isinstance(value, int) and not isinstance(value, bool) and value > 0 and key not in _STRUCTURAL:
                    values[f"{key}{index}"] = value
    return values
