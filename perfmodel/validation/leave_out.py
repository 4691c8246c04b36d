"""Fit the law to the rows of all devices but one, and predict that one from its class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.validation.fit import fit
from perfmodel.validation.kinds import KINDS, kind_of
from perfmodel.validation.rows import Refused, Row
from perfmodel.validation.run import load, predict_rows
from perfmodel.validation.score import Scored


def fit_all(rows: Sequence[Row]) -> dict[str, float]:
    """Every parameter that the kinds of these rows move, one kind after the other, in the order of KINDS."""
    values: dict[str, float] = {}
    by_kind = defaultdict(list)
    for row in rows:
        kind = kind_of(row)
        if kind is not None and kind.parameters and _known(row):
            by_kind[kind.name].append(row)
    for kind in KINDS:
        mine = by_kind.get(kind.name, [])
        if mine:
            with calibration.replaced(values):
                values |= fit(thinned(mine, kind.rows_to_fit), kind.parameters)
    return values


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, evenly spread."""
    step = max(1, -(-len(rows) // most))
    return list(rows[::step])


def usable(rows: Sequence[Row]) -> list[Row]:
    """Rows of known hardware with a positive value."""
    return [r for r in rows if _known(r)]


def _known(row: Row) -> bool:
    try:
        return bool(row.hardware) and row.measured > 0
    except Refused:
        return False


def without(rows: Sequence[Row], device: str) -> dict[str, float]:
    """Parameter values from rows of other devices: the law refitted, the device's class as its kin have it."""
    others = [r for r in rows if _known(r) and calibration.device_behind(r.hardware) != device]
    if not others:
        raise SpecError(f"every row is of {device}: leaving it out leaves nothing to fit")
    values = fit_all(others)
    return values | inherited(values, device, {calibration.device_behind(r.hardware) for r in others})


def inherited(values: Mapping[str, float], device: str, fitted: set[str]) -> dict[str, float]:
    """Parameters of a device nobody fitted: those of its class where a member was, else the geometric mean of all others."""
    spec = catalog.load_device(device)
    kin = catalog.load_device
    gathered: dict[str, list[float]] = defaultdict(list)
    of_class: dict[str, float] = {}
    for name, value in values.items():
        group, *rest = name.split(".")
        if group not in ("architecture", "device"):
            continue
        gathered[rest[-1]].append(value)
        if (rest[0] if group == "architecture" else kin(rest[0]).architecture) == spec.architecture:
            of_class[rest[-1]] = value
    means = {key: float(np.exp(np.mean(np.log(found)))) for key, found in gathered.items()}
    # The class's own priors and a calibration of the device were made with its rows: they must not speak.
    own = {f"device.{device}.{key}": of_class.get(key, mean) for key, mean in means.items()}
    for key, found in calibration.device_parameters(spec).items():
        name = f"device.{device}.{key}"
        if found.parameter.sigma == 0:
            continue  # a fact about the generation's kernels, not a fit
        others = [x for d in sorted(fitted) if (x := _now(d, key)) is not None]
        if others and name not in own and found.evidence.startswith(("calibrated", f"class prior: {spec.architecture}")):
            own[name] = float(np.exp(np.mean(np.log(others)))) if min(others) > 0 else others[0]
    return own


def _now(device: str, key: str) -> float | None:
    """What a device has at present for a parameter, its own or the law's; None for one that only other classes have."""
    found = calibration.device_parameters(catalog.load_device(device))
    p = found[key].parameter if key in found else calibration.law().everything.get(key)
    return p.value if p else None


def leave_one_out(
    paths: Sequence[str | Path], *, flagged: bool = False, requests_per_client: int | None = None
) -> list[Scored]:
    """Every row predicted by parameters that were fitted to the rows of all other devices of these files."""
    rows = load(paths, flagged=flagged, requests_per_client=requests_per_client)
    devices: dict[str, list[Row]] = defaultdict(list)
    unknown = []
    for row in rows:
        if _known(row):
            devices[calibration.device_behind(row.hardware)].append(row)
        else:
            unknown.append(row)
    found = predict_rows(unknown)
    for device, mine in devices.items():
        with calibration.replaced(without(rows, device)):
            found += predict_rows(mine)
    return found
