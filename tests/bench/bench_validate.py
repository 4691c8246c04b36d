"""How fast rows are predicted, and how far a calibration of this machine is from what it really does. Printed, not asserted."""

from __future__ import annotations

import time
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from perfmodel import calibration, catalog
from perfmodel.validation.kinds import kind_of, predict
from perfmodel.validation.rows import Predicted
from perfmodel.validation.run import load, predict_rows

MEASURED = Path(__file__).parents[1] / "data" / "measured"


def test_rows_per_second():
    print()
    rows = load(sorted(p for p in (MEASURED / "calibrate").glob("*.csv.gz") if "memory" not in p.name))
    by_kind: dict[str, list] = {}
    for row in rows:
        by_kind.setdefault(kind_of(row).name, []).append(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, mine in by_kind.items():
            predict_rows(mine[:10])
            start = time.perf_counter()
            predict_rows(mine)
            print(f"  {name:22s} {len(mine) / (time.perf_counter() - start):9,.0f} rows/s with bands, of {len(mine):,}")


def test_this_machine(tmp_path):
    """Micro-benchmarks of two minutes, every third shape kept from the fit."""
    torch = pytest.importorskip("torch")
    from perfmodel.validation import microbench
    from perfmodel.validation.calibrate import calibrate, write

    torch.set_num_threads(1)
    microbench.run(None, budget=120.0, out=tmp_path / "rows.csv", progress=False)
    catalog.use_specs(tmp_path)
    rows = load([tmp_path / "rows.csv"])
    kept = [r for r in rows if r.text("phase") in ("gemm", "attention")][1::3]
    write(calibrate([r for r in rows if r not in kept], "this-machine"), tmp_path / "cal.yaml", today=date.today())
    calibration.use_file(tmp_path / "cal.yaml")
    ratios = [o.value / r.measured for r, o in zip(kept, predict(kept), strict=True) if isinstance(o, Predicted)]
    error = np.abs(np.log(ratios))
    print(f"\n  {len(ratios)} held-out shapes: median x{np.exp(np.median(error)):.2f}, worst x{np.exp(error.max()):.2f}")
