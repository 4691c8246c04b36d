"""Traces as files: the forms public traces have, what is read from them, and every bad row named."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving import sharing, ticks
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.serving.trace import closed_loop, read_trace
from perfmodel.spec.workload import Columns, Trace

ROOT = Path(__file__).parents[2]
CARRIED = {name: f"examples/traces/{name}.csv.gz" for name in ("azure-conv-2023", "azure-code-2023", "mooncake-conversation")}


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(folder: Path, text: str, **trace: object) -> Requests:
    return read_trace(Trace(file="t.csv", **trace), write(folder, text))


@pytest.mark.parametrize(
    ("name", "count", "inputs", "outputs"),
    # Rows and means as published with the Azure 2023 release (Splitwise, table of traces) and counted in Mooncake's JSON lines.
    [("azure-conv-2023", 19_366, 1154.7, 211.1), ("azure-code-2023", 8_819, 2047.8, 27.9),
     ("mooncake-conversation", 12_031, 12035.1, 342.6)],
)  # fmt: skip
def test_the_carried_traces_are_the_public_ones(name: str, count: int, inputs: float, outputs: float) -> None:
    r = read_trace(Trace(file=CARRIED[name]), ROOT)
    assert len(r) == count
    assert r.input.mean() == pytest.approx(inputs, abs=0.1)
    assert r.output.mean() == pytest.approx(outputs, abs=0.1)
    assert r.arrival[0] == 0
    assert np.all(np.diff(r.arrival) >= 0)


def test_azure_as_published(tmp_path: Path) -> None:
    r = read(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n"
             "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.2224670,879,55\n")  # fmt: skip
    assert r.arrival == pytest.approx([0, 50.9951690 - 46.6805900, 51.2224670 - 46.6805900], abs=1e-6)
    assert r.input.tolist() == [374, 396, 879]
    assert r.output.tolist() == [44, 109, 55]
    # The 2024 release has a zone; another row's zone two hours east is two hours earlier.
    r = read(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,10,1\n2024-05-10T02:00:03Z,20,2\n"
             "2024-05-10 02:00:01+02:00,30,3\n")  # fmt: skip
    assert r.arrival == pytest.approx([0, 0.5, 7202.5])
    assert r.input.tolist() == [10, 30, 20]


def test_burstgpt_sessions_and_think_times(tmp_path: Path) -> None:
    text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = [(5, "a", 3, "ChatGPT", 472, 18), (6, "", 2, "GPT-4", 90, 10), (45, "a", 2.5, "ChatGPT", 1087, 230), (46, "a", 4, "GPT-4", 9, 9)]
    r = read(tmp_path, text + "".join(f"{a},{s},{e},{m},{i},{o},{i + o},API log\n" for a, s, e, m, i, o in rows))
    assert r.arrival.tolist() == [0, 1, 40, 41]
    assert r.session.tolist() == [0, -1, 0, 0]
    # 45 s - (5 s + 3 s); the next turn is logged 1 s after one that took 2.5 s: no time to think.
    assert r.think[2:].tolist() == [37, 0]
    assert np.all(np.isnan(r.think[:2]))
    assert r.labels["model"].tolist() == ["ChatGPT", "GPT-4", "ChatGPT", "GPT-4"]


def test_mooncake_json_lines(tmp_path: Path) -> None:
    rows = [(0, 1500, 20, [0, 1, 2]), (3000, 1600, 5, [0, 1, 2, 7]), (1000, 1, 1, [9])]
    text = "".join(json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": b}) + "\n" for t, i, o, b in rows)
    r = read(tmp_path, text)
    assert r.arrival.tolist() == [0, 1, 3]  # milliseconds
    assert [r.blocks.of(i).tolist() for i in range(3)] == [[0, 1, 2], [9], [0, 1, 2, 7]]
    # The same as ranges in a CSV.
    csv = "timestamp_ms,input_len,output_len,hash_id_ranges\n0,1500,20,0-2\n3000,1600,5,0-2;7\n1000,1,1,9\n"
    same = read(tmp_path, csv)
    assert np.array_equal(same.blocks.ids, r.blocks.ids)
    assert np.array_equal(same.arrival, r.arrival)


def test_bailian_chats_are_followed_to_their_root(tmp_path: Path) -> None:
    rows = [(159, -1, 61.1, 40), (160, 159, 62.5, 60), (161, -1, 63.0, 16), (162, 160, 70.0, 80)]
    text = "".join(json.dumps({"chat_id": c, "parent_chat_id": p, "timestamp": t, "input_length": n, "output_length": 3,
                                   "hash_ids": list(range(c * 10, c * 10 + -(-n // 16)))}) + "\n" for c, p, t, n in rows)  # fmt: skip
    r = read(tmp_path, text, block_tokens=16)
    assert r.arrival == pytest.approx([0, 1.4, 1.9, 8.9])  # seconds, although there are hash_ids
    assert r.session.tolist() == [0, 0, 1, 0]
    with pytest.raises(SpecError, match=r"t\.csv:1: 3 blocks for 40 input tokens.*block_tokens: 16"):
        read(tmp_path, text)


def test_hashes_beyond_63_bits_and_text_stay_apart(tmp_path: Path) -> None:
    big = 2**64 - 5
    text = "".join(json.dumps({"arrival": t, "input": 600, "output": 1, "blocks": b}) + "\n" for t, b in ((0, [big, "x"]), (1, [big, "y"])))
    r = read(tmp_path, text)
    a, b = r.blocks.of(0), r.blocks.of(1)
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_named_columns_where_and_labels(tmp_path: Path) -> None:
    text = "when,who,in,out,cap,kind\n3,x,10,1,100,a\n1,y,20,2,,a\n2,z,30,3,50,b\n"
    columns = Columns(arrival_ms="when", input="in", output="out", labels={"tenant": "who", "max_tokens": "cap"}, where={"kind": "a"})
    r = read(tmp_path, text, columns=columns)
    assert r.arrival.tolist() == [0, 0.002]
    assert r.labels["tenant"].tolist() == ["y", "x"]
    assert np.isnan(r.labels["max_tokens"][0])
    assert r.labels["max_tokens"][1] == 100
    with pytest.raises(SpecError, match=r"no requests where.*kind is one of a, b"):
        read(tmp_path, text, columns=columns.model_copy(update={"where": {"kind": "c"}}))


def test_a_quoted_cell_over_two_lines_does_not_shift_the_line_of_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"t\.csv:5: .*'input' holds 0, below 1 \(remove requests that failed\)"):
        read(tmp_path, '# a note\narrival,input,output,note\n0,5,5,"two\nlines"\n1,0,5,x\n')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrival_s,input,output\n0,5,5\n1,5\n", [":3:", "2 values"]),
        ("# note\narrival_s,input,output\n0,5,5\n1,x,5\n", [":4:", "'x'", "input"]),
        ("arrival_s,input,output\n0,5,5\n\n2,5,5\n", [":3:", "empty row"]),
        ("arrival_s,input,output\n0,5,5\n1,0,5\n", [":3:", "input"]),
        ("arrival_s,input,output\n0,5,5\n1,nan,5\n", [":3:", "input"]),
        ("arrival_s,input,output\n0,5,5\n1,inf,5\n", [":3:", "input", "not finite"]),
        ("arrival_s,input,output\n0,5,5\n1,5.5,5\n", [":3:", "5.5", "whole"]),
        ("arrival_s,input,output\n-3,5,5\n1,5,5\n", [":2:", "arrival_s"]),
        ("arival_s,input,output\n0,5,5\n", [":1:", "no column for arrival", "'arrival_s' would be found"]),
        ("arrival_s,input\n0,5\n", [":1:", "no column for output"]),
        ("arrival_s,input,input,output\n0,5,5,5\n", [":1:", "twice"]),
        ("arrival_s,input,isl,output\n0,5,5,5\n", [":1:", "'input' and 'isl'", "columns"]),
        ("timestamp,input,output\n0,5,5\n", [":1:", "unit", "arrival_ms: timestamp"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,5\n2023-11-16 18:75:46,5,5\n", [":3:", "not a date"]),
        ("arrival,input,output,blocks\n0,5,5,0\n1,5,5,a-b\n", [":3:", "0;14-15"]),
        ("arrival,input,output,blocks\n0,5,5,0\n1,5,5,9-3\n", [":3:", "9-3"]),
        ("arrival,input,output,blocks\n0,5,5,0\n1,5,5,3-9\n", [":3:", "7 blocks for 5 input tokens"]),
        ('{"arrival": 0, "input": 5, "output": 5}\n{"arrival": 1, "input": 5}\n', [":2:", "'output'", "no value"]),
        ('{"arrival": 0, "input": 5, "output": 5}\n{"arrival": 1,\n', [":2:", "not valid JSON"]),
        ('{"arrival": 0, "input": 5, "output": 5}\n[1, 2, 3]\n', [":2:", "one JSON object"]),
        ("", ["empty"]),
        ("# only a note\n", ["empty"]),
        ("arrival_s,input,output\n", ["no requests"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_traces_name_the_line(text: str, words: list[str], packed: bool, tmp_path: Path) -> None:
    name = "t.csv.gz" if packed else "t.csv"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(SpecError) as caught:
        read_trace(Trace(file=name), tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_missing_and_binary_traces(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the trace"):
        read_trace(Trace(file="none.csv"), tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not text"):
        read_trace(Trace(file="b.csv"), tmp_path)
    for data in (b"not gzip", gzip.compress(b"arrival,input,output\n0,5,5\n" * 99)[:-20]):
        (tmp_path / "b.csv.gz").write_bytes(data)
        with pytest.raises(SpecError, match="cannot read the trace"):
            read_trace(Trace(file="b.csv.gz"), tmp_path)


def test_thirty_thousand_rows_take_well_under_a_second(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = zip(np.cumsum(rng.exponential(1, 30_000)), rng.integers(1, 9000, 30_000), rng.integers(1, 900, 30_000), strict=True)
    folder = write(tmp_path, "arrival,input,output\n" + "".join(f"{a},{i},{o}\n" for a, i, o in rows))
    start = time.process_time()
    assert len(read_trace(Trace(file="t.csv"), folder)) == 30_000
    assert time.process_time() - start < 1


# Clocks


def test_mooncakes_three_second_clock_is_found_and_spread() -> None:
    logged = read_trace(Trace(file=CARRIED["mooncake-conversation"], spread_ticks=False), ROOT)
    spread = read_trace(Trace(file=CARRIED["mooncake-conversation"]), ROOT)
    assert logged.tick == spread.tick == pytest.approx(3.0, abs=0.001)
    assert np.unique(logged.arrival).size == 1180  # instants in the file
    assert np.unique(spread.arrival).size == 12_031
    moved = spread.arrival - logged.arrival
    assert moved.min() == 0
    assert moved.max() < 3.003
    # The first tick holds ten requests: 0.3 s apart.
    assert np.diff(spread.arrival[:11]) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("name", ["azure-conv-2023", "azure-code-2023"])
def test_a_fine_clock_is_left_alone(name: str) -> None:
    both = [read_trace(Trace(file=CARRIED[name], spread_ticks=s), ROOT) for s in (True, False)]
    assert both[0].tick == 0
    assert np.array_equal(both[0].arrival, both[1].arrival)


@given(tick=st.sampled_from([0.5, 1.0, 60.0]), per_tick=st.floats(0.3, 8), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_grid_is_found_whether_full_or_sparse(tick: float, per_tick: float, seed: int) -> None:
    exact = np.cumsum(np.random.default_rng(seed).exponential(tick / per_tick, 600))
    logged = np.floor(exact / tick) * tick
    assert ticks.tick_of(logged) == pytest.approx(tick, rel=1e-6)
    assert ticks.tick_of(exact) == 0
    r = Requests(logged, np.ones(600), np.ones(600))
    spread = ticks.on_clock(r, tick, spread=True)
    assert np.all(np.diff(spread.arrival) > 0)
    assert np.array_equal(np.floor(spread.arrival / tick + 1e-9), np.round(logged / tick))  # nobody leaves its tick


# Conversations


def chained(prompts: list[tuple[float, int, int, list[int]]]) -> Requests:
    """Requests of 10-token blocks from (arrival, input, output, block ids)."""
    ids = np.array([x for *_, b in prompts for x in b])
    start = np.concatenate([[0], np.cumsum([len(b) for *_, b in prompts])])
    a, i, o = (np.array([p[k] for p in prompts], float) for k in range(3))
    return Requests(a, i, o, Blocks(ids, start, 10))


def test_conversations_are_told_from_block_ids() -> None:
    r = chained([
        (0, 25, 8, [1, 2, 3]),  # two full blocks, the third is partial: its hash changes when the prompt grows
        (1, 25, 8, [11, 12, 13]),
        (2, 36, 5, [1, 2, 4, 5]),  # 25 + 8 < 36: prompt and answer of the first, and three tokens more
        (3, 27, 5, [1, 2, 6]),  # too short to hold the first one's answer: another question on the same text
        (4, 50, 5, [1, 2, 4, 7, 8]),  # continues the third
        (5, 9, 5, [20]),
    ])  # fmt: skip
    assert sharing.conversations(r).tolist() == [0, 1, 0, 2, 0, 3]
    r = Requests(r.arrival, r.input, r.output, r.blocks, sharing.conversations(r))
    assert sharing.previous_turn(r).tolist() == [-1, -1, 0, -1, 2, -1]
    # Answers of 0.5 s each: think times are the gaps less that.
    assert closed_loop(r, np.full(6, 0.5)).think[[2, 4]].tolist() == [1.5, 1.5]


def test_a_system_prompt_joins_no_conversations() -> None:
    # Block 0 is followed by a different full block each time, and the one-block prompts end with it.
    users = [(float(k), 24, 3, [0, 100 + k, 200 + k]) for k in range(6)]
    short = [(10.0 + k, 15 + k, 2, [0, 300 + k]) for k in range(4)]
    r = chained(users + short)
    assert np.unique(sharing.conversations(r)).size == 10


def test_mooncakes_further_turns_add_a_users_line() -> None:
    """Not fitted to: if the rule guessed, the tokens beyond prompt and answer would not gather at a few dozen."""
    r = read_trace(Trace(file=CARRIED["mooncake-conversation"]), ROOT)
    before = sharing.previous_turn(r)
    later = before >= 0
    added = (r.input - r.input[before] - r.output[before])[later]
    assert 0.25 < later.mean() < 0.35
    assert added.min() >= 0
    assert 10 < np.median(added) < 80
    assert np.mean(added < 600) > 0.7
    assert np.all(np.isnan(r.think))


def test_an_even_pace_is_no_coarse_clock() -> None:
    assert ticks.tick_of(np.arange(500.0)) == 0
    assert ticks.tick_of(np.repeat(np.arange(500.0), 2)) == pytest.approx(1)


def test_a_line_separator_inside_a_cell_ends_no_row(tmp_path: Path) -> None:
    assert len(read(tmp_path, "arrival,input,output,note\r\n0,5,5,one\u2028two\r\n1,5,5,x\r\n\r\n")) == 2
