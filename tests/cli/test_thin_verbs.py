"""`perfmodel plan` and `perfmodel explain` hand their options over and print what comes back; stand-ins do the work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perfmodel.errors import Infeasible

RESULT = {"cost": 1.5, "unstable": float("inf")}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verbs passed on."""
    calls: dict[str, Any] = {}

    def plan(path: str, **options: Any) -> SimpleNamespace:
        calls["plan"] = (path, options)
        if options["objective"] == "power":
            raise Infeasible("no device draws so little", nearest="more power")
        return SimpleNamespace(data=RESULT, text=lambda: "the plan")

    def write(run: Any, folder: str) -> Path:
        calls["report"] = (run.text(), folder)
        return Path(folder) / "report.html"

    def explain(estimator: Any, *, batch: int, isl: int, osl: int, prefix: int) -> SimpleNamespace:
        calls["explain"] = (estimator.model.name, int(estimator.par.tp), batch, isl, osl, prefix)
        return SimpleNamespace(data=lambda: RESULT, text=lambda: "the explanation")

    monkeypatch.setitem(sys.modules, "perfmodel.planner.run", SimpleNamespace(plan=plan))
    monkeypatch.setitem(sys.modules, "perfmodel.explain", SimpleNamespace(explain=explain))
    page = SimpleNamespace(write=write)
    monkeypatch.setitem(sys.modules, "perfmodel.report.page", page)
    import perfmodel.report

    monkeypatch.setattr(perfmodel.report, "page", page, raising=False)
    return calls


def test_plan_prints_and_reports(cli: Callable[..., Any], seen: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("model: x\n", encoding="utf-8")
    outcome = cli("plan", file, "--out", tmp_path / "here", "--objective", "devices")
    assert (outcome.code, outcome.out) == (0, "the plan\n")
    assert seen["plan"][0] == str(file)
    assert seen["plan"][1]["objective"] == "devices"
    assert seen["report"] == ("the plan", str(tmp_path / "here"))
    assert outcome.err == f"report: {tmp_path / 'here' / 'report.html'}\n"


def test_plan_as_json_without_a_report(cli: Callable[..., Any], seen: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("model: x\n", encoding="utf-8")
    outcome = cli("plan", file, "--json", "--no-report")
    assert outcome.json == {"cost": 1.5, "unstable": None}  # infinity has no spelling in JSON
    assert outcome.err == ""
    assert "report" not in seen


def test_plan_without_an_answer(cli: Callable[..., Any], seen: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("model: x\n", encoding="utf-8")
    outcome = cli("plan", file, "--objective", "power")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == "error: no device draws so little\nNearest feasible change: more power\n"
    assert "report" not in seen
    assert cli("plan", file, "--objective", "fun").code == 2


def test_explain_takes_an_instance_and_a_request(cli: Callable[..., Any], seen: dict[str, Any]) -> None:
    base = ("explain", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--gpus", 2)
    outcome = cli(*base, "--batch", 3, "--isl", 100, "--osl", 10, "--prefix", 5, "--ttft", "1 s", "--price", "8 USD/h")
    assert (outcome.code, outcome.out) == (0, "the explanation\n")
    assert seen["explain"] == ("llama-3.1-8b", 2, 3, 100, 10, 5)
    assert cli(*base, "--json").json["cost"] == 1.5
    refused = cli(*base, "--isl", 10, "--prefix", 10)
    assert refused.code == 2
    assert "--prefix (10)" in refused.err
