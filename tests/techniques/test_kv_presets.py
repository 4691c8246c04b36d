"""Presets of published cache techniques: each builds, each parameter says where it is from, and some figures by hand."""

from __future__ import annotations

import pytest
from cache_by_hand import bytes_per_column, estimator

from perfmodel import catalog

MINE = {
    "kv-quantization", "kv-eviction", "kv-selection", "streaming-heads", "kv-low-rank", "kv-sharing", "attention-layout",
    "kv-rematerialisation",
}  # fmt: skip
NAMES = [n for n in catalog.names("techniques") if catalog.load_preset(n).technique in MINE]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_source(name: str) -> None:
    preset = catalog.load_preset(name)
    assert set(preset.number_sources) == set(preset.parameters)
    assert set(preset.number_sources.values()) <= {*preset.sources, "assumed"}


@pytest.mark.parametrize("name", NAMES)
def test_presets_run(name: str) -> None:
    e = estimator(name)
    assert e.decode(8, 30_000) > 0
    assert e.prefill(1, 4096) > 0
    assert e.memory(8, 30_000).kv < estimator().memory(8, 30_000).kv * 1.6
    assert e.techniques[0].effects() == "lossy"


def test_kivi_by_hand() -> None:
    # 2 bits and 32 bits of scale per 32 elements: 3 bits; the newest 128 tokens at 16
    assert bytes_per_column(("kivi-2bit",), 4096) == pytest.approx((4096 - 128) * 3 / 8 + 256)


def test_kvquant_by_hand() -> None:
    # 3 bits and 1 % of outliers of 32 bits: 3.32 bits; the first token at 16
    assert bytes_per_column(("kvquant-3bit",), 4096) == pytest.approx(4095 * 3.32 / 8 + 2)


def test_zipcache_reaches_its_published_ratio_on_long_texts() -> None:
    # 0.6 x 4 + 0.4 x 2 = 3.2 bits: 16 / 3.2 = 5; published 4.98 with scales
    assert 2e6 / bytes_per_column(("zipcache",), 1_000_000) == pytest.approx(4.98, rel=0.01)


def test_razorattention_saves_what_its_abstract_says() -> None:
    # "over 70 %" of the cache at long contexts
    assert 1 - bytes_per_column(("razorattention",), 100_000) / 200_000 > 0.7


def test_palu_with_bits() -> None:
    # half the rank at 4 bits of 16: one eighth remains
    assert bytes_per_column(("palu-50", "kv-quantization:bits=4"), 10_000) == pytest.approx(20_000 / 8)
