"""Everything a user can get wrong: one clear message on stderr, nothing on stdout, the right exit code, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BAD, INFEASIBLE = 2, 3
ESTIMATE = ("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm")
DENOISE = ("denoise", "--model", "stable-diffusion-xl", "--hw", "a100-sxm-80gb")


def check(outcome: Any, code: int, *wanted: str) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error:") == 1
    assert "Traceback" not in outcome.err
    for words in wanted:
        assert words in outcome.err


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (("--batch", 0), ("--batch", "at least 1", "0")),
        (("--batch", -3), ("--batch", "at least 1", "-3")),
        (("--batch", "many"), ("--batch", "'many'")),
        (("--batch", "1.5"), ("--batch", "'1.5'")),
        (("--batch", 10**30), ("--batch", "exceed 1,000,000")),
        (("--isl", 0), ("--isl", "at least 1")),
        (("--osl", 0), ("--osl", "at least 1")),
        (("--prefix", -1), ("--prefix", "at least 0")),
        (("--isl", 512, "--prefix", 512), ("--prefix (512)", "--isl (512)")),
        (("--isl", 131_000, "--osl", 100), ("131100", "131072 positions")),
        (("--ttft", "50"), ("--ttft", "'50' has no unit", "50 ms")),
        (("--ttft", "50 GB"), ("--ttft", "is not a time")),
        (("--ttft", "soon"), ("--ttft", "'soon'", "50 ms")),
        (("--tpot", "0 ms"), ("--tpot", "positive")),
        (("--tpot", "-5 ms"), ("--tpot", "positive")),
        (("--tpot", "5 mss"), ("--tpot", "did you mean 'ms'?")),
        (("--rate", "0"), ("--rate", "positive")),
        (("--rate", "8 GB"), ("--rate", "is not a rate")),
        (("--rate", "nan"), ("--rate", "'nan'")),
        (("--concurrency", 0), ("--concurrency", "at least 1")),
        (("--price", "88"), ("--price", "'88' has no unit", "USD/h")),
        (("--price", "88 USD"), ("--price", "is not a price", "USD/h")),
        (("--mem-fraction", 1.5), ("--mem-fraction", "1.5")),
        (("--mem-fraction", "nan"), ("--mem-fraction", "'nan'")),
        (("--weight-dtype", "fp9"), ("'fp9'", "did you mean 'fp8'?")),
        (("--kv-dtype", "int99"), ("'int99'", "known: ")),
        (("--act-dtype", "bf61"), ("'bf61'",)),
        (("--dtype", "fp8"), ("--dtype fp8", "--weight-dtype")),
        (("--engine", "vlm"), ("'vlm'", "did you mean 'vllm'?")),
        (("--tp", 0), ("--tp", "positive")),
        (("--pp", 0, "--gpus", 8), ("--pp", "positive")),
        (("--tp", 3), ("--tp 3", "32 heads", "1, 2, 4, 8, 16, 32")),
        (("--pp", 33), ("--pp 33", "32 layers")),
        (("--ep", 2, "--tp", 2), ("--ep 2", "no experts")),
        (("--gpus", 0), ("--gpus", "at least 1")),
        (("--gpus", 8, "--tp", 4), ("--gpus 8", "= 4")),
        (("--gpus", 6, "--tp", 2, "--dp", 2), ("--gpus 6", "= 4")),
        (("--bach", 4), ("unknown option '--bach'", "did you mean '--batch'?", "perfmodel estimate --help")),
        (("--zzzz",), ("unknown option '--zzzz'", "perfmodel estimate --help")),
        (("--batch",), ("--batch",)),
        (("extra",), ("extra",)),
    ],
)
def test_bad_options(cli: Callable[..., Any], more: tuple[object, ...], wanted: tuple[str, ...]) -> None:
    check(cli(*ESTIMATE, *more), BAD, *wanted)
    # Asking for JSON changes nothing: stdout stays empty, and the message stays on stderr.
    check(cli(*ESTIMATE, "--json", *more), BAD, *wanted)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("estimat",), ("'estimat'", "did you mean 'estimate'?")),
        (("frobnicate",), ("'frobnicate'", "estimate, denoise, explain, plan, replay, report, emit, lint, place, validate, calibrate, ingest, measure-next, trace, techniques, papers, models, hardware")),
        (("models", "shaw"), ("'shaw'", "did you mean 'show'?")),
        (("models", "show"), ("NAME", "perfmodel models show --help")),
        (("--jsn", "estimate"), ("unknown option '--jsn'",)),
        (("estimate",), ("--model", "perfmodel estimate --help")),
        (("estimate", "--model", "llama-3.1-8b"), ("--hw",)),
        (("estimate", "--model", "lama-3.1-8b", "--hw", "h100-sxm"), ("unknown model 'lama-3.1-8b'", "did you mean 'llama-3.1-8b'?")),
        (("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxn"), ("unknown device or node 'h100-sxn'", "did you mean 'h100-sxm'?")),
        (("estimate", "--model", "llama-3.1-8b", "--hw", "nvme-gen4"), ("storage", "cannot run a model")),
        (("estimate", "--model", "llama-3.1-8b", "--hw", "nvlink4"), ("network", "cannot run a model")),
        (("models", "show", "no-such.json"), ("no-such.json",)),
        (("models", "show", "no-such.yaml"), ("no such file",)),
        (("hardware", "show", "h100-sxn"), ("did you mean 'h100-sxm'?",)),
        (("hardware", "show", "no-such.yaml"), ("no such file",)),
        (("hardware", "show", "nvme-gen4", "--calibration"), ("storage",)),
        (("hardware", "show", "h100-sxm", "--calibration", "--engine", "vlm"), ("did you mean 'vllm'?",)),
        (("--specs", "/no/such/folder", "models", "list"), ("/no/such/folder",)),
        (("plan", "no-such-workload.yaml"), ("no-such-workload.yaml",)),
        (("explain", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--bach", 2), ("did you mean '--batch'?",)),
        ((*DENOISE, "--size", "big"), ("--size", "WIDTHxHEIGHT", "'big'")),
        ((*DENOISE, "--size", "1024x1024x3"), ("--size", "WIDTHxHEIGHT", "'1024x1024x3'")),
        ((*DENOISE, "--size", "1000x1000"), ("--size", "multiples of 32 pixels", "1000x1000")),
        (DENOISE, ("--size", "--tokens")),
    ],
)  # fmt: skip
def test_bad_names_and_verbs(cli: Callable[..., Any], arguments: tuple[object, ...], wanted: tuple[str, ...]) -> None:
    check(cli(*arguments), BAD, *wanted)


def test_a_model_too_large_names_the_nearest_change(cli: Callable[..., Any]) -> None:
    """70.6 G parameters of two bytes are 141.1 GB; one H100 has 85.5 GB, and two have room."""
    arguments = ("estimate", "--model", "llama-3.1-70b", "--hw", "h100-sxm")
    check(cli(*arguments), INFEASIBLE, "141.1 GB", "85.5 GB", "--tp 2 (2 devices)")
    assert cli(*arguments, "--tp", 2).code == 0


def test_expert_parallelism_that_contradicts_itself(cli: Callable[..., Any]) -> None:
    moe = ("estimate", "--model", "gpt-oss-120b", "--hw", "h100-sxm", "--tp", 4)
    check(cli(*moe, "--ep", 2, "--enable-expert-parallel"), BAD, "= 4", "--ep says 2")
    check(cli(*moe, "--ep", 3), BAD, "--ep 3", "= 4")


DEVICE = """\
name: toy
title: Toy
vendor: Nobody
kind: accelerator
architecture: hopper
compute:
  source: unverified
  matrix: {bf16: 989 TFLOP/s}
  vector: {fp32: 67 TFLOP/s}
  units: 132
  unit_name: SM
  clock: 1.98 GHz
memory:
  source: unverified
  technology: hbm3
  capacity: 80 GB
  bandwidth: 3.35 TB/s
"""


@pytest.mark.parametrize(
    ("right", "wrong", "line", "wanted"),
    [
        ("bandwidth: 3.35", "bandwith: 3.35", 17, ("'bandwith'", "did you mean 'bandwidth'?")),
        ("3.35 TB/s", "3.35 TB", 17, ("memory.bandwidth", "is not a bandwidth")),
        ("3.35 TB/s", "3350", 17, ("memory.bandwidth", "has no unit")),
        ("80 GB", "-80 GB", 16, ("memory.capacity", "positive")),
        ("hbm3", "hbm33", 15, ("memory.technology", "'hbm33'", "did you mean 'hbm3'?")),
        ("units: 132", "units: 0", 10, ("compute.units",)),
        # The list is open until the next line, and that is where the parser stumbles.
        ("vendor: Nobody", "vendor: [", 5, ("not valid YAML",)),
        ("vendor: Nobody", "title: Twice", 3, ("duplicate key 'title'",)),
    ],
)
def test_mistakes_in_a_device_file(
    cli: Callable[..., Any], tmp_path: Path, right: str, wrong: str, line: int, wanted: tuple[str, ...]
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(DEVICE.replace(right, wrong), encoding="utf-8")
    for arguments in (("hardware", "show", path), ("estimate", "--model", "llama-3.1-8b", "--hw", path)):
        check(cli(*arguments), BAD, f"{path}:{line}: ", *wanted)


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ("not valid JSON",)),
        ('{"hidden_size": 4096,', (":1: ", "not valid JSON")),
        ("[1, 2]", ("expected a JSON object",)),
        ("{}", ("no 'architectures' entry",)),
        (json.dumps(CONFIG | {"architectures": ["LlamaForCasualLM"]}), ("'LlamaForCasualLM'", "did you mean 'LlamaForCausalLM'?")),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}), ("missing key 'hidden_size'",)),
        (json.dumps(CONFIG | {"vocab_size": -1}), ("'vocab_size'", "-1")),
        (json.dumps(CONFIG | {"vocab_size": "large"}), ("'vocab_size'", "'large'")),
    ],
)  # fmt: skip
def test_mistakes_in_a_config_json(cli: Callable[..., Any], tmp_path: Path, text: str, wanted: tuple[str, ...]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    for source in (path, tmp_path):
        check(cli("models", "show", source), BAD, str(path), *wanted)
        check(cli("estimate", "--model", source, "--hw", "h100-sxm"), BAD, str(path), *wanted)


def test_a_config_json_that_is_not_text(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x81")
    check(cli("models", "show", path), BAD, str(path), "cannot read")


def test_a_folder_without_a_configuration(cli: Callable[..., Any], tmp_path: Path) -> None:
    check(cli("models", "show", tmp_path), BAD, str(tmp_path / "config.json"), "cannot read")
