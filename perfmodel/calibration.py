"""Resolve what a device, its memory, its links and an engine achieve: device file, else class prior, else default."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from perfmodel import catalog
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.calibration import Classes, DeviceCalibration, Engine, Engines, Law, Parameter
from perfmodel.spec.hardware import Device

_MODELS: dict[str, Any] = {"law": Law, "classes": Classes, "engines": Engines}


@lru_cache(maxsize=8)
def _load(name: str) -> Any:
    path = catalog.root("hardware") / "calibrations" / f"{name}.yaml"
    return yaml.validate(yaml.read(path), _MODELS[name])


def law() -> Law:
    """Parameters shared by all devices."""
    result: Law = _load("law")
    return result


def classes() -> Classes:
    """Class priors."""
    result: Classes = _load("classes")
    return result


@lru_cache(maxsize=64)
def engine(name: str) -> Engine:
    """An engine's parameters and defaults. Raises SpecError naming the nearest."""
    engines: Engines = _load("engines")
    key = {"tensorrt-llm": "trtllm", "trt-llm": "trtllm"}.get(name.lower(), name.lower())
    if key not in engines.engines:
        raise SpecError(
            f"unknown engine {name!r}{did_you_mean(key, engines.engines)}; known: {', '.join(engines.engines)}"
        )
    return engines.engines[key]


@lru_cache(maxsize=256)
def _device_file(name: str) -> DeviceCalibration | None:
    path = catalog.root("hardware") / "calibrations" / f"{name}.yaml"
    return yaml.validate(yaml.read(path), DeviceCalibration) if path.is_file() else None


@dataclass(frozen=True)
class Resolved:
    """A parameter with the evidence it rests on."""

    parameter: Parameter
    evidence: str
    """`calibrated: …`, `class prior: hopper`, or `default prior`."""


_ARCHITECTURE_KEYS = ("matrix_efficiency", "attention_efficiency", "vector_efficiency", "kernel_latency")
_MEMORY_KEYS = ("bandwidth_efficiency", "memory_latency")


def _of_class(table: dict[str, dict[str, Parameter]], key: str, name: str, fallback: str = "default") -> Resolved:
    if name in table:
        return Resolved(table[name][key], f"class prior: {name}")
    return Resolved(table[fallback][key], f"{fallback} prior (no entry for {name!r})")


def memory_class(technology: str) -> str:
    """hbm3e -> hbm, gddr6x -> gddr, lpddr5x -> lpddr, ddr5 -> ddr."""
    match = re.match(r"lpddr|gddr|ddr|hbm", technology)
    return match.group(0) if match else technology


def link_class(technology: str) -> str:
    """nvlink4 -> nvlink, pcie5-x16 -> pcie, infiniband-ndr -> infiniband, roce-400gbe -> ethernet."""
    stem = re.split(r"[-\d]", technology)[0]
    return {"roce": "ethernet", "efa": "ethernet"}.get(stem, stem)


def device_parameters(device: Device) -> dict[str, Resolved]:
    """Every parameter of one device, calibrated where a file exists, else from its classes."""
    own = _device_file(device.name)
    table = classes()
    memory = memory_class(device.memory.technology) if device.memory else "default"
    fallback = "cpu" if device.kind == "cpu" else "default"
    found = {k: _of_class(table.architecture, k, device.architecture, fallback) for k in _ARCHITECTURE_KEYS}
    found |= {k: _of_class(table.memory, k, memory) for k in _MEMORY_KEYS}
    if own is not None:
        stamp = f"calibrated: {own.stack}, {own.date}, {own.rows} rows"
        found |= {k: Resolved(v, stamp) for k, v in own.parameters.items()}
    return found


def link_parameters(technology: str) -> dict[str, Resolved]:
    """Efficiency and latency of a link technology."""
    table, name = classes().link, link_class(technology)
    return {k: _of_class(table, k, name) for k in ("link_efficiency", "link_latency")}
