"""Reading tidy files: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from perfmodel.errors import SpecError
from perfmodel.validation.rows import Refused, header, read, scored

_HEAD = "hardware,phase,metric,value,unit,m,flag\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_gzipped_and_commented_files_read_alike(tmp_path: Path) -> None:
    text = "# a comment\n" + _HEAD + 'h100-sxm,gemm,kernel_time,"1,5",us,4,\nh100-sxm,gemm,kernel_time,2.5,us,4,\n'
    plain = read(write(tmp_path / "a.csv", text))
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert [r.cells for r in read(packed)] == [r.cells for r in plain]
    assert [r.line for r in plain] == [3, 4]
    assert plain[1].measured == 2.5
    assert plain[1].unit == 1e-6
    assert plain[1].hardware == "h100-sxm"
    with pytest.raises(Refused, match="value is not a number"):
        _ = plain[0].measured


@pytest.mark.parametrize(
    ("cells", "attribute", "reason"),
    [
        ("h100-sxm,gemm,kernel_time,-1,us,4,", "measured", "value is not positive"),
        ("h100-sxm,gemm,kernel_time,nan,us,4,", "measured", "value is not finite"),
        ("h100-sxm,gemm,kernel_time,,us,4,", "measured", "value not stated"),
        ("h100-sxm,gemm,kernel_time,1,uss,4,", "unit", "unknown unit 'uss'"),
        ("h1000-sxm,gemm,kernel_time,1,us,4,", "hardware", "unknown hardware 'h1000-sxm'"),
    ],
)
def test_unusable_cells_are_refused_with_a_reason(tmp_path: Path, cells: str, attribute: str, reason: str) -> None:
    (row,) = read(write(tmp_path / "a.csv", _HEAD + cells + "\n"))
    with pytest.raises(Refused, match=reason):
        getattr(row, attribute)


def test_flagged_rows_are_left_out(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", _HEAD + "h,gemm,t,1,us,4,\nh,gemm,t,1,us,4,exceeds_bandwidth\n"))
    assert len(rows) == 2
    assert [r.line for r in scored(rows)] == [2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("hardwar,phase,metric,value,unit\n", "no column hardware.*did you mean 'hardwar'"),
        (_HEAD + "h,gemm,t,1,us\n", "a.csv:2: 5 cells under 7 columns"),
    ],
)
def test_a_file_that_is_no_table_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(write(tmp_path / "a.csv", text))


def test_a_binary_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(b"\x00\x01 not gzip")
    with pytest.raises(SpecError, match="cannot read measurements"):
        header(path)
