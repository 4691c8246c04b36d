"""The tables of README and docs/fidelity.md are what the code says today, from parameters that did not see their rows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfmodel import calibration
from perfmodel.validation.folds import FOLDS, cross_validated, fold_of
from perfmodel.validation.kinds import KINDS, kind_of
from perfmodel.validation.rows import Predicted
from perfmodel.validation.run import load, predict_rows
from perfmodel.validation.score import score

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests" / "data" / "measured"


@pytest.fixture(scope="module")
def fidelity() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "fidelity.py"))


@pytest.fixture(scope="module")
def results(fidelity: dict[str, Any]) -> Any:
    return fidelity["Results"]()


@pytest.fixture(scope="module")
def folds() -> dict[str, dict[int, dict[str, float]]]:
    found: dict[str, dict[int, dict[str, float]]] = yaml.safe_load((ROOT / "tests" / "data" / "folds.yaml").read_text("utf-8"))
    return found


@pytest.mark.filterwarnings("ignore")
def test_tables_are_current(fidelity: dict[str, Any], results: Any) -> None:
    blocks = results.blocks()
    for path in (ROOT / "README.md", ROOT / "docs" / "fidelity.md"):
        text = path.read_text(encoding="utf-8")
        assert "fidelity:begin" in text or "folds:begin" in text
        # Numbers may differ in the last digit between machines: compare to half a point.
        assert close(text, fidelity["page"](text, blocks)), f"{path.name} is out of date: run python docs/fidelity.py"


def close(committed: str, fresh: str) -> bool:
    """The same text, percentages within 0.5 points and other numbers equal."""
    number = re.compile(r"[-+]?\d+\.\d+%")
    if number.sub("x", committed) != number.sub("x", fresh):
        return False
    pairs = zip(number.findall(committed), number.findall(fresh), strict=True)
    return all(abs(float(a[:-1]) - float(b[:-1])) <= max(0.5, 0.02 * abs(float(a[:-1]))) for a, b in pairs)


def test_close_sees_a_changed_number() -> None:
    assert close("a 12.3% b 4", "a 12.4% b 4")
    assert not close("a 12.3% b 4", "a 13.9% b 4")
    assert not close("a 12.3% b 4", "a 12.3% b 5")


@pytest.mark.filterwarnings("ignore")
def test_nearly_every_row_is_predicted(results: Any) -> None:
    for rows in (results.folds, results.unseen):
        s = score(rows)
        assert s.predicted >= 0.97 * s.rows
        assert not any("defect" in reason for reason in s.refused)


@pytest.mark.filterwarnings("ignore")
def test_errors_stay_below_what_others_make(results: Any, fidelity: dict[str, Any]) -> None:
    """A plain roofline misses kernels by 40-70 % and decode by half; tables of measured points miss decode by 16 and 28 %."""
    for name, rule, *_ in fidelity["LINES"]:
        mine = [s for s in results.folds if rule(s)]
        if len(mine) >= 100:
            assert score(mine).median_ape < 0.40, name
    tpot = score([s for s in results.folds if s.kind == "closed-loop serving" and s.row.text("metric") == "tpot"])
    assert tpot.median_ape < 0.16
    assert tpot.mape < 0.28


@pytest.mark.filterwarnings("ignore")
def test_bands_hold_what_they_promise(results: Any) -> None:
    """An interval from p10 to p90 should hold eight measurements of ten."""
    assert 0.70 <= score(results.folds).coverage <= 0.90


def test_folds_hold_out_whole_groups(folds: dict[str, dict[int, dict[str, float]]]) -> None:
    """Rows of one group share a fold, every fold of a kind has its own parameters, and all kinds that are fitted are there."""
    rows = load([MEASURED / "calibrate" / "aic_gemm.csv.gz"])
    gemm = next(k for k in KINDS if k.name == "gemm")
    seen: dict[Any, int] = {}
    for row in rows:
        assert seen.setdefault(gemm.held_out(row), fold_of(row, gemm)) == fold_of(row, gemm)
    assert set(seen.values()) == set(range(FOLDS))
    assert set(folds["gemm"]) == set(range(FOLDS))
    values = [folds["gemm"][f]["law.tile_overhead"] for f in range(FOLDS)]
    assert len(set(values)) == FOLDS
    fitted = {k.name for k in KINDS if k.parameters}
    assert fitted >= set(folds) >= fitted - {"storage", "power"}


@pytest.mark.filterwarnings("ignore")
def test_a_fold_is_predicted_by_its_own_parameters(folds: dict[str, dict[int, dict[str, float]]]) -> None:
    rows = [r for r in load([MEASURED / "calibrate" / "aic_gemm.csv.gz"]) if r.text("dtype") == "bf16"][::10]
    one = next(r for r in rows if fold_of(r, kind_of(r)) == 3)  # type: ignore[arg-type]
    with calibration.replaced(folds["gemm"][3]):
        (expected,) = predict_rows([one])
    found = next(s for s in cross_validated(rows, folds) if s.row is one)
    assert found.outcome == expected.outcome
    assert found.outcome != predict_rows([one])[0].outcome


@pytest.mark.filterwarnings("ignore")
def test_zero_shot_uses_no_constant_of_the_device() -> None:
    """Without H100's rows its efficiency is that of the others, so a change of its calibration file must not show."""
    rows = [r for r in load([MEASURED / "calibrate" / "aic_gemm.csv.gz"]) if "H100" in r.text("hardware")][:40]
    blind = predict_rows(rows, zero_shot=True)
    own = {k: p.parameter.value for k, p in calibration.own_parameters(calibration.catalog.load_device("h100-sxm")).items()}
    with calibration.replaced({f"device.h100-sxm.{k}": v * 1.5 for k, v in own.items()}):
        again = predict_rows(rows, zero_shot=True)
    seeing = predict_rows(rows)
    for a, b, c in zip(blind, again, seeing, strict=True):
        assert isinstance(a.outcome, Predicted)
        assert a.outcome.value == pytest.approx(b.outcome.value, rel=1e-12)  # type: ignore[union-attr]
        assert a.outcome.value != c.outcome.value  # type: ignore[union-attr]


def test_a_wrong_measurement_shows() -> None:
    rows = load([MEASURED / "calibrate" / "aic_gemm.csv.gz"])[:50]
    before = score(predict_rows(rows))
    doubled = [type(r)(r.file, r.line, {**r.cells, "value": str(2 * float(r.cells["value"]))}) for r in rows]
    after = score(predict_rows(doubled))
    assert after.bias == pytest.approx((1 + before.bias) / 2 - 1)
