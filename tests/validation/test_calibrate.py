"""A calibration finds parameters that were planted, helps on rows it never saw, and refuses rows that cannot carry it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from perfmodel import calibration
from perfmodel.errors import SpecError
from perfmodel.machine import machine
from perfmodel.validation.calibrate import calibrate, write
from perfmodel.validation.fit import log_errors
from perfmodel.validation.kinds import predict
from perfmodel.validation.rows import Predicted, Row, read, scored

MEASURED = Path(__file__).parents[1] / "data" / "measured" / "calibrate"
TODAY = date(2026, 1, 2)


@pytest.fixture(autouse=True)
def _forget_files() -> Iterator[None]:
    """Calibration files are meant to last for a process; here they must not outlive the test."""
    yield
    calibration.forget_files()


def gemm_rows(hardware: str, values: dict[str, float]) -> list[Row]:
    """Products of many shapes, 'measured' on a device with these parameters."""
    cells = {"hardware": hardware, "phase": "gemm", "metric": "kernel_time", "unit": "us", "dtype": "bf16", "engine": "vllm"}
    shapes = itertools.product((1, 16, 256, 2048, 8192), (4096, 14336), (4096, 8192))
    rows = [Row("x.csv", i, {**cells, "m": str(m), "n": str(n), "k": str(k), "value": "1"}) for i, (m, n, k) in enumerate(shapes)]
    with calibration.replaced(values):
        outcomes = predict(rows)
    found = []
    for row, outcome in zip(rows, outcomes, strict=True):
        assert isinstance(outcome, Predicted)
        found.append(replace(row, cells={**row.cells, "value": repr(outcome.value)}))
    return found


def test_planted_parameters_are_found(tmp_path: Path) -> None:
    planted = {"device.l40s.matrix_efficiency": 0.45}
    rows = gemm_rows("l40s", planted)
    report = calibrate(rows, "l40s")
    prior, value, sigma = report.kept["matrix_efficiency"]
    assert prior == machine("l40s").matrix_efficiency
    assert value == pytest.approx(0.45, rel=0.03)
    assert 0 < sigma < 0.1
    assert report.held_back is not None
    assert report.held_back[0] == len(rows) // 5
    assert report.held_back[2] < 0.03 < report.held_back[1]
    write(report, tmp_path / "l40s.yaml", today=TODAY)
    assert calibration.use_file(tmp_path / "l40s.yaml") == "l40s"
    m = machine("l40s")
    assert m.matrix_efficiency == pytest.approx(0.45, rel=0.03)
    assert m.evidence["matrix_efficiency"] == f"calibrated: vllm, 2026-01-02, {report.fitted.rows} rows"


def test_a_calibration_narrows_the_band(tmp_path: Path) -> None:
    rows = gemm_rows("l40s", {"device.l40s.matrix_efficiency": 0.45})
    wide = predict(rows)
    write(calibrate(rows, "l40s"), tmp_path / "l40s.yaml", today=TODAY)
    calibration.use_file(tmp_path / "l40s.yaml")
    narrow = predict(rows)
    largest = np.argmax([float(r.cells["value"]) for r in rows])
    before, after = wide[largest], narrow[largest]
    assert isinstance(before, Predicted)
    assert isinstance(after, Predicted)
    assert after.high / after.low < before.high / before.low


def test_real_rows_are_predicted_better_where_no_fit_saw_them() -> None:
    rows = [r for r in scored(read(MEASURED / "aic_gemm.csv.gz")) if "B200" in r.text("hardware") and r.text("dtype") == "bf16"]
    report = calibrate(rows[::2], "b200-sxm")
    assert report.held_back is not None
    n, before, after = report.held_back
    assert n >= 30
    assert after <= before * 1.02


def test_too_few_rows_say_what_was_ignored() -> None:
    rows = gemm_rows("l40s", {})[:2] + gemm_rows("h100-sxm", {})[:5]
    with pytest.raises(SpecError, match=r"2 usable rows of l40s.*at least 3.*ignored: 5 rows of other hardware.*--measure"):
        calibrate(rows, "l40s")


def test_repeats_that_disagree_are_refused() -> None:
    rows = gemm_rows("l40s", {})
    louder = [replace(r, cells={**r.cells, "value": str(2 * float(r.cells["value"]))}) for r in rows]
    with pytest.raises(SpecError, match="too noisy to fit: repeats of one configuration differ by 49%"):
        calibrate([*rows, *louder], "l40s")  # ln 2 / sqrt 2 = 0.49


def test_rows_that_follow_no_law_are_refused() -> None:
    rows = gemm_rows("l40s", {})
    wild = [replace(r, cells={**r.cells, "value": str(float(r.cells["value"]) * (8.0 if i % 2 else 0.125))}) for i, r in enumerate(rows)]
    with pytest.raises(SpecError, match="scatter by x"):
        calibrate(wild, "l40s")


def test_a_file_for_an_unknown_device_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("kind: device\ndevice: l400s\nstack: vllm\ndate: '2026-01-01'\nrows: 5\nparameters: {}\n", encoding="utf-8")
    with pytest.raises(SpecError, match="did you mean 'l40s'"):
        calibration.use_file(path)


@pytest.mark.filterwarnings("ignore")
def test_three_points_of_a_stack_predict_its_other_rows() -> None:
    """A fast, a middling and a slow step of one deployment; the median error of all others falls below 6 %."""
    rows = [r for r in scored(read(MEASURED / "aic_silicon_e2e_agg.csv.gz")) if r.text("metric") == "tpot"]
    columns = ("hardware", "model", "dtype", "engine", "engine_version", "tp", "ep", "dp")
    stacks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        stacks.setdefault(tuple(row.text(c) for c in columns), []).append(row)
    before, after = [], []
    for stack in [s for s in stacks.values() if len(s) >= 9][::6]:
        by_time = sorted(stack, key=lambda r: r.measured)
        chosen = [by_time[1], by_time[len(by_time) // 2], by_time[-2]]
        rest = [r for r in by_time if r not in chosen]
        report = calibrate(chosen, chosen[0].hardware)
        before += list(np.abs(np.expm1(log_errors(rest))))
        with calibration.replaced({f"device.{report.device}.{k}": x[1] for k, x in report.kept.items()}):
            after += list(np.abs(np.expm1(log_errors(rest))))
    assert len(after) > 100
    assert np.median(after) < 0.06
    assert np.median(after) < np.median(before)
