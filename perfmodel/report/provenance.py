"""Where a report's numbers are from: datasheets, parameters with their evidence, versions, and the plan file itself."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import yaml

from perfmodel import __version__, calibration
from perfmodel.machine import Machine
from perfmodel.planner.evaluated import Run
from perfmodel.report.blocks import Block, Cell, Code, Fold, Items, Table
from perfmodel.report.text import number
from perfmodel.spec.base import Source

_LIBRARIES = ("numpy", "pulp", "highspy", "plotly", "pydantic")


def blocks(run: Run) -> list[Block]:
    """Evidence, parameters, sources, versions and the plan file."""
    machines = {o.node.name: o.machine for p in run.plans for o, n in zip(p.offers, p.nodes, strict=True) if n}
    models = {x.column.estimator.model.name: x.column.estimator.model for p in run.plans for x in p.pools}
    sources = [(m.device.name, s) for m in machines.values() for s in m.device.sources.values()]
    sources += [(m.name, s) for m in machines.values() if m.node for s in m.node.sources.values()]
    sources += [(name, s) for name, model in models.items() for s in model.sources.values()]
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    today = datetime.now().astimezone()
    return [
        Items("", (
            *(f"{name}: {m.provenance}" for name, m in machines.items()),
            f"perfmodel {__version__}, Python {platform.python_version()}, {libraries}; written {today:%Y-%m-%d %H:%M %Z}",
            f"engine {run.spec.choices.engine}: {calibration.engine(run.spec.choices.engine).documentation}",
        )),
        Fold("Documents behind the datasheets", (_sources(sources),)),
        Fold("Parameters of the devices, with their evidence", tuple(_parameters(name, m) for name, m in machines.items())),
        Fold("Parameters shared by all devices, and the engine's", (_law(run),)),
        Code(f"The plan file, {Path(run.file).name}", run.listing or yaml.safe_dump(run.request, sort_keys=False, width=120)),
    ]  # fmt: skip


def _sources(found: list[tuple[str, Source]]) -> Table:
    rows = [
        (name, Cell(s.title, link=s.url if (s.url or "").startswith(("https://", "http://")) else None), s.date or "–",
         s.note or "")
        for name, s in dict.fromkeys(found)
    ]  # fmt: skip
    return Table("Documents the datasheets cite", ("of", "document", "date", "note"), tuple(rows))


def _parameters(name: str, m: Machine) -> Table:
    values = {key: float(m.law[key] if key in m.law else getattr(m, key)) for key in m.evidence}
    rows = [(key, number(values[key], 4), _spread(m.sigma.get(key)), x) for key, x in m.evidence.items()]
    columns = ("parameter", "value [SI]", "spread (one sigma)", "evidence")
    return Table(f"{m.device.title} in {name}", columns, tuple(rows), (1, 2))


def _law(run: Run) -> Table:
    shared = calibration.law().everything
    engine = calibration.engine(run.spec.choices.engine).parameters
    rows = [
        (key, number(p.value, 4), _spread(p.sigma), p.meaning, p.source) for key, p in (shared | engine).items()
    ]  # fmt: skip
    return Table(
        "Shared parameters", ("parameter", "value [SI]", "spread (one sigma)", "meaning", "source"), tuple(rows), (1, 2)
    )


def _spread(sigma: float | None) -> str:
    """A standard deviation of the logarithm as a factor."""
    return "exact" if not sigma else f"×/÷ {number(float(np.exp(sigma)), 3)}"
