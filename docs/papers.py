"""Write docs/papers.md and its parity plot: every paper's claims, predicted.

    python docs/papers.py            run all papers, write the page and images/parity.svg
    python docs/papers.py --check    write nothing; exit 1 if either is out of date
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from perfmodel import catalog
from perfmodel.papers.run import Result, Score, load, score
from perfmodel.papers.setting import systems
from perfmodel.papers.several import run_several
from perfmodel.papers.verdict import as_ratio, is_relative
from perfmodel.spec.paper import Paper

HERE = Path(__file__).resolve().parent
PLOT = HERE / "images" / "parity.svg"
_SIZE, _MARGIN = 560, 56
_COLOURS = {
    "reproduced": "#1a7f37", "consistent": "#5aa469", "derived": "#7a9e9f", "bounded": "#2f6fb0", "loose": "#8a6fc0",
    "exceeds": "#c0392b", "open": "#9a9a9a",
}  # fmt: skip
_MEANING = {
    "reproduced": "within the tolerance at the stated values, and over the whole range of whatever was assumed",
    "consistent": "within the tolerance, but only for part of what was assumed",
    "derived": "within the tolerance, with an input read off the claim's own experiment",
    "bounded": "an `up to` between which and its power of 3/2 the best over the paper's range lies",
    "loose": "an `up to` far below the best over the paper's range",
    "exceeds": "beyond what datasheet rates allow for the setting as read here, every parameter sourced",
    "open": "not met, or not predicted; the reason stands beside it",
    "input": "on an input, on accuracy or on a tool's own run time: not counted",
}


def page(papers: list[Paper], results: dict[str, list[Result]]) -> str:
    """The whole page."""
    everything = [r for rows in results.values() for r in rows]
    core = _core()
    parts = [
        "<!-- Printed by docs/papers.py; edit papers/*.yaml and run it again. -->",
        "# What the literature claims, and what this model says\n",
        "Every paper is one file of `papers/`: a baseline and a proposal in settings whose every number has an origin, and the "
        "printed claims as expressions of what the settings give. Nothing is fitted to a claim. Where a paper's text was read "
        "only in a public summary, in its repository or in notes on it, the source says so; what was not found is assumed, over "
        "a range. Run them with "
        "`perfmodel papers run --all`, one with `perfmodel papers run ID`; `perfmodel explain --paper ID` shows which resource a "
        "proposal relieves and where it stops helping.\n",
        "A ratio is met within |ln(predicted/claimed)| ≤ max(0.1, 0.3·|ln claimed|) and in the same direction, an absolute "
        "value within 20 %.\n",
        "Ninety of the papers were chosen before any was run, to span every family of inference, and their texts, code and "
        "notes were sought; the others' files rest mostly on abstracts. A scenario is fully sourced where nothing in it is "
        "assumed, its presets included.\n",
        _verdicts(score([r for r in everything if r.paper in core]), score(everything)), _nulls(score(everything)),
        "![Predicted against claimed](images/parity.svg)\n",
        "## All claims\n", _table(papers, results),
        "## Beyond the bound\n", _listed(everything, "exceeds", "No claim lies beyond its bound."),
        "A claim listed here is a question, not an accusation: the setting may be read wrongly. Corrections are welcome as "
        "an edit of the paper's file, with the section that says otherwise.\n",
        "## Open\n", _listed(everything, "open", "No claim is open."),
        "## Predictions without a claim\n", _predictions(everything),
        "## Baselines\n", _baselines(),
    ]  # fmt: skip
    return "\n".join(parts).rstrip() + "\n"


def _core() -> set[str]:
    """The ninety papers that were chosen beforehand, to span every family of inference."""
    lines = (HERE.parent / "tests" / "data" / "papers_wanted.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def _verdicts(core: Score, all_: Score) -> str:
    rows = [
        "| verdict | of ninety papers | share | fully sourced | of all papers | share | meaning |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, meaning in _MEANING.items():
        counts = [s.verdicts.get(name, 0) for s in (core, all_)]
        shares = ["" if name == "input" else f"{n / s.counted:.0%}" for n, s in zip(counts, (core, all_), strict=True)]
        sourced_ones = core.sourced.get(name, 0)
        rows.append(f"| {name} | {counts[0]} | {shares[0]} | {sourced_ones} | {counts[1]} | {shares[1]} | {meaning} |")
    sourced = sum(core.sourced.values())
    rows.append(f"| **counted** | **{core.counted}** | | {sourced} | **{all_.counted}** | | all but `input` |")
    return "\n".join(rows) + f"\n\n{_total(core, 'Of the ninety papers')} {_total(all_, 'Of all papers')}\n"


def _total(s: Score, of: str) -> str:
    met, with_bound = s.share("reproduced"), s.share("reproduced", "bounded")
    return (
        f"{of} {s.counted} claims are counted: {met:.0%} are reproduced, {with_bound:.0%} reproduced or bounded, and "
        f"{s.share('reproduced', 'bounded', 'consistent', 'derived'):.0%} with those that rest on an assumption or on a measured "
        "input."
    )


def _nulls(s: Score) -> str:
    ours = s.verdicts.get("reproduced", 0) + s.verdicts.get("consistent", 0) + s.verdicts.get("derived", 0)
    return (
        f"Two null models on all {s.counted} claims: `no effect` meets {s.null_no_effect}, bytes over bandwidth or FLOPs over "
        f"peak alone {s.null_ratio_alone}; this model meets {ours}.\n"
    )


def _table(papers: list[Paper], results: dict[str, list[Result]]) -> str:
    rows = ["| paper | metric | claimed | predicted | over what is assumed | verdict |", "|---|---|--:|--:|--:|---|"]
    for p in papers:
        for r in results[p.id]:
            if r.verdict is None:
                continue
            link = f"[{p.id}](https://arxiv.org/abs/{p.arxiv})" if p.arxiv else p.id
            what = f"{_cell(r.metric)}: {_cell(r.setting)}"
            rows.append(f"| {link} | {what} | {_claimed(r)} | {_predicted(r)} | {_span(r)} | {r.verdict} |")
    return "\n".join(rows) + "\n"


def _listed(results: list[Result], verdict: str, none: str) -> str:
    found = [r for r in results if r.verdict == verdict]
    if not found:
        return none + "\n"
    rows = ["| paper | metric | claimed | predicted | why |", "|---|---|--:|--:|---|"]
    rows += [f"| {r.paper} | {_cell(r.metric)} | {_claimed(r)} | {_predicted(r)} | {_cell(r.reason)} |" for r in found]
    return "\n".join(rows) + "\n"


def _predictions(results: list[Result]) -> str:
    rows = ["| paper | metric | predicted | over what is assumed | setting |", "|---|---|--:|--:|---|"]
    rows += [
        f"| {r.paper} | {_cell(r.metric)} | {_predicted(r)} | {_span(r)} | {_cell(r.setting)} |"
        for r in results if r.verdict is None
    ]  # fmt: skip
    return "\n".join(rows) + "\n"


def _baselines() -> str:
    rows = ["Dated, shared by all papers that compare with them, and tuned to none (`papers/systems.yaml`).\n"]
    for name, s in systems().items():
        rows.append(f"- **{name}** ({s.date}): {s.title}. " + "; ".join(s.weaknesses))
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _unit(unit: str) -> str:
    return unit if unit in ("x", "%") else f" {unit}"


def _claimed(r: Result) -> str:
    if r.claimed is None:
        return ""
    value = f"{r.claimed[0]:g}–{r.claimed[1]:g}" if isinstance(r.claimed, tuple) else f"{r.claimed:g}"
    return value + _unit(r.unit)


def _predicted(r: Result) -> str:
    return "" if r.predicted is None else f"{r.predicted:.3g}{_unit(r.unit)}"


def _span(r: Result) -> str:
    return "" if r.low is None or r.high is None or r.low == r.high else f"{r.low:.3g}–{r.high:.3g}"


def parity(points: list[tuple[float, float, Result]]) -> str:
    """Predicted over claimed ratios on logarithmic axes, with the tolerance as a band."""
    values = [v for x, y, _ in points for v in (x, y)]
    low, high = (math.log10(min(values, default=1.0)), math.log10(max(values, default=10.0)))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    span = max(high - low, 0.5)

    def place(v: float) -> float:
        return (math.log10(v) - low) / span * (_SIZE - 2 * _MARGIN) + _MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        return place(x), _SIZE - place(y)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIZE} {_SIZE}" font-family="sans-serif" font-size="12">',
           f'<rect width="{_SIZE}" height="{_SIZE}" fill="white"/>']  # fmt: skip
    grid = [10 ** (low + span * i / 60) for i in range(61)]
    band = [(c, c * math.exp(_tolerance(c))) for c in grid] + [(c, c * math.exp(-_tolerance(c))) for c in reversed(grid)]
    clip = [(min(max(x, 10**low), 10**high), min(max(y, 10**low), 10**high)) for x, y in band]
    corners = " ".join("{:.1f},{:.1f}".format(*at(*c)) for c in clip)
    out.append(f'<polygon points="{corners}" fill="#e8f1e8"/>')
    (x0, y0), (x1, y1) = at(10**low, 10**low), at(10**high, 10**high)
    out.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#888"/>')
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if 10**low <= tick <= 10**high:
            x, y = at(tick, tick)
            out.append(f'<text x="{x:.1f}" y="{_SIZE - _MARGIN + 18}" text-anchor="middle">{tick:g}</text>')
            out.append(f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
            out.append(f'<line x1="{x:.1f}" y1="{_MARGIN}" x2="{x:.1f}" y2="{_SIZE - _MARGIN}" stroke="#eee"/>')
            out.append(f'<line x1="{_MARGIN}" y1="{y:.1f}" x2="{_SIZE - _MARGIN}" y2="{y:.1f}" stroke="#eee"/>')
    for claimed, predicted, r in points:
        x, y = at(claimed, predicted)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_COLOURS[str(r.verdict)]}" fill-opacity="0.8">'
                   f"<title>{r.paper}: {r.metric}</title></circle>")  # fmt: skip
    for i, (name, colour) in enumerate(_COLOURS.items()):
        y = _MARGIN + 8 + 17 * i
        out.append(f'<circle cx="{_MARGIN + 12}" cy="{y}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{_MARGIN + 22}" y="{y + 4}">{name}</text>')
    out.append(f'<text x="{_SIZE / 2}" y="{_SIZE - 12}" text-anchor="middle">claimed, as a factor</text>')
    turned = f'transform="rotate(-90 16 {_SIZE / 2})"'
    out.append(f'<text x="16" y="{_SIZE / 2}" text-anchor="middle" {turned}>predicted, as a factor</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _tolerance(claimed: float) -> float:
    return max(0.1, 0.3 * abs(math.log(claimed)))


def points(results: list[Result]) -> list[tuple[float, float, Result]]:
    """Relative claims with a prediction, both as factors above or below one."""
    found = []
    for r in results:
        if r.verdict in (None, "input") or r.predicted is None or r.claimed is None or not is_relative(r.unit):
            continue
        claimed = sum(r.claimed) / 2 if isinstance(r.claimed, tuple) else r.claimed
        pair = as_ratio(claimed, r.unit, r.direction), as_ratio(r.predicted, r.unit, r.direction)
        if min(pair) > 0:
            found.append((*pair, r))
    return found


def main(arguments: list[str]) -> int:
    papers = [load(name) for name in catalog.names("papers")]
    results = dict(zip([p.id for p in papers], run_several(papers), strict=True))
    texts = {HERE / "papers.md": page(papers, results), PLOT: parity(points([r for rows in results.values() for r in rows]))}
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(HERE.parent)} is out of date: run python docs/papers.py\n")
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
