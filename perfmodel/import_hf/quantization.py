"""Read `torch_dtype` and `quantization_config` into the storage formats of a Model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfmodel.import_hf.reader import Config


def quantization_fields(config: Config) -> dict[str, Any]:
    """`dtype`, `expert_dtype` and `unquantized` from a configuration."""
    raise NotImplementedError
