"""The README's table of errors is what the code says today, and the errors are no worse than these."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from perfmodel.validation.compare import Score, bf16_gemm, read_rows, score, scores

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests" / "data" / "measured"


@pytest.fixture(scope="module")
def readme_rows() -> dict[str, list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("fidelity:begin")[1].split("fidelity:end")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.filterwarnings("ignore")
def test_readme_table_is_current(readme_rows: dict[str, list[str]]) -> None:
    fresh = runpy.run_path(str(ROOT / "docs" / "fidelity.py"))["rendered"]()
    printed = {m[1].strip(): m[2] for m in re.finditer(r"^\| ([^|]+) \|(.*)\|$", fresh, re.MULTILINE)}
    for name, cells in readme_rows.items():
        assert [c.strip() for c in printed[name].split("|")] == cells, name
    assert len(printed) - 2 == len(readme_rows)


def test_errors_stay_below_what_a_plain_roofline_makes(readme_rows: dict[str, list[str]]) -> None:
    # A plain roofline (no efficiency, no launch) misses these kernels by 40-80 % and decode steps by about half.
    for name, (rows, median, _, _) in readme_rows.items():
        assert int(rows) > 50
        assert float(median.rstrip("%")) < 40, name
    dense = [float(r[1].rstrip("%")) for n, r in readme_rows.items() if "serving: dense" in n]
    assert len(dense) == 2
    assert max(dense) < 12


def test_score_by_hand() -> None:
    # Ratios 1.1, 0.5, 2.0: errors 0.1, 0.5, 1.0.
    s = score("x", [11.0, 5.0, 20.0], [10.0, 10.0, 10.0])
    assert s == Score("x", 3, 0.5, pytest.approx((0.1 + 0.5 + 1.0) / 3), pytest.approx(0.1))


def test_a_wrong_measurement_shows() -> None:
    rows = list(read_rows(MEASURED / "gemm_bf16.csv.gz"))[:50]
    doubled = [{**r, "time_us": str(2 * float(r["time_us"]))} for r in rows]
    before, after = scores(iter(rows), bf16_gemm)[0], scores(iter(doubled), bf16_gemm)[0]
    assert after.bias == pytest.approx((1 + before.bias) / 2 - 1)


