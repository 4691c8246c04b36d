"""A preset: one kind of technique at the parameters of a published system."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from perfmodel.errors import did_you_mean
from perfmodel.spec.base import Source, Spec

ASSUMED = "assumed"


class Preset(Spec):
    """`technique` with `parameters`; its name is the file's stem."""

    title: str
    technique: str
    parameters: dict[str, Any]
    sources: dict[str, Source]
    number_sources: dict[str, str] = {}
    """Source of each parameter by name; `assumed` where the publication does not say."""
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sources_exist(self) -> Preset:
        for name, source in self.number_sources.items():
            if name not in self.parameters:
                near = did_you_mean(name, list(self.parameters))
                raise ValueError(f"number_sources names {name!r}, which is no parameter{near}")
            if source != ASSUMED and source not in self.sources:
                near = did_you_mean(source, [*self.sources, ASSUMED])
                raise ValueError(f"number_sources.{name}: no source {source!r}{near}")
        return self
