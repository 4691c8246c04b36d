"""perfmodel techniques: every page reads, every parameter says what it may be, mistakes get one line with a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perfmodel import catalog
from perfmodel.techniques.base import limits, words
from perfmodel.techniques.registry import kinds

BASE = ("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--isl", 512, "--osl", 64)


@pytest.mark.parametrize("name", list(kinds()))
def test_the_page_of_a_kind(cli: Callable[..., Any], name: str) -> None:
    cls, outcome = kinds()[name], cli("techniques", "show", name)
    assert outcome.code == 0
    first, *rest = outcome.out.splitlines()
    assert first.startswith(f"{name}  ")
    assert first.endswith(f", {cls.reference}")
    assert "=" in outcome.out, "an equation"
    for knob, field in cls.model_fields.items():
        if knob == "spare_layers" and not cls.by_layer:
            continue
        row = next(line for line in rest if line.startswith(f"  {knob} ") and line.endswith(field.description))
        assert limits(field) in row
        assert all(word in row for word in words(field.annotation))


@pytest.mark.parametrize("name", list(kinds()))
def test_every_number_has_a_range(name: str) -> None:
    for knob, field in kinds()[name].model_fields.items():
        types = str(field.annotation)
        if field.annotation is not bool and any(x in types for x in ("'int'>", "'float'>", "int |", "float |")):
            assert "to" in limits(field), knob
        assert field.description, knob
        assert "unit" in (field.json_schema_extra or {}), knob


@pytest.mark.parametrize("name", catalog.names("techniques"))
def test_the_page_of_a_preset_says_where_each_number_is_from(cli: Callable[..., Any], name: str) -> None:
    preset, outcome = catalog.load_preset(name), cli("techniques", "show", name)
    assert outcome.code == 0
    assert preset.title in outcome.out
    assert set(preset.number_sources) == set(preset.parameters)
    for knob, source in preset.number_sources.items():
        assert any(line.startswith(f"  {knob} ") and f"  {source} " in line for line in outcome.out.splitlines())
    assert outcome.out.rstrip().endswith(f"perfmodel techniques show {preset.technique}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kv-quantisation:bits=4", "unknown technique 'kv-quantisation' (did you mean 'kv-quantization'?)"),
        ("kivi2bit", "did you mean 'kivi-2bit'?"),
        ("", "unknown technique ''"),
        ("kv-quantization:bit=4", "no parameter 'bit' (did you mean 'bits'?)"),
        ("kv-quantization:bits", "'bits' is not name=value"),
        ("kv-quantization:bits=40", "bits must be a number from 0.5 to 16, got 40"),
        ("kv-quantization:bits=nan", "bits must be a number from 0.5 to 16"),
        ("kv-quantization:bits=four", "bits must be a number from 0.5 to 16, got 'four'"),
        ("kv-quantization:fused=maybe", "fused must be true or false, got 'maybe'"),
        ("kv-eviction:budget=100.5", "budget must be a whole number from 0 to 1e+07, got 100.5"),
        ("kv-offload:by=request", "by must be tokens or requests, got 'request' (did you mean 'requests'?)"),
        ("kv-offload:on=gpu", "on must be nothing or cpu, got 'gpu'"),
        ("kv-offload:tier=cxl", "has no way to 'cxl'; known: host"),
        ("moe-offload:cpu=balancd", "cpu must be a number or balanced, got 'balancd' (did you mean 'balanced'?)"),
        ("speculation:tree=4y2", "tree must be numbers of children joined by x"),
        ("prefix-cache:spare_layers=2", "spare_layers means nothing to prefix-cache"),
        ("moe-offload", "llama-3.1-8b has no routed experts; weight-offload streams dense layers"),
        ("parallel-scheme:prefill=ring", "give --cp 2 or more"),
        ("denoising-cache:skipped=0.5", "changes the steps of a denoiser"),
    ],
)
def test_a_mistake_gets_one_line(cli: Callable[..., Any], text: str, wanted: str) -> None:
    outcome = cli(*BASE, "-t", text)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1
    assert wanted in outcome.err


def test_two_that_cannot_stand_together(cli: Callable[..., Any]) -> None:
    outcome = cli(*BASE, "-t", "kivi-2bit", "-t", "kvquant-3bit")
    assert outcome.code == 2
    assert "kv-quantization and kv-quantization cannot be combined: a cache is quantised once" in outcome.err
