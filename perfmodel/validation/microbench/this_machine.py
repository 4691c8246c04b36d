"""What this machine says of itself: a device file for a CPU that no datasheet in the catalogue describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# FP32 operations per core and clock of two fused multiply-add units.
_LANES = (("avx512f", 64), ("avx2", 32), ("asimd", 16))
NAME = "this-machine"


def describe(today: str, bandwidth: float, cores: int) -> dict[str, Any]:
    """A device spec read off this machine: the `cores` that PyTorch uses.

    bandwidth [B/s] is what was measured, for no interface tells the nominal one.
    """
    text = _read("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", _field(text, "flags") or _field(text, "Features")))
    per_clock = next((n for flag, n in _LANES if flag in flags), 8)
    clock = _clock(text)
    memory = _field(_read("/proc/meminfo"), "MemTotal").removesuffix(" kB")
    matrix = {"bf16": f"{cores * clock * 1024 / 1e9:g} GFLOP/s"} if "amx_bf16" in flags else {}
    installed = float(memory) * 1024 if memory else 8e9
    return {
        "name": NAME, "title": _field(text, "model name") or "This machine", "vendor": "this machine", "kind": "cpu",
        "architecture": "cpu", "form_factor": "socket",
        "compute": {
            "source": "machine", "matrix": matrix, "vector": {"fp32": f"{cores * clock * per_clock / 1e9:g} GFLOP/s"},
            "units": cores, "unit_name": "core", "clock": f"{clock / 1e9:g} GHz",
        },
        "memory": {
            "source": "machine", "technology": "ddr4", "capacity": f"{installed / 1e9:.3f} GB", "ecc": False,
            "bandwidth": f"{bandwidth / 1e9:.2f} GB/s",
        },
        "cache": {"source": "machine", "name": "l3", "capacity": f"{cache_bytes() / 2**20:g} MiB"},
        "sources": {
            "machine": {"title": "Read off the machine itself; bandwidth: the fastest stream measured on it", "date": today},
        },
    }  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _clock(text: str) -> float:
    """Nominal clock [Hz]: the brand string's, else the present one, else 2.5 GHz."""
    named = re.search(r"@\s*([\d.]+)\s*GHz", _field(text, "model name"))
    if named:
        return float(named.group(1)) * 1e9
    present = _field(text, "cpu MHz")
    return float(present) * 1e6 if present else 2.5e9


def cache_bytes() -> float:
    """Last-level cache of the first core [byte]; 32 MiB where the system does not say."""
    sizes = [_read(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size").strip() for i in range(5)]
    scale = {"K": 2**10, "M": 2**20}
    found = [float(s[:-1]) * scale[s[-1]] for s in sizes if s and s[-1] in scale]
    return max(found, default=32 * 2.0**20)
