"""Two small runs and what their pages say, read back from the written files."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from perfmodel.planner.run import PlanRun, plan
from perfmodel.report import page

VOID = {"meta", "link", "br", "img", "input", "hr", "source", "area", "base", "col", "embed", "track", "wbr"}


class Page(HTMLParser):
    """A strict reader: every element closed in order. Collects attributes, tables, scripts and plain text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._caption = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag in VOID:
            return
        self.stack.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> closes another element"
        if tag == "caption":
            # The same table stands once for each load.
            while self._caption in self.tables:
                self._caption += "+"
            self.tables[self._caption] = []

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
            return
        if "caption" in self.stack:
            self._caption += data
        if self.stack and ("td" in self.stack or "th" in self.stack):
            self.tables[self._caption][-1][-1] += data.strip()
        if "style" not in self.stack:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> dict[str, Any]:
        """Figures by their place: section and load."""
        place = next(i for i, (_, a) in enumerate([e for e in self.elements if e[0] == "script"]) if a.get("id") == "charts")
        found: dict[str, Any] = json.loads(self.scripts[place])
        return found

    def chart(self, start: str, nth: int = 0) -> Any:
        return [v for k, v in self.charts.items() if k.startswith(start)][nth]


@pytest.fixture(scope="session")
def folder(root: Path) -> Path:
    return root / "tests" / "report"


@pytest.fixture(scope="session")
def run(folder: Path) -> PlanRun:
    return plan(folder / "colocated.yaml")


@pytest.fixture(scope="session")
def split(folder: Path) -> PlanRun:
    return plan(folder / "split.yaml")


@pytest.fixture(scope="session")
def written(run: PlanRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write(run, tmp_path_factory.mktemp("colocated"))


@pytest.fixture(scope="session")
def shown(written: Path) -> Page:
    return Page(written)


@pytest.fixture(scope="session")
def split_shown(split: PlanRun, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(page.write(split, tmp_path_factory.mktemp("split")))


@pytest.fixture
def read() -> type[Page]:
    return Page
