"""The devices that are not NVIDIA GPUs: peaks, bandwidths and links against arithmetic written out here."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from perfmodel import catalog
from perfmodel.spec.hardware import Compute, Memory, Network

FOLDERS = ("amd", "intel", "google", "huawei", "apple", "sambanova", "cpu", "pim")
NAMES = sorted(p.stem for folder in FOLDERS for p in (catalog.root("hardware") / folder).glob("*.yaml"))

REQUIRED = {
    "mi210",
    "mi250",
    "mi300x",
    "mi325x",
    "mi355x",
    "gaudi2",
    "gaudi3",
    "max-1550",
    "arc-pro-b60",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "ascend-910b1",
    "ascend-910b2",
    "ascend-910b3",
    "ascend-910b4",
    "ascend-910c",
    "sn40l",
    "m1",
    "m1-max",
    "m2-ultra",
    "m3-max",
    "m4-max",
    "xeon-8480-plus",
    "xeon-8380",
    "epyc-7742",
    "epyc-9654",
    "grace",
    "kunpeng-920",
    "hbm-pim",
    "gddr6-aim",
}

# Device, unit kind and dtype: units, clock in GHz, operations per unit and clock (a multiply-add is two).
PEAKS = [
    ("mi210", "matrix", "fp16", 104, 1.7, 1024),
    ("mi210", "vector", "fp32", 104, 1.7, 64 * 2),
    ("mi250", "matrix", "bf16", 208, 1.7, 1024),
    ("mi250", "matrix", "fp64", 208, 1.7, 256),
    ("mi300x", "matrix", "bf16", 304, 2.1, 2048),
    ("mi300x", "matrix", "tf32", 304, 2.1, 1024),
    ("mi300x", "matrix", "fp8", 304, 2.1, 4096),
    ("mi300x", "vector", "fp32", 304, 2.1, 256),
    ("mi300x", "vector", "fp64", 304, 2.1, 128),
    ("mi325x", "matrix", "int8", 304, 2.1, 4096),
    ("mi355x", "matrix", "bf16", 256, 2.4, 4096),
    ("mi355x", "matrix", "fp8", 256, 2.4, 8192),
    ("mi355x", "matrix", "fp4", 256, 2.4, 16384),
    ("mi355x", "vector", "fp32", 256, 2.4, 256),
    # Gaudi: engines of 256 x 256 multiply-adds.
    ("gaudi2", "matrix", "bf16", 2, 1.65, 256 * 256 * 2),
    ("gaudi3", "matrix", "bf16", 8, 1.75, 256 * 256 * 2),
    # Xe HPC: 8 matrix engines of 512 FP16 operations per Xe core; Xe2: 2048 per core.
    ("max-1550", "matrix", "fp16", 128, 1.6, 8 * 512),
    ("max-1550", "matrix", "int8", 128, 1.6, 8 * 1024),
    ("max-1550", "vector", "fp32", 128, 1.6, 8 * 16 * 2),
    ("arc-pro-b60", "matrix", "fp16", 20, 2.4, 2048),
    ("arc-pro-b60", "matrix", "int8", 20, 2.4, 4096),
    ("arc-pro-b60", "vector", "fp32", 20, 2.4, 8 * 16 * 2),
    # TPU: systolic arrays of 128 x 128, from v6 of 256 x 256.
    ("tpu-v4", "matrix", "bf16", 8, 1.05, 128 * 128 * 2),
    ("tpu-v5e", "matrix", "bf16", 4, 1.5, 128 * 128 * 2),
    ("tpu-v5e", "matrix", "int8", 4, 1.5, 128 * 128 * 4),
    ("tpu-v5p", "matrix", "bf16", 8, 1.75, 128 * 128 * 2),
    ("tpu-v6e", "matrix", "bf16", 4, 1.75, 256 * 256 * 2),
    ("tpu-v6e", "matrix", "int8", 4, 1.75, 256 * 256 * 4),
    # Ascend: one 16 x 16 x 16 cube per core, INT8 with K of 32; two vector cores of 128 FP16 lanes per cube.
    ("ascend-910b1", "matrix", "bf16", 24, 1.85, 16**3 * 2),
    ("ascend-910b2", "matrix", "fp16", 24, 1.8, 16**3 * 2),
    ("ascend-910b2", "vector", "fp16", 24, 1.8, 2 * 128 * 2),
    ("ascend-910b3", "matrix", "bf16", 20, 1.8, 16**3 * 2),
    ("ascend-910b3", "matrix", "int8", 20, 1.8, 16 * 32 * 16 * 2),
    ("ascend-910b4", "matrix", "bf16", 20, 1.5, 16**3 * 2),
    ("ascend-910b4-1", "matrix", "bf16", 20, 1.5, 16**3 * 2),
    ("ascend-910c", "matrix", "bf16", 48, 1.8, 16**3 * 2),
    ("ascend-910c", "vector", "fp32", 48, 1.8, 2 * 64 * 2),
    # Apple: 128 ALUs per GPU core, one multiply-add each.
    ("m1", "vector", "fp32", 7, 1.278, 256),
    ("m1-max", "vector", "fp32", 32, 1.296, 256),
    ("m2-ultra", "vector", "fp32", 76, 1.398, 256),
    ("m3-max", "vector", "fp32", 40, 1.38, 256),
    ("m4-max", "vector", "fp32", 40, 1.578, 256),
    # CPUs: SIMD units x lanes x 2; AMX 16 x 16 x 32 BF16 multiply-adds every 16 cycles.
    ("xeon-8480-plus", "matrix", "bf16", 56, 2.0, 16 * 16 * 32 * 2 / 16),
    ("xeon-8480-plus", "matrix", "int8", 56, 2.0, 16 * 16 * 64 * 2 / 16),
    ("xeon-8480-plus", "vector", "fp32", 56, 2.0, 2 * 16 * 2),
    ("xeon-8380", "vector", "fp32", 40, 2.3, 2 * 16 * 2),
    ("epyc-7742", "vector", "fp32", 64, 2.25, 2 * 8 * 2),
    ("epyc-9654", "vector", "fp32", 96, 2.4, 2 * 8 * 2),
    ("epyc-9654", "vector", "bf16", 96, 2.4, 2 * 16 * 2),
    ("grace", "vector", "fp32", 72, 3.1, 4 * 4 * 2),
    ("kunpeng-920", "vector", "fp32", 64, 2.6, 2 * 4 * 2),
    ("hbm-pim", "vector", "fp16", 128, 0.3, 16 * 2),
    ("gddr6-aim", "matrix", "bf16", 32, 1.0, 16 * 2),
]

# Device: width of the memory interface in bit, Gbit/s per pin, tolerance (vendors round to 2 digits).
MEMORIES = [
    ("mi210", 4 * 1024, 3.2, 0.001),
    ("mi250", 8 * 1024, 3.2, 0.001),
    ("mi300x", 8 * 1024, 5.2, 0.01),
    ("mi325x", 8 * 1024, 6.0, 0.03),
    ("mi355x", 8 * 1024, 8.0, 0.03),
    ("gaudi2", 6 * 1024, 3.2, 0.002),
    ("gaudi3", 8 * 1024, 3.6, 0.01),
    ("max-1550", 8 * 1024, 3.2, 0.001),
    ("arc-pro-b60", 192, 19.0, 0.001),
    ("tpu-v6e", 2 * 1024, 6.4, 0.002),
    ("ascend-910b3", 4 * 1024, 3.2, 0.03),
    ("ascend-910b4", 2 * 1024, 3.2, 0.03),
    ("ascend-910c", 8 * 1024, 3.2, 0.03),
    ("m1", 128, 4.2667, 0.002),
    ("m1-max", 512, 6.4, 0.001),
    ("m2-ultra", 1024, 6.4, 0.001),
    ("m3-max", 512, 6.4, 0.001),
    ("m4-max", 512, 8.533, 0.001),
    ("xeon-8480-plus", 8 * 64, 4.8, 0.001),
    ("xeon-8380", 8 * 64, 3.2, 0.001),
    ("epyc-7742", 8 * 64, 3.2, 0.001),
    ("epyc-9654", 12 * 64, 4.8, 0.001),
    ("grace", 512, 6.0, 0.001),
    ("kunpeng-920", 8 * 64, 2.933, 0.001),
    # Inside the memory: four times the interface; 32 banks of 256 bit at 1 GHz.
    ("hbm-pim", 4 * 1024, 2.4, 0.002),
    ("gddr6-aim", 32 * 256, 1.0, 0.01),
]

# Device, role: ports x GB/s per port and direction.
LINKS = [
    ("mi210", "scale_up", 3, 25 * 2),
    ("mi250", "scale_up", 6, 25 * 2),
    ("mi300x", "scale_up", 7, 16 * 32 / 8),
    ("mi325x", "scale_up", 7, 16 * 32 / 8),
    ("mi355x", "scale_up", 7, 16 * 38.4 / 8),
    ("gaudi2", "scale_up", 21, 100 / 8),
    ("gaudi3", "scale_up", 21, 200 / 8),
    ("max-1550", "scale_up", 16, 4 * 53 / 8),
    ("tpu-v4", "scale_up", 6, 50),
    ("tpu-v5e", "scale_up", 4, 50),
    ("tpu-v5p", "scale_up", 6, 100),
    ("tpu-v6e", "scale_up", 4, 100),
    ("ascend-910b2", "scale_up", 7, 56 / 2),
    ("ascend-910c", "scale_up", 2, 7 * 56 / 2),
    ("grace", "scale_up", 1, 900 / 2),
    ("mi300x", "host", 16, 32 * 128 / 130 / 8),
    ("mi250", "host", 2 * 16, 16 * 128 / 130 / 8),
    ("arc-pro-b60", "host", 8, 32 * 128 / 130 / 8),
    ("hbm-pim", "host", 1024, 2.4 / 8),
    ("gddr6-aim", "host", 32, 16 / 8),
]

# Names as measurement files and people write them.
SPELLINGS = {
    "MI210": "mi210",
    "MI250": "mi250",
    "MI300X": "mi300x",
    "mi300": "mi300x",
    "AMD Instinct MI325X": "mi325x",
    "MI355": "mi355x",
    "Gaudi2": "gaudi2",
    "gaudi-2": "gaudi2",
    "Intel Gaudi 3": "gaudi3",
    "Max1550": "max-1550",
    "Intel Data Center GPU Max 1550": "max-1550",
    "Arc-Pro-B60": "arc-pro-b60",
    "TPU-v6e": "tpu-v6e",
    "Trillium": "tpu-v6e",
    "TPU v5e": "tpu-v5e",
    "tpu_v5p": "tpu-v5p",
    "Cloud TPU v4": "tpu-v4",
    "Ascend-910B": "ascend-910b3",
    "Ascend-910B (Atlas 800I A2)": "ascend-910b4-1",
    "Ascend-910B2": "ascend-910b2",
    "Ascend-910C (Atlas 800I A3, 2 dies/card)": "ascend-910c",
    "Ascend-910C (CloudMatrix384)": "ascend-910c",
    "Ascend (A3)": "ascend-910c",
    "SN40L": "sn40l",
    "M1 7-Core GPU 8GB": "m1",
    "M1 Max 32-Core GPU 64GB": "m1-max",
    "M2 Ultra 76-Core GPU 192GB": "m2-ultra",
    "M3 Max 40-Core GPU 64GB": "m3-max",
    "Apple M4 Max": "m4-max",
    "Xeon Platinum 8480+": "xeon-8480-plus",
    "Xeon 8480C": "xeon-8480-plus",
    "AMD EPYC 7742": "epyc-7742",
    "AMD EPYC 9654": "epyc-9654",
    "NVIDIA Grace": "grace",
    "Kunpeng 920": "kunpeng-920",
    "Aquabolt-XL": "hbm-pim",
    "SK hynix AiM": "gddr6-aim",
}


def compute(name: str) -> Compute:
    found = catalog.load_device(name).compute
    assert found is not None
    return found


def memory(name: str) -> Memory:
    found = catalog.load_device(name).memory
    assert found is not None
    return found


def peak(name: str, section: str, dtype: str) -> float:
    return float(getattr(compute(name), section)[dtype])


def test_every_wanted_device_is_there() -> None:
    assert set(NAMES) >= REQUIRED


@pytest.mark.parametrize("name", NAMES)
def test_file_loads_under_its_own_name(name: str) -> None:
    device = catalog.load_device(name)
    assert device.name == name
    assert compute(name).vector["fp32"] > 0
    folder = Path(catalog.find("hardware", name)).parent.name
    assert device.kind == (folder if folder in ("cpu", "pim") else "accelerator")


@pytest.mark.parametrize("name", NAMES)
def test_single_number_sources_name_numbers_that_exist(name: str) -> None:
    device = catalog.load_device(name)
    for path in device.number_sources:
        here: object = device
        for part in path.split("."):
            here = here.get(part) if isinstance(here, dict) else getattr(here, part, None)
        assert not isinstance(here, BaseModel | None), f"{name}: number_sources.{path} is no number"


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hbm-pim", "gddr6-aim")])
def test_link_technologies_are_catalogue_networks(name: str) -> None:
    for link in catalog.load_device(name).links.values():
        assert isinstance(catalog.load_hardware(link.technology), Network)


@pytest.mark.parametrize(("name", "section", "dtype", "units", "ghz", "operations"), PEAKS)
def test_peak_is_units_times_clock_times_rate(
    name: str, section: str, dtype: str, units: int, ghz: float, operations: float
) -> None:
    assert compute(name).units == units
    assert compute(name).clock == pytest.approx(ghz * 1e9)
    assert peak(name, section, dtype) == pytest.approx(units * ghz * 1e9 * operations, rel=0.025)


@pytest.mark.parametrize(("name", "bits", "gbit_per_pin", "tolerance"), MEMORIES)
def test_memory_bandwidth_is_width_times_pin_rate(name: str, bits: int, gbit_per_pin: float, tolerance: float) -> None:
    assert memory(name).bandwidth == pytest.approx(bits * gbit_per_pin * 1e9 / 8, rel=tolerance)


@pytest.mark.parametrize(("name", "role", "ports", "gigabytes"), LINKS)
def test_link_bandwidth_is_per_direction_over_all_ports(name: str, role: str, ports: int, gigabytes: float) -> None:
    assert catalog.load_device(name).links[role].bandwidth == pytest.approx(ports * gigabytes * 1e9, rel=0.005)


@pytest.mark.parametrize(("written", "name"), SPELLINGS.items())
def test_spelling_resolves(written: str, name: str) -> None:
    assert catalog.load_device(written).name == name


@pytest.mark.parametrize("name", NAMES)
def test_aliases_lead_home(name: str) -> None:
    """An alias that another file claims first would lead elsewhere."""
    for alias in catalog.load_device(name).aliases:
        assert catalog.load_hardware(alias).name == name


@pytest.mark.parametrize(
    ("name", "sold"), [("ascend-910b2", 376e12), ("ascend-910b3", 313e12), ("ascend-910c", 752e12)]
)
def test_ascend_sold_figure_is_matrix_plus_vector(name: str, sold: float) -> None:
    """Huawei's headline counts both kinds of core, so the matrix peak alone must be lower by the vector part."""
    assert peak(name, "matrix", "fp16") + peak(name, "vector", "fp16") == pytest.approx(sold, rel=0.003)


@pytest.mark.parametrize(
    ("name", "chips", "dtype", "pod"),
    [
        ("tpu-v4", 4096, "bf16", 1.1e18),
        ("tpu-v5e", 256, "bf16", 50.63e15),
        ("tpu-v5e", 256, "int8", 100e15),
        ("tpu-v6e", 256, "bf16", 234.9e15),
    ],
)
def test_tpu_chips_add_up_to_the_published_pod(name: str, chips: int, dtype: str, pod: float) -> None:
    assert chips * peak(name, "matrix", dtype) == pytest.approx(pod, rel=0.025)


def test_sn40l_sockets_add_up_to_the_published_node() -> None:
    """Hot Chips 2024: 16 sockets have 1 TB of HBM at 25.6 TB/s and 8 GB of SRAM."""
    cache = catalog.load_device("sn40l").cache
    assert cache is not None
    assert 16 * memory("sn40l").bandwidth == pytest.approx(25.6e12)
    assert 16 * memory("sn40l").capacity == 2**40
    assert 16 * cache.capacity == pytest.approx(8 * 2**30, rel=0.02)


def test_peaks_are_dense() -> None:
    """Where a vendor advertises twice the rate with structured sparsity, the file holds the other half."""
    advertised_sparse = {
        ("mi300x", "fp8"): 5229.8e12,
        ("mi300x", "bf16"): 2614.9e12,
        ("mi355x", "fp8"): 10.1e15,
    }
    for (name, dtype), sparse in advertised_sparse.items():
        assert 2 * peak(name, "matrix", dtype) == pytest.approx(sparse, rel=0.01)


@pytest.mark.parametrize(("die", "module"), [("mi210", "mi250"), ("ascend-910b2", "ascend-910c")])
def test_two_die_devices_are_twice_one_die(die: str, module: str) -> None:
    assert compute(module).units == 2 * compute(die).units
    assert memory(module).capacity == 2 * memory(die).capacity
    assert memory(module).bandwidth == 2 * memory(die).bandwidth


def test_stacked_and_soldered_memories_are_binary() -> None:
    gib = {"mi300x": 192, "mi355x": 288, "gaudi3": 128, "tpu-v4": 32, "ascend-910b2": 64, "m2-ultra": 192}
    assert {name: memory(name).capacity / 2**30 for name in gib} == gib
