"""Errors that name place, reason and nearest spelling; YAML read strictly, as YAML 1.2 and with line numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import Infeasible, PerfmodelError, SpecError, UnitError, UnknownName, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.base import Count, Fraction, Spec
from perfmodel.spec.hardware import Device
from perfmodel.spec.model import Model

DEVICE = """\
name: toy
title: Toy 1
vendor: Nobody
kind: accelerator
architecture: hopper
sources:
  sheet: {title: Data sheet}
compute:
  source: sheet
  matrix:
    bf16: 989 TFLOP/s
  vector: {fp32: 67 TFLOP/s}
  units: 132
  unit_name: SM
  clock: 1.98 GHz
memory:
  source: sheet
  technology: hbm3
  capacity: 80 GB
  bandwidth: 3.35 TB/s
"""

MODEL = """\
name: toy
family: Toy
hidden: 64
vocab: 100
blocks:
  a:
    mixer:
      kind: latent
      heads: 4
      q_rank: 0
      kv_rank: 16
      nope_dim: 8
      rope_dim: 4
      v_dim: 8
    ffn: {kind: moe, experts: 8, top_k: 2, inter: 32}
layers:
  - {blocks: [a], repeat: 2}
"""


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_spec_error_reads_as_file_line_path_message() -> None:
    assert str(SpecError("too small", file="a.yaml", line=3, path="memory.capacity")) == "a.yaml:3: memory.capacity: too small"
    assert str(SpecError("too small", file="a.yaml")) == "a.yaml: too small"
    assert str(SpecError("too small")) == "too small"


def test_exit_codes_tell_bad_input_from_infeasible() -> None:
    assert [e.exit_code for e in (PerfmodelError, SpecError, UnknownName, UnitError)] == [2, 2, 2, 2]
    assert Infeasible.exit_code == 3


def test_infeasible_carries_the_reason_and_the_nearest_change() -> None:
    error = Infeasible("70 GB do not fit 24 GB", nearest="4 devices", binding=("memory",))
    assert str(error) == "70 GB do not fit 24 GB\nNearest feasible change: 4 devices"
    assert error.binding == ("memory",)
    assert str(Infeasible("no")) == "no"


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("h100-smx", ["h100-sxm", "a100-sxm"], " (did you mean 'h100-sxm'?)"),
        ("H100-SXM", ["h100-sxm"], " (did you mean 'h100-sxm'?)"),
        ("llama", ["Llama"], " (did you mean 'Llama'?)"),
        ("zebra", ["h100-sxm"], ""),
        ("x", [], ""),
    ],
)
def test_did_you_mean(word: str, known: list[str], hint: str) -> None:
    assert did_you_mean(word, known) == hint


# --- scalars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("989e12", 989e12),
        ("1e-6", 1e-6),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("128_000", 128000),
        ("007", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    read = yaml.parse(f"x: {text}").data["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "y", "12:30", "2024-05-01", "0x1F", "1.2.3", "1e", "e5", "3 TB/s", "5e12B"]
)
def test_what_yaml_1_1_would_convert_stays_text(text: str) -> None:
    assert yaml.parse(f"x: {text}").data["x"] == text


@pytest.mark.parametrize("text", ["'12'", '"true"', "'null'", "|-\n  989e12", ">-\n  12"])
def test_quoted_text_stays_text(text: str) -> None:
    assert isinstance(yaml.parse(f"x: {text}").data["x"], str)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufeff\x85\u2028\u2029")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdefgh_", min_size=1), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text("abcdefgh_", min_size=1), plain))
def test_json_is_yaml(data: dict[str, Any]) -> None:
    """YAML 1.2 contains JSON: what Python's json writes must read back equal, types included."""
    read = yaml.parse(json.dumps(data, ensure_ascii=False)).data
    assert json.dumps(read) == json.dumps(data)


# --- structure ------------------------------------------------------------------------------------------------------


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        yaml.parse(dedent(text), "f.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key 'a'"),
        ("x:\n  a: 1\n  'a': 3\n", 3, "duplicate key 'a'"),
        ("x:\n  - a: 1\n    b: 2\n    b: 3\n", 4, "duplicate key 'b'"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "not valid YAML: but found another document"),
        ("a: *gone\n", 1, "not valid YAML"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "a key must be a single word or number"),
        ("a: 1\nb: {{ x }}\n", 2, "a key must be a single word or number"),
        ("a: 1\nb: !include other.yaml\n", 2, "tags such as '!include' are not read"),
        ("a: &a [1, *a]\n", None, "an anchor that contains itself"),
        ("", None, "the file is empty"),
        ("# only a comment\n", None, "the file is empty"),
        ("a: \x00\n", None, "not valid YAML"),
    ],
)
def test_malformed_files_are_refused_with_the_line(text: str, line: int | None, says: str) -> None:
    error = refusal(text)
    assert error.line == line
    assert error.file == "f.yaml"
    assert says in str(error)
    assert "\n" not in str(error)


def test_lines_of_nested_paths() -> None:
    document = yaml.parse("a: 1\nb:\n  - x: 1\n    y:\n      z: 2\n  - 3\n")
    paths: list[tuple[str | int, ...]] = [("a",), ("b",), ("b", 0, "y", "z"), ("b", 1)]
    assert [document.line(p) for p in paths] == [1, 2, 5, 6]
    assert document.line(("b", 0, "y", "unheard", "of")) == 4
    assert document.line(("unheard",)) == 1


def test_anchors_are_read_and_merge_keys_are_plain_keys() -> None:
    assert yaml.parse("a: &a {x: 1}\nb: *a\n").data == {"a": {"x": 1}, "b": {"x": 1}}
    assert "<<" in yaml.parse("a: &a {x: 1}\nb:\n  <<: *a\n").data["b"]


def test_reading_files(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("\ufeffname: Zürich µ\n", encoding="utf-8")
    assert yaml.read(good).data == {"name": "Zürich µ"}
    with pytest.raises(SpecError, match="absent.yaml: cannot read the file: No such file"):
        yaml.read(tmp_path / "absent.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Zürich".encode("latin-1"))
    with pytest.raises(SpecError, match="latin.yaml: cannot read the file"):
        yaml.read(latin)


# --- validation -----------------------------------------------------------------------------------------------------


def problem(text: str, model: type[Spec] = Device) -> str:
    with pytest.raises(SpecError) as caught:
        yaml.validate(yaml.parse(text, "f.yaml"), model)
    return str(caught.value)


def test_the_unbroken_specs_are_accepted() -> None:
    device = yaml.validate(yaml.parse(DEVICE), Device)
    assert device.compute is not None
    assert device.compute.matrix["bf16"] == 989e12
    assert yaml.validate(yaml.parse(MODEL), Model).n_layers == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vendor:", "vender:", "f.yaml:3: unknown key 'vender' (did you mean 'vendor'?)"),
        ("  capacity:", "  capcity:", "f.yaml:19: unknown key 'capcity' (did you mean 'capacity'?)"),
        ("  clock: 1.98 GHz", "  clock: 1.98 GHz\n  qqq: 1", "f.yaml:16: unknown key 'qqq'; known keys: clock, "),
        ("  unit_name: SM\n", "", "f.yaml:8: missing key 'compute.unit_name'"),
        ("bf16: 989 TFLOP/s", "bf17: 989 TFLOP/s", "f.yaml:11: compute.matrix.bf17: 'bf17' is not one of"),
        ("3.35 TB/s", "3.35 TB", "f.yaml:20: memory.bandwidth: '3.35 TB' is not a bandwidth; write it like '3.35 TB/s'"),
        ("3.35 TB/s", "3.35", "f.yaml:20: memory.bandwidth: 3.35 has no unit"),
        ("80 GB", "-80 GB", "f.yaml:19: memory.capacity: '-80 GB' must be positive"),
        ("hbm3", "hmb3", "f.yaml:18: memory.technology: 'hmb3' is not one of"),
        ("units: 132", "units: 0", "f.yaml:13: compute.units: must be at least 1, got 0"),
        ("units: 132", "units: true", "f.yaml:13: compute.units: expected a number, got True"),
        ("units: 132", "units: '132'", "f.yaml:13: compute.units: expected a number, got '132'"),
        ("units: 132", "units: 132.5", "f.yaml:13: compute.units: must be a whole number, got 132.5"),
        ("source: sheet\n  matrix", "source: shet\n  matrix", "compute cites 'shet', which is not under sources"),
    ],
)
def test_device_problems_name_file_line_and_path(old: str, new: str, message: str) -> None:
    assert DEVICE.count(old) == 1
    assert message in problem(DEVICE.replace(old, new))


def test_near_literals_are_suggested() -> None:
    assert problem(DEVICE.replace("bf16:", "bf17:")).endswith("(did you mean 'bf16'?)")
    assert problem(DEVICE.replace("hbm3", "hmb3")).endswith("(did you mean 'hbm3'?)")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("      kv_rank:", "      kv_rnak:", "f.yaml:11: unknown key 'kv_rnak' (did you mean 'kv_rank'?)"),
        ("top_k:", "topk:", "f.yaml:15: unknown key 'topk' (did you mean 'top_k'?)"),
        ("repeat:", "repaet:", "f.yaml:17: unknown key 'repaet' (did you mean 'repeat'?)"),
        ("kind: latent", "kind: laten", "blocks.a.mixer: 'laten' is not one of"),
        ("kind: moe", "kind: mole", "(did you mean 'moe'?)"),
        ("top_k: 2", "top_k: 9", "f.yaml:15: blocks.a.ffn: top_k (9) exceeds experts (8)"),
        ("[a]", "[b]", "layers name block 'b', which is not under blocks"),
    ],
)
def test_model_problems_name_the_member_of_the_union(old: str, new: str, message: str) -> None:
    assert MODEL.count(old) == 1
    assert message in problem(MODEL.replace(old, new), Model)


def test_a_file_that_is_not_a_mapping() -> None:
    assert problem("- a\n- b\n") == "f.yaml:1: expected a mapping of keys to values"
    assert problem("---\n") == "f.yaml:1: expected a mapping of keys to values"


class _Numbers(Spec):
    n: Count = 1
    share: Fraction = 0.5


def test_numbers_are_whole_and_shares_lie_within_one() -> None:
    assert yaml.validate(yaml.parse("n: 128e3\nshare: 1"), _Numbers).n == 128000
    assert problem("share: 1.5", _Numbers).startswith("f.yaml:1: share: ")
    assert problem("share: true", _Numbers) == "f.yaml:1: share: expected a number, got True"


def test_specs_are_frozen() -> None:
    record = _Numbers()
    with pytest.raises(ValueError, match="frozen"):
        record.n = 2  # type: ignore[misc]
