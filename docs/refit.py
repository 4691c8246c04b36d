"""Refit what scores are made from: five folds for cross-validation, and one set for each device left out.

    python docs/refit.py [KIND ...]     all kinds of rows, or those named; takes about half an hour on two cores

Reads tests/data/measured/calibrate, writes tests/data/folds.yaml and hardware/calibrations/without/DEVICE.yaml. The
parameters the catalogue uses are not touched: they are chosen by hand from such fits, rounded, and entered with a source.
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from perfmodel import calibration
from perfmodel.validation.fit import fit
from perfmodel.validation.folds import FOLDS, training
from perfmodel.validation.kinds import KINDS
from perfmodel.validation.leave_out import inherited, thinned, usable
from perfmodel.validation.run import load

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "tests" / "data" / "measured" / "calibrate"
WITHOUT = ROOT / "hardware" / "calibrations" / "without"


def one(job: tuple[str, str]) -> tuple[tuple[str, str], dict[str, float], int]:
    """Fit one kind without one fold (`0`-`4`) or without one device."""
    kind_name, left_out = job
    warnings.simplefilter("ignore")
    kind = next(k for k in KINDS if k.name == kind_name)
    rows = [
        r
        for r in usable(load(sorted(p for p in MEASURED.glob("*.csv.gz") if "memory" not in p.name)))
        if kind.claims(r)
    ]
    rows = [r for r in rows if next(k for k in KINDS if k.claims(r)) is kind]
    if left_out.isdigit():
        rows = training(rows, kind, int(left_out))
    else:
        rows = [r for r in rows if calibration.device_behind(r.hardware) != left_out]
    return job, (fit(thinned(rows, kind.rows_to_fit), kind.parameters, evaluations=8) if rows else {}), len(rows)


def main(names: list[str]) -> int:
    """Fit, and write both kinds of files."""
    kinds = [k for k in KINDS if k.parameters and (not names or k.name in names)]
    devices = sorted({calibration.device_behind(r.hardware) for r in usable(load(sorted(MEASURED.glob("aic_gemm*"))))})
    jobs = [(k.name, x) for k in kinds for x in [*map(str, range(FOLDS)), *devices]]
    found: dict[tuple[str, str], tuple[dict[str, float], int]] = {}
    with ProcessPoolExecutor(2) as pool:
        for job, values, rows in pool.map(one, jobs):
            found[job] = values, rows
            print(*job, rows, "rows", {k: f"{v:.3g}" for k, v in values.items()}, flush=True)  # noqa: T201
    _write_folds({k: v for k, (v, _) in found.items()})
    for device in devices:
        _write_without(device, set(devices) - {device}, {k: v for k, v in found.items() if k[1] == device})
    return 0


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.4g}") for k, v in sorted(values.items())}


def _write_folds(found: dict[tuple[str, str], dict[str, float]]) -> None:
    path = ROOT / "tests" / "data" / "folds.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for (kind, fold), values in found.items():
        if fold.isdigit():
            document.setdefault(kind, {})[int(fold)] = _rounded(values)
    path.write_text(yaml.safe_dump(document, sort_keys=True), encoding="utf-8")


def _write_without(device: str, others: set[str], found: dict[tuple[str, str], tuple[dict[str, float], int]]) -> None:
    path = WITHOUT / f"{device}.yaml"
    values: dict[str, float] = dict(calibration.fitted_without(device))
    for fitted, _ in found.values():
        values |= fitted
    values |= inherited(values, device, others)
    document = {
        "kind": "without", "device": device, "date": date.today().isoformat(), "rows": sum(n for _, n in found.values()),
        "parameters": _rounded(values),
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
