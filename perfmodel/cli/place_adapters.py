"""perfmodel place adapters: which low-rank adapters stay in device memory, on which replica."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Finite, Quantity
from perfmodel.cli.text import echo_json, heading, number, seconds, size, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.planner.placement.adapters import Adapter, Pinning, Replicas
    from perfmodel.spec.model import Model


@click.command("adapters")
@click.option("--model", required=True, help="The base model: name, alias, Hugging Face id or file.")
@click.option("--hw", "--hardware", "hardware", required=True, help="Device or node a replica's adapters are fetched on.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Replicas of the base model.")
@click.option("--slots", type=click.IntRange(1), required=True, help="Adapters on a device at once (vLLM: --max-loras).")
@click.option("--table", "file", type=click.Path(exists=True, dir_okay=False), help="CSV: adapter, rate (or requests), rank.")
@click.option("--count", type=click.IntRange(1), help="Adapters of a popularity law, instead of a table.")
@click.option("--zipf", type=Finite(), default=1.0, show_default=True, help="Its exponent.")
@click.option("--rank", "ranks", default="16", show_default=True, help="Ranks of its adapters, in turn: '16' or '8,16,64'.")
@click.option("--rate", type=Quantity("rate", bare=True), help="Requests per second of all adapters.  [the table's sum]")
@click.option("--targets", type=click.Choice(["attention", "linear"]), default="linear", show_default=True,
              help="Matrices an adapter changes.")
@click.option("--request-time", type=Quantity("time"), default="5 s", show_default=True, help="A request keeps its adapter.")
@click.option("--device-memory", type=Quantity("size"), help="For adapters on each device.  [slots alone limit]")
@click.option("--host-memory", type=Quantity("size"), help="For adapters on each replica's host.  [all fit]")
@click.option("--imbalance", type=Finite(), default=0.1, show_default=True, help="Load of a replica over the mean, at most.")
@click.option("--solver", type=click.Choice(["highs", "cbc"]), default="highs", show_default=True)
@common_options
def place_adapters(
    model: str, hardware: str, replicas: int, slots: int, request_time: float, device_memory: float | None,
    host_memory: float | None, imbalance: float, solver: str, as_json: bool, **asked: Any,
) -> None:  # fmt: skip
    """Keep the adapters in device memory that save most fetching, and route their requests to them.

    \b
    perfmodel place adapters --model llama-3.1-8b --hw l40s-server-4 --replicas 4 --slots 8 --count 50 --rate 2
    """
    from perfmodel import catalog
    from perfmodel.machine import machine
    from perfmodel.planner.placement import adapters

    base = catalog.load_model(model)
    found = _adapters(base, **asked)
    where = adapters.Replicas(
        replicas, slots, device_memory or math.inf, host_memory or math.inf, request_time, imbalance, machine(hardware)
    )
    best = adapters.pin(found, where, solver=solver)
    others, worth = adapters.alternatives(found, where), adapters.worth(found, where)
    if as_json:
        echo_json(_data(found, best, others, worth))
    else:
        click.echo(_page(base.name, found, where, best, others, worth))


def _adapters(
    model: Model, file: str | None, count: int | None, zipf: float, ranks: str, rate: float | None, targets: Any
) -> list[Adapter]:
    from perfmodel.planner.placement import inputs
    from perfmodel.planner.placement.adapters import Adapter, adapter_bytes
    from perfmodel.serving import prefix_laws

    if (file is None) == (count is None):
        raise SpecError("give the adapters: either --table or --count")
    if count is not None:
        if rate is None:
            raise SpecError("--count needs --rate, the requests per second of all adapters")
        given = [r.strip() for r in ranks.split(",")]
        if not all(r.isdigit() and int(r) > 0 for r in given):
            raise SpecError(f"--rank {ranks!r}: write whole numbers like '8,16,64'")
        sizes = [adapter_bytes(model, int(r), targets) for r in given]
        shares = prefix_laws.zipf(count, zipf)
        return [Adapter(f"adapter-{i + 1}", float(rate * s), sizes[i % len(sizes)]) for i, s in enumerate(shares)]
    rows = inputs.read_table(str(file), ("adapter",), ("rate", "requests", "rank"))
    column = next((c for c in ("rate", "requests") if c in rows[0][1]), None)
    if column is None:
        raise SpecError("no column 'rate' (requests/s) or 'requests' (a count)", file=file, line=1)
    if column == "requests" and rate is None:
        raise SpecError("a table of request counts needs --rate", file=file)
    found = []
    for line, row in rows:
        wanted = inputs.number(row.get("rank") or ranks, "rank", str(file), line)
        if wanted < 1 or wanted != int(wanted):
            raise SpecError(f"rank: expected a whole number of at least 1, got {wanted:g}", file=file, line=line)
        amount = inputs.number(row[column], column, str(file), line)
        found.append(Adapter(row["adapter"], amount, adapter_bytes(model, int(wanted), targets)))
    total = sum(a.rate for a in found)
    if rate is not None and total > 0:
        found = [Adapter(a.name, a.rate * rate / total, a.size) for a in found]
    return found


def _data(found: list[Adapter], best: Pinning, others: dict[str, float], worth: dict[str, float]) -> dict[str, Any]:
    return {
        "fetching": best.fetching, "bound": best.bound, "gap": best.gap, "hits": best.hits, "loads": best.loads,
        "adapters": [
            {
                "name": a.name, "rate": a.rate, "bytes": a.size, "on_device": best.on_device[i].nonzero()[0],
                "on_host": best.on_host[i].nonzero()[0], "met": best.met[i].sum(), "from_host": best.from_host[i].sum(),
                "from_disk": best.from_disk[i].sum(),
            }
            for i, a in enumerate(found)
        ],
        "alternatives": others,
        "worth": worth,
    }  # fmt: skip


def _page(
    name: str, found: list[Adapter], where: Replicas, best: Pinning, others: dict[str, float], worth: dict[str, float]
) -> str:
    rate = sum(a.rate for a in found)
    rows = [["replica", "requests/s", "kept on the device", "bytes"]]
    for r in range(where.count):
        kept = [a for i, a in enumerate(found) if best.on_device[i, r]]
        names = ", ".join(a.name for a in kept[:6]) + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")
        rows.append([str(r), number(best.loads[r]), names or "none", size(sum(a.size for a in kept))])
    disk = best.from_disk.sum() / rate
    lines = [
        f"{heading(name)}: {len(found)} adapters, {number(rate)} requests/s on {where.count} x {where.slots} slots",
        table(rows, right=(0, 1, 3)),
        f"  {best.hits:.1%} of requests meet their adapter on the device, {disk:.1%} read it from disk; "
        f"a request waits {seconds(best.fetching / rate)} for it on average",
        f"  fetching {seconds(best.fetching)} per second, bound {seconds(best.bound)}, gap {best.gap:.2%} ({best.method})",
        "",
        heading("fetching otherwise"),
        table([[k, "cannot serve" if math.isinf(v) else f"{seconds(v)} per second"] for k, v in others.items()], right=(1,)),
        "",
        heading("saved by, on every replica"),
        table([[k, f"{seconds(v)} per second"] for k, v in worth.items()], right=(1,)),
    ]
    return "\n".join(lines)
