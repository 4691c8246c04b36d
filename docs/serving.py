"""Write the comparison of the closed forms with the event simulation in docs/serving.md.

    python docs/serving.py            simulate every cell and write the tables (about five minutes)
    python docs/serving.py --check    write nothing; exit 1 if a table is out of date

Every cell is one instance at a share of its saturation rate, with a trace's joint lengths and gamma arrivals of a given
coefficient of variation, whose gaps are scaled so that the rate is exact; a tenth of the requests warms up.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perfmodel import memory
from perfmodel.estimator import Estimator
from perfmodel.serving import goodput
from perfmodel.serving.clock import StepClock
from perfmodel.serving.goodput import highest_rate
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.replay import simulate
from perfmodel.serving.replay.outcome import Outcome
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Trace

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z0-9-]+):begin -->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
TRACES = {
    "Azure conversation": "azure-conv-2023", "Azure code": "azure-code-2023", "Mooncake conversation": "mooncake-conversation",
}  # fmt: skip
INSTANCES = {
    "Llama-3.1-8B, H100": ("llama-3.1-8b", "h100-sxm", {}, "colocated"),
    "Llama-3.1-70B, 8 A100": ("llama-3.1-70b", "hgx-a100-8", {"tp": 8}, "colocated"),
    "DeepSeek-V3, 8 H200": ("deepseek-v3", "hgx-h200-8", {"tp": 8}, "colocated"),
    "Llama-3.1-70B, 8 H100, prefill": ("llama-3.1-70b", "hgx-h100-8", {"tp": 8}, "prefill"),
    "Llama-3.1-8B, H100, decode": ("llama-3.1-8b", "h100-sxm", {}, "decode"),
}
CVS = (0.5, 1, 2, 4)
LOADS = (0.2, 0.5, 0.8)
AIMS = {"p50": 0.10, "p95": 0.20}
_REQUESTS = {0.5: 10_000, 1: 20_000, 2: 30_000, 4: 60_000}
"""Replayed at half load, of each CV; in proportion to the load otherwise, because waits then hang together for longer."""


@dataclass(frozen=True)
class Cell:
    """One comparison: closed form and replay of TTFT and TPOT, p50 and p95 [s]; `refused` says why the form does not hold."""

    instance: str
    trace: str
    arrivals: str
    load: float
    rate: float
    form: dict[str, float]
    replay: dict[str, float]
    refused: str
    gaps: dict[str, tuple[float, float]]
    """ITL and longest gap [s] and attainment, form and replay, of instances that prefill and decode."""

    @property
    def errors(self) -> dict[str, float]:
        return {k: self.form[k] / v - 1 for k, v in self.replay.items() if v > 0}

    @property
    def within(self) -> bool:
        return all(abs(e) <= AIMS[name[-3:]] for name, e in self.errors.items())


def lengths(trace: str) -> Requests:
    """Requests of a trace that ships with the project."""
    return read_trace(Trace(file=f"examples/traces/{TRACES[trace]}.csv.gz"), ROOT)


def instance(name: str, mix: Mix) -> Instance:
    """One of INSTANCES, with a clock for a mix."""
    model, hardware, layout, role = INSTANCES[name]
    e = Estimator(model, hardware, **layout)
    per_token = float(memory.cache_bytes(e.model, e.par, e.formats, 1, mix.context, e.engine.block_tokens)) / mix.context
    return Instance(StepClock(e, mix.context), role, e.kv_free / per_token)


def compare(name: str, one: Instance, trace: str, r: Requests, mix: Mix, cv: float, load: float, most: float) -> Cell:
    """Both sides of one cell; cv 0: the trace's own arrivals, its clock stretched to the rate."""
    rate, n = most * load, int(_REQUESTS.get(cv, 12_000) * load / 0.5)
    rng = np.random.default_rng(17)
    if cv:
        gaps = rng.gamma(1 / cv**2, cv**2, n)
        arrival = np.cumsum(gaps) * n / gaps.sum() / rate
        # Every request of the trace equally often, in any order: the replay has the load that the form is asked about.
        pick = np.concatenate([rng.permutation(len(r)) for _ in range(-(-n // len(r)))])[:n]
        dispersion, arrivals = float(cv**2), "Poisson" if cv == 1 else f"CV {cv:g}"
    else:
        pick = np.arange(min(len(r), n))
        arrival = r.arrival[pick] * (pick.size / r.arrival[pick[-1]]) / rate
        gaps = np.diff(arrival)
        dispersion, arrivals = float(gaps.var() / gaps.mean() ** 2), "the trace's own"
    out = simulate(one.clock, one.kv_tokens, Requests(arrival, r.input[pick], r.output[pick]), one.role)
    s = one.state(rate, mix)
    kept = slice(pick.size // 10, None)
    found: dict[str, float] = {}
    form: dict[str, float] = {}
    for metric, skip, quantile in (("TTFT", "decode", one.ttft_quantile), ("TPOT", "prefill", one.tpot_quantile)):
        if one.role == skip:
            continue
        values = getattr(out, metric.lower())[kept]
        for p in (50, 95):
            found[f"{metric} p{p}"] = float(np.nanpercentile(values, p))
            form[f"{metric} p{p}"] = quantile(p / 100, s, mix, min(dispersion, 20.0))
    gaps = compare_gaps(one, s, mix, min(dispersion, 20.0), out, r.output[pick], kept) if one.role == "colocated" else {}
    return Cell(name, trace, arrivals, load, rate, form, found, one.refused(s, mix, dispersion), gaps)


def compare_gaps(
    one: Instance, s: State, mix: Mix, dispersion: float, out: Outcome, output: np.ndarray, kept: slice
) -> dict[str, tuple[float, float]]:
    """Both sides of the gaps between tokens, and of attainment at limits that a tenth of the requests misses each."""
    result = {}
    for p in (95, 99):
        result[f"ITL p{p}"] = goodput.itl_quantile(one, p / 100, s, mix, dispersion), out.gaps.percentile(p / 100)
    longest = out.longest_gap[kept][output[kept] > 1]
    for p in (50, 95):
        form = goodput.longest_gap_quantile(one, p / 100, s, mix, dispersion)
        result[f"longest gap p{p}"] = (form, float(np.percentile(longest, p)))
    ttft, tpot = (float(np.nanpercentile(x[kept], 90)) for x in (out.ttft, out.tpot))
    met = float(np.mean((out.ttft[kept] <= ttft) & ~(out.tpot[kept] > tpot)))
    return result | {"attainment": (goodput.attainment(one, s, mix, goodput.Goals(ttft, tpot), dispersion), met)}


def cells() -> list[Cell]:
    """All comparisons."""
    result = []
    for trace in TRACES:
        r = lengths(trace)
        mix = Mix.of(r.input, r.output)
        for name in INSTANCES:
            one = instance(name, mix)
            most = highest_rate(one, mix)
            result += [compare(name, one, trace, r, mix, cv, load, most) for cv in CVS for load in LOADS]
            if one.role == "colocated":
                result.append(compare(name, one, trace, r, mix, 0, 0.5, most))
    return result


def summary(found: list[Cell]) -> str:
    """Share of cells within the aims, by arrivals and trace."""
    lines = [
        "| arrivals | trace | cells | refused | all within | TTFT within | TPOT within |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arrivals in ("CV 0.5", "Poisson", "CV 2", "CV 4"):
        for trace in TRACES:
            mine = [c for c in found if c.arrivals == arrivals and c.trace == trace]
            held = [c for c in mine if not c.refused]
            parts = [
                sum(all(abs(e) <= AIMS[k[-3:]] for k, e in c.errors.items() if k.startswith(metric)) for c in held)
                for metric in ("T", "TTFT", "TPOT")
            ]
            lines.append(
                f"| {arrivals} | {trace} | {len(held)} | {len(mine) - len(held)} | " + " | ".join(str(x) for x in parts) + " |"
            )
    return "\n".join(lines) + "\n"


def table(found: list[Cell], trace: str, own: bool = False) -> str:
    """One line a cell: closed form, replay and error."""
    names = ("TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95")
    lines = [
        "| instance | arrivals | load | " + " | ".join(f"{n}: form, replay [ms], error" for n in names) + " | |",
        "| --- | --- | ---: |" + " ---: |" * 4 + " --- |",
    ]
    for c in found:
        if c.trace != trace or (c.arrivals == "the trace's own") != own:
            continue
        parts = [
            f"{c.form[n] * 1e3:,.1f}, {c.replay[n] * 1e3:,.1f}, {c.errors[n]:+.0%}" if c.replay.get(n) else "" for n in names
        ]
        note = f"refused: {c.refused}" if c.refused else "" if c.within or own else "outside"
        lines.append(f"| {c.instance} | {c.arrivals} | {c.load:.0%} | " + " | ".join(parts) + f" | {note} |")
    return "\n".join(lines) + "\n"


def gap_table(found: list[Cell]) -> str:
    """Gaps and attainment of every cell that is not refused, up to half load."""
    names = ("ITL p95", "ITL p99", "longest gap p50", "longest gap p95", "attainment")
    lines = [
        "| trace | instance | arrivals | load | " + " | ".join(names) + " |",
        "| --- | --- | --- | ---: |" + " ---: |" * len(names),
    ]
    for c in found:
        if c.refused or not c.gaps or c.load > 0.5 or c.arrivals == "the trace's own":
            continue
        parts = [
            f"{x:.1%}, {y:.1%}" if n == "attainment" else f"{x * 1e3:,.1f}, {y * 1e3:,.1f}, {x / y - 1:+.0%}"
            for n, (x, y) in c.gaps.items()
        ]
        lines.append(f"| {c.trace} | {c.instance} | {c.arrivals} | {c.load:.0%} | " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write or check; the exit code."""
    path = ROOT / "docs" / "serving.md"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cells()
    blocks = {"summary": summary(found)}
    for trace, file in TRACES.items():
        blocks[file] = table(found, trace)
    blocks["own"] = "\n".join(f"{trace}\n\n" + table(found, trace, own=True) for trace in TRACES)
    blocks["gaps"] = gap_table(found)
    before = path.read_text(encoding="utf-8")
    after = _BLOCK.sub(lambda m: m[1] + blocks[m["name"]] + m[3], before)
    if "--check" not in arguments:
        path.write_text(after, encoding="utf-8")
        return 0
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
