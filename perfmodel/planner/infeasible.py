"""What is infeasible, and the nearest change that would be feasible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from perfmodel import units
from perfmodel.errors import Infeasible
from perfmodel.planner.cells import Cell, Fleet
from perfmodel.planner.columns import Rejected
from perfmodel.planner.confirm import Shortfall, kept_rate
from perfmodel.planner.optimum import optimise
from perfmodel.planner.program import Program, Question
from perfmodel.planner.service import Service
from perfmodel.spec.workload import Limit

_MARGIN = 1e-6
_SHORT_OF = "GB"
_MORE_MEMORY = "devices with more memory, a narrower weight format, or a larger tp or pp"
_OTHER_DEGREES = "degrees that divide the model: left out of `choices`, all that do are tried"
_SLACK = 1.05
"""Factor on a limit that would just be kept without any load."""


def no_column(found: Service) -> Infeasible:
    """No layout meets the objectives even without load, or none holds the model."""
    of = f" of {found.name}" if found.name != found.model else ""
    timed = [r for r in found.rejected if math.isfinite(r.best)]
    if not timed:
        kept = {r.layout.node: r for r in found.rejected}
        listed = "; ".join(f"{r.layout.label} {r.reason}" for r in kept.values())
        return Infeasible(
            f"no layout on the fleet list holds the model{of}: {listed}",
            nearest=_MORE_MEMORY if any(_SHORT_OF in r.reason for r in kept.values()) else _OTHER_DEGREES,
            binding=("memory",),
        )
    nearest = _nearest(found, timed)
    return Infeasible(
        f"no layout meets the objectives{of}, the best being "
        + "; ".join(f"{_shown(metric)}: {r.layout.label}, {r.reason}" for metric, r in nearest.items()),
        nearest=" and ".join(_change(found, metric, r) for metric, r in nearest.items()),
        binding=tuple(nearest),
    )


def _nearest(found: Service, timed: list[Rejected]) -> dict[str, Rejected]:
    """By metric, the rejected layout that comes nearest, in the unserved bucket that is hardest to serve."""
    nearest: dict[str, Rejected] = {}
    for k in found.unserved():
        mine = [r for r in timed if k in r.buckets]
        for metric in sorted({r.metric for r in mine}):
            best = min((r for r in mine if r.metric == metric), key=lambda r: r.best)
            if metric not in nearest or best.best > nearest[metric].best:
                nearest[metric] = best
    return nearest


def _shown(metric: str) -> str:
    """``ttft.p99.9`` as TTFT p99.9, ``longest gap.p95`` as longest gap p95."""
    name, _, share = metric.partition(".")
    return f"{name.upper() if len(name) <= 4 else name} {share}".rstrip()


def _change(found: Service, metric: str, r: Rejected) -> str:
    """The looser limit that a rejected layout would keep, at the client and at the asked confidence."""
    if metric == "attainment":
        joint = found.objectives.attainment
        assert joint is not None
        limits = [(n, x) for n, x in (("TTFT", joint.ttft), ("TPOT", joint.tpot)) if x is not None]
        wanted = " and ".join(f"{n} {Limit(x * r.best * _SLACK, x.per_token * r.best * _SLACK)}" for n, x in limits)
        return f"joint limits of {wanted} ({r.layout.label})"
    name, _, share = metric.partition(".")
    field = {"longest gap": "longest_gap", "end to end": "e2e"}.get(name, name)
    far = min((o.site.rtt for o in found.offers if o.label == r.layout.node), default=0.0) if field in ("ttft", "e2e") else 0.0
    slower = found.slower.get(r.layout.node, 1.0)
    slope = getattr(found.objectives, field)[share].per_token
    more = f" + {units.show(slope, 'time')}/token" if slope else ""
    return f"{_shown(metric)} of {(r.best * slower * _SLACK + far) * 1e3:,.0f} ms{more} ({r.layout.label})"


def still_broken(
    fleet: Fleet, broken: Sequence[tuple[list[Shortfall], list[Cell]]], rounds: Sequence[dict[str, Any]]
) -> Infeasible:
    """No round of plan and replay kept every promise: by how much the nearest one misses, and what it would keep.

    broken: of every round its broken promises, the worst first, and its pools.
    """
    said = ", ".join(rounds[-1]["missed"])
    timed = [(short, cells) for short, cells in broken if short]
    if not timed:
        return Infeasible(f"after {len(rounds)} rounds of plan and replay the closed forms still refuse {said}", binding=(said,))
    short, cells = min(timed, key=lambda x: x[0][0].excess)
    kept = kept_rate(cells, fleet)
    rate = sum(c.service.workload.rate for c in cells if c.service.period == 0)
    changes = [" and ".join(_kept(x) for x in short)]
    if kept:
        changes.append(f"a rate of {kept * rate:,.3g} requests/s ({kept:.0%} of the load), as the same pools keep in replay")
    return Infeasible(
        f"after {len(rounds)} rounds of plan and replay it still misses " + "; ".join(f"{x.text} ({x.layout})" for x in short),
        nearest=", or ".join(changes),
        binding=tuple(f"{x.metric}.{x.percentile}".rstrip(".") for x in short),
    )


def _kept(x: Shortfall) -> str:
    """The limit that a replayed plan would have kept."""
    if x.is_share:
        return f"{x.name} for {math.floor(x.measured * 1000) / 10:.1f} % of the requests"
    more = f" + {units.show(x.per_token, 'time')}/token" if x.per_token else ""
    return f"{x.name} of {math.ceil(x.measured * _SLACK * 1e3):,} ms{more}"


def nearest_change(question: Question) -> Infeasible:
    """Which limits stand in the way, and the smallest change (relative to each limit, summed) that makes a plan possible."""
    changed, program = _least_excess(question)
    load = f"{question.rate:.2f} requests/s"
    if changed is None:
        return Infeasible(f"no mixture of the columns carries {load}", nearest="another device type or region", binding=("load",))
    rows = [(program.limits[name], extra) for name, extra in changed.items()]
    # Rows of several periods tell the same story: the largest counts.
    largest: dict[str, tuple[float, float, str]] = {}
    for row, extra in rows:
        if row.label not in largest or extra > largest[row.label][0]:
            largest[row.label] = (extra, row.limit, row.unit)
    limits = ", ".join(
        f"{row.limit:g} {row.label.removeprefix('max_nodes of ')}" if row.label.startswith("max_nodes")
        else f"{row.label} {row.limit:,.4g} {row.unit}" for row in {r.label: r for r in program.limits.values()}.values()
    )  # fmt: skip
    changes = [f"{label} of {_up(limit + extra, unit)} (now {limit:,.4g})" for label, (extra, limit, unit) in largest.items()]
    return Infeasible(
        f"{load} do not fit within {limits}" + _survival(question),
        nearest=" and ".join(changes) or None,
        binding=tuple(
            f"available {label.removeprefix('max_nodes of ')}" if label.startswith("max_nodes") else label for label in largest
        ),
    )


def _survival(question: Question) -> str:
    r = question.resilience
    if r is None:
        return ""
    parts = [f"with any one {d} lost" for d in r.survive]
    parts += [f"with {r.availability:.4%} availability"] if r.availability else []
    return ", " + " and ".join(parts)


def _up(value: float, unit: str) -> str:
    if unit in ("nodes", "devices"):
        return f"{math.ceil(value - _MARGIN)} {unit}"
    if unit == "of the requests":
        return f"{math.ceil((value - _MARGIN) * 100) / 100:.2f} {unit}"
    digits = max(0, 3 - math.ceil(math.log10(max(value, 1e-9))))
    step = 10.0**-digits
    return f"{math.ceil(value / step - _MARGIN) * step:,.{digits}f} {unit}"


def _least_excess(question: Question) -> tuple[dict[str, float] | None, Program]:
    """Excess over each limit of the plan that exceeds them least; None where even without limits there is no plan."""
    best = optimise(question, gap=1e-2, time_limit=15.0, elastic=True)
    if not best.solution.ok:
        return None, best.program
    found = {}
    for name, variable in best.program.excess.items():
        extra = best.solution.values.get(variable.name, 0.0) * best.program.limits[name].step
        if extra > _MARGIN:
            found[name] = extra
    return found, best.program
