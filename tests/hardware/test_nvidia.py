"""The NVIDIA GPUs: peaks, bandwidths and links against arithmetic written out here."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from perfmodel import catalog
from perfmodel.spec.hardware import Compute, Memory, Network

NAMES = sorted(p.stem for p in (catalog.root("hardware") / "nvidia").glob("*.yaml"))

# SMs, tensor clock in GHz, FP16 tensor FLOP per SM and clock (dense, FP32 accumulation), FP32 cores per SM,
# vector clock in GHz. Data sheets of Hopper and Blackwell quote tensor and vector peaks at different clocks.
# 1024: 8 tensor cores of 64 multiply-adds (Volta, Turing) or 4 of 128 (GA10x, Ada); GA100 4 of 256; Hopper 4 of 512;
# data-centre Blackwell 4 of 1024. GeForce and A10G run FP32 accumulation at half rate.
PEAKS = {
    "v100-pcie": (80, 1.38, 1024, 64, 1.38),
    "v100-sxm": (80, 1.53, 1024, 64, 1.53),
    "v100-sxm-16gb": (80, 1.53, 1024, 64, 1.53),
    "t4": (40, 1.59, 1024, 64, 1.59),
    "a10": (72, 1.695, 1024, 128, 1.695),
    "a10g": (80, 1.71, 512, 128, 1.71),
    "a30": (56, 1.44, 2048, 64, 1.44),
    "a40": (84, 1.74, 1024, 128, 1.74),
    "rtx-a6000": (84, 1.80, 1024, 128, 1.80),
    "rtx-a5000": (64, 1.695, 1024, 128, 1.695),
    "a100-sxm-40gb": (108, 1.41, 2048, 64, 1.41),
    "a100-sxm-80gb": (108, 1.41, 2048, 64, 1.41),
    "a100-pcie-40gb": (108, 1.41, 2048, 64, 1.41),
    "a100-pcie-80gb": (108, 1.41, 2048, 64, 1.41),
    "rtx-3070": (46, 1.725, 512, 128, 1.725),
    "rtx-3080": (68, 1.71, 512, 128, 1.71),
    "rtx-3080-ti": (80, 1.665, 512, 128, 1.665),
    "rtx-3090": (82, 1.695, 512, 128, 1.695),
    "l4": (58, 2.04, 1024, 128, 2.04),
    "l20": (92, 2.52, 512, 128, 2.52),
    "l40s": (142, 2.52, 1024, 128, 2.52),
    "rtx-4070-ti": (60, 2.61, 512, 128, 2.61),
    "rtx-4080": (76, 2.505, 512, 128, 2.505),
    "rtx-4090": (128, 2.52, 512, 128, 2.52),
    "rtx-4000-ada": (48, 2.175, 1024, 128, 2.175),
    "rtx-5000-ada": (100, 2.55, 1024, 128, 2.55),
    "rtx-6000-ada": (142, 2.505, 1024, 128, 2.505),
    "h100-sxm": (132, 1.83, 4096, 128, 1.98),
    "h100-pcie": (114, 1.62, 4096, 128, 1.755),
    "h100-nvl": (132, 1.545, 4096, 128, 1.785),
    "h800-sxm": (132, 1.83, 4096, 128, 1.98),
    "h20-sxm": (78, 1.83, 1024, None, None),  # tensor rate cut to a quarter; its published FP32 peak fits no clock
    "h200-sxm": (132, 1.83, 4096, 128, 1.98),
    "gh200-96gb": (132, 1.83, 4096, 128, 1.98),
    "gh200-144gb": (132, 1.83, 4096, 128, 1.98),
    "b200-sxm": (148, 1.856, 8192, 128, 1.965),
    "b300-sxm": (148, 1.856, 8192, 128, 1.965),
    "gb200": (152, 2.008, 8192, 128, 2.062),
    "gb300": (152, 2.008, 8192, 128, 2.062),
    "rtx-5090": (170, 2.407, 512, 128, 2.407),
    "rtx-pro-6000-server": (188, 2.43, 1024, 128, 2.43),
    "rtx-pro-6000-workstation": (188, 2.617, 1024, 128, 2.617),
    "jetson-agx-orin-64gb": (16, 1.3, 2048, 128, 1.3),
}

# Width of the memory interface in bit, Gbit/s per pin.
MEMORIES = {
    "v100-pcie": (4096, 1.752),
    "v100-sxm": (4096, 1.752),
    "v100-sxm-16gb": (4096, 1.752),
    "t4": (256, 10),
    "a10": (384, 12.5),
    "a10g": (384, 12.5),
    "a30": (3072, 2.43),
    "a40": (384, 14.5),
    "rtx-a6000": (384, 16),
    "rtx-a5000": (384, 16),
    "a100-sxm-40gb": (5120, 2.43),
    "a100-pcie-40gb": (5120, 2.43),
    "a100-sxm-80gb": (5120, 3.186),
    "a100-pcie-80gb": (5120, 3.024),
    "rtx-3070": (256, 14),
    "rtx-3080": (320, 19),
    "rtx-3080-ti": (384, 19),
    "rtx-3090": (384, 19.5),
    "l4": (192, 12.5),
    "l20": (384, 18),
    "l40s": (384, 18),
    "rtx-4070-ti": (192, 21),
    "rtx-4080": (256, 22.4),
    "rtx-4090": (384, 21),
    "rtx-4000-ada": (160, 18),
    "rtx-5000-ada": (256, 18),
    "rtx-6000-ada": (384, 20),
    "h100-sxm": (5120, 5.24),
    "h800-sxm": (5120, 5.24),
    "h100-pcie": (5120, 3.186),
    "h100-nvl": (6016, 5.24),
    "h20-sxm": (6144, 5.2),
    "h200-sxm": (6144, 6.25),
    "gh200-96gb": (6144, 5.2),
    "gh200-144gb": (6144, 6.4),
    "b200-sxm": (7680, 8.0),
    "b300-sxm": (7680, 8.0),
    "gb200": (8192, 8.0),
    "gb300": (8192, 8.0),
    "rtx-5090": (512, 28),
    "rtx-pro-6000-workstation": (512, 28),
    "rtx-pro-6000-server": (512, 25),
    "jetson-agx-orin-64gb": (256, 6.4),
}

# NVLink ports and GB/s per port and direction. Devices that are absent have no NVLink.
NVLINKS = {
    "v100-sxm": ("nvlink2", 6, 25),
    "v100-sxm-16gb": ("nvlink2", 6, 25),
    "a30": ("nvlink3", 4, 25),
    "a40": ("nvlink3", 4, 14.0625),
    "rtx-a6000": ("nvlink3", 4, 14.0625),
    "rtx-3090": ("nvlink3", 4, 14.0625),
    "a100-sxm-40gb": ("nvlink3", 12, 25),
    "a100-sxm-80gb": ("nvlink3", 12, 25),
    "a100-pcie-40gb": ("nvlink3", 12, 25),
    "a100-pcie-80gb": ("nvlink3", 12, 25),
    "h100-sxm": ("nvlink4", 18, 25),
    "h100-pcie": ("nvlink4", 12, 25),
    "h100-nvl": ("nvlink4", 12, 25),
    "h800-sxm": ("nvlink4", 8, 25),
    "h20-sxm": ("nvlink4", 18, 25),
    "h200-sxm": ("nvlink4", 18, 25),
    "gh200-96gb": ("nvlink4", 18, 25),
    "gh200-144gb": ("nvlink4", 18, 25),
    "b200-sxm": ("nvlink5", 18, 50),
    "b300-sxm": ("nvlink5", 18, 50),
    "gb200": ("nvlink5", 18, 50),
    "gb300": ("nvlink5", 18, 50),
}

# GT/s per lane, 128b/130b encoding, 16 lanes.
PCIE_RATES = {"pcie3-x16": 8, "pcie4-x16": 16, "pcie5-x16": 32}

GEFORCE = {
    "rtx-3070", "rtx-3080", "rtx-3080-ti", "rtx-3090", "rtx-4070-ti", "rtx-4080", "rtx-4090", "rtx-5090",
}  # fmt: skip

# Peaks as advertised with 2:4 sparsity.
ADVERTISED_SPARSE = {
    ("a100-sxm-80gb", "bf16"): 624e12,
    ("a100-sxm-80gb", "int8"): 1248e12,
    ("a30", "fp16"): 330e12,
    ("a40", "bf16"): 299.4e12,
    ("rtx-a6000", "fp16"): 309.7e12,
    ("h100-sxm", "bf16"): 1979e12,
    ("h100-sxm", "fp8"): 3958e12,
    ("h100-pcie", "fp8"): 3026e12,
    ("h100-nvl", "bf16"): 1671e12,
    ("l4", "fp8"): 485e12,
    ("l40s", "fp8"): 1466e12,
    ("rtx-6000-ada", "fp8"): 1457e12,
    ("rtx-4090", "int8"): 1321e12,
    ("rtx-5090", "fp4"): 3352e12,
    ("rtx-pro-6000-workstation", "fp4"): 4000e12,
    ("b200-sxm", "bf16"): 4.5e15,
    ("b200-sxm", "fp4"): 18e15,
    ("gb200", "fp8"): 10e15,
    ("jetson-agx-orin-64gb", "int8"): 170e12,
}

# Names as measurement files and people write them.
SPELLINGS = {
    "3070 8GB": "rtx-3070",
    "3080 10GB": "rtx-3080",
    "3080 Ti 12GB": "rtx-3080-ti",
    "3090 24GB": "rtx-3090",
    "4070 Ti 12GB": "rtx-4070-ti",
    "4080 16GB": "rtx-4080",
    "4090 24GB": "rtx-4090",
    "A100 PCIe 80GB": "a100-pcie-80gb",
    "A100 SXM 80GB": "a100-sxm-80gb",
    "A100-PCIe-80GB": "a100-pcie-80gb",
    "A100-SXM-40GB": "a100-sxm-40gb",
    "A100-SXM-80GB": "a100-sxm-80gb",
    "A40": "a40",
    "A40 48GB": "a40",
    "A6000": "rtx-a6000",
    "B200(SM100)": "b200-sxm",
    "B200-SXM-180GB": "b200-sxm",
    "B300-SXM-288GB": "b300-sxm",
    "GB200-186GB": "gb200",
    "GB300-288GB": "gb300",
    "GH200-144GB": "gh200-144gb",
    "GH200-96GB": "gh200-96gb",
    "H100 PCIe 80GB": "h100-pcie",
    "H100-NVL-94GB": "h100-nvl",
    "H100-SXM-80GB": "h100-sxm",
    "H100/H800(SM90)": "h100-sxm",
    "H20-SXM-96GB": "h20-sxm",
    "H200-SXM-141GB": "h200-sxm",
    "H800-SXM-80GB": "h800-sxm",
    "L40S": "l40s",
    "L40S 48GB": "l40s",
    "RTX 4000 Ada 20GB": "rtx-4000-ada",
    "RTX 5000 Ada 32GB": "rtx-5000-ada",
    "RTX 6000 Ada 48GB": "rtx-6000-ada",
    "RTX A6000 48GB": "rtx-a6000",
    "RTX-PRO-6000-Server": "rtx-pro-6000-server",
    "RTX3090": "rtx-3090",
    "RTX4090": "rtx-4090",
    "V100-PCIe-16GB": "v100-pcie",
    "h100": "h100-sxm",
    "a100": "a100-sxm-80gb",
    "a100-80gb": "a100-sxm-80gb",
    "h200": "h200-sxm",
    "b200": "b200-sxm",
    "b300": "b300-sxm",
    "gh200": "gh200-96gb",
    "v100": "v100-sxm",
    "4090": "rtx-4090",
    "Tesla T4": "t4",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
}


def compute(name: str) -> Compute:
    found = catalog.load_device(name).compute
    assert found is not None
    return found


def memory(name: str) -> Memory:
    found = catalog.load_device(name).memory
    assert found is not None
    return found


def test_tables_cover_every_file() -> None:
    assert set(NAMES) == set(PEAKS) == set(MEMORIES)


@pytest.mark.parametrize("name", NAMES)
def test_file_loads_under_its_own_name(name: str) -> None:
    device = catalog.load_device(name)
    assert (device.name, device.vendor, device.kind) == (name, "nvidia", "accelerator")


@pytest.mark.parametrize("name", NAMES)
def test_single_number_sources_name_numbers_that_exist(name: str) -> None:
    device = catalog.load_device(name)
    for path in device.number_sources:
        here: object = device
        for part in path.split("."):
            here = here.get(part) if isinstance(here, dict) else getattr(here, part, None)
        assert not isinstance(here, BaseModel | None), f"{name}: number_sources.{path} is no number"


@pytest.mark.parametrize("name", PEAKS)
def test_tensor_peak_is_sms_times_clock_times_rate(name: str) -> None:
    sms, ghz, flop, _, _ = PEAKS[name]
    found = compute(name)
    assert found.units == sms
    assert found.clock == pytest.approx(ghz * 1e9)
    assert found.matrix["fp16"] == pytest.approx(sms * ghz * 1e9 * flop, rel=0.03)


@pytest.mark.parametrize("name", [n for n in PEAKS if n != "h20-sxm"])
def test_vector_peak_is_cores_times_clock_times_two(name: str) -> None:
    sms, _, _, cores, ghz = PEAKS[name]
    assert compute(name).vector["fp32"] == pytest.approx(sms * cores * 2 * ghz * 1e9, rel=0.02)


@pytest.mark.parametrize("name", [n for n in PEAKS if not n.startswith("v100")])
def test_tensor_dtypes_keep_their_ratios(name: str) -> None:
    """Halving the width doubles the rate. GeForce halves floating point only, so INT8 is four times FP16 there;
    A10G halves both."""
    device = catalog.load_device(name)
    matrix = compute(name).matrix
    half = matrix["fp16"]
    expected = {"int8": (4 if name in GEFORCE else 2) * half}
    if name in ("b300-sxm", "gb300"):
        del expected["int8"]  # traded for FP4, see below
    if device.architecture != "turing":
        expected |= {"bf16": half, "tf32": half / 2}
    if device.architecture in ("ada", "hopper", "blackwell"):
        expected["fp8"] = 2 * half
    assert {d: matrix[d] for d in expected} == pytest.approx(expected, rel=0.02)


def test_fp8_begins_with_ada_and_bf16_with_ampere() -> None:
    for name in NAMES:
        generation = catalog.load_device(name).architecture
        assert ("fp8" in compute(name).matrix) == (generation in ("ada", "hopper", "blackwell")), name
        assert ("bf16" in compute(name).matrix) == (generation not in ("volta", "turing")), name
        assert ("fp4" in compute(name).matrix) == (generation == "blackwell"), name


@pytest.mark.parametrize(
    ("name", "times_fp8"),
    [("b200-sxm", 2), ("gb200", 2), ("rtx-pro-6000-server", 2), ("rtx-5090", 4), ("b300-sxm", 3), ("gb300", 3)],
)
def test_fp4_against_fp8(name: str, times_fp8: float) -> None:
    """Twice FP8; GeForce cuts FP8 but not FP4; Blackwell Ultra has half as much again (49152 per SM and clock)."""
    assert compute(name).matrix["fp4"] == pytest.approx(times_fp8 * compute(name).matrix["fp8"], rel=0.01)


@pytest.mark.parametrize("name", ["b300-sxm", "gb300"])
def test_blackwell_ultra_gave_up_int8_and_fp64(name: str) -> None:
    assert compute(name).matrix["int8"] < 0.1 * compute(name).matrix["bf16"]
    assert compute(name).vector["fp64"] < 0.02 * compute(name).vector["fp32"]


@pytest.mark.parametrize(("name", "dtype"), ADVERTISED_SPARSE)
def test_peaks_are_dense(name: str, dtype: str) -> None:
    """Where a sheet advertises twice the rate with structured sparsity, the file holds the other half."""
    found = dict(compute(name).matrix)
    assert 2 * found[dtype] == pytest.approx(ADVERTISED_SPARSE[name, dtype], rel=0.012)  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_only_geforce_accumulates_faster_in_fp16(name: str) -> None:
    """The fast rates, and the licence, are what sets GeForce apart."""
    found = compute(name)
    assert catalog.load_device(name).datacenter_licence == (name not in GEFORCE)
    fast = ({"fp16", "fp8"} & set(found.matrix)) if name in GEFORCE else set()
    assert set(found.matrix_reduced_accumulation) == fast
    for dtype, rate in found.matrix_reduced_accumulation.items():
        assert rate == pytest.approx(2 * found.matrix[dtype], rel=0.003)


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_bandwidth_is_width_times_pin_rate(name: str) -> None:
    bits, gbit = MEMORIES[name]
    assert memory(name).bandwidth == pytest.approx(bits * gbit * 1e9 / 8, rel=0.025)


@pytest.mark.parametrize("name", NAMES)
def test_visible_memory_is_a_little_below_the_nominal(name: str) -> None:
    """ECC in band costs 1/16 on GDDR6 cards; A10G and B300 come lowest."""
    found = memory(name)
    assert found.visible is None or 0.91 * found.capacity < found.visible <= found.capacity


@pytest.mark.parametrize("name", NAMES)
def test_nvlink_is_ports_times_rate_per_direction(name: str) -> None:
    link = catalog.load_device(name).links.get("scale_up")
    assert (link is None) == (name not in NVLINKS)
    if link is not None:
        technology, ports, gigabytes = NVLINKS[name]
        assert link.technology == technology
        assert link.bandwidth == pytest.approx(ports * gigabytes * 1e9)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "jetson-agx-orin-64gb"])
def test_host_link(name: str) -> None:
    """PCIe: 16 lanes. NVLink-C2C: 450 GB/s per direction and Grace, which two Blackwell GPUs share."""
    link = catalog.load_device(name).links["host"]
    assert isinstance(catalog.load_hardware(link.technology), Network)
    if link.technology == "nvlink-c2c":
        assert link.bandwidth == {"gh200": 450e9, "gb200": 225e9, "gb300": 225e9}[name.split("-")[0]]
    else:
        lanes = 16 * PCIE_RATES[link.technology] * 1e9 * 128 / 130 / 8
        assert link.bandwidth == pytest.approx(lanes, rel=0.002)


def test_special_functions_doubled_with_blackwell_ultra() -> None:
    """NVIDIA gives 10.7 against 5 T exponentials/s; at the clock of GB300 and GB200 that is 32 and 16 per SM."""
    ultra = {"b300-sxm", "gb300"}
    assert {n: compute(n).exp_per_unit_clock for n in NAMES} == {n: 32 if n in ultra else 16 for n in NAMES}
    for name, published in (("gb300", 10.7e12), ("gb200", 5e12)):
        found = compute(name)
        assert found.units * found.clock * (found.exp_per_unit_clock or 0) == pytest.approx(published, rel=0.1)


def test_the_same_chip_computes_the_same() -> None:
    """Memory variants of one chip at one clock share every peak; H20 is the cut one."""
    for one, other in (
        ("a100-sxm-40gb", "a100-pcie-80gb"), ("h100-sxm", "h200-sxm"), ("h100-sxm", "gh200-144gb"),
        ("v100-sxm", "v100-sxm-16gb"),
    ):  # fmt: skip
        assert compute(one).matrix == compute(other).matrix
    assert compute("h20-sxm").matrix["bf16"] < 0.16 * compute("h100-sxm").matrix["bf16"]


@pytest.mark.parametrize(("written", "name"), SPELLINGS.items())
def test_spelling_resolves(written: str, name: str) -> None:
    assert catalog.load_device(written).name == name


@pytest.mark.parametrize("name", NAMES)
def test_aliases_lead_home(name: str) -> None:
    """An alias that another file claims first would lead elsewhere."""
    for alias in catalog.load_device(name).aliases:
        assert catalog.load_hardware(alias).name == name
