"""perfmodel techniques: what can be done to a model or its serving, and with which parameters."""

from __future__ import annotations

import inspect
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
    knobs = [_knob(n, f, given[n], preset.number_sources.get(n, "") if preset else "")
             for n, f in cls.model_fields.items() if cls.by_layer or n != "spare_layers"]  # fmt: skip
    data: dict[str, Any] = {
        "name": name, "kind": built.kind, "quality": built.effects() if preset else cls.quality, "reference": cls.reference,
        "equation": _text(cls), "parameters": knobs, "excludes": dict(cls.excludes),
        "title": preset.title if preset else summary(cls),
        "sources": {k: s.model_dump() for k, s in preset.sources.items()} if preset else {},
        "notes": list(preset.notes) if preset else [],
    }  # fmt: skip
    if as_json:
        echo_json(data)
        return
    click.echo("\n".join(_of_preset(data, preset.parameters) if preset else _of_kind(data)))


def _of_kind(data: dict[str, Any]) -> list[str]:
    lines = [f"{heading(data['name'])}  {data['quality']}, {data['reference']}", ""]
    lines += ["  " + line for line in data["equation"].splitlines()]
    rows = [["parameter", "default", "unit", "range", "meaning"]]
    rows += [[k["name"], plain(k["value"]), k["unit"], k["range"], k["meaning"]] for k in data["parameters"]]
    lines += ["", table(rows), *([""] if data["excludes"] else [])]
    return lines + [f"  not with {other}: {why}" for other, why in data["excludes"].items()]


def _of_preset(data: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    """Only what the preset sets, and where each number is from."""
    lines = [f"{heading(data['name'])}  {data['kind']}, {data['quality']}", "", f"  {data['title']}", ""]
    rows = [["parameter", "value", "unit", "from", "meaning"]]
    rows += [[k["name"], plain(k["value"]), k["unit"], k["source"], k["meaning"]]
             for k in data["parameters"] if k["name"] in chosen]  # fmt: skip
    lines += [table(rows), ""]
    for key, source in data["sources"].items():
        lines.append(f"  {key}: {source['title']}  {source['url'] or ''}")
        lines += [f"    {source['note']}"] if source["note"] else []
    lines += [f"  note: {note}" for note in data["notes"]]
    return [*lines, "", f"  Equation and all other parameters: perfmodel techniques show {data['kind']}"]


def _text(cls: Any) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def summary(cls: Any) -> str:
    """First sentence of a technique's description."""
    return _text(cls).split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def plain(value: Any) -> str:
    """A parameter as it is typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "+".join(str(v).replace(",", "/") for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _knob(name: str, field: Any, value: Any, source: str = "") -> dict[str, Any]:
    from perfmodel.techniques.base import limits, words

    unit = (field.json_schema_extra or {}).get("unit", "1")
    unit = "" if unit == "1" else unit
    allowed = " | ".join(x for x in (limits(field), *(word or "(empty)" for word in words(field.annotation))) if x)
    return {"name": name, "value": value, "unit": unit, "range": allowed, "meaning": field.description or "", "source": source}
