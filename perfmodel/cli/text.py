"""How the command line writes: one JSON document, or plain aligned text that survives a pipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from perfmodel import units


def echo_json(data: Any) -> None:
    """Print one JSON document. Infinity (an unstable queue, say) and what nobody has (a median of nothing) become null."""
    click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if hasattr(x, "tolist"):  # a NumPy scalar or array
        return _plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def heading(text: str) -> str:
    """Bold on a terminal, plain in a pipe."""
    return click.style(text, bold=True)


def table(rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: int = 2) -> str:
    """Columns as wide as their longest cell; those in `right` are aligned to the right."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells), default=0))]
    lines = []
    for row in cells:
        padded = [c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row)]
        lines.append((" " * indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def number(x: float, digits: int = 3) -> str:
    """A plain number with thousands separated: 1690.2 -> 1,690."""
    return units.show(x, "ratio", digits)


def seconds(x: float | None) -> str:
    """A duration, or a dash."""
    return "-" if x is None else units.show(x, "time")


def size(x: float) -> str:
    """Bytes, decimal prefixes."""
    return units.show(x, "size")


def tally(x: float) -> str:
    """A large count: 8030261248 -> 8.03 B."""
    rounded = float(f"{x:.2e}")  # 999.9 M reads 1 B
    for factor, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if rounded >= factor:
            return number(x / factor) + letter
    return f"{x:,.0f}"


NO_PRICE = "no price in the catalogue: --price '25 USD/h' gives the price of a node"


def busiest(busy: Mapping[str, float], whole: float) -> str:
    """Busy time of each resource as a share of the whole, longest first, without what rounds to nothing."""
    longest = sorted(busy.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {s / whole:.0%}" for name, s in longest if s / whole >= 0.005)


def plural(n: int, one: str) -> str:
    """1 token, 2 tokens."""
    return f"{n:,} {one}" if n == 1 else f"{n:,} {one}s"
