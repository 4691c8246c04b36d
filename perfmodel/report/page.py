"""One self-contained page of a run: recipe, template, style and script library in a single file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.io
import plotly.offline
from markupsafe import Markup

from perfmodel import __version__, catalog
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.planner.evaluated import Run
from perfmodel.report import sections  # registers the sections
from perfmodel.report.blocks import SECTIONS, Block, Chart, Fold, Section
from perfmodel.report.figures import TEMPLATE
from perfmodel.spec import yaml
from perfmodel.spec.base import Spec

__all__ = ["sections", "write"]

_DIGITS = 6  # significant digits of plotted numbers


class Entry(Spec):
    """One section of a recipe: its registered name, its heading, what to take from it, its options."""

    section: str
    title: str
    lead: str = ""
    options: dict[str, Any] = {}


class Recipe(Spec):
    """What a report is. Template and style are files beside the recipe."""

    title: str
    template: str
    style: str
    sections: tuple[Entry, ...]


def write(run: Run, out: str | Path, recipe: str | Path | None = None, *, data: bool = True) -> Path:
    """Write report.html, and plan.json unless `data` is false, into the folder `out` and return the page's path.

    recipe: a recipe file, else the catalogue's `reports/plan.yaml`. Raises SpecError where the recipe is wrong or
    the folder cannot be written.
    """
    source = Path(recipe) if recipe is not None else catalog.root("reports") / "plan.yaml"
    plan = {"plan.json": json_text(_from(run.data, Path(out)))} if data else {}
    return save(Path(out), plan | {"report.html": render(run, source)})


def _from(data: dict[str, Any], out: Path) -> dict[str, Any]:
    """The plan's data, with the folder of its request as seen from the folder it is written to."""
    folder = Path(data["request"]["folder"]).absolute()
    try:
        seen = Path(os.path.relpath(folder, out.absolute()))
    except ValueError:  # on another drive
        seen = folder
    return data | {"request": data["request"] | {"folder": seen.as_posix()}}


def save(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files into a folder, made where it is missing; the path of the last. Raises SpecError where it cannot be written."""
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / name
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"cannot write the report: {error.strerror or error}", file=str(error.filename or folder)
        ) from None
    return path


def json_text(data: Any) -> str:
    """Data as an indented JSON document."""
    return json.dumps(_plain(data), indent=1, allow_nan=False) + "\n"


def render(run: Run, source: Path) -> str:
    """The page as text."""
    recipe = read_recipe(source, SECTIONS)
    charts: dict[str, Any] = {}
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    panels: list[dict[str, Any]] = [
        {
            "id": _slug(f"load-{p.workload.load:g}"),
            "tab": f"Load ×{p.workload.load:g}",
            "sections": [],
            "heading": f"Load ×{p.workload.load:g}: {sum(c.service.workload.rate for c in p.peak):.4g} requests/s",
        }
        for p in run.plans
    ]
    for entry in recipe.sections:
        known = SECTIONS[entry.section]
        if known.per == "run":
            where = after if any(panel["sections"] for panel in panels) else before
            place(where, entry, known.make(run, **entry.options), "run", charts)
            continue
        for panel, p in zip(panels, run.plans, strict=True):
            place(panel["sections"], entry, known.make(run, p, **entry.options), panel["id"], charts)
    subtitle = (
        f"Objective: {run.spec.objective}. Times are predictions from datasheets and calibrated parameters, not "
        f"measurements; see the end of the page. {run.note}"
    )
    models = ", ".join(dict.fromkeys(s.model for s in run.spec.services)) or run.spec.model
    return document(
        source, recipe, title=recipe.title.format(model=models), subtitle=subtitle, before=before, panels=panels,
        after=after, charts=charts,
    )  # fmt: skip


def document(
    source: Path,
    recipe: Recipe,
    *,
    title: str,
    subtitle: str,
    before: list[dict[str, Any]],
    panels: list[dict[str, Any]],
    after: list[dict[str, Any]],
    charts: dict[str, Any],
    data: str = "plan.json",
) -> str:
    """The self-contained page of placed sections, with the recipe's template and style and the script library."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(source.parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    try:
        template = environment.get_template(recipe.template)
        style = (source.parent / recipe.style).read_text(encoding="utf-8")
    except (OSError, jinja2.TemplateError) as error:
        raise SpecError(f"cannot read the template or the style: {error}", file=str(source)) from None
    return template.render(
        title=title, subtitle=subtitle, data=data, version=__version__,
        before=before, panels=panels, after=after, style=Markup(style), plotly=Markup(plotly.offline.get_plotlyjs()),
        charts=_json(charts), look=_json(TEMPLATE.to_plotly_json()),
    )  # fmt: skip


def read_recipe(source: Path, sections: Mapping[str, Section]) -> Recipe:
    """A recipe whose sections and options are all known. Raises SpecError with the line of the first that is not."""
    document = yaml.read(source)
    recipe = yaml.validate(document, Recipe)
    for i, entry in enumerate(recipe.sections):
        if entry.section not in sections:
            raise SpecError(
                f"unknown section {entry.section!r}{did_you_mean(entry.section, sections)}; known: {', '.join(sections)}",
                file=document.file, line=document.line(("sections", i, "section")),
            )  # fmt: skip
        known = sections[entry.section].options
        for name in entry.options:
            if name not in known:
                raise SpecError(
                    f"section {entry.section!r} has no option {name!r}{did_you_mean(name, known)}",
                    file=document.file, line=document.line(("sections", i, "options", name)),
                )  # fmt: skip
    return recipe


def place(place: list[dict[str, Any]], entry: Entry, blocks: list[Block], scope: str, charts: dict[str, Any]) -> None:
    """Add a section that has something to show, and take its figures out."""
    if not blocks:
        return
    name = f"{scope}-{_slug(entry.section)}"
    shown = [_block(b, name, charts) for b in blocks]
    place.append({"id": name, "title": entry.title, "lead": entry.lead, "blocks": shown})


def _block(block: Block, name: str, charts: dict[str, Any]) -> Any:
    if isinstance(block, Chart):
        key = f"{name}-{len(charts) + 1}"
        figure = block.figure.to_plotly_json()
        figure["layout"].pop("template", None)
        charts[key] = {"data": figure["data"], "layout": figure["layout"]}
        return {"kind": "chart", "id": key, "title": block.title, "caption": block.caption, "alt": block.alt,
                "height": figure["layout"]["height"]}  # fmt: skip
    if isinstance(block, Fold):
        return {"kind": "fold", "summary": block.summary, "blocks": [_block(b, name, charts) for b in block.blocks]}
    return block


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_plain(value, _DIGITS), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _plain(x: Any, digits: int | None = None) -> Any:
    """Plain JSON data; infinity and not-a-number have no JSON spelling and become null."""
    if isinstance(x, dict):
        return {str(k): _plain(v, digits) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v, digits) for v in x]
    if hasattr(x, "tolist"):
        return _plain(x.tolist(), digits)
    if isinstance(x, float):
        if not math.isfinite(x):
            return None
        return float(f"{x:.{digits}g}") if digits else x
    return x
