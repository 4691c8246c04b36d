"""Leaving a device out: what it inherits by hand, and that its own rows and calibration have no say."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfmodel import calibration
from perfmodel.errors import SpecError
from perfmodel.validation.leave_out import inherited, leave_one_out, without
from perfmodel.validation.rows import Predicted, Row
from perfmodel.validation.run import load
from perfmodel.validation.score import score

MEASURED = Path(__file__).parents[1] / "data" / "measured" / "calibrate"
OTHERS = {"a100-sxm-80gb", "b200-sxm"}


def test_a_device_without_kin_inherits_the_geometric_mean() -> None:
    values = {
        "architecture.ampere.attention_efficiency": 0.4, "architecture.blackwell.attention_efficiency": 0.9,
        "device.a100-sxm-80gb.kernel_latency": 1e-6, "device.b200-sxm.kernel_latency": 4e-6, "law.decode_chunk": 500.0,
    }  # fmt: skip
    found = inherited(values, "h100-sxm", OTHERS)
    assert found["device.h100-sxm.attention_efficiency"] == pytest.approx(0.6)  # sqrt(0.4 x 0.9)
    assert found["device.h100-sxm.kernel_latency"] == pytest.approx(2e-6)
    assert not any("decode_chunk" in name for name in found)
    # What its own calibration says and the fit did not move comes from the others too.
    own = {r.parameter.value for r in calibration.own_parameters(calibration.catalog.load_device("h100-sxm")).values()}
    assert own.isdisjoint(found.values())


def test_a_member_of_the_class_speaks_for_the_class() -> None:
    values = {"architecture.hopper.attention_efficiency": 0.7, "architecture.ampere.attention_efficiency": 0.3}
    assert inherited(values, "h200-sxm", {"h100-sxm", "a100-sxm-80gb"})["device.h200-sxm.attention_efficiency"] == 0.7


def test_one_device_alone_leaves_nothing_to_fit() -> None:
    rows = [r for r in load([MEASURED / "aic_mla.csv.gz"]) if "H100" in r.text("hardware")][:20]
    with pytest.raises(SpecError, match="leaving it out leaves nothing to fit"):
        without(rows, "h100-sxm")


@pytest.mark.filterwarnings("ignore")
def test_the_rows_of_a_device_do_not_move_its_prediction(tmp_path: Path) -> None:
    """All of H100's rows made three times as slow: the predictions for H100 stay, and the scores see it."""
    rows = load([MEASURED / "aic_mla.csv.gz"])[::25]
    slower = [r if "H100" not in r.text("hardware") else _times(r, 3.0) for r in rows]
    found = [leave_one_out([_write(tmp_path / name, these)]) for name, these in (("a.csv", rows), ("b.csv", slower))]
    h100 = [[s for s in scored if "H100" in s.row.text("hardware")] for scored in found]
    assert len(h100[0]) > 30
    for one, other in zip(*h100, strict=True):
        assert isinstance(one.outcome, Predicted)
        assert isinstance(other.outcome, Predicted)
        assert one.outcome.value == pytest.approx(other.outcome.value, rel=1e-9)
    assert score(h100[1]).bias == pytest.approx((1 + score(h100[0]).bias) / 3 - 1, rel=1e-6)


def _times(row: Row, factor: float) -> Row:
    return Row(row.file, row.line, {**row.cells, "value": repr(factor * float(row.cells["value"]))})


def _write(path: Path, rows: list[Row]) -> Path:
    names = list(rows[0].cells)
    lines = [",".join(names), *(",".join(r.cells[n] for n in names) for r in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
