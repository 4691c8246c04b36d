"""Fit one device to measured rows and keep the result as a calibration file."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import yaml

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.machine import achieved
from perfmodel.spec.calibration import Parameter
from perfmodel.validation.fit import Fitted, log_errors, solve
from perfmodel.validation.kinds import kind_of
from perfmodel.validation.rows import Refused, Row

_FEWEST = 3
_FEWEST_TO_HOLD_BACK = 10
_NOISIEST = 0.25  # standard deviation of the logarithm between repeats of one configuration
_WIDEST_SCATTER = 0.6  # of the rows around the fitted law
_MOVED = 0.25  # or when they move it by this share of its prior's sigma
_INFORMED = 0.8  # a parameter is kept when the rows narrow its prior at least to this share
_NOT_A_CONFIGURATION = ("value", "unit", "flag", "note", "source_repo", "source_path", "source_commit", "std", "id")
_MOST_PARAMETERS = 12
_SERVING = ("closed-loop serving", "static batch", "offline throughput")
# How far one stack (release, settings, host) lies from its engine's typical numbers: sigma of the logarithm.
_STACKS_DIFFER = {"queued_launch": 0.5, "host_base": 1.0, "host_per_sequence": 0.7, "bandwidth_efficiency": 0.15}
_SUREST = 0.05  # narrower priors are widened to this: a device may differ from its class by as much
_EVERY_DEVICE = (
    "matrix_efficiency", "attention_efficiency", "vector_efficiency", "kernel_latency", "bandwidth_efficiency",
    "memory_latency", "cache_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a calibration did: errors are |predicted/measured - 1|."""

    device: str
    stack: str
    fitted: Fitted
    kept: dict[str, tuple[float, float, float]]
    """Parameter -> (prior, fitted, sigma of the logarithm)."""
    uninformed: tuple[str, ...]
    kinds: dict[str, tuple[int, float, float]]
    """Kind -> (rows, median error before, after)."""
    held_back: tuple[int, float, float] | None
    """(rows, median error before, after) of the rows no fit saw."""
    ignored: dict[str, int]


def calibrate(rows: Sequence[Row], hardware: str, *, seed: int = 0) -> Report:
    """Fit the parameters of `hardware` that these rows inform.

    Rows of other hardware and rows no law predicts are ignored, with counts. A fifth is held back (where there are ten
    or more). Raises SpecError when the rows are too few or too noisy, naming what is missing.
    """
    device = calibration.device_behind(hardware)
    usable, ignored = _usable(rows, device)
    if len(usable) < _FEWEST:
        raise SpecError(
            f"{len(usable)} usable rows of {device}, and a calibration needs at least {_FEWEST}"
            + (f" (ignored: {', '.join(f'{n} {why}' for why, n in ignored.items())})" if ignored else "")
            + "; measure some with `perfmodel calibrate --measure`, or convert benchmark output with `perfmodel ingest`"
        )
    _check_noise(usable)
    priors = _priors(usable, device)
    names = list(priors)
    start = {n: value for n, (value, _) in priors.items()}
    prior = {n: sigma for n, (_, sigma) in priors.items()}
    held = (
        set(random.Random(seed).sample(range(len(usable)), len(usable) // 5))
        if len(usable) >= _FEWEST_TO_HOLD_BACK
        else set()
    )
    training = [r for i, r in enumerate(usable) if i not in held]
    before = np.abs(np.expm1(log_errors(usable)))
    with calibration.replaced(start):
        found = solve(training, names, prior=prior)
    if found.scatter > _WIDEST_SCATTER:
        raise SpecError(
            f"the rows of {device} scatter by x{np.exp(found.scatter):.1f} around any setting of the law: check that their "
            "units, shapes and degrees are right, and that the clock was locked or warm"
        )
    moved = {n: abs(np.log(found.values[n] / start[n])) for n in names}
    informed = [n for n in names if found.sigma[n] < _INFORMED * prior[n] or moved[n] > _MOVED * prior[n]]
    with calibration.replaced({n: found.values[n] for n in informed}):
        after = np.abs(np.expm1(log_errors(usable)))
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(usable):
        kind = kind_of(row)
        kinds[kind.name if kind else ""].append(i)
    back = sorted(held)
    return Report(
        device,
        ", ".join(sorted({r.text("engine") or "unnamed" for r in usable})),
        found,
        {n.split(".")[-1]: (start[n], found.values[n], found.sigma[n]) for n in informed},
        tuple(n.split(".")[-1] for n in names if n not in informed),
        {k: (len(m), float(np.median(before[m])), float(np.median(after[m]))) for k, m in kinds.items()},
        (len(back), float(np.median(before[back])), float(np.median(after[back]))) if back else None,
        ignored,
    )


def _usable(rows: Sequence[Row], device: str) -> tuple[list[Row], dict[str, int]]:
    good: list[Row] = []
    ignored: dict[str, int] = defaultdict(int)
    for row in rows:
        try:
            other = calibration.device_behind(row.hardware)
            if row.measured and other != device:
                raise Refused("rows of other hardware")
            if kind_of(row) is None:
                raise Refused("rows no law is for")
            good.append(row)
        except Refused as reason:
            ignored[str(reason)] += 1
    errors = log_errors(good) if good else np.array([])
    unpredicted = int(np.sum(~np.isfinite(errors)))
    if unpredicted:
        ignored["rows that cannot be predicted"] = unpredicted
    return [r for r, e in zip(good, errors, strict=True) if np.isfinite(e)], dict(ignored)


def _check_noise(rows: Sequence[Row]) -> None:
    """Repeats of one configuration must agree."""
    groups: dict[tuple[tuple[str, str], ...], list[float]] = defaultdict(list)
    for row in rows:
        key = tuple((k, v) for k, v in row.cells.items() if v and k not in _NOT_A_CONFIGURATION)
        groups[key].append(float(np.log(row.measured)))
    spreads = [float(np.std(v, ddof=1)) for v in groups.values() if len(v) > 1]
    stated = [s / r.measured for r in rows if (s := r.number("std", 0.0)) > 0]
    for spread, what in (
        (spreads, "repeats of one configuration differ"),
        (stated, "the stated standard deviations are"),
    ):
        if spread and np.median(spread) > _NOISIEST:
            raise SpecError(
                f"too noisy to fit: {what} by {np.median(spread):.0%} (median), at most {_NOISIEST:.0%} is accepted; measure on "
                "an idle machine, after a warm-up, with locked clocks"
            )


def _priors(rows: Sequence[Row], device: str) -> dict[str, tuple[float, float]]:
    """Full name -> (value, sigma) before the fit, of this device's parameters that rows of these kinds may inform."""
    engines = {calibration.known_engine(r.text("engine")) for r in rows}
    engine = next(iter(engines)) if len(engines) == 1 else None
    served = all((k := kind_of(r)) is not None and k.name in _SERVING for r in rows)
    # Whole steps cannot tell one kernel's rate from another's.
    keys = dict.fromkeys(("matrix_efficiency",) if served else _EVERY_DEVICE)
    for kind in {id(k): k for r in rows if (k := kind_of(r))}.values():
        for group, *rest in (name.split(".") for name in kind.parameters):
            # What an engine does is the stack's: it is fitted only where all rows are of one engine.
            if group == "engine" and rest[0] not in ("*", engine):
                continue
            if group != "law" and (group != "engine" or engine):
                keys[rest[-1]] = None
    wider = _STACKS_DIFFER if served and engine else {}
    resolved = _resolved(device)
    found = {key: _prior(key, resolved, engine) for key in (*keys, *wider)}
    return {f"device.{device}.{key}": (p.value, max(p.sigma, wider.get(key, _SUREST))) for key, p in found.items() if p}


def _resolved(device: str) -> dict[str, calibration.Resolved]:
    spec = catalog.load_device(device)
    node = catalog.node_of(device)
    return achieved(spec, catalog.load_node(node) if node else None)


def _prior(key: str, found: dict[str, calibration.Resolved], engine: str | None) -> Parameter | None:
    """What is known of a parameter before the fit; None for one that plays no part, or is a fact and no fit."""
    own = calibration.engine(engine).parameters if engine else {}
    p = own.get(key) or (found[key].parameter if key in found else calibration.law().everything.get(key))
    return p if p and p.sigma > 0 and p.value > 0 else None


def write(report: Report, path: Path, *, today: date) -> None:
    """Write a calibration file. Raises SpecError when nothing was informed, or more than a device may have."""
    if not report.kept:
        raise SpecError("these rows inform no parameter of the device beyond its class prior; nothing to write")
    best = sorted(report.kept.items(), key=lambda item: item[1][2])[:_MOST_PARAMETERS]
    source = f"fitted to {report.fitted.rows} measured rows"
    document = {
        "kind": "device", "device": report.device, "stack": report.stack, "date": today.isoformat(),
        "rows": report.fitted.rows, "scatter": round(report.fitted.scatter, 4),
        "parameters": {
            key: {"value": float(f"{value:.4g}"), "sigma": round(max(sigma, 0.01), 3), "source": source}
            for key, (_, value, sigma) in sorted(best)
        },
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
