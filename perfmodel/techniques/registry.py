"""Techniques by name: kinds that register themselves, presets that are YAML, and the text that names them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any, get_args

from pydantic import ValidationError

import perfmodel.techniques as package
from perfmodel import catalog
from perfmodel.errors import SpecError, UnknownName, did_you_mean
from perfmodel.spec.technique import Preset
from perfmodel.spec.yaml import parse
from perfmodel.techniques.base import Technique, limits, words


@lru_cache(maxsize=1)
def kinds() -> dict[str, type[Technique]]:
    """Every kind of technique by name: each module of this package that defines one is found by itself."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {cls.kind: cls for cls in sorted(_subclasses(Technique), key=lambda c: c.kind)}


def _subclasses(cls: type[Technique]) -> list[type[Technique]]:
    found = []
    for sub in cls.__subclasses__():
        found += [sub, *_subclasses(sub)] if "kind" in sub.__dict__ else _subclasses(sub)
    return found


def technique(spec: str | dict[str, Any] | Technique) -> Technique:
    """One technique from text (``kv-quantization:bits=2,group=32`` or a preset's name) or a mapping with `kind`.

    A preset's parameters may be overridden: ``kivi-2bit:residual=64``. Raises SpecError with the nearest name.
    """
    if isinstance(spec, Technique):
        return spec
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        given = dict(_pair(spec, part) for part in rest.split(",") if part.strip()) if rest.strip() else {}
    else:
        given = dict(spec)
        name = str(given.pop("kind", None) or given.pop("preset", None) or "")
        if not name:
            raise SpecError(f"a technique needs `kind:` or `preset:`, got {spec!r}")
    name = name.strip()
    if name not in kinds():
        preset = _preset(name)
        given = {**preset.parameters, **given}
        name = preset.technique
    return _built(name, given)


def techniques(specs: Any) -> tuple[Technique, ...]:
    """Several in the order they apply, checked against each other. Raises SpecError for two that cannot stand together."""
    found = tuple(sorted((technique(s) for s in specs), key=lambda t: t.order))
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            why = one.clash(other) or other.clash(one)
            if why:
                raise SpecError(f"{one.kind} and {other.kind} cannot be combined: {why}")
    return found


def _pair(spec: str, part: str) -> tuple[str, Any]:
    key, sign, value = part.partition("=")
    if not sign or not key.strip() or not value.strip():
        raise SpecError(f"in {spec!r}: {part.strip()!r} is not name=value, as in kv-quantization:bits=2,group=32")
    return key.strip().replace("-", "_"), parse(value.strip(), spec).data


def _preset(name: str) -> Preset:
    try:
        return catalog.load_preset(name)
    except UnknownName:
        everything = [*kinds(), *catalog.names("techniques")]
        hint = did_you_mean(name, everything)
        raise UnknownName(f"unknown technique {name!r}{hint}; `perfmodel techniques` lists all") from None


def _built(name: str, given: dict[str, Any]) -> Technique:
    cls = kinds()[name]
    try:
        return cls(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise SpecError(
                f"{name} has no parameter {key!r}{did_you_mean(key, list(cls.model_fields))}; "
                f"it has {', '.join(cls.model_fields)}"
            ) from None
        raise SpecError(f"{name}: {_meaning(cls, first)}") from None


def _meaning(cls: type[Technique], error: Any) -> str:
    """What a parameter must be and what it was given; what parameters must be together."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name, given = str(error["loc"][0]), error.get("input")
    field = cls.model_fields[name]
    types = (field.annotation, *get_args(field.annotation))
    number = "a number" if float in types else "a whole number" if int in types else ""
    span = limits(field)
    number += f" from {span.removeprefix('from ')}" if number and span else ""
    choice = words(field.annotation)
    wanted = " or ".join(x for x in (number, *(w or "nothing" for w in choice)) if x) or "text"
    return f"{name} must be {wanted}, got {given!r}{did_you_mean(str(given), choice)}"
