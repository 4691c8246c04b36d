"""Find and load specs by name, alias or path.

`hardware/`, `models/` and the other data folders stand beside the package in a checkout and inside it
(`perfmodel/_catalog`) in a wheel. A user's own folder (``--specs DIR`` or ``$PERFMODEL_SPECS``) is searched first.
A file's stem is its name; aliases come from an index kept in the user's cache and refreshed by modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from perfmodel.errors import SpecError, UnknownName, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.hardware import Device, Network, Node, PriceList
from perfmodel.spec.model import Model
from perfmodel.spec.technique import Preset

KINDS = ("hardware", "models", "papers", "reports", "techniques")
_user_roots: list[Path] = []
# Folders under hardware/ that hold no devices.
_NOT_HARDWARE = {"prices", "calibrations"}
# What stands beside the papers and is none.
_NOT_PAPERS = {"systems.yaml"}


def use_specs(folder: str | Path) -> None:
    """Search this folder before the built-in catalogue."""
    path = Path(folder)
    if not path.is_dir():
        raise SpecError(f"no such folder of specs: {folder}")
    _user_roots.insert(0, path)
    _index.cache_clear()
    nodes.cache_clear()


def root(kind: str) -> Path:
    """The built-in folder of a kind: hardware, models, papers, reports or techniques."""
    package = Path(__file__).parent
    packaged = package / "_catalog"
    return packaged / kind if packaged.is_dir() else package.parent / kind


def _roots(kind: str) -> list[Path]:
    environment = [Path(p) for p in os.environ.get("PERFMODEL_SPECS", "").split(os.pathsep) if p]
    for missing in (p for p in environment if not p.is_dir()):
        raise SpecError(f"no such folder of specs: {missing} (from $PERFMODEL_SPECS)")
    own = []
    for base in (*_user_roots, *environment):
        sorted_by_kind = any((base / k).is_dir() for k in KINDS)
        own.append(base / kind if sorted_by_kind else base)
    return [*own, root(kind)]


def _key(name: str) -> str:
    """Spelling-independent form of a name: case, spaces, underscores, slashes and brackets do not matter."""
    return re.sub(r"[\s_/()+,:]+", "-", name.strip().casefold()).strip("-")


def _files(kind: str) -> Iterator[Path]:
    for folder in _roots(kind):
        yield from _files_in(folder, kind)


def _files_in(folder: Path, kind: str) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.yaml")):
        relative = path.relative_to(folder).parts
        apart = {"hardware": _NOT_HARDWARE, "papers": _NOT_PAPERS}.get(kind, set())
        if relative[0] not in apart:
            yield path


def _cache_file(kind: str) -> Path:
    # An account without a home (a container under a foreign user id) gets the temporary folder.
    home = os.path.expanduser("~")
    base = Path(os.environ.get("XDG_CACHE_HOME") or (Path(home, ".cache") if home != "~" else tempfile.gettempdir()))
    places = os.pathsep.join(str(p.resolve()) for p in _roots(kind))
    return base / "perfmodel" / f"index-{kind}-{hashlib.sha256(places.encode()).hexdigest()[:16]}.json"


def _names_in(path: Path) -> list[str]:
    """Names a file answers to; a file that cannot be parsed answers to its stem, and fails when asked for."""
    try:
        data = yaml.read(path).data
    except SpecError:
        return [path.stem]
    aliases = data.get("aliases") if isinstance(data, dict) else None
    return [path.stem, *(str(a) for a in aliases)] if isinstance(aliases, list) else [path.stem]


@lru_cache(maxsize=8)
def _index(kind: str) -> dict[str, tuple[str, str]]:
    """Key of every name and alias -> (name as written, file). Earlier roots win."""
    cache_file = _cache_file(kind)
    try:
        read = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        read = None
    cached: dict[str, Any] = read if isinstance(read, dict) else {}
    fresh: dict[str, Any] = {}
    index: dict[str, tuple[str, str]] = {}
    for folder in _roots(kind):
        files = [str(path) for path in _files_in(folder, kind)]
        for path in files:
            stamp = os.stat(path)
            mark = [stamp.st_mtime_ns, stamp.st_size]
            entry = cached.get(path)
            fresh[path] = entry if entry and entry[0] == mark else [mark, _names_in(Path(path))]
        # Within a root a name beats an alias.
        for path in files:
            name = fresh[path][1][0]
            index.setdefault(_key(name), (name, path))
        for path in files:
            for alias in fresh[path][1][1:]:
                index.setdefault(_key(alias), (alias, path))
    if fresh != cached:
        _write_quietly(cache_file, json.dumps(fresh))
    return index


def _write_quietly(path: Path, text: str) -> None:
    """Replace a cache file atomically; a read-only home only costs speed."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)


def names(kind: str) -> list[str]:
    """Catalogue names (file stems) of a kind, sorted."""
    return sorted({path.stem for path in _files(kind)})


def find(kind: str, name: str) -> Path:
    """Path of a spec by name, alias or file path. Raises UnknownName with the nearest known name."""
    if name.endswith((".yaml", ".yml")) or (os.sep in name and Path(name).is_file()):
        path = Path(name)
        if not path.is_file():
            raise SpecError("no such file", file=name)
        return path
    index = _index(kind)
    found = index.get(_key(name))
    if found is None:
        singular = {"hardware": "device or node", "models": "model", "papers": "paper", "techniques": "technique"}.get(kind, kind)
        spelled = [written for written, _ in index.values()]
        raise UnknownName(
            f"unknown {singular} {name!r}{did_you_mean(name, spelled)}; "
            f"`perfmodel {kind} list` shows all {len(names(kind))}"
        )
    return Path(found[1])


def load_hardware(name: str) -> Device | Node | Network:
    """Load a device, node or network by name, alias or path."""
    return _load_hardware(str(find("hardware", name)))


@lru_cache(maxsize=512)
def _load_hardware(path: str) -> Device | Node | Network:
    document = yaml.read(path)
    kind = document.data.get("kind") if isinstance(document.data, dict) else None
    if kind == "node":
        return yaml.validate(document, Node)
    return yaml.validate(document, Network) if kind == "network" else yaml.validate(document, Device)


def load_device(name: str) -> Device:
    """Load a device; a node or network under that name is an error that says so."""
    spec = load_hardware(name)
    if not isinstance(spec, Device):
        raise SpecError(f"{name!r} is of kind {spec.kind!r}, and a device is wanted here")
    return spec


def load_node(name: str) -> Node:
    """Load a node; a single device under that name is an error that says so."""
    spec = load_hardware(name)
    if not isinstance(spec, Node):
        raise SpecError(f"{name!r} is of kind {spec.kind!r}, and a node is wanted here{_node_hint(name)}")
    return spec


def _node_hint(device: str) -> str:
    """Nodes that contain a device, as a suggestion."""
    wanted = Path(_index("hardware")[_key(device)][1]).stem if _key(device) in _index("hardware") else ""
    holders = [n.name for n in nodes() if n.devices.device == wanted]
    return f" (nodes with it: {', '.join(holders)})" if holders else ""


def node_of(device: str) -> str | None:
    """The catalogue node that a device usually comes in: the one with most devices, up to eight."""
    found = [(min(n.devices.count, 8), -n.devices.count, n.name) for n in nodes() if n.devices.device == device]
    return max(found)[2] if found else None


@lru_cache(maxsize=1)
def nodes() -> tuple[Node, ...]:
    """Every node of the catalogue."""
    paths = [p for p in _files("hardware") if p.parent.name == "nodes"]
    specs = (_load_hardware(str(p)) for p in paths)
    return tuple(s for s in specs if isinstance(s, Node))


def load_prices() -> list[PriceList]:
    """All price lists: the user's own first, then the built-in ones."""
    lists = []
    for base in _roots("hardware"):
        folder = base / "prices"
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            lists.append(yaml.validate(yaml.read(path), PriceList))
    return lists


@lru_cache(maxsize=256)
def load_preset(name: str) -> Preset:
    """Load the preset of a technique by name, alias or path."""
    return yaml.validate(yaml.read(find("techniques", name)), Preset)


def load_model(name: str) -> Model:
    """Load a model by name, alias, Hugging Face id, YAML path, config.json or a folder that holds one."""
    path = Path(name)
    from perfmodel import import_hf

    if path.is_dir() or name.endswith(".json"):
        return import_hf.read(path)
    return _load_model(str(find("models", name)))


@lru_cache(maxsize=256)
def _load_model(path: str) -> Model:
    document = yaml.read(path)
    if isinstance(document.data, dict) and "config" in document.data:
        from perfmodel import import_hf

        return import_hf.from_catalog(document)
    return yaml.validate(document, Model)
