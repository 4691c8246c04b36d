"""The registry of architecture readers, and reading a configuration with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.import_hf.quantization import quantization_fields
from perfmodel.spec.model import Model
from perfmodel.spec.yaml import Document

Fields = dict[str, Any]
_MISSING = object()
_FAMILIES: dict[str, Callable[[Config], Fields]] = {}


class Config:
    """A configuration with access that explains what is missing."""

    def __init__(self, data: dict[str, Any], file: str) -> None:
        self.data, self.file = data, file

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def get(self, *keys: str, default: Any = _MISSING) -> Any:
        """The first of several spellings that is set; without a default its absence is an error."""
        for key in keys:
            if self.data.get(key) is not None:
                return self.data[key]
        if default is _MISSING:
            raise SpecError(f"missing key {keys[0]!r} (needed for {self.architecture})", file=self.file)
        return default

    def integer(self, *keys: str, default: Any = _MISSING) -> int:
        """A positive whole number under one of the spellings."""
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
            raise SpecError(f"{keys[0]!r} must be a whole number, got {value!r}", file=self.file)
        return int(value)

    def sub(self, key: str) -> Config:
        """A nested configuration (text_config, vision_config)."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise SpecError(f"{key!r} must be an object", file=self.file)
        return Config({"architectures": self.data.get("architectures"), **value}, self.file)

    @property
    def architecture(self) -> str:
        names = self.data.get("architectures") or []
        return str(names[0]) if names else ""


def family(*architectures: str) -> Callable[[Callable[[Config], Fields]], Callable[[Config], Fields]]:
    """Register a reader for one or more Hugging Face architecture class names."""

    def register(reader: Callable[[Config], Fields]) -> Callable[[Config], Fields]:
        for name in architectures:
            _FAMILIES[name] = reader
        return reader

    return register


def _load_families() -> None:
    if not _FAMILIES:
        from perfmodel.import_hf import classic, dense, hybrid, latent, moe, vision  # noqa: F401


def from_config(data: dict[str, Any], *, file: str, name: str, extra: Fields | None = None) -> Model:
    """Build a Model from a configuration. Raises SpecError for an unknown architecture, naming the nearest."""
    _load_families()
    config = Config(data, file)
    architecture = config.architecture
    if architecture not in _FAMILIES:
        if not architecture:
            raise SpecError("no 'architectures' entry, so the kind of model is unknown", file=file)
        raise SpecError(f"unknown architecture {architecture!r}{did_you_mean(architecture, _FAMILIES)}", file=file)
    try:
        fields = {"family": architecture, **quantization_fields(config), **_FAMILIES[architecture](config)}
        return Model.model_validate({**fields, "name": name, **(extra or {})})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join(str(p) for p in problem["loc"])
        raise SpecError(problem["msg"].removeprefix("Value error, "), file=file, path=path) from None


def read(path: Path) -> Model:
    """Read a config.json, or the one in a model folder."""
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SpecError(f"not valid JSON: {error.msg}", file=str(file), line=error.lineno) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"cannot read the configuration: {reason}", file=str(file)) from None
    if not isinstance(data, dict):
        raise SpecError("expected a JSON object", file=str(file), line=1)
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return from_config(data, file=str(file), name=name)


def from_catalog(document: Document) -> Model:
    """Build a Model from a catalogue file: metadata beside a `config` kept as published."""
    data = dict(document.data)
    config = data.pop("config")
    if not isinstance(config, dict):
        raise SpecError("'config' must be a mapping", file=document.file, line=document.line(("config",)))
    allowed = {"name", "title", "organisation", "aliases", "published", "sources", "notes", "dtype", "mtp_parameters"}
    for key in data:
        if key not in allowed:
            line = document.line((key,))
            raise SpecError(f"unknown key {key!r}{did_you_mean(key, allowed)}", file=document.file, line=line)
    return from_config(config, file=document.file, name=str(data.pop("name")), extra=data)
