"""perfmodel hardware: datasheets of devices, nodes and links, and what a stack is believed to achieve on them."""

from __future__ import annotations

from typing import Any

import click

from perfmodel import units
from perfmodel.cli.group import Verbs, common_options, help_if_alone
from perfmodel.cli.text import echo_json, heading, number, size, table


@click.group(cls=Verbs, verbs={"list": f"{__name__}:list_hardware", "show": f"{__name__}:show"})
@click.pass_context
def hardware(context: click.Context) -> None:
    """List the catalogue's devices, nodes and links, or show one."""
    help_if_alone(context)


@click.command("list")
@common_options
def list_hardware(as_json: bool) -> None:
    """Every device, node and link technology of the catalogue."""
    from perfmodel import catalog

    found = [_summary(name, catalog.load_hardware(name)) for name in catalog.names("hardware")]
    if as_json:
        echo_json(found)
        return
    lines = []
    for kind in dict.fromkeys(x["kind"] for x in found):
        rows = [[x["name"], x["figures"], x["title"]] for x in found if x["kind"] == kind]
        lines.append(f"{heading(kind)}\n{table(rows)}")
    click.echo("\n\n".join(lines))


def _summary(name: str, spec: Any) -> dict[str, Any]:
    """The figures one chooses by: whatever of them a spec has, in base SI, and the same as text."""
    x = {"name": name, "title": spec.title, "kind": spec.kind, "vendor": spec.vendor, "figures": ""}
    if spec.kind == "node":
        x |= {"device": spec.devices.device, "count": spec.devices.count}
        return x | {"figures": f"{spec.devices.count} x {spec.devices.device}"}
    if spec.kind == "network":
        x |= {"bandwidth": spec.bandwidth, "role": spec.role}
        return x | {"figures": f"{units.show(spec.bandwidth, 'bandwidth')} per {spec.per}"}
    x |= {"architecture": spec.architecture}
    figures = []
    if spec.memory:
        x |= {"memory": spec.memory.capacity, "bandwidth": spec.memory.bandwidth}
        figures += [size(spec.memory.capacity), units.show(spec.memory.bandwidth, "bandwidth")]
    if spec.storage:
        x |= {"storage": spec.storage.capacity, "read": spec.storage.read}
        figures += [size(spec.storage.capacity), f"read {units.show(spec.storage.read, 'bandwidth')}"]
    if spec.compute:
        x |= {"matrix": dict(spec.compute.matrix), "vector": dict(spec.compute.vector)}
        half = spec.compute.matrix.get("bf16") or spec.compute.matrix.get("fp16")
        figures += [f"16-bit {units.show(half, 'flops')}"] if half else []
    if spec.power:
        x |= {"tdp": spec.power.tdp}
    return x | {"figures": ", ".join(figures)}


@click.command()
@click.argument("name", metavar="NAME|PATH.YAML")
@click.option("--calibration", "calibrated", is_flag=True, help="The achieved rates and latencies an estimate uses.")
@click.option("--engine", default="vllm", show_default=True, help="Whose parameters --calibration shows.")
@common_options
def show(name: str, calibrated: bool, engine: str, as_json: bool) -> None:
    """The datasheet of one device, node or link technology, with a source for every section."""
    from perfmodel import catalog

    spec = catalog.load_hardware(name)
    data = spec.model_dump(mode="json")
    text = f"{heading(f'{spec.name}: {spec.title}')}\n{table(_rows(spec, '', spec.source_keys()))}"
    if spec.sources:
        listed = [[k, s.title, s.url or "", s.date or ""] for k, s in spec.sources.items()]
        text += f"\n\n{heading('Sources')}\n{table(listed)}"
    if spec.notes:
        text += f"\n\n{heading('Notes')}\n" + "\n".join(f"  {note}" for note in spec.notes)
    if calibrated:
        from perfmodel.cli import calibration

        data["calibration"] = calibration.describe(spec, engine)
        text += "\n\n" + calibration.page(data["calibration"])
    if as_json:
        echo_json(data)
    else:
        click.echo(text)


_LISTED_APART = ("name", "title", "sources", "number_sources", "notes", "source")


def _rows(spec: Any, path: str, cited: dict[str, str]) -> list[list[str]]:
    """One row a number: its path, the value with its unit, and the source it cites."""
    rows: list[list[str]] = []
    properties = type(spec).model_json_schema()["properties"]
    for key, value in spec:
        where = f"{path}{key}"
        if key in _LISTED_APART or value is None or value in ({}, ()):
            continue
        if hasattr(value, "model_dump"):
            rows += _rows(value, f"{where}.", cited)
        elif isinstance(value, dict):
            for name, item in value.items():
                if hasattr(item, "model_dump"):
                    rows += _rows(item, f"{where}.{name}.", cited)
                else:
                    rows.append(_row(f"{where}.{name}", item, _unit(properties[key]), cited))
        else:
            rows.append(_row(where, value, _unit(properties[key]), cited))
    return rows


def _row(path: str, value: Any, kind: str | None, cited: dict[str, str]) -> list[str]:
    # A number's own source, else that of the innermost section around it.
    around = [path.rsplit(".", cut)[0] for cut in range(path.count(".") + 1)]
    source = next((cited[p] for p in around if p in cited), "")
    if kind is not None:
        text = units.show(value, kind, digits=4)
        text = text.replace("FLOP", "OP") if path.rsplit(".", 1)[-1].startswith("int") else text
    elif isinstance(value, tuple):
        text = ", ".join(_member(v) for v in value)
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = number(value, digits=12) if isinstance(value, float) else str(value)
    return [path, text, source]


def _member(value: Any) -> str:
    return f"{value.count} x {value.device}" if hasattr(value, "count") and hasattr(value, "device") else str(value)


def _unit(schema: dict[str, Any]) -> str | None:
    """Kind of quantity of a field: its own, that of the value it may hold, or that of a mapping's values."""
    inner = schema.get("additionalProperties")
    options = [*schema.get("anyOf", ()), *([inner] if isinstance(inner, dict) else [])]
    return schema.get("unit") or next((u for u in map(_unit, options) if u), None)
