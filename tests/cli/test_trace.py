"""`perfmodel trace show` and `trace fit`: what they print of known traces, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRACES = Path(__file__).parents[2] / "examples" / "traces"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A hundred requests, one a second, of 100 and 200 input tokens by turns."""
    rows = "".join(f"{1000 * k},{100 + 100 * (k % 2)},5,{'ab'[k % 2]}\n" for k in range(100))
    (tmp_path / "log.csv").write_text("ms,prompt_tokens,completion_tokens,kind\n" + rows)
    return tmp_path / "log.csv"


def test_show_says_what_burstiness_a_trace_has(cli: Callable[..., Any]) -> None:
    outcome = cli("trace", "show", TRACES / "azure-code-2023.csv.gz")
    assert outcome.code == 0
    for words in ("8,819 requests", "CV of gaps                 13.2", "fullest second / mean      26.1", "clock                      fine"):
        assert words in outcome.out
    assert "Shared prefixes" not in outcome.out


def test_show_json_of_a_trace_with_blocks(cli: Callable[..., Any]) -> None:
    data = cli("trace", "show", TRACES / "mooncake-conversation.csv.gz", "--json").json
    assert data["requests"] == 12_031
    assert data["clock_tick_s"] == pytest.approx(3.0, abs=0.001)
    # The trace's own column of infinite-cache hits sums to 105,710 blocks of 512 tokens: 37 % of all prompt tokens.
    assert data["sharing"]["reusable_share"] == pytest.approx(105_710 * 512 / (12_031 * 12_035), abs=0.005)
    caches = list(data["sharing"]["cache_tokens"].values())
    assert caches == sorted(caches)
    assert data["rate"]["peaks"]["60"]["rate"] > data["rate"]["peaks"]["300"]["rate"] > data["rate"]["mean"]


def test_show_with_columns_named(cli: Callable[..., Any], log: Path) -> None:
    data = cli("trace", "show", log, "--column", "arrival_ms=ms", "--json").json
    assert (data["requests"], data["span_s"]) == (100, 99)
    assert data["dispersion"]["cv"] == 0
    assert data["input"]["mean"] == 150
    only = cli("trace", "show", log, "--column", "arrival_ms=ms", "--where", "kind=b", "--json").json
    assert (only["requests"], only["input"]["min"]) == (50, 200)


def test_fit_writes_a_workload_that_show_reads(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "w.yaml"
    outcome = cli("trace", "fit", TRACES / "azure-conv-2023.csv.gz", "--out", out)
    assert outcome.code == 0
    assert "19,366 requests" in outcome.out
    assert "fullest second / mean" in outcome.out
    like, original = (cli("trace", "show", f, "--json").json for f in (out, TRACES / "azure-conv-2023.csv.gz"))
    assert like["rate"]["mean"] == pytest.approx(original["rate"]["mean"], rel=0.01)
    assert like["output"]["p95"] == pytest.approx(original["output"]["p95"], rel=0.02)
    both = cli("trace", "fit", TRACES / "azure-conv-2023.csv.gz", "--out", out, "--json").json
    assert both["log"] == original
    assert both["like"]["requests"] == 19_366


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "{log}"), "log.csv:1: no column for arrival"),
        (("show", "{log}", "--column", "arival_ms=ms"), "did you mean 'arrival_ms'"),
        (("show", "{log}", "--column", "ms"), "write ROLE=NAME"),
        (("show", "{log}", "--column", "arrival_ms=ms", "--where", "kind=c"), "kind is one of a, b"),
        (("show", "{log}", "--column", "arrival_ms=ms", "--column", "arrival_s=ms"), "either arrival_s or arrival_ms"),
        (("show", "nowhere.csv"), "nowhere.csv"),
        (("fit", "{log}", "--column", "arrival_ms=ms"), "--out"),
        (("fitt", "{log}"), "did you mean 'fit'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: tuple[str, ...], words: str, cli: Callable[..., Any], log: Path) -> None:
    outcome = cli("trace", *(a.format(log=log) for a in arguments))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
