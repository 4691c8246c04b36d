"""One step as data: every operator with its formulas and seconds, totals, and which resource binds."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from perfmodel import vectorize
from perfmodel.breakdown import op_table, step_phase
from perfmodel.estimator import Estimator
from perfmodel.explain.change import machine_effects, ridge, symbol_effects
from perfmodel.symbols import ALPHABET
from perfmodel.vectorize import DEGREES, Expression


def explain_step(e: Estimator, batch: int, new: int, context: int, *, is_decode: bool) -> dict[str, Any]:
    """Explain one step of `batch` sequences that bring `new` tokens each on top of `context` cached ones."""
    phase = step_phase(e, batch, new, context, is_decode=is_decode)
    rows = op_table(e, phase)
    degrees = [d for d in DEGREES if getattr(e.par, d) != 1]
    program = vectorize.symbolic_program(e.model, "decode" if is_decode else "prefill", e.formats, degrees)
    counts = vectorize.expressions(program)
    group = phase.groups[0]
    values = vectorize.inputs(e.model, e.formats, e.par) | {"B": float(group.n), "Q": float(new), "C": float(context)}
    _add_formulas(rows, counts, values)
    parts = e.parts(batch, new, context, is_decode=is_decode)
    device = sum(row["times"] * row["seconds"] for row in rows) * float(e._passes(batch, is_decode))
    ranked = sorted(parts.busy.items(), key=lambda item: -item[1])
    return {
        "kind": "decode" if is_decode else "prefill",
        "batch": batch,
        "new": new,
        "context": context,
        "seconds": parts.seconds,
        "bounds": [parts.lower, parts.upper],
        "interval": list(parts.interval),
        "device_seconds": device,
        "host_seconds": parts.seconds - device,
        "passes": float(e._passes(batch, is_decode)),
        "symbols": _used(counts, values),
        "groups": _grouped(rows, counts, values),
        "totals": _totals(rows, counts, values),
        "busy": parts.busy,
        "binding": {"resource": ranked[0][0], "seconds": ranked[0][1], "next": ranked[1][0],
                    "next_seconds": ranked[1][1]},
        "ridge": ridge(e, rows, counts, values, is_decode=is_decode),
        "machine_effects": machine_effects(e, batch, new, context, is_decode=is_decode),
        "symbol_effects": symbol_effects(counts, values, is_decode=is_decode),
        "uncertainty": _uncertainty(parts.sensitivity),
    }  # fmt: skip


def _add_formulas(rows: list[dict[str, Any]], counts: list[Expression], values: dict[str, float]) -> None:
    """Give every row its formulas. Rows and expressions come from the same graph, so positions agree."""
    evaluated = vectorize.compile(c.expr for c in counts)(values)[:, 0]
    for row in rows:
        row["formulas"] = []
    for count, value in zip(counts, evaluated, strict=True):
        rows[count.position]["formulas"].append(
            {
                "quantity": count.quantity,
                "formula": vectorize.text(vectorize.unindexed(count.expr)),
                "numbers": vectorize.text(count.expr, values),
                "value": float(value),
            }
        )


def _used(counts: list[Expression], values: dict[str, float]) -> dict[str, float]:
    """Values of the symbols that the step's formulas contain, in the order of the alphabet."""
    names = {s.name for c in counts for x in (c.expr, c.times) for s in x.free_symbols}
    return {name: values[name] for name in sorted(names, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return list(ALPHABET).index(vectorize.base(name)), name


def _grouped(rows: list[dict[str, Any]], counts: list[Expression], values: dict[str, float]) -> list[dict[str, Any]]:
    """Consecutive operators of one kind of layer (or embedding, head) together, with the sizes that are its own."""
    groups = []
    for part, members in groupby(rows, key=lambda row: row["part"]):
        found = list(members)
        names = {s.name for c in counts if c.part == part for s in c.expr.free_symbols} - set(ALPHABET)
        own = {vectorize.base(name): values[name] for name in sorted(names, key=_place)}
        groups.append(
            {
                "part": part,
                "times": found[0]["times"],
                "symbols": own,
                "seconds": sum(r["times"] * r["seconds"] for r in found),
                "share": sum(r["share"] for r in found),
                "operators": found,
            }
        )
    return groups


def _totals(rows: list[dict[str, Any]], counts: list[Expression], values: dict[str, float]) -> dict[str, Any]:
    """Counts of one pass over all operators, and the matrix work per byte."""
    exprs = vectorize.totals(counts)
    evaluated = vectorize.compile(exprs.values())(values)[:, 0]
    found = {name: float(x) for name, x in zip(exprs, evaluated, strict=True)}
    found["intensity"] = found["flops"] / found["bytes"]
    found["launches"] = sum(row["times"] * row["launches"] for row in rows)
    return found


def _uncertainty(sensitivity: dict[str, float]) -> dict[str, float]:
    """The parameters whose spread moves the step most: change of ln(seconds) for one standard deviation of each."""
    ranked = sorted(sensitivity.items(), key=lambda item: -abs(item[1]))
    return {name: step for name, step in ranked[:5] if abs(step) > 1e-3}
