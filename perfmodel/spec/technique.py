"""A preset: one kind of technique at the parameters of a published system."""

from __future__ import annotations

from typing import Any

from perfmodel.spec.base import Source, Spec


class Preset(Spec):
    """`technique` with `parameters`; its name is the file's stem."""

    title: str
    technique: str
    parameters: dict[str, Any]
    sources: dict[str, Source]
    number_sources: dict[str, str] = {}
    """Source of each parameter by name; `assumed` where the publication does not say."""
    notes: tuple[str, ...] = ()
