"""Vision encoders of multimodal models."""

from __future__ import annotations

from typing import Any

from perfmodel.import_hf.reader import Config


def vision_fields(config: Config, text_hidden: int) -> dict[str, Any] | None:
    """The `vision` record of a Model, or None where the configuration has no encoder."""
    return None
