"""An explanation as plain text for a terminal, at most 110 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from perfmodel import units
from perfmodel.symbols import ALPHABET
from perfmodel.vectorize import base

WIDTH = 110
RESOURCES = {
    "compute": "matrix", "vector": "vector", "hbm": "memory", "cache": "cache", "launch": "launch",
    "link": "link", "network": "network", "host": "host",
}  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The whole explanation."""
    lines = list(_heading(data["configuration"]))
    for step in data["steps"].values():
        lines += ["", *_step(step)]
    lines += ["", *_memory(data["memory"], data["configuration"]["batch"]), "", *_legend(data["steps"])]
    return "\n".join(line.rstrip() for line in lines)


def _heading(c: dict[str, Any]) -> Iterator[str]:
    degrees = ", ".join(f"{d} {c[d]}" for d in ("tp", "pp", "dp", "ep", "cp") if c[d] > 1) or "one device"
    peaks = ", ".join(f"{name} {units.show(x, 'flops')}" for name, x in c["matrix"].items())
    experts = f", experts {c['experts']}" if c["experts"] != c["weights"] else ""
    cached = f" ({c['prefix']} cached)" if c["prefix"] else ""
    yield f"{c['model']} on {c['hardware']}: {degrees}, engine {c['engine']}"
    yield f"{_plural(c['batch'], 'sequence')}, {c['isl']:,} prompt tokens{cached}, {c['osl']:,} output tokens each"
    yield f"weights {c['weights']}{experts}, activations {c['activations']}, KV {c['kv']}; {c['provenance']}"
    yield from _wrap(f"{c['device']}: memory {units.show(c['bandwidth'], 'bandwidth')}; matrix {peaks}", "")


def _step(s: dict[str, Any]) -> Iterator[str]:
    title = "DECODE STEP" if s["kind"] == "decode" else "PREFILL"
    sequences, new = _plural(s["batch"], "sequence"), _plural(s["new"], "new token")
    yield f"{title}: {sequences}, {new} on {s['context']:,} cached ones each"
    yield "=" * WIDTH
    low, high = s["interval"]
    yield (
        f"{_time(s['seconds'])} expected (p10 {_time(low)}, p90 {_time(high)}); "
        f"lower bound {_time(s['bounds'][0])}, nothing overlapped {_time(s['bounds'][1])}"
    )
    yield f"  device {_time(s['device_seconds'])} + host not overlapped {_time(s['host_seconds'])}"
    if s["passes"] != 1:
        yield f"  the device time is {s['passes']:.3g} passes of one micro-batch through the pipeline's stages"
    yield from _wrap("with " + _values({k: v for k, v in s["symbols"].items() if k in ALPHABET}), "  ", "    ")
    for group in s["groups"]:
        yield ""
        yield from _group(group)
    yield ""
    yield from _totals(s)
    yield ""
    yield from _binding(s)


def _values(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {x:.10g}" for name, x in values.items())


def _group(g: dict[str, Any]) -> Iterator[str]:
    runs = f" x {g['times']:g}" if g["times"] != 1 else ""
    time = f"{_time(g['seconds'])}, {g['share']:.1%} of the device time"
    yield f"{g['part']}{runs}".ljust(60) + time.rjust(WIDTH - 60)
    yield "-" * WIDTH
    if g["symbols"]:
        yield from _wrap("with " + _values(g["symbols"]), "  ", "    ")
    for op in g["operators"]:
        yield from _operator(op)


def _operator(op: dict[str, Any]) -> Iterator[str]:
    runs = f" x {op['times']:g}" if op["times"] != 1 else ""
    head = f"  {op['name']}".ljust(34) + f"{_time(op['seconds'])}{runs}".rjust(16) + f"{op['share']:7.1%}"
    bound = f"  bound by {RESOURCES[op['bound_by']]}" if op["bound_by"] else ""
    if op["intensity"]:
        bound += f"; {op['intensity']:.3g} FLOP/B, ridge {op['ridge']:.3g} ({op['dtype']})"
    yield from [head + bound] if len(head + bound) <= WIDTH else [head, " " * 10 + bound]
    for f in op["formulas"]:
        yield from _formula(f)
    if op["busy"]:
        yield "      time    " + " | ".join(f"{RESOURCES[r]} {_time(x)}" for r, x in op["busy"].items())


def _formula(f: dict[str, Any]) -> Iterator[str]:
    group, *rest = f["quantity"].split(".")
    label = rest[-1] if rest[0] != "fabric" else "sent"
    value = _count(f["value"], group, rest[-1])
    numbers = "" if f["numbers"] == f["formula"] else f" = {f['numbers']}"
    text = f"{label.ljust(12)}{f['formula']}{numbers} = {value}"
    yield from _wrap(text, "      ", "        " + " " * 12)


def _count(value: float, group: str, unit: str) -> str:
    if group == "bytes":
        return units.show(value, "size")
    name = "FLOP" if unit not in ("vector", "exp") else "op"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{name}"
    return f"{value:.4g} {name}"


def _totals(s: dict[str, Any]) -> Iterator[str]:
    t = s["totals"]
    yield "TOTALS of one pass"
    flops = ", ".join(
        f"{q.removeprefix('flops.')} {_count(x, 'flops', q.removeprefix('flops.'))}"
        for q, x in t.items() if q.startswith("flops.")
    )  # fmt: skip
    moved = ", ".join(
        f"{q.removeprefix('bytes.hbm.').removeprefix('bytes.')} {units.show(x, 'size')}"
        for q, x in t.items() if q.startswith("bytes.")
    )  # fmt: skip
    yield from _wrap(f"arithmetic  {flops}", "  ")
    yield from _wrap(f"bytes       {moved}", "  ")
    ridges = ", ".join(
        f"{d} {r['datasheet']:.3g} ({r['achieved']:.3g} at achieved rates)" for d, r in s["ridge"]["dtypes"].items()
    )
    yield from _wrap(f"intensity   {t['intensity']:.3g} FLOP/B; ridge {ridges}; {t['launches']:.0f} kernels", "  ")
    busy = sorted(s["busy"].items(), key=lambda item: -item[1])
    yield from _wrap("busy        " + " | ".join(f"{RESOURCES[r]} {_time(x)}" for r, x in busy if x > 0), "  ")


def _binding(s: dict[str, Any]) -> Iterator[str]:
    b = s["binding"]
    yield "WHAT BINDS, AND WHAT WOULD CHANGE IT"
    yield (
        f"  {RESOURCES[b['resource']]} is busy {_time(b['seconds'])}, {b['seconds'] / b['next_seconds']:.2f} times "
        f"as long as the next, {RESOURCES[b['next']]} ({_time(b['next_seconds'])})"
    )
    yield from _ridge(s["ridge"])
    for x in s["machine_effects"]:
        yield (
            f"  1 % better {x['parameter'].ljust(26)} {x['elasticity']:+.2f} % time;   "
            f"twice as good: {_time(x['seconds_at_twice'])}"
        )
    for quantity, effects in s["symbol_effects"].items():
        listed = ", ".join(f"{n} {x:+.2f} %" for n, x in effects.items())
        yield from _wrap(f"{quantity} for 1 % more of: {listed}", "  ")
    if s["uncertainty"]:
        listed = ", ".join(f"{n} {x:+.1%}" for n, x in s["uncertainty"].items())
        yield from _wrap(f"widest in the band, one standard deviation each: {listed}", "  ")


def _ridge(r: dict[str, Any]) -> Iterator[str]:
    name = r["symbol"]
    what = "sequences in a pass" if name == "B" else "new tokens per sequence"
    for scope, label in (("pass", "the whole pass"), ("linear", "linear layers alone")):
        x = r[scope]
        state = f"matrix time is {x['now']:.3g} of memory time at datasheet rates"
        if x["at"] is not None:
            how = "" if x["closed_form"] else ", found by bisection"
            text = f"{label}: {state}; they are equal at {name} = {x['at']:.4g} {what}{how}"
        elif x["now"] >= 1:
            text = f"{label}: {state}, at any {name}"
        else:
            one = "sequence" if name == "B" else "token"
            text = (
                f"{label}: {state}; no {name} makes them equal: each further {one} adds {_time(x['more'][1])} of "
                f"memory time and {_time(x['more'][0])} of matrix time"
            )
        yield from _wrap(text, "  ")


def _memory(m: dict[str, Any], batch: int) -> Iterator[str]:
    yield "MEMORY of one device"
    parts = ", ".join(f"{name} {units.show(m[name], 'size')}" for name in ("weights", "kv", "activations", "other"))
    verdict = "fits" if m["fits"] else "DOES NOT FIT"
    yield f"  {parts}: {units.show(m['total'], 'size')} of {units.show(m['capacity'], 'size')}, {verdict}"
    trained = f" (the model was trained for {m['max_positions']:,})" if m["max_positions"] else ""
    yield f"  most sequences of {m['tokens']:,} tokens: {m['max_batch']:,}"
    yield f"  longest context of {_plural(batch, 'sequence')}: {m['longest_context']:,} tokens each{trained}"


def _legend(steps: dict[str, Any]) -> Iterator[str]:
    used = {base(name) for step in steps.values() for name in step["symbols"]}
    yield "SYMBOLS"
    for name, entry in ALPHABET.items():
        if name in used:
            yield f"  {name.ljust(14)}{entry.meaning}" + (f" [{entry.unit}]" if entry.unit != "1" else "")


def _plural(n: int, one: str) -> str:
    return f"{n:,} {one}" + ("" if n == 1 else "s")


def _time(seconds: float) -> str:
    return units.show(seconds, "time")


def _wrap(text: str, indent: str, hanging: str | None = None) -> list[str]:
    """Lines of at most WIDTH columns; formulas are also broken between factors."""
    more = hanging if hanging is not None else indent + " " * 12
    lines = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)
    return lines or [indent]
