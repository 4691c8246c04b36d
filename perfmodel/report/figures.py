"""Figures of a report. Colours are CSS variables, which the page turns into those of the light or the dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from perfmodel.machine import Machine
from perfmodel.planner.page import METRICS
from perfmodel.report import series
from perfmodel.report.text import letter, money, number, percent, plain, seconds
from perfmodel.serving.workload import Bucket

COLOURS = tuple(f"var(--c{i})" for i in range(1, 9))
INK, MUTED, LIMIT, FAINT = "var(--ink)", "var(--muted)", "var(--bad)", "var(--rule)"
_ROW = 62  # pixels of one horizontal bar with its label
_PHASE_SYMBOLS = {"prefill": "circle", "decode": "diamond"}
_ROLE_DASHES = {"colocated": "solid", "prefill": "dot", "decode": "dash"}
_AXIS = {
    "gridcolor": FAINT, "linecolor": MUTED, "tickcolor": MUTED, "zeroline": False, "showline": True, "ticks": "outside",
    "title": {"standoff": 8}, "automargin": True,
}  # fmt: skip

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": COLOURS,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        # The page makes room at the bottom for as many rows as a legend needs.
        "margin": {"l": 8, "r": 12, "t": 16, "b": 8},
        "legend": {
            "orientation": "h", "xref": "container", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom",
            "font": {"size": 12},
        },
        "hoverlabel": {
            "bgcolor": "var(--panel)", "bordercolor": MUTED, "font": {"color": INK}, "align": "left", "namelength": -1,
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
        "dragmode": False,
        "bargap": 0.25,
    }
)  # fmt: skip


def _figure(height: int, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(height=height, template="none", **layout)
    return figure


def _limit(figure: go.Figure, x: float, text: str, *, low: bool = False) -> None:
    """A vertical limit line with its name at the top or the bottom, on a logarithmic axis."""
    figure.add_shape(
        type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line={"color": LIMIT, "width": 2, "dash": "dash"}
    )
    figure.add_annotation(
        x=math.log10(x), y=0 if low else 1, yref="paper", text=plain(text), showarrow=False, xanchor="right",
        yanchor="bottom" if low else "top", xshift=-5, font={"color": LIMIT, "size": 12},
    )  # fmt: skip


def _log_axis(title: str, low: float, high: float, show: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 of each decade, or at more where that leaves fewer than four."""
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [x * 10.0**d for d in decades for x in steps if low <= x * 10.0**d <= high]
        if len(ticks) >= 4:
            break
    return {
        "type": "log", "title": {"text": title}, "range": [math.log10(low), math.log10(high)], "tickvals": ticks,
        "ticktext": [show(v) for v in ticks],
    }  # fmt: skip


def roofline(m: Machine, steps: Sequence[series.Step]) -> go.Figure:
    """Operators that multiply matrices on the roofs of one device.

    x: FLOPs over bytes of device memory; y: FLOPs over the operator's seconds; area: its share of the step.
    """
    points = [(s, row) for s in steps for row in s.rows if row["intensity"]]
    dtypes = sorted({row["dtype"] for _, row in points}, key=m.peak)
    ridges = {d: m.peak(d) / m.bandwidth for d in dtypes}
    low = min([row["intensity"] for _, row in points] + [1.0]) / 2
    high = max([row["intensity"] for _, row in points] + [3 * r for r in ridges.values()]) * 2
    figure = _figure(
        520,
        xaxis={"type": "log", "title": {"text": "FLOP per byte of device memory"},
               "range": [math.log10(low), math.log10(high)], "dtick": 1},
        yaxis={"type": "log", "title": {"text": "achieved TFLOP/s per device"}, "dtick": 1},
    )  # fmt: skip
    for dtype in dtypes:
        peak, bend = m.peak(dtype), ridges[dtype]
        name = f"{dtype} roof: {number(peak / 1e12)} TFLOP/s, ridge at {number(bend)} FLOP/byte"
        _roof(figure, low, high, m.bandwidth, peak, name, INK, "solid", 2)
        figure.add_annotation(
            x=math.log10(bend), y=math.log10(peak / 1e12), xanchor="right", yanchor="bottom", showarrow=False,
            text=f"{dtype} {number(peak / 1e12)} TFLOP/s, ridge {number(bend)}",
        )  # fmt: skip
        reached = peak * float(m.matrix_efficiency)
        fed = m.bandwidth * float(m.bandwidth_efficiency)
        _roof(figure, low, high, fed, reached, f"{dtype}: what large kernels reach", MUTED, "dot", 1)
    middle = math.sqrt(low * min(ridges.values(), default=high))
    figure.add_annotation(
        x=math.log10(middle), y=math.log10(middle * m.bandwidth / 1e12), text=f"memory {number(m.bandwidth / 1e12)} TB/s",
        showarrow=False, xanchor="left", yanchor="top", xshift=8,
    )  # fmt: skip
    for s in steps:
        rows = [row for row in s.rows if row["intensity"]]
        figure.add_scatter(
            x=[row["intensity"] for row in rows],
            y=[row["achieved"] / 1e12 for row in rows],
            mode="markers",
            name=f"{letter(s.pool)} {s.phase}",
            marker={
                "symbol": _PHASE_SYMBOLS[s.phase], "color": COLOURS[s.pool % len(COLOURS)], "opacity": 0.85,
                "size": [8 + 34 * math.sqrt(row["share"]) for row in rows], "line": {"color": "var(--panel)", "width": 1},
            },
            hovertext=[_operator_hover(s, row) for row in rows],
            hoverinfo="text",
            cliponaxis=False,
        )  # fmt: skip
    for label, fed, x, y in _clusters(points):
        # Nothing lies above the memory roof but the names of the matrix roofs, and little far below the roofs.
        place = {"ax": -30, "ay": -40} if fed and x < min(ridges.values()) / 2 else {"ax": -8, "ay": 60 if fed else 90}
        figure.add_annotation(
            x=math.log10(x), y=math.log10(y / 1e12), text="<br>".join(plain(line) for line in label), align="right", arrowhead=0,
            arrowwidth=1, arrowcolor=MUTED, font={"size": 12}, xanchor="right", **place,
        )  # fmt: skip
    return figure


def _clusters(points: Sequence[tuple[series.Step, dict[str, Any]]]) -> list[tuple[list[str], bool, float, float]]:
    """(phase and names, left of the ridge, FLOP/byte, FLOP/s) of operators that take a tenth of a step; neighbours share one."""
    found: list[tuple[list[str], bool, float, float]] = []
    for s, row in sorted(points, key=lambda q: -q[1]["share"]):
        if row["share"] < 0.1:
            continue
        near = [
            label for label, _, x, y in found
            if label[0] == f"{s.phase}:" and math.hypot(math.log10(row["intensity"] / x), math.log10(row["achieved"] / y)) < 0.7
        ]  # fmt: skip
        if not near:
            found.append(
                ([f"{s.phase}:", row["name"]], row["intensity"] < row["ridge"], row["intensity"], row["achieved"])
            )
        elif row["name"] not in near[0]:
            near[0].append(row["name"])
    return found


def _roof(figure: go.Figure, low: float, high: float, bandwidth: float, peak: float, name: str, colour: str, dash: str,
          width: int) -> None:  # fmt: skip
    bend = peak / bandwidth
    figure.add_scatter(
        x=[low, bend, high], y=[low * bandwidth / 1e12, peak / 1e12, peak / 1e12], mode="lines", name=name, showlegend=False,
        line={"color": colour, "dash": dash, "width": width}, hovertext=[name] * 3, hoverinfo="text",
    )  # fmt: skip


def _operator_hover(s: series.Step, row: Mapping[str, Any]) -> str:
    shape = ", ".join(f"{k}={number(float(v), 6)}" for k, v in row["shape"].items())
    return "<br>".join((
        f"<b>{plain(row['name'])}</b> ({plain(row['part'])}), {row['times']:,.0f} times in a {s.described}",
        f"{number(row['intensity'])} FLOP/byte, {number(row['achieved'] / 1e12)} TFLOP/s in {row['dtype']}",
        f"{seconds(row['seconds'])} each, {percent(row['share'], 1)} of the device's time",
        f"waits for {series.RESOURCES[row['bound_by']]}; {shape}",
    ))  # fmt: skip


def _bar_labels(figure: go.Figure, labels: Sequence[str], *, shown: float = 0.27) -> None:
    """Names above horizontal bars, which leaves the whole width to the bars."""
    for i, label in enumerate(labels):
        figure.add_annotation(
            x=0,
            xref="paper",
            y=i - shown,
            text=plain(label),
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            align="left",
        )
    figure.update_yaxes(visible=False, range=[len(labels) - 0.6, -0.75], automargin=False)


def stacked(labels: Sequence[str], totals: Sequence[str], parts: Sequence[Mapping[str, float]], names: Mapping[str, str],
            colours: Mapping[str, str]) -> go.Figure:  # fmt: skip
    """Shares of a step, one bar a step; hover has the seconds."""
    figure = _figure(
        90 + _ROW * len(labels), barmode="stack", bargap=0.5,
        xaxis={"range": [0, 1], "tickformat": ".0%", "title": {"text": "share of the step"}},
        legend={"traceorder": "normal"},
    )  # fmt: skip
    sums = [sum(p.values()) for p in parts]
    for key, name in names.items():
        values = [p.get(key, 0.0) for p in parts]
        if not any(v > 0 for v in values):
            continue
        shares = [v / t for v, t in zip(values, sums, strict=True)]
        figure.add_bar(
            y=list(range(len(labels))), x=shares, orientation="h", name=name, marker={"color": colours[key]},
            text=[percent(s) if s >= 0.05 else "" for s in shares], textposition="inside", insidetextanchor="middle",
            textangle=0, constraintext="none",
            hovertext=[f"{plain(label)}<br><b>{name}</b>: {seconds(v)}, {percent(s, 1)}"
                       for label, v, s in zip(labels, values, shares, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
    _bar_labels(figure, [f"{label}: {total}" for label, total in zip(labels, totals, strict=True)])
    return figure


GROUP_COLOURS = dict(zip(series.GROUPS, ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c8)", "var(--c6)", "var(--c5)",
                                         "var(--c4)", "var(--c7)"), strict=True))  # fmt: skip
RESOURCE_COLOURS = dict(zip(series.RESOURCES, ("var(--c3)", "var(--c1)", "var(--c5)", "var(--c4)", "var(--c6)", "var(--c2)",
                                               "var(--c8)", "var(--c7)"), strict=True))  # fmt: skip


def frontier(curves: Sequence[series.Curve], chosen: Sequence[tuple[int, str, str, float, float]], metric: str, name: str,
             limit: float | None, nodes: Sequence[str], unit: str) -> go.Figure:  # fmt: skip
    """Latency against what a dollar (or a device) serves, one curve a layout. chosen: (pool, role, label, latency, worth)."""
    roles = ("colocated", "prefill" if metric == "ttft" else "decode")
    kept = [c for c in curves if c.layout.role in roles]
    every = [getattr(q, metric) for c in kept for q in c.points] + [x[3] for x in chosen] + ([limit] if limit else [])
    low, high = min(every) / 1.15, max(every) * 1.1
    top = max([q.worth for c in kept for q in c.points] + [x[4] for x in chosen])
    figure = _figure(
        500,
        xaxis=_log_axis(f"{METRICS[metric]} {name}", low, high, seconds),
        yaxis=_log_axis(unit, top / 300, top * 1.5, number),
        hovermode="closest",
    )
    shown: set[tuple[str, str]] = set()
    for c in kept:
        key = (c.layout.node, c.layout.role)
        colour = COLOURS[nodes.index(c.layout.node) % len(COLOURS)]
        figure.add_scatter(
            x=[getattr(q, metric) for q in c.points], y=[q.worth for q in c.points], mode="lines+markers",
            name=plain(f"{c.layout.node} {c.layout.role}"), legendgroup=" ".join(key), showlegend=key not in shown,
            line={"color": colour, "width": 1.4, "dash": _ROLE_DASHES[c.layout.role]}, marker={"size": 4, "color": colour},
            opacity=0.75, hovertext=[_curve_hover(c, q, metric, name, unit) for q in c.points], hoverinfo="text",
        )  # fmt: skip
        shown.add(key)
    for role in roles:
        best = series.front([(getattr(q, metric), q.worth) for c in kept if c.layout.role == role for q in c.points])
        if len(best) > 1:
            figure.add_scatter(
                x=[x for x, _ in best], y=[y for _, y in best], mode="lines", name=f"best {role}", hoverinfo="skip",
                line={"color": INK, "width": 3, "dash": _ROLE_DASHES[role]}, opacity=0.45,
            )  # fmt: skip
    for pool, _role, label, x, y in chosen:
        figure.add_scatter(
            x=[x], y=[y], mode="markers+text", name=f"pool {letter(pool)}", showlegend=False, text=[letter(pool)],
            textposition="middle center", textfont={"size": 12, "color": "var(--panel)"},
            marker={"symbol": "circle", "size": 21, "color": INK, "line": {"color": "var(--panel)", "width": 1.5}},
            hovertext=[f"<b>{plain(label)}</b><br>{METRICS[metric]} {name} {seconds(x)}<br>{number(y)} {unit}"], hoverinfo="text",
        )  # fmt: skip
    if limit:
        _limit(figure, limit, f"limit {seconds(limit)}")
    return figure


def _curve_hover(c: series.Curve, q: series.Point, metric: str, name: str, unit: str) -> str:
    lines = [
        f"<b>{plain(c.layout.label)}</b>", f"{number(q.rate)} requests/s an instance, {number(q.worth)} {unit}",
        f"{METRICS[metric]} {name} {seconds(getattr(q, metric))}",
    ]  # fmt: skip
    if c.layout.role != "prefill":
        lines.append(f"decode batch {number(q.batch)}")
    if c.layout.role != "decode":
        lines.append(f"prefill {percent(q.utilisation)} of the time")
    return "<br>".join(lines)


MEMORY_PARTS = {
    "weights": ("weights", "var(--c1)"), "cached": ("keys and values in use (mean + 2σ)", "var(--c2)"),
    "activations": ("activations (peak)", "var(--c3)"), "other": ("runtime, graphs, buffers", "var(--c4)"),
    "free": ("free for keys and values", "var(--free)"), "reserved": ("left to the system", "var(--c7)"),
}  # fmt: skip


def memory(labels: Sequence[str], parts: Sequence[Mapping[str, float]], capacities: Sequence[float]) -> go.Figure:
    """Device memory by use, one bar a pool; the line is what a program can allocate."""
    figure = _figure(
        90 + _ROW * len(labels), barmode="stack", bargap=0.5,
        xaxis={"title": {"text": "GB per device"}, "range": [0, max(capacities) / 1e9 * 1.04]},
        legend={"traceorder": "normal"},
    )  # fmt: skip
    for key, (name, colour) in MEMORY_PARTS.items():
        values = [p[key] / 1e9 for p in parts]
        figure.add_bar(
            y=list(range(len(labels))), x=values, orientation="h", name=name, marker={"color": colour},
            text=[number(v) if v >= 0.05 * max(capacities) / 1e9 else "" for v in values], textposition="inside",
            insidetextanchor="middle", textangle=0, constraintext="none",
            hovertext=[f"{plain(label)}<br><b>{name}</b>: {number(v)} GB" for label, v in zip(labels, values, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
    for i, capacity in enumerate(capacities):
        edge = {"x0": capacity / 1e9, "x1": capacity / 1e9, "y0": i - 0.3, "y1": i + 0.3}
        figure.add_shape(type="line", **edge, line={"color": LIMIT, "width": 3})
    _bar_labels(figure, [f"{label}: {number(c / 1e9)} GB" for label, c in zip(labels, capacities, strict=True)])
    return figure


def distribution(
    metric: str, whole: series.Line, parts: Sequence[tuple[int, series.Line]], closed: series.Line,
    limits: Mapping[str, float],
) -> go.Figure:  # fmt: skip
    """Cumulative distribution of simulated requests, of each pool and of all, beside the closed form."""
    every = [t for t in whole[0] if t > 0] + [t for t in closed[0] if t > 0] + list(limits.values())
    figure = _figure(
        440,
        xaxis=_log_axis(f"{METRICS[metric]} of a request", min(every) / 1.1, max(every) * 1.15, seconds),
        yaxis={"title": {"text": "share of requests at or below"}, "tickformat": ".0%", "range": [0, 1.02]},
    )
    if len(parts) > 1:
        for pool, (x, y) in parts:
            figure.add_scatter(x=x, y=y, mode="lines", name=f"pool {letter(pool)}, replayed", opacity=0.8,
                               line={"color": COLOURS[pool % len(COLOURS)], "width": 1.5, "shape": "hv"},
                               hovertemplate="%{x:.4g} s: %{y:.1%}")  # fmt: skip
    figure.add_scatter(x=whole[0], y=whole[1], mode="lines", name="all requests, replayed", hovertemplate="%{x:.4g} s: %{y:.1%}",
                       line={"color": INK, "width": 3, "shape": "hv"})  # fmt: skip
    figure.add_scatter(x=closed[0], y=closed[1], mode="lines+markers", name="all requests, closed form",
                       line={"color": INK, "width": 1.5, "dash": "dash"}, marker={"size": 6, "symbol": "circle-open"},
                       hovertemplate="%{x:.4g} s: %{y:.1%}")  # fmt: skip
    for name, limit in limits.items():
        share = float(name[1:]) / 100
        _limit(figure, limit, f"{name} limit {seconds(limit)}", low=True)
        thin = {"color": LIMIT, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=0, x1=1, xref="paper", y0=share, y1=share, line=thin)
    return figure


def arrivals(starts: Sequence[float], rates: Sequence[float], mean: float) -> go.Figure:
    """Requests per second over the window, and their mean."""
    figure = _figure(320, xaxis={"title": {"text": "seconds from the start of the window"}},
                     yaxis={"title": {"text": "requests/s"}, "rangemode": "tozero"}, bargap=0.05)  # fmt: skip
    width = starts[1] - starts[0] if len(starts) > 1 else 1.0
    figure.add_bar(x=[x + width / 2 for x in starts], y=rates, name="arrivals", marker={"color": "var(--c5)"},
                   hovertemplate="%{x:.0f} s: %{y:.3g} requests/s<extra></extra>")  # fmt: skip
    figure.add_scatter(x=[starts[0], starts[-1] + width], y=[mean, mean], mode="lines", line={"color": INK, "dash": "dash"},
                       name=f"mean {number(mean)} requests/s", hoverinfo="skip")  # fmt: skip
    return figure


def lengths(inputs: series.Line, outputs: series.Line, buckets: Sequence[Bucket]) -> go.Figure:
    """Histograms of input and output tokens, with the edges of the input buckets."""
    figure = _figure(
        340, xaxis={"type": "log", "title": {"text": "tokens"}, "dtick": 1},
        yaxis={"title": {"text": "share of requests"}, "tickformat": ".0%", "rangemode": "tozero"},
    )  # fmt: skip
    for name, (edges, shares), colour, dash in (
        ("input tokens", inputs, "var(--c1)", "solid"), ("output tokens", outputs, "var(--c2)", "dash"),
    ):  # fmt: skip
        figure.add_scatter(
            x=edges, y=[*shares, 0.0], mode="lines", name=name,
            line={"shape": "hv", "color": colour, "width": 2, "dash": dash},
            hovertemplate="from %{x:.0f} tokens: %{y:.1%}",
        )  # fmt: skip
    thin = {"color": MUTED, "width": 1, "dash": "dot"}
    for b in buckets[1:]:
        figure.add_shape(type="line", x0=b.low, x1=b.low, y0=0, y1=1, yref="paper", line=thin)
    return figure


def alternatives(names: Sequence[str], values: Sequence[float], best: float, unit: str) -> go.Figure:
    """Objective of each alternative that carries the load, the best first; the first bar is the chosen plan."""

    def apart(value: float) -> bool:
        return abs(value - best) > 1e-4 * abs(best)

    figure = _figure(
        60 + 46 * len(names), bargap=0.62, xaxis={"title": {"text": unit}, "range": [0, max(values) * 1.02]}
    )
    figure.add_bar(
        y=list(range(len(names))), x=list(values), orientation="h", showlegend=False,
        marker={"color": ["var(--c3)"] + ["var(--c1)" if apart(v) else "var(--c5)" for v in values[1:]]},
        hovertext=[f"{plain(n)}: {money(v)} {unit}" for n, v in zip(names, values, strict=True)], hoverinfo="text",
    )  # fmt: skip
    more = [f" ({(v - best) / best:+.0%})" if apart(v) else "" for v in values]
    labels = [f"{n}: {money(v)} {unit}{extra}" for n, v, extra in zip(names, values, more, strict=True)]
    _bar_labels(figure, labels, shown=0.2)
    return figure
