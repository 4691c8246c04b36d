"""Tables of the docs are those that their scripts make today: a few cells of each are made again and compared as printed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from perfmodel.planner.run import plan
from perfmodel.serving.prefix import uses
from perfmodel.serving.queueing import Mix
from perfmodel.serving.trace import read_trace
from perfmodel.spec.workload import Trace
from perfmodel.units import parse

DOCS = Path(__file__).parents[1] / "docs"


def script(name: str) -> ModuleType:
    """One of the scripts in docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def block(page: str, name: str) -> list[str]:
    """Lines between a page's marks, or all of it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if name:
        found = re.search(rf"<!-- {name}:begin[^>]*-->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
        assert found, f"{page} has no block {name}"
        text = found[1]
    return text.splitlines()


def only(lines: list[str], *parts: str) -> str:
    """The line of a table that begins with these cells."""
    found = [x for x in lines if x.startswith("| " + " | ".join(parts) + " |")]
    assert len(found) == 1, (parts, found)
    return found[0]


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    return script("serving")


@pytest.mark.parametrize(
    ("trace", "instance", "cv", "load"),
    [("Azure conversation", "Llama-3.1-8B, H100", 1, 0.2), ("Azure code", "Llama-3.1-70B, 8 H100, prefill", 0.5, 0.5)],
)
def test_cells_of_the_grid_are_current(serving: ModuleType, trace: str, instance: str, cv: float, load: float) -> None:
    r = serving.lengths(trace)
    mix = Mix.of(r.input, r.output)
    one = serving.instance(instance, mix)
    cell = serving.compare(instance, one, trace, r, mix, cv, load, serving.highest_rate(one, mix))
    made = serving.table([cell], trace).splitlines()[-1]
    printed = only(block("serving.md", serving.TRACES[trace]), instance, cell.arrivals, f"{load:.0%}")
    assert made == printed, "docs/serving.md is out of date: run python docs/serving.py"


def test_the_summary_counts_the_cells_of_the_grid(serving: ModuleType) -> None:
    """Counted by hand from the printed rows: those not refused, and those whose errors are within the aims."""
    for trace, name in serving.TRACES.items():
        for arrivals in ("CV 0.5", "Poisson", "CV 2", "CV 4"):
            rows = [x for x in block("serving.md", name) if f"| {arrivals} |" in x]
            held = [x for x in rows if "refused" not in x]
            cells = only(block("serving.md", "summary"), arrivals, trace).split("|")[3:6]
            assert [int(x) for x in cells] == [len(held), len(rows) - len(held), sum("outside" not in x for x in held)]
            for row in held:
                errors = [abs(int(e)) for e in re.findall(r"([+-]\d+)%", row.split("%", 1)[1])]
                limits = [10, 20] * 2
                assert ("outside" in row) or all(e <= most for e, most in zip(errors, limits, strict=False)), row


def test_policies_and_hand_offs_are_current() -> None:
    modes, lines = script("modes"), block("modes.md", "")
    modes.MODELS = modes.MODELS[-1:]  # the dense model
    for row in itertools.chain(list(modes.policies())[2:], modes.handoffs()):
        assert row.strip() in lines, f"docs/modes.md is out of date: {row}"


def test_the_cache_curve_is_current() -> None:
    caching = script("caching")
    r = read_trace(Trace(file=str(caching.TRACE)), caching.ROOT)
    u, lines = uses(r), block("caching.md", "curve")
    for size in (500, 2000):
        # Llama-3.1-70B: 80 layers x 8 key-value heads x 128 x 2 (keys and values) x 2 B.
        tokens = size * 1e9 / (80 * 8 * 128 * 2 * 2)
        found = u.cached(tokens, len(r)).sum() / r.input.sum()
        assert only(lines, f"{size:,} GB", f"{tokens:,.0f}") == f"| {size:,} GB | {tokens:,.0f} | {found:.1%} |"


SECONDS = {"ms": 1e-3, "s": 1.0}


def seconds(text: str) -> float:
    value, unit = text.split()
    return float(value.replace(",", "")) * SECONDS[unit]


def test_plans_of_the_page_keep_their_promises() -> None:
    """Every plan printed in docs/planning.md meets its limits under replay, and those are the limits of the plan files."""
    planning, lines = script("planning"), block("planning.md", "")
    for trace, file in planning.TRACES.items():
        goals = yaml.safe_load((DOCS.parent / file).read_text(encoding="utf-8"))["workload"]["objectives"]
        rows = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith(f"| {trace} |")]
        plans = [row for row in rows if len(row) == 9]
        assert {row[2] for row in plans} == set(planning.OBJECTIVES.values())
        for row in plans:
            for cell, goal in ((row[6], goals["ttft"]["p95"]), (row[7], goals["tpot"]["p95"])):
                _, replayed, limit = (seconds(x) for x in cell.split(", "))
                assert limit == pytest.approx(parse(goal, "time"))
                assert replayed <= limit


def test_the_plan_of_fewest_devices_is_current(tmp_path: Path) -> None:
    """The row of the page, with only the node in the fleet that the page says wins."""
    planning, trace, kind = script("planning"), "Azure conversation", "fewest devices"
    spec = yaml.safe_load((DOCS.parent / planning.TRACES[trace]).read_text(encoding="utf-8"))
    spec["workload"]["trace"]["file"] = str(DOCS.parent / "examples" / spec["workload"]["trace"]["file"])
    printed = only(block("planning.md", ""), trace, "×1", kind)
    spec["fleet"] = [x for x in spec["fleet"] if f"× {x['node']} |" in printed]
    assert len(spec["fleet"]) == 1
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = plan(path, objective="devices", explain=False, load=1.0)
    made = planning.plans([planning.Row(trace, kind, run.plans[0])]).strip()
    assert made == printed, "docs/planning.md is out of date: run python docs/planning.py"
