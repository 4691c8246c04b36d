"""`perfmodel models` and `perfmodel hardware`: what the catalogue says, against published figures and arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfmodel import calibration, catalog
from perfmodel.cli.calibration import unit


def test_llama_by_hand(cli: Callable[..., Any]) -> None:
    m = cli("models", "show", "llama-3.1-8b", "--json").json
    assert m["parameters_total"] == 8_030_261_248  # safetensors total of the published checkpoint
    assert m["parameters_active"] == m["parameters_total"]
    assert m["weight_bytes"] == 2 * 8_030_261_248
    assert m["kv_bytes_per_token"] == 32 * 2 * 8 * 128 * 2  # layers x (K, V) x heads x head size x 2 B = 131,072
    assert m["state_bytes_per_sequence"] == 0
    assert (m["layers"], m["hidden"], m["vocab"]) == (32, 4096, 128_256)
    assert m["difference"] == m["parameters_total"] - m["published"]["total"]
    assert [b["layers"] for b in m["blocks"].values()] == [32]


def test_a_checkpoint_with_four_bit_experts(cli: Callable[..., Any]) -> None:
    """gpt-oss-120b: experts in MXFP4 (4 bits and an 8-bit scale per 32), everything else in 16 bits."""
    m = cli("models", "show", "gpt-oss-120b", "--json").json
    total = 116_829_156_672
    experts = 36 * 128 * 3 * 2880 * 2880
    assert m["parameters_total"] == total
    assert m["weight_bytes"] == experts * 4.25 / 8 + (total - experts) * 2


def test_a_checkpoint_with_block_scaled_eight_bits(cli: Callable[..., Any]) -> None:
    """DeepSeek-R1: one byte a weight and 4 bytes of scale per 128 x 128 block; embedding, head and router in 16 bits."""
    m = cli("models", "show", "deepseek-r1", "--json").json
    assert m["parameters_total"] == 671_026_419_200
    wide = 2 * 129_280 * 7168 + 58 * 256 * 7168  # embedding and head, and 58 routers
    assert m["weight_bytes"] == pytest.approx((671_026_419_200 - wide) * (1 + 4 / 128**2) + 2 * wide, rel=1e-4)
    assert m["kv_bytes_per_token"] == 61 * (512 + 64) * 2  # one latent and one rotated key a layer, 16 bits


def test_a_recurrent_model_keeps_state_and_no_keys(cli: Callable[..., Any]) -> None:
    """Mamba-2 2.7B: 64 layers of 80 heads x 64 x 128 state elements in FP32, and a short convolution's tail."""
    m = cli("models", "show", "mamba2-2.7b", "--json").json
    assert m["kv_bytes_per_token"] == 0
    state = 64 * 80 * 64 * 128 * 4
    assert state <= m["state_bytes_per_sequence"] <= 1.05 * state


def test_config_json_and_its_folder(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A GPT-2-sized Llama, counted by hand: tied embeddings are one tensor."""
    folder = tmp_path / "small"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    m = cli("models", "show", folder, "--json").json
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 100 + 2 * 64  # q and o, k and v, the MLP, two norms
    assert m["parameters_total"] == 1000 * 64 + 3 * layer + 64
    assert m["weight_bytes"] == 4 * m["parameters_total"]  # FP32, as stored
    assert m["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 2  # cached in 16 bits all the same
    assert m["name"] == "small"
    assert m["published"] is None
    assert m["difference"] is None
    assert cli("models", "show", folder / "config.json", "--json").json == m
    estimate = cli("estimate", "--model", folder, "--hw", "h100-sxm", "--isl", 100, "--osl", 10, "--json").json
    assert estimate["configuration"]["model"] == "small"


@pytest.mark.parametrize("name", catalog.names("models"))
def test_every_model_can_be_shown(cli: Callable[..., Any], name: str) -> None:
    text = cli("models", "show", name)
    data = cli("models", "show", name, "--json").json
    assert text.code == 0
    assert f"{data['parameters_total']:,}" in text.out
    # At least two bits a weight, at most FP32; and every layer is in some block.
    assert data["parameters_total"] / 4 < data["weight_bytes"] <= data["parameters_total"] * 4
    assert sum(b["layers"] for b in data["blocks"].values()) == data["layers"]
    assert data["kv_bytes_per_token"] + data["state_bytes_per_sequence"] > 0


def test_models_list(cli: Callable[..., Any]) -> None:
    found = {m["name"]: m for m in cli("models", "list", "--json").json}
    assert list(found) == catalog.names("models")
    assert found["llama-3.1-8b"]["parameters_total"] == 8_030_261_248
    lines = cli("models", "list").out.splitlines()
    assert len(lines) == len(found) + 1
    assert any(line.split()[:3] == ["llama-3.1-8b", "8.03", "B"] for line in lines)


def test_h100_in_base_units_with_sources(cli: Callable[..., Any]) -> None:
    h = cli("hardware", "show", "h100-sxm", "--json").json
    assert h["memory"]["bandwidth"] == 3.35e12
    assert h["memory"]["capacity"] == 80 * 2**30
    assert h["compute"]["matrix"]["bf16"] == 989.4e12
    assert h["links"]["scale_up"]["bandwidth"] == 450e9
    for section in ("compute", "memory", "cache", "power"):
        assert h[section]["source"] in {*h["sources"], "unverified"}
    assert "calibration" not in h
    text = cli("hardware", "show", "H100").out
    for words in ("memory.bandwidth", "3.35 TB/s", "989.4 TFLOP/s", "1.979 POP/s", "700 W"):
        assert words in text


@pytest.mark.parametrize("name", catalog.names("hardware"))
def test_all_hardware_can_be_shown(cli: Callable[..., Any], name: str) -> None:
    text, data = cli("hardware", "show", name), cli("hardware", "show", name, "--json").json
    assert text.code == 0
    assert data["name"] == name
    assert data["title"] in text.out.splitlines()[0]


def test_hardware_list(cli: Callable[..., Any]) -> None:
    found = {h["name"]: h for h in cli("hardware", "list", "--json").json}
    assert list(found) == catalog.names("hardware")
    assert found["h100-sxm"]["bandwidth"] == 3.35e12
    assert (found["hgx-h100-8"]["device"], found["hgx-h100-8"]["count"]) == ("h100-sxm", 8)
    out = cli("hardware", "list").out
    assert all(f"  {name} " in out for name in found)


@pytest.mark.parametrize("name", ["h100-sxm", "hgx-h100-8", "rtx-4090", "xeon-8480-plus"])
def test_calibration_lists_every_parameter_once(cli: Callable[..., Any], name: str) -> None:
    data = cli("hardware", "show", name, "--calibration", "--engine", "sglang", "--json").json["calibration"]
    names = [p["name"] for p in data["parameters"]]
    assert len(names) == len(set(names)) == sum(data["counts"].values())
    assert set(calibration.law().parameters) <= set(names)
    assert set(calibration.engine("sglang").parameters) <= set(names)
    for p in data["parameters"]:
        assert p["sigma"] >= 0
        assert p["source"]
        assert p["evidence"]
    # Few and physical: the limits the design sets itself.
    assert data["counts"]["device"] <= 12
    assert data["counts"]["law"] <= 40
    assert data["counts"]["engine"] <= 8
    text = cli("hardware", "show", name, "--calibration", "--engine", "sglang").out
    assert all(f"  {n} " in text for n in names)


def test_units_of_parameters_agree_with_their_size() -> None:
    """A time is far below one second, bytes are many, and a share or exponent is of order one."""
    tables = calibration.classes()
    groups = [g for t in (tables.architecture, tables.memory, tables.link) for g in t.values()]
    everything = [calibration.law().parameters, *groups]
    everything += [calibration.engine(e).parameters for e in ("vllm", "sglang", "trtllm")]
    ranges = {"second": (0, 0.1), "byte": (1, 1e11), "byte/s": (1e8, 1e14), "token": (1, 1e4), "row": (1, 256), "1": (0.01, 50)}
    for parameters in everything:
        for name, p in ((n, p) for n, p in parameters.items() if p.sigma > 0):
            low, high = ranges[unit(name)]
            assert low < p.value < high, name


def test_own_specs_come_first(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A folder of one's own shadows the built-in file of the same name, and adds new ones."""
    (tmp_path / "hardware").mkdir()
    source = catalog.find("hardware", "l4").read_text(encoding="utf-8")
    assert "\nname: l4\n" in f"\n{source}"
    other = f"\n{source}".replace("\nname: l4\n", "\nname: l4-mine\n").replace("\nvendor: nvidia\n", "\nvendor: me\n")
    for name in ("l4", "l4-mine"):
        (tmp_path / "hardware" / f"{name}.yaml").write_text(other, encoding="utf-8")
    for arguments in (("--specs", tmp_path, "hardware", "list"), ("hardware", "list", "--specs", tmp_path)):
        assert "  l4-mine " in cli(*arguments).out
    assert cli("hardware", "show", "l4", "--json").json["vendor"] == "me"
