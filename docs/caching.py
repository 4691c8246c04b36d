"""Write the tables of docs/caching.md.

    python docs/caching.py            run the commands of the page on the Mooncake trace and write its tables
    python docs/caching.py --check    write nothing; exit 1 if a table is out of date
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from perfmodel.cli.place_cache import page
from perfmodel.memory import kv_bytes_per_token
from perfmodel.planner.placement.study import Study, study
from perfmodel.prices import StalePrice
from perfmodel.serving.prefix import cached_tokens, imbalance, uses
from perfmodel.serving.trace import read_trace
from perfmodel.spec.workload import Trace

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "examples" / "traces" / "mooncake-conversation.csv.gz"
PAGE = ROOT / "docs" / "caching.md"
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z-]+):begin[^>]*-->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
_GB = 1e9
_SIZES_GB = (50, 100, 250, 500, 1000, 2000, 4000, 8000)
_REPLICAS = (1, 2, 3, 6, 12)


def run(**changes: Any) -> Study:
    """The study of the page, with changes."""
    return study("llama-3.1-70b", "hgx-h100-8", str(TRACE), tp=8, **changes)


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table, all but the first column to the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def curve(base: Study) -> str:
    """Share of prompt tokens found by one LRU cache of some sizes, from one pass."""
    requests = read_trace(Trace(file=str(TRACE)), ROOT)
    per_token = kv_bytes_per_token(base.estimator.model, base.estimator.formats)
    u = uses(requests)
    rows = [["cache", "tokens", "found"]]
    for size in (*_SIZES_GB, float("inf")):
        tokens = size * _GB / per_token
        found = u.cached(tokens, len(requests)).sum() / requests.input.sum()
        label = f"{size:,} GB" if size < float("inf") else "endless"
        rows.append([label, f"{tokens:,.0f}" if size < float("inf") else "", f"{found:.1%}"])
    return markdown(rows)


def routing(base: Study) -> str:
    """Hits and imbalance over replicas, with 250 GB of cache in each."""
    requests = read_trace(Trace(file=str(TRACE)), ROOT)
    per_token = kv_bytes_per_token(base.estimator.model, base.estimator.formats)
    rows = [["replicas", "random", "prefix-affine", "busiest replica", "with a guard of 1.1", "busiest replica"]]
    for n in _REPLICAS:
        row = [str(n)]
        cases: list[tuple[Any, float | None]] = [("random", None), ("prefix-affine", None), ("prefix-affine", 1.1)]
        for kind, guard in cases:
            found = cached_tokens(requests, 250 * _GB, n, kind, per_token, guard=guard)
            row.append(f"{found.sum() / requests.input.sum():.1%}")
            if kind != "random":
                row.append(f"x {imbalance(requests, n, kind, guard=guard):.2f}")
        rows.append(row)
    return markdown(rows)


def command(base: Study) -> str:
    """What the command prints."""
    return "```\n" + click.unstyle(page(base)) + "\n```"


def priced(base: Study) -> str:
    """The sizes that pay for themselves."""
    rows = [["DRAM, flash (USD per GB-month)", "DRAM should be", "flash should be"]]
    for dram, ssd in ((0.15, 0.003), (0.015, 0.003), (2.0, 0.08)):
        s = run(gb_prices={"dram": dram, "ssd": ssd})
        sizes = [s.sizes[name] * next(t.token_bytes for t in s.tiers if t.name == name) / 1e12 for name in ("dram", "ssd")]
        rows.append([f"{dram:g}, {ssd:g}", *(f"{x:,.1f} TB" for x in sizes)])
    return markdown(rows)


def changes(base: Study) -> str:
    """What other hardware and policies do to the same question."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("as above", {}),
        ("500 GB of host memory in each node", {"wanted": {"dram": "500GB"}}),
        ("500 GB, 8 SATA drives instead of the drives", {"wanted": {"dram": "500GB", "ssd": "8xsata-ssd"}}),
        ("500 GB, its own drives, one full write a day", {"wanted": {"dram": "500GB"}, "drive_writes_per_day": 1.0}),
        ("500 GB, 8 SmartSSDs instead of the drives", {"wanted": {"dram": "500GB", "ssd": "0", "csd": "8xsmartssd"}}),
        ("500 GB and 8 CXL expanders", {"wanted": {"dram": "500GB", "cxl": "8xcxl-expander"}}),
        ("no host memory, drives", {"wanted": {"dram": "0"}}),
        ("no host memory, drives, fetches behind prefill", {"wanted": {"dram": "0"}, "overlap": True}),
        ("random routing", {"routing": "random"}),
    ]
    rows = [["case", "found", "in hbm", "below", "GPU s/s saved", "+1 GB of hbm, USD/month"]]
    for name, options in cases:
        s = run(**options)
        p, best = s.profile, s.placement
        hbm = best.of("hbm")
        rows.append([
            name, f"{best.hit_share:.1%}", f"{hbm.hits / p.prompt:.1%}", f"{best.hit_share - hbm.hits / p.prompt:.1%}",
            f"{best.saved * int(s.estimator.par.devices):.2f}", f"{s.worth(hbm) or 0:.3g}",
        ])  # fmt: skip
    return markdown(rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "curve": curve, "routing": routing, "command": command, "priced": priced, "changes": changes,
}  # fmt: skip


def main() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StalePrice)
        base = run()
        text = PAGE.read_text(encoding="utf-8")
        made = _BLOCK.sub(lambda m: f"{m[1]}{TABLES[m['name']](base)}\n{m[3]}", text)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
