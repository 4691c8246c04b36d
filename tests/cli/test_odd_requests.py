"""Options that contradict each other, do nothing, or ask for the impossible: one line that says so, and what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ONE = ("--model", "llama-3.1-8b", "--hw", "h100-sxm")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "".join(f"{n * 0.5},100,20\n" for n in range(20))
    (tmp_path / "t.csv").write_text(f"arrival_s,input,output\n{rows}")
    (tmp_path / "once.csv").write_text("arrival_s,input,output\n" + "3,100,20\n" * 8)
    (tmp_path / "w.yaml").write_text("a: 1\n")
    (tmp_path / "cut.json").write_text('{"deployment": {"model": "lla')
    (tmp_path / "plan.yaml").write_text((EXAMPLES / "small-fleet.yaml").read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("replay", "t.csv", *ONE, "--seed", -1), "--seed: -1 is not in the range"),
        (("replay", "t.csv", *ONE, "--window", "1 ns"), "too short for 10 s"),
        (("replay", "t.csv", *ONE, "--replicas", 10**9), "1,000,000,000 instances"),
        (("replay", "t.csv", *ONE, "--load", "1e6"), "more than 10,000,000"),
        (("replay", "t.csv", *ONE, "--mem-fraction", 2), "--mem-fraction: must be at most 1, got 2"),
        (("replay", "t.csv", *ONE, "--policy", "chunk"), "--policy: 'chunk'"),
        (("replay", "t.csv", *ONE, "--rate", "percentile(x)"), "--rate: cannot read 'x'"),
        (("replay", "t.csv", *ONE, "--tier", "dram 1 GB 1 GB/s"), "add --prefix-caching"),
        (("replay", "t.csv", *ONE, "--prefix-caching"), "does not say which prompts share blocks"),
        (("replay", "t.csv", *ONE, "--prefix-caching", "--tier", "dram 512 GB 50 GB"), "--tier 'dram 512 GB 50 GB'"),
        (("replay", "t.csv", *ONE, "--column", "inptu=input"), "did you mean 'input'?"),
        (("replay", "w.yaml", *ONE, "--where", "a=b"), "--where is about the columns of a trace"),
        (("trace", "show", "w.yaml", "--column", "input=x"), "--column is about the columns of a trace"),
        (("trace", "fit", "w.yaml", "--out", "x.yaml"), "a workload needs no fit"),
        (("replay", "t.csv", "--plan", "cut.json"), "cut.json:1: not valid JSON"),
        (("report", "cut.json"), "cut.json:1: not valid JSON"),
        (("emit", EXAMPLES / "deployment.yaml", "--format", "kubernetes", "--name", "A B"), "--name 'A B'"),
        (("emit", EXAMPLES / "deployment.yaml", "--format", "kubernetes", "--name", "x" * 300), "at most 40"),
        (("emit", EXAMPLES / "deployment.yaml", "--checkpoint", ""), "--checkpoint is empty"),
        (("estimate", *ONE, "--pool", 1), "--pool is a pool of --plan"),
        (("plan", "plan.yaml", "--load", "nan"), "--load"),
        (("plan", "plan.yaml", "--load", "inf"), "--load"),
        (("lint", "start.sh"), "start.sh: no such file"),
        (("place", "offload", "--model", "opt-175b", "--hw", "t4-server", "--expand", "nan"), "--expand: 'nan' is not a finite"),
        (("place", "adapters", "--model", "llama-3.1-8b", "--hw", "l40s-server-4", "--slots", 8, "--count", 9, "--rate", 2,
          "--imbalance", "nan"), "--imbalance: 'nan' is not a finite"),
        (("place", "experts", "--model", "mixtral-8x7b", "--hw", "hgx-h100-8", "--ep", 8, "--batch", 8, "--zipf", "inf"), "--zipf"),
        (("place", "experts", "--model", "mixtral-8x7b", "--hw", "hgx-h100-8", "--ep", 8, "--batch", 8, "--seed", -1), "--seed"),
    ],
)  # fmt: skip
def test_one_line_and_code_2(
    cli: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], wanted: str
) -> None:
    monkeypatch.chdir(folder)
    found = cli(*arguments)
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1), found.err
    assert wanted in found.err


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("objective: cost", "seed: -1", "plan.yaml:12: seed: must be at least 0, got -1"),
        ("[colocated]", "[prefill]", "prefill and decode pools need each other"),
        ("[colocated]", "[]", "roles"),
        ("input: 1024", "input: 1.5", "workload.lengths.input: must be a whole number, got 1.5"),
        ("lengths: {input: 1024, output: 256}", "lengths: [1, 2]", "workload.lengths: must be a mapping"),
        ("max_nodes: 2,", "max_nodes: 0,", "fleet.2.max_nodes: must be at least 1, got 0"),
    ],
)
def test_plan_files(cli: Callable[..., Any], folder: Path, old: str, new: str, wanted: str) -> None:
    text = (folder / "plan.yaml").read_text()
    assert old in text
    (folder / "plan.yaml").write_text(text.replace(old, new))
    found = cli("plan", folder / "plan.yaml", "--quick", "--no-report")
    assert (found.code, found.out) == (2, ""), found.err
    assert wanted in found.err


def test_an_empty_fleet(cli: Callable[..., Any], folder: Path) -> None:
    text = (folder / "plan.yaml").read_text()
    head, tail = text[: text.index("fleet:")], text[text.index("choices:") :]
    (folder / "plan.yaml").write_text(f"{head}fleet: []\n{tail}")
    assert "fleet: must list at least 1, got 0" in cli("plan", folder / "plan.yaml").err


def test_a_batch_sent_at_once_is_replayed(cli: Callable[..., Any], folder: Path) -> None:
    """Eight prompts of 100 tokens fit one step of 8,192, so all see the same first token; they have no rate to multiply."""
    found = cli("replay", folder / "once.csv", *ONE, "--json").json
    assert found["requests"] == 8
    assert found["percentiles"]["ttft"]["p99"] == pytest.approx(found["percentiles"]["ttft"]["p50"], rel=0.01)
    assert cli("replay", folder / "once.csv", *ONE, "--load", 2).code == 2


@pytest.mark.parametrize("share", ["nan", "inf", "1.5", "90", "0"])
def test_no_share_of_memory_computes_nothing_absurd(cli: Callable[..., Any], share: str) -> None:
    """The figures are those of the engine's own share, and the better line leaves the bad one out."""
    line = "vllm serve meta-llama/Llama-3.1-8B"
    plain = cli("lint", line, "--hw", "h100-sxm", "--json").json[0]
    found = cli("lint", f"{line} --gpu-memory-utilization {share}", "--hw", "h100-sxm", "--json")
    assert found.code == 2
    (report,) = found.json
    assert "bad-fraction" in [f["code"] for f in report["findings"]]
    assert report["fit"]["kv_tokens"] == plain["fit"]["kv_tokens"]
    assert report["better"] == line


def test_a_script_may_set_variables(cli: Callable[..., Any]) -> None:
    """The report is that of the line with the values written out; a variable that nobody set stays a word."""
    script = 'MODEL=meta-llama/Llama-3.1-8B\nARGS="--tensor-parallel-size 2 --max-model-len 4096"\nvllm serve "$MODEL" $ARGS'
    line = "vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 2 --max-model-len 4096"
    assert cli("lint", script, "--hw", "h100-sxm", "--json").json == cli("lint", line, "--hw", "h100-sxm", "--json").json
    assert "$MODEL is not in the catalogue" in cli("lint", "vllm serve $MODEL", "--hw", "h100-sxm").out


@pytest.mark.parametrize(("format_", "near"), [("fp9", "fp8"), ("bfloat61", "bfloat16")])
def test_a_cache_format_nobody_has(cli: Callable[..., Any], format_: str, near: str) -> None:
    found = cli("lint", f"vllm serve meta-llama/Llama-3.1-8B --kv-cache-dtype {format_}", "--hw", "h100-sxm")
    assert found.code == 2
    assert f"did you mean '{near}'?" in found.out
