"""Lines of files of what serving engines say they hold per device, and what their free-text names stand for.

Their names are free text. Those that name a public model or device are resolved by the catalogue's aliases; a line
whose model is not among them is refused as `unidentified`, one whose prediction needs a setting it does not state as
`inputs not logged`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError, UnknownName
from perfmodel.spec.hardware import Device, Node
from perfmodel.spec.model import Model
from perfmodel.validation.rows import Refused, Row, cells


@dataclass(frozen=True)
class Line:
    """One start-up. Cells are as written; an empty cell means not stated."""

    file: str
    line: int
    cells: dict[str, str]

    def number(self, name: str) -> float | None:
        """A numeric cell; None where it is empty or no finite number."""
        try:
            value = float(self.cells.get(name, ""))
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def whole(self, name: str) -> int | None:
        """A cell as a positive whole number; None where it is not one."""
        value = self.number(name)
        return int(value) if value is not None and value >= 1 else None

    def noted(self, pattern: str) -> str | None:
        """What the first group of a pattern finds in the free-text note."""
        found = re.search(pattern, self.cells.get("note", ""))
        return found.group(1) if found else None

    def row(self, metric: str, value: float, unit: str) -> Row:
        """The line as a tidy row of one quantity."""
        c = self.cells
        device = self.device
        return Row(
            self.file,
            self.line,
            {
                "hardware": device.name if device else c["gpu"], "phase": "memory", "metric": metric,
                "value": repr(value), "unit": unit, "engine": calibration.known_engine(c["engine"]) or c["engine"],
                "engine_version": c["engine_version"], "model": c["model"], "dtype": c["quant"],
                "tp": c.get("tp", ""), "pp": c.get("pp", ""), "n_devices": c.get("n_gpus", ""),
            },
        )  # fmt: skip

    @property
    def device(self) -> Device | None:
        """The device the text names; None for one it does not name or the catalogue does not have."""
        return device_named(self.cells["gpu"])

    @property
    def model(self) -> Model:
        """The public model the text names. Raises Refused."""
        found = model_named(self.cells["model"])
        if found is None:
            raise Refused("unidentified model")
        return found


def read_lines(path: str | Path) -> list[Line]:
    """Every line of such a file. Raises SpecError, with the line, for a ragged one."""
    names, table = cells(Path(path))
    return [Line(Path(path).name, number, dict(zip(names, row, strict=True))) for number, row in table]


# What may follow a model's name without making it another model: its tuning, its file format, how sure the file is.
_SUFFIXES = re.compile(
    r"[-_ .:](instruct|chat|it|hf|base|sft|thinking|\d{4}|"
    r"bf16|fp16|f16|gguf|awq|gptq|int[48]|w4a16|w8a8|fp8|nvfp4|mxfp4|bnb|4bit|8bit|"
    r"q\d(_\w+)*|g(256|128|64|32)|inferred|class|unsloth|autoround|smoothquant|dynamic)$",
    re.IGNORECASE,
)


@lru_cache(maxsize=1024)
def model_named(text: str) -> Model | None:
    """The catalogue's model for a free text: as it stands, without organisation, brackets or tuning suffixes."""
    for name in _candidates(text):
        try:
            return catalog.load_model(name)
        except (UnknownName, SpecError):
            continue
    return None


@lru_cache(maxsize=1024)
def device_named(text: str) -> Device | None:
    """The catalogue's device for a free text; one that leaves a choice (`RTX 3090/4090`) names none."""
    if "/" in text:
        return None
    for name in _candidates(re.sub(r"\b(NVIDIA|AMD|GeForce|Tesla|Intel|class|inferred|derived)\b", "", text)):
        try:
            spec = catalog.load_hardware(name)
        except (UnknownName, SpecError):
            continue
        if isinstance(spec, Node):
            return catalog.load_device(spec.devices.device)
        if isinstance(spec, Device):
            return spec
    return None


def _candidates(text: str) -> list[str]:
    """Names to try, the most literal first; a text with an alternative (`A or B`, `A/B`) names nothing."""
    outside = re.sub(r"\(.*?\)", "", text).strip()
    inside = [part.split(",")[0].strip() for part in re.findall(r"\((.*?)\)", text)]
    first = [text.strip(), outside, outside.split("/")[-1], *inside, *(p.split("/")[-1] for p in inside)]
    found = list(first)
    for name in first:
        while (shorter := _SUFFIXES.sub("", name.strip())) != name.strip():
            name = shorter
            found.append(name)
    return [name for name in dict.fromkeys(found) if len(name) > 1]
