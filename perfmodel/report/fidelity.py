"""The page of predictions against measurements. To add a section, write a function here and name it in the recipe."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from perfmodel import catalog
from perfmodel.report import page
from perfmodel.report.blocks import Block, Cell, Chart, Section, Table, section
from perfmodel.report.figures import COLOURS, MUTED
from perfmodel.report.text import percent
from perfmodel.validation.rows import Predicted
from perfmodel.validation.score import Score, Scored, by, score

SECTIONS: dict[str, Section] = {}
_GOOD, _FAIR = 0.12, 0.25  # median errors up to which a group is marked good, or left unmarked
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")


def write(rows: Sequence[Scored], out: str | Path, described: str) -> Path:
    """Write report.html and scores.json into the folder `out`; the page's path. described: what was scored, in words."""
    source = catalog.root("reports") / "fidelity.yaml"
    groups = by(rows, ["file", "hardware", "phase", "metric"])
    data = {"groups": [{**k, **s.as_dict()} for k, s in groups], "overall": score(rows).as_dict()}
    return page.save(Path(out), {"scores.json": page.json_text(data), "report.html": render(rows, source, described)})


def render(rows: Sequence[Scored], source: Path, described: str) -> str:
    """The page as text."""
    recipe = page.read_recipe(source, SECTIONS)
    charts: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []
    for entry in recipe.sections:
        page.place(shown, entry, SECTIONS[entry.section].make(rows, **entry.options), "all", charts)
    panel = {"id": "all", "tab": "", "heading": "", "sections": shown}
    return page.document(
        source, recipe, title=recipe.title, subtitle=described, before=[], panels=[panel], after=[], charts=charts,
        data="scores.json",
    )  # fmt: skip


def _figures(s: Score) -> tuple[str | Cell, ...]:
    mark: Literal["", "pass", "warn"] = "pass" if s.median_ape <= _GOOD else "" if s.median_ape <= _FAIR else "warn"
    return (
        f"{s.rows:,}", f"{s.predicted:,}", Cell(percent(s.median_ape, 1), mark), percent(s.mape, 1), percent(s.p90_ape, 1),
        _dash(s.bias, "+.1%"), _dash(s.spearman, ".3f"), _dash(s.coverage, ".0%"), _dash(s.width, ".2f"),
    )  # fmt: skip


_COLUMNS = ("rows", "predicted", "median", "mean", "p90", "bias", "rank corr.", "in band", "band width")


def _dash(x: float, form: str) -> str:
    return format(x, form) if math.isfinite(x) else "–"


@section("headline", "run", registry=SECTIONS)
def headline(rows: Sequence[Scored]) -> list[Block]:
    """One line for each kind and device, and one for all."""
    lines = [(k["kind"], k["hardware"], *_figures(s)) for k, s in by(rows, ["kind", "hardware"])]
    lines.append(("all", "", *_figures(score(rows))))
    return [Table("Errors by kind and device", ("kind", "hardware", *_COLUMNS), tuple(lines), tuple(range(2, 11)))]


@section("parity", "run", registry=SECTIONS)
def parity(rows: Sequence[Scored], *, points: int) -> list[Block]:
    """A scatter of predicted over measured for every kind, one colour a device. points: most per kind, evenly spaced."""
    kinds: dict[str, list[Scored]] = defaultdict(list)
    for s in rows:
        if isinstance(s.outcome, Predicted):
            kinds[f"{s.kind} [{s.row.text('unit')}]"].append(s)
    return [_scatter(name, mine[:: max(1, -(-len(mine) // points))], len(mine)) for name, mine in sorted(kinds.items())]


def _scatter(name: str, rows: Sequence[Scored], total: int) -> Chart:
    figure = go.Figure()
    devices = sorted({s.row.text("hardware") for s in rows})
    for i, device in enumerate(devices):
        mine = [s for s in rows if s.row.text("hardware") == device]
        figure.add_scatter(
            x=[s.measured for s in mine], y=[_value(s) for s in mine], mode="markers", name=device,
            marker={"size": 5, "opacity": 0.55, "color": COLOURS[i % len(COLOURS)], "symbol": _SYMBOLS[i // len(COLOURS) % 6]},
            text=[_hover(s) for s in mine], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    every = [x for s in rows for x in (s.measured, _value(s))]
    ends = [min(every) / 1.3, max(every) * 1.3]
    for factor, dash in ((1.0, "solid"), (1.5, "dash"), (1 / 1.5, "dash")):
        figure.add_scatter(
            x=ends, y=[e * factor for e in ends], mode="lines", line={"color": MUTED, "width": 1, "dash": dash},
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    figure.update_layout(height=460, template="none")
    figure.update_xaxes(type="log", title="measured")
    figure.update_yaxes(type="log", title="predicted")
    s = score(rows)
    shown = f"{len(rows):,} of {total:,} rows shown. " if total > len(rows) else ""
    said = f"{shown}Median error {s.median_ape:.1%}, bias {s.bias:+.1%}."
    return Chart(name, figure, said, f"Predicted over measured for {total:,} rows of {', '.join(devices)}. {said}")


def _value(s: Scored) -> float:
    assert isinstance(s.outcome, Predicted)
    return s.outcome.value


def _hover(s: Scored) -> str:
    hidden = ("value", "unit", "source_repo", "source_path", "source_commit", "provenance")
    cells = ", ".join(f"{k} {v}" for k, v in s.row.cells.items() if v and k not in hidden)
    return f"{s.row.file}:{s.row.line}<br>{cells}<br>measured {s.measured:.4g}, predicted {_value(s):.4g} {s.row.text('unit')}"


@section("spread", "run", registry=SECTIONS)
def spread(rows: Sequence[Scored]) -> list[Block]:
    """Cumulative share of rows over the error, one line a kind."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for s in rows:
        kinds[s.kind].append(abs(_value(s) / s.measured - 1) if isinstance(s.outcome, Predicted) else 1.0)
    figure = go.Figure()
    for i, (name, errors) in enumerate(sorted(kinds.items())):
        figure.add_scatter(
            x=np.quantile(errors, np.linspace(0, 1, 101)), y=np.linspace(0, 1, 101), mode="lines",
            name=f"{name} ({len(errors):,})",
            line={"color": COLOURS[i % len(COLOURS)], "width": 2, "dash": ("solid", "dash", "dot")[i // len(COLOURS) % 3]},
        )  # fmt: skip
    figure.update_layout(height=420, template="none")
    figure.update_xaxes(title="error", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="share of rows within it", tickformat=".0%", range=[0, 1])
    return [
        Chart("Share of rows within an error", figure, "Rows farther off than 100 % lie beyond the right edge.",
              f"Cumulative distribution of the error for {len(kinds)} kinds of rows.")
    ]  # fmt: skip


@section("worst", "run", registry=SECTIONS)
def worst(rows: Sequence[Scored], *, most: int) -> list[Block]:
    """Groups of at least five rows with the largest median error."""
    keys = ["kind", "hardware", "engine", "dtype", "model"]
    groups = [(k, s) for k, s in by(rows, keys) if s.predicted >= 5]
    groups.sort(key=lambda item: -item[1].median_ape)
    lines = [(*k.values(), *_figures(s)) for k, s in groups[:most]]
    return [Table("Groups with the largest median error", (*keys, *_COLUMNS), tuple(lines), tuple(range(5, 14)))]


@section("refused", "run", registry=SECTIONS)
def refused(rows: Sequence[Scored]) -> list[Block]:
    """Reasons of refusal with their counts; nothing when all rows were predicted."""
    reasons = Counter((s.kind, str(s.outcome)) for s in rows if not isinstance(s.outcome, Predicted))
    lines = tuple((kind, reason, f"{n:,}") for (kind, reason), n in reasons.most_common())
    return [Table("Reasons", ("kind", "reason", "rows"), lines, (2,))] if lines else []
