"""Files that hold traces in other shapes, and what cannot be a trace: read right, or refused with the line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.serving.trace import read_trace
from perfmodel.serving.trace_summary import summary
from perfmodel.spec.workload import Columns, Trace

ROWS = [(0.0, 100, 20), (0.5, 300, 40), (2.0, 50, 7)]


def read(folder: Path, text: str, name: str = "t.csv", **columns: str):
    (folder / name).write_text(text, encoding="utf-8")
    return read_trace(Trace(file=name, columns=Columns(**columns)), folder)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    text = "\n".join(delimiter.join(map(str, row)) for row in [("arrival_s", "input", "output"), *ROWS])
    found = read(tmp_path, text)
    assert list(zip(found.arrival.tolist(), found.input.tolist(), found.output.tolist(), strict=True)) == ROWS


def test_a_row_may_hold_a_whole_prompt(tmp_path: Path) -> None:
    """200,000 characters: beyond the 131,072 that the csv module takes by default."""
    text = f'arrival_s,input,output,prompt\n0,5,6,"{"word " * 40_000}"\n1,7,8,hello\n'
    assert read(tmp_path, text).input.tolist() == [5, 7]


def test_time_zones_and_dates(tmp_path: Path) -> None:
    """18:00 UTC and 20:00 at +02:00 are the same instant; the third is 90 s later."""
    rows = "2023-11-16 18:00:00Z,1,1\n2023-11-16T20:00:00+02:00,2,1\n2023-11-16 13:01:30-0500,3,1\n"
    assert read(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows).arrival.tolist() == [0, 0, 90]


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        ("arrival_s,input,output\n0,5,5\n1e300,5,5\n", "t.csv", "too late for seconds"),
        ("arrival_s,input,output\n0,5,5\n31708800,5,5\n", "t.csv", "367 days"),
        ("arrival_s,input,output\n1700000000000,5,5\n1700000001000,5,5\n", "t.csv", "{arrival_ms: arrival_s}"),
        ('{"arrival_s":0,"input":true,"output":5}\n', "t.jsonl", "t.jsonl:1: column 'input' holds true, not a number"),
        ('{"arrival_s":0,"input":4,"output":5}\n{"arrival_s":1,"input":4,"output":[5]}\n', "t.jsonl", "t.jsonl:2: column 'output'"),
        ('{"arrival_s":0,"input":' + "9" * 5000 + ',"output":5}\n', "t.jsonl", "t.jsonl:1: not valid JSON"),
        ('{"arrival_s":0,"input":' + "9" * 400 + ',"output":5}\n', "t.jsonl", "t.jsonl:1: column 'input'"),
        ('{"a":' + "[" * 100_000 + "\n", "t.jsonl", "t.jsonl:1: not valid JSON"),
        ('[{"arrival_s":0,"input":5,"output":5}]\n', "t.json", "write one object a line"),
        (",".join(f"column{n}" for n in range(5000)) + "\n", "t.csv", "column19, …"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,1,1\n,1,1\n", "t.csv", "t.csv:3: column 'TIMESTAMP'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00+ab:cd,1,1\n", "t.csv", "t.csv:2: column 'TIMESTAMP'"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(tmp_path: Path, text: str, name: str, wanted: str) -> None:
    with pytest.raises(SpecError) as error:
        read(tmp_path, text, name)
    assert wanted in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_year_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, "arrival_s,input,output\n0,5,5\n31536000,5,5\n").arrival[-1] == 31_536_000


@pytest.mark.parametrize("arrivals", [[0.0], [0.0, 0.0, 0.0], [0.0, 1.0]])
def test_too_few_gaps_have_no_spread(tmp_path: Path, arrivals: list[float]) -> None:
    found = read(tmp_path, "arrival_s,input,output\n" + "".join(f"{t},5,5\n" for t in arrivals))
    data = summary(found)
    assert data["dispersion"]["cv"] is None
    json.dumps(data, allow_nan=False)


def test_even_gaps_have_none_at_all(tmp_path: Path) -> None:
    found = read(tmp_path, "arrival_s,input,output\n" + "".join(f"{t},5,5\n" for t in np.arange(20) * 0.7))
    assert summary(found)["dispersion"]["cv"] == pytest.approx(0, abs=1e-6)
