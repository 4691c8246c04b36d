"""What is infeasible, and the nearest change that would be feasible."""

from __future__ import annotations

import math

from perfmodel.errors import Infeasible
from perfmodel.planner.optimum import optimise
from perfmodel.planner.program import Program, Question
from perfmodel.planner.service import Service

_MARGIN = 1e-6


def no_column(found: Service) -> Infeasible:
    """No layout meets the objectives even without load, or none holds the model."""
    of = f" of {found.name}" if found.name != found.model else ""
    timed = [r for r in found.rejected if r.best == r.best]
    if not timed:
        kept = {r.layout.node: r for r in found.rejected}
        listed = "; ".join(f"{r.layout.label} {r.reason}" for r in kept.values())
        return Infeasible(
            f"no layout on the fleet list holds the model{of}: {listed}",
            nearest="devices with more memory, a narrower weight format, or a larger tp or pp",
            binding=("memory",),
        )
    metrics = sorted({r.metric for r in timed})
    parts, changes = [], []
    for metric in metrics:
        best = min((r for r in timed if r.metric == metric), key=lambda r: r.best)
        name, p = metric.split(".")
        parts.append(f"{name.upper()} {p}: {best.layout.label}, {best.reason}")
        far = min((o.site.rtt for o in found.offers if o.label == best.layout.node), default=0.0) if name == "ttft" else 0.0
        slower = found.slower.get(best.layout.node, 1.0)
        changes.append(f"{name.upper()} {p} of {(best.best * slower * 1.05 + far) * 1e3:,.0f} ms ({best.layout.label})")
    return Infeasible(
        f"no layout meets the objectives{of}, the best being " + "; ".join(parts),
        nearest=" and ".join(changes),
        binding=tuple(metrics),
    )


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
