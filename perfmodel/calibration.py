"""Resolve what a device, its memory, its links and an engine achieve: device file, else class prior, else default."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from perfmodel import catalog
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.calibration import (
    Classes,
    DeviceCalibration,
    Engine,
    Engines,
    Law,
    MemoryAccounts,
    Parameter,
    Without,
    version_number,
)
from perfmodel.spec.hardware import Device, Node

P90 = 1.2816
"""Standard normal quantile of 0.9: a log-normal p90 is the expected value x exp(P90 sigma)."""

_MODELS: dict[str, Any] = {"law": Law, "classes": Classes, "engines": Engines, "memory": MemoryAccounts}
_replaced: dict[str, float] = {}
_own_files: dict[str, DeviceCalibration] = {}
_forget: list[Callable[[], None]] = []


def on_change(clear: Callable[[], None]) -> None:
    """Register what to forget when parameters are replaced: caches of results that depend on them."""
    _forget.append(clear)


@contextlib.contextmanager
def replaced(values: Mapping[str, float]) -> Iterator[None]:
    """Use other parameter values for a while: fits, and sets fitted without one device.

    Keys: `law.NAME`, `architecture.CLASS.NAME`, `memory.CLASS.NAME`, `link.CLASS.NAME`, `engine.ENGINE.NAME`,
    `device.DEVICE.NAME`. A class or device may override any parameter of the law, so these keys need not exist before.
    """
    before = dict(_replaced)
    _replaced.update(values)
    _clear()
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)
        _clear()


def use_file(path: str | Path) -> str:
    """Let a calibration file speak for its device: its parameters replace the catalogue's. Returns the device's name."""
    spec = yaml.validate(yaml.read(path), DeviceCalibration)
    name = catalog.load_device(spec.device).name
    _own_files[name] = spec
    _clear()
    return name


def forget_files() -> None:
    """Undo every `use_file`."""
    _own_files.clear()
    _clear()


def _clear() -> None:
    for cached in (_load, engine, _device_files):
        cached.cache_clear()
    for clear in _forget:
        clear()


def _edited(table: dict[str, Parameter], prefix: str) -> dict[str, Parameter]:
    """A table of parameters with the replaced values under a prefix."""
    changed = {k.removeprefix(prefix): v for k, v in _replaced.items() if k.startswith(prefix)}
    new = {
        k: table[k].model_copy(update={"value": v}) if k in table else Parameter(value=v, sigma=0.3, source="fit")
        for k, v in changed.items()
        if "." not in k
    }
    return table | new


@lru_cache(maxsize=8)
def _load(name: str) -> Any:
    path = catalog.root("hardware") / "calibrations" / f"{name}.yaml"
    spec = yaml.validate(yaml.read(path), _MODELS[name])
    match spec:
        case Law():
            edited = _edited(spec.everything, "law.")
            facts = {k: p for k, p in edited.items() if k in spec.facts}
            return spec.model_copy(
                update={"parameters": {k: p for k, p in edited.items() if k not in facts}, "facts": facts}
            )
        case Classes():
            kinds = ("architecture", "memory", "link", "power")
            return spec.model_copy(
                update={k: {c: _edited(t, f"{k}.{c}.") for c, t in getattr(spec, k).items()} for k in kinds}
            )
        case Engines():
            accounts = _load("memory").engines
            engines = {
                n: e.model_copy(
                    update={"parameters": _edited(e.parameters, f"engine.{n}."), "memory": accounts.get(n, ())}
                )
                for n, e in spec.engines.items()
            }
            return spec.model_copy(update={"engines": engines})
    return spec


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
    """An engine's parameters and defaults; `vllm==0.8.5` for one version. Raises SpecError naming the nearest."""
    engines: Engines = _load("engines")
    name, _, version = name.partition("==")
    if version and version_number(version) is None:
        raise SpecError(f"--engine {name}=={version}: not a version number")
    key = known_engine(name)
    if key is None:
        raise SpecError(
            f"unknown engine {name!r}{did_you_mean(name, engines.engines)}; known: {', '.join(engines.engines)}"
        )
    return engines.engines[key].model_copy(update={"version": version}) if version else engines.engines[key]


def known_engine(text: str) -> str | None:
    """Name of the engine a row or log calls by some spelling (`vLLM 0.6.1`, `vllm-fork(sarathi)`); None: unknown."""
    engines: Engines = _load("engines")
    key = text.strip().lower()
    spellings = {alias.lower(): name for name, e in engines.engines.items() for alias in (name, *e.aliases)}
    return spellings.get(key) or spellings.get(re.split(r"[\s(/]", key)[0])


@lru_cache(maxsize=256)
def _device_files(name: str) -> tuple[DeviceCalibration, ...]:
    """Calibrations of a device, the last word last: the catalogue's, the user's, values replaced for a while."""
    found = []
    path = catalog.root("hardware") / "calibrations" / f"{name}.yaml"
    if path.is_file():
        found.append(yaml.validate(yaml.read(path), DeviceCalibration))
    if name in _own_files:
        found.append(_own_files[name])
    prefix = f"device.{name}."
    if any(k.startswith(prefix) for k in _replaced):
        known = {k: p for file in found for k, p in file.parameters.items()}
        edited = {k: p for k, p in _edited(known, prefix).items() if prefix + k in _replaced}
        found.append(
            DeviceCalibration(kind="device", device=name, stack="replaced", date="", rows=0, parameters=edited)
        )
    return tuple(found)


@dataclass(frozen=True)
class Resolved:
    """A parameter with the evidence it rests on."""

    parameter: Parameter
    evidence: str
    """`calibrated: …`, `class prior: hopper`, or `default prior`."""


def device_behind(hardware: str) -> str:
    """Name of the device that a device's or a node's name stands for."""
    spec = catalog.load_hardware(hardware)
    return spec.devices.device if isinstance(spec, Node) else spec.name


@lru_cache(maxsize=64)
def fitted_without(device: str) -> dict[str, float]:
    """Parameter values fitted without any row of a device, by full name; none where no row of it was ever fitted."""
    path = catalog.root("hardware") / "calibrations" / "without" / f"{device}.yaml"
    return dict(yaml.validate(yaml.read(path), Without).parameters) if path.is_file() else {}


_ARCHITECTURE_KEYS = ("matrix_efficiency", "attention_efficiency", "vector_efficiency", "kernel_latency")


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
    """Every parameter of one device, calibrated where a file exists, else from its classes.

    Besides the parameters every device has, its class or its own file may override any parameter of the law.
    """
    return class_parameters(device) | own_parameters(device)


def own_parameters(device: Device) -> dict[str, Resolved]:
    """What was fitted to this device; nothing for one that nobody calibrated."""
    return {
        k: Resolved(p, f"calibrated: {file.stack}, {file.date}, {file.rows} rows")
        for file in _device_files(device.name)
        for k, p in file.parameters.items()
    }


def calibrated_devices() -> list[str]:
    """Devices of the catalogue with a calibration file."""
    folder = catalog.root("hardware") / "calibrations"
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem not in _MODELS)


def engine_names() -> list[str]:
    """Engines (and their launch modes) with parameters."""
    engines: Engines = _load("engines")
    return list(engines.engines)


@lru_cache(maxsize=1)
def kernel_parameter_names() -> frozenset[str]:
    """Names of all parameters that kernels read from the law: shared by all, of a class, or of an engine."""
    table = classes()
    tables = [law().everything, *(engine(e).parameters for e in engine_names())]
    tables += [t for group in (table.architecture, table.memory, table.power) for t in group.values()]
    return frozenset(name for t in tables for name in t)


def class_parameters(device: Device) -> dict[str, Resolved]:
    """What a device inherits from its architecture and its memory technology."""
    table = classes()
    memory = memory_class(device.memory.technology) if device.memory else "default"
    fallback = "cpu" if device.kind == "cpu" else "default"
    found = {k: _of_class(table.architecture, k, device.architecture, fallback) for k in _ARCHITECTURE_KEYS}
    keys = table.memory[memory if memory in table.memory else "default"]
    found |= {k: _of_class(table.memory, k, memory) for k in keys}
    found |= {k: Resolved(p, "class prior: power of a board") for k, p in table.power["default"].items()}
    # What a class overrides of the shared law.
    name = device.architecture if device.architecture in table.architecture else fallback
    special = table.architecture[name]
    return found | {k: Resolved(p, f"class prior: {name}") for k, p in special.items() if k not in found}


def link_parameters(technology: str) -> dict[str, Resolved]:
    """Efficiency and latency of a link technology."""
    table, name = classes().link, link_class(technology)
    return {k: _of_class(table, k, name) for k in ("link_efficiency", "link_latency")}
