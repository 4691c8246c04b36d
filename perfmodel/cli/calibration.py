"""The parameters behind an estimate, one line each: value, unit, spread, evidence and source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfmodel.cli.text import heading, plural, table
from perfmodel.errors import SpecError
from perfmodel.spec.calibration import Parameter
from perfmodel.spec.hardware import Device, Network, Node

if TYPE_CHECKING:
    from perfmodel.calibration import Resolved

# Base units by the words parameter names are made of; what matches none is a plain number.
_UNITS = (
    ("second", ("latency", "overhead", "issue", "start", "ramp", "host_base", "host_per_sequence", "_call", "expert_layer",
                "profiled_launch", "storage_operation", "exchange_token")),
    ("byte", ("token_bytes", "pass_bytes", "row_bytes", "memory_driver", "memory_context", "memory_parallel", "memory_graphs",
              "memory_sampler", "latent_widening")),
    ("byte/s", ("exchange_unit_rate", "attention_load_rate", "scatter_rate")),
    ("token", ("attention_tile", "attention_padding", "decode_chunk")),
    ("row", ("latent_small_rows", "latent_portable_rows")),
)  # fmt: skip


def unit(name: str) -> str:
    """Base unit of a parameter.

    >>> unit("memory_latency"), unit("memory_context"), unit("link_efficiency")
    ('second', 'byte', '1')
    """
    return next((u for u, words in _UNITS if any(word in name for word in words)), "1")


def describe(spec: Device | Node | Network, engine: str) -> dict[str, Any]:
    """Every parameter an estimate on this hardware uses, and how many there are of each group.

    Groups: `device` (fitted to this device), `class` (priors of its architecture, memory and links), `law` (shared by
    all devices), `engine`, `memory` (what the engine's version counts), `fact` (what kernels are known to do: not fitted).
    Raises SpecError for hardware that runs no model and is no link.
    """
    from perfmodel import calibration, catalog
    from perfmodel.machine import achieved

    if isinstance(spec, Network):
        found = calibration.link_parameters(spec.name)
    elif isinstance(spec, Node):
        found = achieved(catalog.load_device(spec.devices.device), spec)
    elif spec.compute:
        node = catalog.node_of(spec.name)
        found = achieved(spec, catalog.load_node(node) if node else None)
    else:
        raise SpecError(f"{spec.name!r} is a {spec.kind}: no achieved rates are kept for it")
    # What was calibrated on the device stays whatever the engine.
    own = {k for k, r in found.items() if r.evidence.startswith("calibrated")}
    replaced = set() if isinstance(spec, Network) else set(calibration.engine(engine).parameters) - own
    rows = [_row(_home(r), k, r.parameter, r.evidence) for k, r in found.items() if k not in replaced]
    if not isinstance(spec, Network):
        driven, law = calibration.engine(engine), calibration.law()
        rows += [_row("engine" if p.sigma > 0 else "fact", k, p, engine) for k, p in driven.parameters.items()
                 if k not in own]  # fmt: skip
        # What the class, the device or the engine say replaces what is shared by all.
        said = {r["name"] for r in rows}
        rows += [_row("law", k, p, "shared by all devices") for k, p in law.parameters.items() if k not in said]
        rows += [_row("fact", k, p, "kernels and libraries") for k, p in law.facts.items() if k not in said]
        counted = driven.account
        rows += [_row("memory", k, p, f"{engine}, {counted.title}") for k, p in counted.parameters.items()]
    groups = ("device", "class", "law", "engine", "memory", "fact")
    return {
        "parameters": rows,
        "counts": {g: sum(r["group"] == g for r in rows) for g in groups},
        "residual": dict(calibration.law().residual),
    }


def _home(r: Resolved) -> str:
    if r.parameter.sigma == 0:
        return "fact"
    return "device" if r.evidence.startswith("calibrated") else "class"


def _row(group: str, name: str, p: Parameter, evidence: str) -> dict[str, Any]:
    return {
        "group": group, "name": name, "value": p.value, "unit": unit(name), "sigma": p.sigma,
        "evidence": evidence, "source": p.source,
    }  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The same as text: one table per group."""
    parts = []
    for group, count in data["counts"].items():
        if not count:
            continue
        rows = [["parameter", "value", "unit", "sigma", "evidence", "source"]]
        rows += [
            [r["name"], f"{r['value']:.4g}", r["unit"], f"{r['sigma']:.2g}", r["evidence"], r["source"]]
            for r in data["parameters"]
            if r["group"] == group
        ]
        title = heading(plural(count, f"{group} parameter"))
        parts.append(f"{title}\n{table(rows, right=(1, 3))}")
    spread = ", ".join(f"{phase} {value:g}" for phase, value in data["residual"].items())
    note = f"sigma: standard deviation of the logarithm. Beyond the parameters the law itself leaves {spread}."
    return "\n\n".join([*parts, note])
