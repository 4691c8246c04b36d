"""`emit` and `lint` as programs: what they print, and with what code they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfmodel.cli import main

LINE = "vllm serve meta-llama/Llama-3.1-70B-Instruct --tensor-parallel-size 4 --max-model-len 8192"


def test_the_command_line_emits(tmp_path: Path, cli: Callable[..., Any]) -> None:
    plan = tmp_path / "plan.json"
    pools = [{"hardware": "hgx-h100-8", "tp": 4, "replicas": 3}]
    plan.write_text(json.dumps({"cost": 1.0, "deployment": {"model": "llama-3.1-70b", "pools": pools}}))
    text = cli("emit", plan).out
    assert text.count("vllm serve") == 2  # two on a node, and the second node runs one of them
    found = cli("emit", plan, "--json", "--engine", "sglang").json
    assert (found["pools"][0]["replicas"], found["pools"][0]["command"][2]) == (3, "sglang.launch_server")
    assert "kind: Deployment" in cli("emit", plan, "--format", "kubernetes").out
    assert "my/weights" in cli("emit", plan, "--checkpoint", "my/weights").out
    pools[0]["tp"] = 3
    plan.write_text(json.dumps({"deployment": {"model": "llama-3.1-70b", "pools": pools}}))
    bad = cli("emit", plan)
    assert (bad.code, "heads" in bad.err) == (2, True)
    assert cli("emit", plan, "--engine", "vlm").code == 2


def test_a_good_line_ends_well(cli: Callable[..., Any]) -> None:
    found = cli("lint", LINE, "--hardware", "hgx-h100-8")
    assert (found.code, found.err) == (0, "")
    for word in ("weights", "Cache", "Binds: memory", "Nothing to report"):
        assert word in found.out


def test_an_error_ends_with_code_2_and_a_better_line(cli: Callable[..., Any]) -> None:
    found = cli("lint", LINE.replace("size 4", "size 6"), "--hw", "hgx-h100-8")
    assert found.code == 2
    assert "[heads-not-divided]" in found.out
    assert "--tensor-parallel-size 8" in found.out.split("Better")[1]


def test_json_is_one_list_of_reports(cli: Callable[..., Any]) -> None:
    (report,) = cli("lint", LINE, "--hardware", "hgx-h100-8", "--isl", 2000, "--osl", 400, "--json").json
    assert report["model"] == "llama-3.1-70b"
    assert report["fit"]["lengths"] == [2000, 400]
    assert report["fit"]["concurrency_at_lengths"] > report["fit"]["concurrency_at_context"]


def test_a_file_a_trace_and_stdin(tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "serve.sh"
    script.write_text(f"#!/bin/sh\n{LINE} &\n")
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input,output\n" + "".join(f"{i / 100},{1000 + 2 * i},100\n" for i in range(101)))
    (report,) = cli("lint", script, "--hardware", "hgx-h100-8", "--trace", trace, "--json").json
    assert report["fit"]["lengths"] == [1100, 100]
    # 101 requests in a second are more than this instance carries.
    assert "rate-beyond-capacity" in [f["code"] for f in report["findings"]]

    class Piped:
        def read(self) -> str:
            return LINE

    monkeypatch.setattr("perfmodel.cli.lint.sys.stdin", Piped())
    with pytest.raises(SystemExit) as ended:
        main(["lint", "-", "--hardware", "hgx-h100-8"])
    assert not ended.value.code


@pytest.mark.parametrize("arguments", [
    ("lint", "ls"), ("lint", LINE, "--hardware", "hgx-h1000-8"), ("lint", LINE, "--hardware", "hgx-h100-8", "--isl", 5),
    ("lint", LINE, "--hardware", "hgx-h100-8", "--model", "nobody"), ("lint", "kind: x\napiVersion: ["),
    ("lint", "vllm serve 'unclosed"), ("lint", LINE, "--hardware", "hgx-h100-8", "--engine-version", "x"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments: tuple[Any, ...], cli: Callable[..., Any]) -> None:
    found = cli(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert len(found.err.strip().splitlines()) == 1
