"""Refit what scores are made from: five folds for cross-validation, and one set for each device left out.

    python docs/refit.py [KIND ...]     all kinds of rows, or those named; takes about half an hour on two cores

Reads tests/data/measured/calibrate, writes tests/data/folds.yaml and hardware/calibrations/without/DEVICE.yaml. The
parameters the catalogue uses are not touched: they are chosen by hand from such fits, rounded, and entered with a source.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from perfmodel import calibration
from perfmodel.validation.fit import fit
from perfmodel.validation.folds import FOLDS, training
from perfmodel.validation.kinds import KINDS, kind_of
from perfmodel.validation.leave_out import inherited, thinned, usable
from perfmodel.validation.rows import Row
from perfmodel.validation.run import load

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "tests" / "data" / "measured" / "calibrate"
FOLDS_FILE = ROOT / "tests" / "data" / "folds.yaml"
WITHOUT = ROOT / "hardware" / "calibrations" / "without"
_EVALUATIONS = 8


def measured() -> list[Row]:
    """Every row that may be fitted."""
    return usable(load(sorted(p for p in MEASURED.glob("*.csv.gz") if "memory" not in p.name)))


def one(job: tuple[str, str]) -> tuple[tuple[str, str], dict[str, float]]:
    """Fit one kind without one fold (`0` to `4`) or without one device."""
    kind_name, left_out = job
    warnings.simplefilter("ignore")
    kind = next(k for k in KINDS if k.name == kind_name)
    rows = [r for r in measured() if kind_of(r) is kind]
    if left_out.isdigit():
        rows = training(rows, kind, int(left_out))
    else:
        rows = [r for r in rows if calibration.device_behind(r.hardware) != left_out]
    if not rows:
        return job, {}
    return job, fit(thinned(rows, kind.rows_to_fit), kind.parameters, evaluations=_EVALUATIONS)


def main(names: list[str]) -> int:
    """Fit, and write both kinds of files."""
    kinds = [k for k in KINDS if k.parameters and (not names or k.name in names)]
    rows = measured()
    devices = sorted({calibration.device_behind(r.hardware) for r in rows})
    jobs = [(k.name, x) for k in kinds for x in [*map(str, range(FOLDS)), *devices]]
    found: dict[tuple[str, str], dict[str, float]] = {}
    with ProcessPoolExecutor(2) as pool:
        for job, values in pool.map(one, jobs):
            found[job] = values
            print(*job, {k: f"{v:.3g}" for k, v in values.items()}, flush=True)  # noqa: T201
    _write_folds(found)
    for device in devices:
        others = sum(calibration.device_behind(r.hardware) != device for r in rows)
        _write_without(device, set(devices) - {device}, [v for (_, x), v in found.items() if x == device], others)
    return 0


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.4g}") for k, v in sorted(values.items())}


def _write_folds(found: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    document: dict[str, Any] = yaml.safe_load(FOLDS_FILE.read_text(encoding="utf-8")) if FOLDS_FILE.is_file() else {}
    for (kind, fold), values in found.items():
        if fold.isdigit():
            document.setdefault(kind, {})[int(fold)] = _rounded(values)
    FOLDS_FILE.write_text(yaml.safe_dump(document, sort_keys=True), encoding="utf-8")


def _write_without(device: str, others: set[str], found: Iterable[Mapping[str, float]], rows: int) -> None:
    """Add these values to what was fitted without a device, and what the device inherits from the others."""
    values: dict[str, float] = dict(calibration.fitted_without(device))
    for fitted in found:
        values |= fitted
    values |= inherited(values, device, others)
    document = {
        "kind": "without", "device": device, "date": date.today().isoformat(), "rows": rows, "parameters": _rounded(values),
    }  # fmt: skip
    WITHOUT.mkdir(exist_ok=True)
    (WITHOUT / f"{device}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
