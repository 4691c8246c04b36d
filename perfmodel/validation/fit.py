"""Fit parameters to measured rows: robust least squares on the logarithm of predicted over measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.machine import achieved
from perfmodel.validation.kinds import predict
from perfmodel.validation.kinds.base import without_bands
from perfmodel.validation.rows import Predicted, Row

_LOSS_SCALE = 0.1  # errors of the logarithm beyond which a row counts less than its square
_ENOUGH, _FEW_ROWS_NOISE = 10, 0.05
_WIDEST = 8.0  # a fit may move a parameter by this factor at most


def expand(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Full parameter names: `*` stands for every class, device or engine that occurs in the rows.

    The classes of `memory.*` and `link.*` are those of the rows' devices.
    """
    devices = sorted({r.hardware for r in rows})
    specs = [catalog.load_device(d) for d in devices]
    found = {
        "device": devices,
        "architecture": sorted({s.architecture for s in specs}),
        "memory": sorted({calibration.memory_class(s.memory.technology) for s in specs if s.memory}),
        "engine": sorted({e for r in rows if (e := calibration.known_engine(r.text("engine")))}),
    }
    full = []
    for name in names:
        group = name.split(".")[0]
        full += [name.replace("*", x) for x in found[group]] if "*" in name else [name]
    return full


def current(name: str) -> float:
    """Value of a parameter by its full name, as resolved now. Raises SpecError for an unknown one."""
    group, *rest = name.split(".")
    law = calibration.law().everything
    key = rest[-1]
    table: Mapping[str, object]
    match group:
        case "law":
            table = law
        case "engine":
            table = {**law, **calibration.engine(rest[0]).parameters}
        case "device":
            node = catalog.node_of(rest[0])
            found = achieved(catalog.load_device(rest[0]), catalog.load_node(node) if node else None)
            # What only engines have (a host's time for a call) may become a device's own.
            engines = [calibration.engine(name).parameters for name in calibration.engine_names()]
            table = {k: p for e in engines for k, p in e.items()} | law | {k: v.parameter for k, v in found.items()}
        case "architecture" | "memory" | "link" | "power":
            table = {**law, **getattr(calibration.classes(), group).get(rest[0], {})}
        case _:
            table = {}
    if key not in table:
        raise SpecError(f"no parameter {name!r} to fit")
    return float(table[key].value)  # type: ignore[attr-defined]


def log_errors(rows: Sequence[Row]) -> np.ndarray:
    """ln(predicted / measured) of each row; NaN where it is refused."""
    with without_bands():
        outcomes = predict(rows)
    return np.array([
        np.log(o.value / r.measured) if isinstance(o, Predicted) else np.nan for r, o in zip(rows, outcomes, strict=True)
    ])  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """Outcome of a fit. `sigma`: standard deviation of each parameter's logarithm; `scatter`: of the rows around the fit."""

    values: dict[str, float]
    sigma: dict[str, float]
    scatter: float
    rows: int


def fit(rows: Sequence[Row], names: Sequence[str], *, evaluations: int = 30) -> dict[str, float]:
    """Values of parameters that make ln(predicted/measured) small; see `solve`."""
    return solve(rows, names, evaluations=evaluations).values


def solve(
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    prior: Mapping[str, float] | None = None,
    evaluations: int = 30,
    most: float = _WIDEST,
) -> Fitted:
    """Fit parameters with soft-L1 loss beyond an error of 0.1, each within x1/most to x most of its present value.

    names: full or with `*` (see `expand`). prior: sigma of the logarithm around the present value, by full name; with it
    few rows move only what they inform. Raises SpecError when no row can be predicted.
    """
    from scipy.optimize import least_squares

    full = expand(names, rows)
    start = np.array([current(n) for n in full])
    usable = np.isfinite(log_errors(rows))
    if not usable.any():
        raise SpecError("none of the rows can be predicted, so nothing can be fitted")
    chosen = [r for r, ok in zip(rows, usable, strict=True) if ok]
    known = np.array([prior[n] for n in full]) if prior else np.array([])

    def residuals(x: np.ndarray) -> np.ndarray:
        with calibration.replaced(dict(zip(full, (start * np.exp(x)).tolist(), strict=True))):
            errors = np.nan_to_num(log_errors(chosen), nan=1.0)
        return np.concatenate([errors, _LOSS_SCALE * x / known]) if prior else errors

    limit = np.log(most)
    found = least_squares(
        residuals, np.zeros(len(full)), bounds=(-limit, limit), loss="soft_l1", f_scale=_LOSS_SCALE, diff_step=0.02,
        max_nfev=evaluations, x_scale=0.3,
    )  # fmt: skip
    left = residuals(found.x)[: len(chosen)]
    scatter = float(1.4826 * np.median(np.abs(left - np.median(left))))
    # Gauss-Newton covariance of the weighted problem; parameters no row feels keep their prior or stay unknown.
    # So few rows say little of their own scatter.
    noise = max(scatter, 0.01) if len(chosen) >= _ENOUGH else max(scatter, _FEW_ROWS_NOISE)
    information = found.jac.T @ found.jac / noise**2
    if prior:
        information[np.diag_indices_from(information)] += 1 / known**2 - (_LOSS_SCALE / known / noise) ** 2
    spread = np.sqrt(np.clip(np.diag(np.linalg.pinv(information)), 0.0, 4.0))
    names_and = dict(zip(full, (start * np.exp(found.x)).tolist(), strict=True))
    return Fitted(names_and, dict(zip(full, spread.tolist(), strict=True)), scatter, len(chosen))
