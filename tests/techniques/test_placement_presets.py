"""Presets of placement and weight techniques: they build on a model and machine they fit, and move what they claim to."""

import pytest

from perfmodel import catalog
from perfmodel.estimator import Estimator

DENSE, MIXTURE = ("llama-2-7b", "a100-sxm-80gb"), ("mixtral-8x7b", "h200-sxm")
PRESETS = {
    "headinfer": DENSE, "shadowkv-values": DENSE, "magicpig": DENSE, "apex-cpu-attention": DENSE, "fastdecode": DENSE,
    "instinfer": DENSE, "instinfer-sparse": DENSE, "leoam": DENSE, "alisa": DENSE, "flexgen-weights": DENSE,
    "flexgen-cache": DENSE, "zero-inference": DENSE, "tpi-llm-window": DENSE, "s-lora": DENSE, "pim-gpt": DENSE, "edgecim": DENSE,
    "qserve-w4a8": DENSE, "comet-w4ax": DENSE, "dfloat11": DENSE, "bnb-nf4": DENSE, "awq-w4a16": DENSE, "prosparse-7b": DENSE,
    "prosparse-13b": DENSE, "chess": DENSE, "teal-50": DENSE, "deja-vu": DENSE, "moe-lens-experts": MIXTURE,
    "moe-lens-attention": MIXTURE, "fiddler": MIXTURE, "hybrimoe": MIXTURE, "expertflow": MIXTURE, "fate": MIXTURE,
    "expertweave": MIXTURE,
}  # fmt: skip
FASTER = {"qserve-w4a8", "comet-w4ax", "awq-w4a16", "prosparse-7b", "prosparse-13b", "chess", "teal-50", "deja-vu", "pim-gpt"}
SMALLER = {"headinfer", "magicpig", "flexgen-cache", "fastdecode", "apex-cpu-attention", "leoam", "alisa", "instinfer"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_and_names_its_sources(name):
    preset = catalog.load_preset(name)
    assert set(preset.number_sources) == set(preset.parameters)
    model, device = PRESETS[name]
    e, plain = Estimator(model, device, techniques=[name]), Estimator(model, device)
    assert e.decode(1, 512) > 0
    assert e.prefill(1, 512) > 0
    parts = e.parts(4, 1, 2047, is_decode=True)
    assert parts.lower <= parts.seconds <= parts.upper
    if name in FASTER:
        assert e.decode(1, 512) < plain.decode(1, 512)
    if name in SMALLER:
        assert float(e.memory(8, 2048).kv) < float(plain.memory(8, 2048).kv)


@pytest.mark.parametrize("name", ["moetuner", "eplb"])
def test_placements_need_ranks(name):
    e = Estimator("mixtral-8x7b", "hgx-h100-8", tp=1, dp=8, ep=8, techniques=[name])
    assert e.decode(64, 512) > 0
    assert set(catalog.load_preset(name).number_sources) == set(catalog.load_preset(name).parameters)
