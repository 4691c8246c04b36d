"""The written file: complete, self-contained, well-formed, safe, and made from a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfmodel.errors import SpecError
from perfmodel.planner.run import PlanRun
from perfmodel.report import page


def test_the_page_stands_beside_its_data(run: PlanRun, written: Path) -> None:
    assert written.name == "report.html"
    stored = json.loads((written.parent / "plan.json").read_text())
    folder = stored["request"].pop("folder")
    assert (written.parent / folder).resolve() == Path(run.file).parent.resolve()
    asked = run.data["request"]
    assert stored == run.data | {"request": {"file": asked["file"], "content": asked["content"]}}
    # plotly.js alone is 4.8 MB.
    assert written.stat().st_size < 7e6


def test_infinity_becomes_null(run: PlanRun, tmp_path: Path) -> None:
    endless = replace(run.plans[0], data=run.plans[0].data | {"bound": float("inf")})
    page.write(replace(run, plans=[endless]), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["bound"] is None


def test_plotly_is_there_once(shown: Any) -> None:
    assert sum("plotly.js v" in script for script in shown.scripts) == 1
    assert sum(len(script) > 1e6 for script in shown.scripts) == 1


def test_nothing_is_fetched(shown: Any) -> None:
    for tag, attributes in shown.elements:
        assert "src" not in attributes, tag
        assert tag != "link" or attributes["href"].startswith("data:")
    policy = next(a["content"] for tag, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    style = shown.source[shown.source.index("<style>") : shown.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_ids_are_unique_and_links_lead_somewhere(shown: Any) -> None:
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in shown.elements:
        for name in ("aria-labelledby", "aria-controls"):
            assert name not in attributes or attributes[name] in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    boxes = [a for _, a in shown.elements if a.get("class") == "chart"]
    assert {a["id"] for a in boxes} == set(shown.charts)
    assert all(len(a["aria-label"]) > 40 for a in boxes)


@pytest.mark.parametrize(("name", "charts"), [("shown", 11), ("split_shown", 11)])
def test_every_load_has_every_section_and_chart(name: str, charts: int, request: pytest.FixtureRequest) -> None:
    shown = request.getfixturevalue(name)
    panels = [a["id"] for _, a in shown.elements if a.get("class") == "load-panel wrap"]
    assert panels == (["load-1", "load-4"] if name == "shown" else ["load-1"])
    ids = [a["id"] for tag, a in shown.elements if tag == "section"]
    wanted = ("headline", "plan", "roofline", "breakdown", "frontier", "memory", "replay", "workload", "why", "what_if", "uncertainty")
    for panel in panels:
        assert [x for x in ids if x.startswith(panel)] == [f"{panel}-{section.replace('_', '-')}" for section in wanted]
        assert sum(key.startswith(f"{panel}-") for key in shown.charts) == charts
    # A comparison of loads is only for several.
    assert ("run-loads" in ids) == (len(panels) > 1)
    assert ids[-1] == "run-provenance"


def test_every_chart_has_something_to_draw(shown: Any, split_shown: Any) -> None:
    for key, figure in {**shown.charts, **split_shown.charts}.items():
        assert figure["data"], key
        for trace in figure["data"]:
            assert len(trace["x"]) == len(trace["y"]) > 0, key
            assert all(v is not None for v in trace["x"] + trace["y"]), key


def test_the_plan_file_is_there_verbatim(shown: Any, folder: Path) -> None:
    assert " ".join((folder / "colocated.yaml").read_text().split()) in shown.text


def test_hostile_names_stay_text(run: PlanRun, tmp_path: Path, read: Any) -> None:
    """Names come from the user's files: none of them may become an element, an attribute or the end of a script."""
    first = run.plans[0]
    data = deepcopy(first.data)
    data["alternatives"][0]["name"] = '</script><script>alert(3)</script><a href="javascript:alert(4)">x</a>'
    data["nodes"][0]["price_source"] = "<svg onload=alert(5)>"
    cell = first.peak[0]
    service = copy(cell.service)  # `replace` would enumerate every layout anew
    service.workload = replace(service.workload, described="<!--<script>")
    hostile = replace(
        run,
        spec=run.spec.model_copy(update={"model": "</title><script>alert(6)</script>"}),
        file='x"><img src=y onerror=alert(1)>.yaml',
        listing="# </pre><script>alert(2)</script>\n",
        plans=[replace(first, data=data, peak=[replace(cell, service=service)])],
    )
    shown = read(page.write(hostile, tmp_path / "out"))
    plain = read(page.write(replace(run, plans=[first]), tmp_path / "plain"))
    tags = [tag for tag, _ in shown.elements]
    assert [t for t in tags if t in ("script", "img", "svg", "title")] == [
        tag for tag, _ in plain.elements if tag in ("script", "img", "svg", "title")
    ]
    assert not any(name.startswith("on") for _, attributes in shown.elements for name in attributes)
    assert not any("javascript" in a.get("href", "") for _, a in shown.elements)
    for number in range(1, 7):
        assert f"alert({number})" in shown.text, number
    # In a chart, whose labels understand tags, the name is escaped once more.
    assert any("&lt;a href=" in n.get("text", "") for n in shown.chart("load-1-why")["layout"]["annotations"])


def test_a_recipe_chooses_sections_and_options(run: PlanRun, tmp_path: Path, read: Any, root: Path) -> None:
    for name in ("page.html.j2", "page.css"):
        (tmp_path / name).write_text((root / "reports" / name).read_text())
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        'title: "Short: {model}"\ntemplate: page.html.j2\nstyle: page.css\nsections:\n'
        "  - {section: workload, title: Arrivals first, options: {bins: 7}}\n  - {section: headline, title: Then what}\n"
    )
    shown = read(page.write(run, tmp_path / "out", recipe))
    assert [a["id"] for tag, a in shown.elements if tag == "section"][:2] == ["load-1-workload", "load-1-headline"]
    assert len(shown.chart("load-1-workload")["data"][0]["x"]) == 7
    assert "Short: llama-3.1-8b" in shown.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("section: rofline, title: x", r"plan\.yaml:5: unknown section 'rofline' \(did you mean 'roofline'\?\)"),
        ("section: workload, title: x, options: {bin: 3}", r"plan\.yaml:5: section 'workload' has no option 'bin' \(did you mean 'bins'\?\)"),
        ("section: workload, titel: x", r"plan\.yaml:5: unknown key 'titel' \(did you mean 'title'\?\)"),
    ],
)
def test_a_wrong_recipe_names_its_line(run: PlanRun, tmp_path: Path, change: str, message: str) -> None:
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(f"title: x\ntemplate: page.html.j2\nstyle: page.css\nsections:\n  - {{{change}}}\n")
    with pytest.raises(SpecError, match=message):
        page.write(run, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_missing_template_is_one_clear_error(run: PlanRun, tmp_path: Path) -> None:
    recipe = tmp_path / "plan.yaml"
    recipe.write_text("title: x\ntemplate: gone.j2\nstyle: page.css\nsections: []\n")
    with pytest.raises(SpecError, match=r"cannot read the template or the style: .*gone\.j2"):
        page.write(run, tmp_path / "out", recipe)


def test_a_folder_that_cannot_be_made_is_one_clear_error(run: PlanRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot write the report"):
        page.write(run, tmp_path / "file" / "out")


def test_planning_alone_does_not_load_the_report() -> None:
    program = "import sys, perfmodel.planner.run; print([m for m in ('plotly', 'jinja2', 'perfmodel.report') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
