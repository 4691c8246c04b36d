"""perfmodel techniques: what can be done to a model or its serving, and with which parameters."""

from __future__ import annotations

from typing import Any

import click

from perfmodel.cli.group import Verbs, common_options, help_if_alone
from perfmodel.cli.text import echo_json, heading, table


@click.group(cls=Verbs, verbs={"list": f"{__name__}:list_techniques", "show": f"{__name__}:show"})
@click.pass_context
def techniques(context: click.Context) -> None:
    """List the techniques and presets, or show one; `-t NAME:k=v` applies it in estimate and explain."""
    help_if_alone(context)


@click.command("list")
@common_options
def list_techniques(as_json: bool) -> None:
    """Every kind of technique, and the presets of published systems."""
    from perfmodel import catalog
    from perfmodel.techniques.registry import kinds

    found: list[dict[str, str]] = [
        {"name": n, "quality": k.quality, "reference": k.reference, "summary": summary(k)} for n, k in kinds().items()
    ]
    presets: list[dict[str, Any]] = [
        {"name": n, "technique": p.technique, "title": p.title, "parameters": p.parameters}
        for n in catalog.names("techniques") for p in [catalog.load_preset(n)]
    ]  # fmt: skip
    if as_json:
        echo_json({"kinds": found, "presets": presets})
        return
    click.echo(heading("Kinds"))
    click.echo(table([[x["name"], x["quality"], x["summary"]] for x in found]))
    if presets:
        click.echo("\n" + heading("Presets"))
        click.echo(table([[x["name"], x["technique"], x["title"]] for x in presets]))


@click.command()
@click.argument("name")
@common_options
def show(name: str, as_json: bool) -> None:
    """Equation, reference and parameters of one kind or preset."""
    from perfmodel import catalog
    from perfmodel.techniques.registry import kinds, technique

    built = technique(name)
    cls = kinds()[built.kind]
    preset = None if name in kinds() else catalog.load_preset(name)
    given = built.model_dump()
    knobs = [_knob(n, f, given[n]) for n, f in cls.model_fields.items()]
    data: dict[str, Any] = {
        "name": name, "kind": built.kind, "quality": built.effects(), "reference": cls.reference,
        "equation": (cls.__doc__ or "").strip(), "parameters": knobs, "excludes": dict(cls.excludes),
        "sources": {k: s.model_dump() for k, s in preset.sources.items()} if preset else {},
    }  # fmt: skip
    if as_json:
        echo_json(data)
        return
    click.echo(f"{heading(name)}  {built.kind if preset else ''}  {data['quality']}, {cls.reference}".replace("    ", "  "))
    click.echo("\n" + "\n".join("  " + line.strip() for line in data["equation"].splitlines()) + "\n")
    rows = [["parameter", "value", "unit", "range", "meaning"]]
    rows += [[k["name"], str(k["value"]), k["unit"], k["range"], k["meaning"]] for k in knobs]
    click.echo(table(rows))
    for other, why in cls.excludes.items():
        click.echo(f"\n  not with {other}: {why}")
    for key, source in data["sources"].items():
        click.echo(f"  {key}: {source['title']} {source['url'] or ''}")


def summary(cls: Any) -> str:
    """First sentence of a technique's description."""
    return (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("    ", "").split(". ")[0].rstrip(".")


def _knob(name: str, field: Any, value: Any) -> dict[str, Any]:
    low = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    high = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    unit = (field.json_schema_extra or {}).get("unit", "1")
    limits = "" if low is None and high is None else f"{low:g} to {high:g}" if high is not None else f"from {low:g}"
    unit = "" if unit == "1" else unit
    return {"name": name, "value": value, "unit": unit, "range": limits, "meaning": field.description or ""}
