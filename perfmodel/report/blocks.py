"""What a section of a report is made of, and the registry of sections.

A section is one function, registered by the name a recipe calls it by. It returns blocks; the template draws them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Cell:
    """Text of a table cell, how it is marked and where it leads."""

    text: str
    mark: Literal["", "pass", "fail", "warn", "strong"] = ""
    link: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows under a heading. `numeric`: columns aligned to the right."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    numeric: tuple[int, ...] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]


@dataclass(frozen=True)
class Chart:
    """A Plotly figure with a title, what to read from it, and what it shows in words for those who cannot see it."""

    kind: ClassVar[str] = "chart"
    title: str
    figure: Any
    caption: str
    alt: str


@dataclass(frozen=True)
class Cards:
    """Headline numbers: (label, value, note)."""

    kind: ClassVar[str] = "cards"
    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Items:
    """A list of short sentences; `mark` colours it as a warning."""

    kind: ClassVar[str] = "items"
    title: str
    items: tuple[str, ...]
    mark: Literal["", "warn"] = ""


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks shown on demand."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: tuple[Block, ...]


Block = Table | Chart | Cards | Items | Code | Fold
Maker = Callable[..., list[Block]]


@dataclass(frozen=True)
class Section:
    """A registered section. `per`: made once for each load's plan, or once for the whole run."""

    make: Maker
    per: Literal["plan", "run"]
    options: tuple[str, ...] = field(default=())


SECTIONS: dict[str, Section] = {}


def section(
    name: str, per: Literal["plan", "run"] = "plan", *, registry: dict[str, Section] = SECTIONS
) -> Callable[[Maker], Maker]:
    """Register a section: a function of (run, plan) or of (run), with the recipe's options as keyword-only arguments.

    registry: the sections of one kind of report; by default those of a plan's.
    """

    def register(make: Maker) -> Maker:
        named = inspect.signature(make).parameters.values()
        registry[name] = Section(make, per, tuple(p.name for p in named if p.kind is p.KEYWORD_ONLY))
        return make

    return register
