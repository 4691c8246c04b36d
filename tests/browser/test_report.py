"""The report in a real browser: everything is drawn, nothing complains, nothing is fetched, nothing runs over the edge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfmodel.planner.run import PlanRun, plan
from perfmodel.report import page

CHARTS = {"roofline": 1, "breakdown": 2, "frontier": 2, "memory": 1, "replay": 2, "workload": 2, "why": 1}
# What a trace looks like once it is drawn.
DRAWN = ".point path, path.point, .js-line"
Open = Callable[..., None]


@pytest.fixture(scope="module")
def run(root: Path) -> PlanRun:
    return plan(root / "tests" / "report" / "colocated.yaml")


@pytest.fixture(scope="module")
def written(run: PlanRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write(run, tmp_path_factory.mktemp("browser"))


@pytest.fixture
def visit(browser: Any) -> Open:
    """Open a page as a screen of some width in a colour scheme, and wait until its charts are drawn."""

    def visit(path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(path.as_uri())
        drawn(browser)

    return visit


def drawn(browser: Any) -> None:
    """Wait for every visible chart."""
    waiting = "return [...document.querySelectorAll('.chart')].filter(b => b.offsetParent !== null && !b.dataset.drawn).length"
    end = time.monotonic() + 60
    while browser.execute_script(waiting):
        assert time.monotonic() < end, "charts are not drawn"
        time.sleep(0.05)


def choose(browser: Any, tab: int) -> None:
    """Click a load."""
    browser.execute_script("scrollTo(0, 0)")
    browser.find_elements("css selector", "[role=tab]")[tab].click()
    drawn(browser)


def test_every_plot_is_drawn_in_silence(browser: Any, visit: Open, written: Path) -> None:
    visit(written)
    for tab, panel in enumerate(("load-1", "load-4")):
        choose(browser, tab)
        boxes = browser.execute_script(
            """return [...document.querySelectorAll('.chart')].filter(b => b.offsetParent !== null).map(b => ({
                 id: b.id, traces: b.data.length, marks: b.querySelectorAll(arguments[0]).length,
                 width: b.querySelector('svg.main-svg').getBoundingClientRect().width,
                 plot: b.querySelector('.bglayer .bg, .cartesianlayer').getBoundingClientRect().height, height: b.clientHeight}))""",
            DRAWN,
        )
        count = {name: sum(b["id"].startswith(f"{panel}-{name}-") for b in boxes) for name in CHARTS}
        assert count == CHARTS
        assert len(boxes) == sum(CHARTS.values())
        for box in boxes:
            assert box["traces"] > 0, box
            assert box["marks"] >= box["traces"], box
            assert 800 < box["width"] <= 1120, box
            assert box["plot"] > 40, box
    assert browser.get_log("browser") == []


def test_the_roofline_shows_every_matrix_operator(browser: Any, visit: Open, written: Path, run: PlanRun) -> None:
    visit(written)
    shown = browser.execute_script(
        "return document.querySelectorAll(\".chart[id^='load-1-roofline'] .scatterlayer path.point\").length"
    )
    # Llama on one device: qkv, attention, o, gate_up, down and the head, for one prefill and one decode step.
    assert run.plans[0].data["pools"][0]["tp"] == 1
    assert shown == 6 * 2


def test_nothing_is_asked_of_the_network(browser: Any, visit: Open, written: Path) -> None:
    visit(written)
    choose(browser, 1)
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls, "the log says nothing"
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {written.as_uri()}
    assert not [m for m in asked if m["method"] == "Network.loadingFailed"]


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_runs_over_the_edge(browser: Any, visit: Open, written: Path, width: int) -> None:
    visit(written, width=width)
    for tab in (0, 1):
        choose(browser, tab)
        page_width, wide = browser.execute_script(
            """const loose = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .chart, pre, nav, .skip'));
               return [document.documentElement.scrollWidth,
                       loose.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))]"""
        )
        assert page_width <= width
        assert wide == []
        plots = browser.execute_script(
            "return [...document.querySelectorAll('svg.main-svg')].map(e => e.getBoundingClientRect()).map(r => r.right)"
        )
        assert max(plots) <= width


@pytest.mark.parametrize("width", [1280, 390])
def test_legends_stay_clear_of_the_axes(browser: Any, visit: Open, written: Path, width: int) -> None:
    visit(written, width=width)
    clashes = browser.execute_script(
        """const box = e => e && e.getBoundingClientRect();
           return [...document.querySelectorAll('.chart')].filter(b => b.offsetParent !== null).filter(b => {
             const legend = box(b.querySelector('.legend')), inside = box(b);
             const title = box(b.querySelector('.xtitle')), ticks = box(b.querySelector('.xaxislayer-above'));
             const over = (x, y) => x && y && x.width && y.width && x.top < y.bottom - 1 && y.top < x.bottom - 1;
             return over(legend, title) || over(legend, ticks) || (legend && legend.bottom > inside.bottom + 2);
           }).map(b => b.id)"""
    )
    assert clashes == []


def test_tabs_swap_loads_and_links(browser: Any, visit: Open, written: Path) -> None:
    visit(written)
    state = """return [...document.querySelectorAll('.load-panel')].map(p => [p.id, p.hidden])
               .concat([[document.querySelector('.toc a').getAttribute('href'), false]])"""
    assert browser.execute_script(state) == [["load-1", False], ["load-4", True], ["#load-1-headline", False]]
    choose(browser, 1)
    assert browser.execute_script(state) == [["load-1", True], ["load-4", False], ["#load-4-headline", False]]
    # A link into the hidden load opens it.
    browser.execute_script("location.hash = '#load-1-memory'")
    drawn(browser)
    end = time.monotonic() + 10
    while browser.execute_script(state)[0][1]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_dark_scheme_recolours_page_and_plots(browser: Any, visit: Open, written: Path) -> None:
    look = """const css = getComputedStyle(document.body), line = document.querySelector("[id^='load-1-replay'] .js-line");
              return [css.backgroundColor, css.color, getComputedStyle(line).stroke]"""
    seen = []
    for scheme in ("light", "dark"):
        visit(written, scheme=scheme)
        seen.append(browser.execute_script(look))
    (page_light, ink_light, line_light), (page_dark, ink_dark, line_dark) = seen
    assert page_light == "rgb(255, 255, 255)"
    # The thick line is drawn in the ink of its scheme.
    assert (line_light, line_dark) == (ink_light, ink_dark)
    assert len({page_light, page_dark, ink_light, ink_dark}) == 4


def test_paper_holds_every_load_in_light_colours(browser: Any, visit: Open, written: Path) -> None:
    visit(written, scheme="dark")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    drawn(browser)
    hidden, widths, ink = browser.execute_script(
        """return [document.querySelectorAll('.load-panel[hidden]').length,
             [...document.querySelectorAll('.chart svg.main-svg')].map(s => s.getBoundingClientRect().width),
             getComputedStyle(document.querySelector("[id^='load-4-replay'] .js-line")).stroke]"""
    )
    assert hidden == 0
    assert set(widths) == {680}
    assert ink == "rgb(27, 31, 36)"
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    drawn(browser)
    assert browser.execute_script("return document.querySelectorAll('.load-panel[hidden]').length") == 1
    assert browser.get_log("browser") == []


def test_turning_the_screen_redraws(browser: Any, visit: Open, written: Path) -> None:
    visit(written, width=390)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 844, "height": 390, "deviceScaleFactor": 1, "mobile": True}
    )
    end = time.monotonic() + 10
    while browser.execute_script("return document.querySelector('.chart svg.main-svg').getBoundingClientRect().width") < 600:
        assert time.monotonic() < end, "the charts kept their width"
        time.sleep(0.05)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_hostile_names_do_nothing(browser: Any, visit: Open, run: PlanRun, tmp_path: Path) -> None:
    first = run.plans[0]
    data = deepcopy(first.data)
    attack = "<img src=x onerror=\"window.struck=1\"></script><script>window.struck=1</script><a href='javascript:struck=1'>x</a>"
    for alternative in data["alternatives"]:
        alternative["name"] = attack
    cell = first.peak[0]
    # `replace` would enumerate every layout anew.
    service = copy(cell.service)
    service.workload = replace(service.workload, described=attack)
    hostile = replace(
        run,
        spec=run.spec.model_copy(update={"model": attack}),
        plans=[replace(first, data=data, peak=[replace(cell, service=service)])],
    )
    visit(page.write(hostile, tmp_path))
    assert browser.execute_script("return window.struck === undefined")
    assert browser.execute_script("return document.querySelectorAll('img, [href^=javascript]').length") == 0
    labels = browser.execute_script("return [...document.querySelectorAll(\"[id^='load-1-why'] .annotation\")].map(e => e.textContent)")
    assert any("<img src=x" in label for label in labels), "the name should be read as it is written"
    assert browser.get_log("browser") == []
