"""Numbers and names as a reader wants them."""

from __future__ import annotations

import html
import math
import re
from datetime import date

from perfmodel import units
from perfmodel.planner.layout import Layout
from perfmodel.planner.pools import Pool

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def seconds(x: float | None) -> str:
    """119 ms; a dash for nothing, ∞ for a queue without end."""
    if x is None:
        return "–"
    return units.show(x, "time").replace(" us", " µs") if math.isfinite(x) else "∞"


def number(x: float | None, digits: int = 3) -> str:
    """1,690; a dash for nothing."""
    return "–" if x is None else units.show(x, "ratio", digits)


def money(x: float | None) -> str:
    """1,690.25; a dash for nothing."""
    return "–" if x is None else f"{x:,.2f}"


def percent(x: float, digits: int = 0) -> str:
    """0.415 -> 42%."""
    return f"{x:.{digits}%}"


def tokens(span: list[float]) -> str:
    """1,254–5,380; one number where both ends are the same."""
    low, high = span
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"


def plain(text: str) -> str:
    """Text for a chart, whose labels understand a few tags."""
    return html.escape(text, quote=False)


def letter(i: int) -> str:
    """A, B, … Z, AA: the name of a pool in tables and charts."""
    return letter(i // 26 - 1) + letter(i % 26) if i >= 26 else chr(ord("A") + i)


def degrees(x: Layout) -> str:
    """tp2 ep2 split 40% for prefill: how an instance is built, but for node, role and format."""
    return x.label.removeprefix(f"{x.node} {x.role} ").removesuffix(f" {x.weight_dtype}")


def layout(pool: Pool) -> str:
    """prefill tp2 fp8 on hgx-h100-8."""
    x, c = pool.column.layout, pool.column
    return f"{x.role} {degrees(x)} {c.estimator.formats.weight.name} on {c.offer.label}"


def pool_names(pools: list[Pool]) -> list[str]:
    """A · 49 × prefill tp2 fp8 on hgx-h100-8."""
    return [f"{letter(i)} · {x.replicas} × {layout(x)}" for i, x in enumerate(pools)]


def age(source: str, today: date) -> tuple[str, int | None]:
    """The last date a source names and its age in days."""
    found = _DAY.findall(source)
    return (found[-1], (today - date.fromisoformat(found[-1])).days) if found else ("", None)
