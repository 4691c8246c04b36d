"""Write the tables of predictions against measurements in README.md and docs/fidelity.md.

    python docs/fidelity.py            score the measured rows in tests/data/measured and write the tables
    python docs/fidelity.py --check    write nothing; exit 1 if a table is out of date

Rows of `calibrate/` are scored by five-fold cross-validation with whole models or shapes held out (tests/data/folds.yaml),
and with each device left out (hardware/calibrations/without/). Rows of `validate/` were never fitted.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from perfmodel import calibration, catalog
from perfmodel.cli.calibration import unit
from perfmodel.spec.calibration import Parameter
from perfmodel.validation import memory_rows
from perfmodel.validation.folds import cross_validated
from perfmodel.validation.rows import Predicted
from perfmodel.validation.run import load, predict_rows
from perfmodel.validation.score import Score, Scored, score

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "tests" / "data" / "measured"
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z-]+):begin[^>]*-->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
_SHORTEST_PREFILL_US = 20.0
_WIDE = ("bf16", "fp16", "")

Rule = Callable[[Scored], bool]


def _is(kind: str, *, metric: str | None = None) -> Rule:
    return lambda s: s.kind == kind and metric in (None, s.row.text("metric"))


def _long_prefill(s: Scored) -> bool:
    return s.kind == "prefill attention" and (s.row.text("unit") != "us" or s.measured > _SHORTEST_PREFILL_US)


# What is reported: name, which rows, and the errors aimed at (median, mean).
LINES: tuple[tuple[str, Rule, float, float], ...] = (
    ("GEMM, bf16 and fp16", lambda s: s.kind == "gemm" and s.row.text("dtype") in _WIDE, 0.08, 0.12),
    ("GEMM, 8 and 4 bits", lambda s: s.kind == "gemm" and s.row.text("dtype") not in _WIDE, 0.12, 0.18),
    ("decode attention", _is("decode attention"), 0.12, 0.18),
    ("prefill attention over 20 µs", _long_prefill, 0.12, 0.18),
    ("latent attention (MLA)", _is("latent attention"), 0.15, 0.22),
    ("mixture of experts", _is("mixture of experts"), 0.15, 0.22),
    ("collectives", _is("collective"), 0.15, 0.22),
    ("expert dispatch and combine", _is("expert exchange"), 0.15, 0.22),
    ("power, share of the limit", _is("power"), 0.20, 0.30),
    ("elementwise and layers", lambda s: s.kind in ("elementwise", "layer"), 0.20, 0.30),
    ("point to point, copies, storage", lambda s: s.kind in ("p2p", "copy", "storage"), 0.20, 0.30),
    ("time per output token, at concurrency",
     lambda s: s.kind == "closed-loop serving" and s.row.text("metric") in ("tpot", "itl_derived"), 0.12, 0.20),
    ("time to first token, at concurrency", _is("closed-loop serving", metric="ttft"), 0.25, 0.35),
    ("time to first token, static batch", _is("static batch", metric="ttft"), 0.10, 0.15),
    ("time per output token, static batch",
     lambda s: s.kind == "static batch" and s.row.text("metric") in ("tpot", "itl_derived"), 0.12, 0.20),
    ("end to end, static batch",
     lambda s: s.kind == "static batch" and s.row.text("metric") not in ("ttft", "tpot", "itl_derived"), 0.15, 0.25),
    ("offline throughput", _is("offline throughput"), 0.15, 0.25),
)  # fmt: skip


class Results:
    """All scored rows, made once."""

    def __init__(self) -> None:
        folds = yaml.safe_load((ROOT / "tests" / "data" / "folds.yaml").read_text(encoding="utf-8"))
        fitted = load(_files("calibrate"))
        self.folds = cross_validated(fitted, folds)
        self.left_out = predict_rows(fitted, zero_shot=True)
        self.unseen = predict_rows(load(_files("validate")))
        self.memory = memory_rows.score_memory(MEASURED / "calibrate" / "engine_memory.csv.gz")

    def blocks(self) -> dict[str, str]:
        """Text of every block, by name."""
        return {
            "fidelity": headline(self), "folds": by_device(self.folds), "left-out": by_device(self.left_out),
            "unseen": by_device(self.unseen), "memory": memory(self.memory), "parameters": parameters(),
            "refused": refused([*self.folds, *self.unseen]),
        }  # fmt: skip


def _files(folder: str) -> list[Path]:
    return sorted(p for p in (MEASURED / folder).glob("*.csv.gz") if not memory_rows.is_memory_file(p))


def _cells(s: Score, aim: tuple[float, float] | None = None) -> str:
    median, mean = f"{s.median_ape:.1%}", f"{s.mape:.1%}"
    if aim is not None:
        median = median if s.median_ape <= aim[0] else f"{median} (!)"
        mean = mean if s.mape <= aim[1] else f"{mean} (!)"
    return f"{s.rows:,} | {median} | {mean} | {s.bias:+.1%} | {s.coverage:.0%}"


def headline(r: Results) -> str:
    """One line a kind: cross-validated, device left out, unseen files."""
    lines = [
        "| predicted | rows | cross-validated: median, mean | device left out: median, mean | rows "
        "| files never fitted: median, mean |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rule, _, _ in LINES:
        columns = [[s for s in rows if rule(s)] for rows in (r.folds, r.left_out, r.unseen)]
        if not any(columns):
            continue
        scores = [score(c) if c else None for c in columns]
        pair = [f"{s.median_ape:.1%}, {s.mape:.1%}" if s else "" for s in scores]
        counts = [f"{s.rows:,}" if s else "" for s in scores]
        lines.append(f"| {name} | {counts[0]} | {pair[0]} | {pair[1]} | {counts[2]} | {pair[2]} |")
    return "\n".join(lines) + "\n"


def by_device(rows: Sequence[Scored]) -> str:
    """Kind and device; errors beyond what is aimed at carry a mark."""
    lines = [
        "| predicted | device | rows | median | mean | bias | in band |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rule, *aim in LINES:
        groups: dict[str, list[Scored]] = defaultdict(list)
        for s in rows:
            if rule(s):
                groups[s.row.text("hardware")].append(s)
        for device, mine in sorted(groups.items()):
            lines.append(f"| {name} | {device} | {_cells(score(mine), (aim[0], aim[1]))} |")
    return "\n".join(lines) + "\n"


def memory(rows: Sequence[Scored]) -> str:
    """Engine and quantity of the start-up logs."""
    lines = [
        "| engine | quantity | rows | predicted | median | p90 | bias |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for s in rows:
        groups[(s.row.text("engine"), s.row.text("metric"))].append(s)
    for (engine, metric), mine in sorted(groups.items()):
        good = [s for s in mine if isinstance(s.outcome, Predicted)]
        if good:
            s = score(good)
            lines.append(
                f"| {engine} | {metric} | {len(mine)} | {len(good)} | {s.median_ape:.1%} | {s.p90_ape:.1%} | {s.bias:+.1%} |"
            )
    return "\n".join(lines) + "\n"


def refused(rows: Sequence[Scored]) -> str:
    """Reasons of refusal with their counts."""
    found = score(rows).refused
    lines = ["| reason | rows |", "| --- | ---: |"] + [f"| {reason} | {n:,} |" for reason, n in found.items()]
    return "\n".join(lines) + "\n"


def parameters() -> str:
    """Every constant of the law, by home, with its value and meaning."""
    law, classes = calibration.law(), calibration.classes()
    lines = [
        "| home | parameter | value | unit | sigma | meaning or source |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]

    def add(home: str, table: dict[str, Parameter]) -> None:
        for name, p in table.items():
            lines.append(
                f"| {home} | `{name}` | {p.value:.4g} | {unit(name)} | {p.sigma:.2g} | {p.meaning or p.source} |"
            )

    add("law", law.parameters)
    for group in ("architecture", "memory", "link"):
        for name, table in getattr(classes, group).items():
            add(f"{group}: {name}", table)
    for name in calibration.engine_names():
        add(f"engine: {name}", calibration.engine(name).parameters)
    for name in calibration.calibrated_devices():
        add(
            f"device: {name}",
            {k: v.parameter for k, v in calibration.own_parameters(catalog.load_device(name)).items()},
        )
    return "\n".join(lines) + "\n"


def page(text: str, blocks: dict[str, str]) -> str:
    """A page with the named blocks written anew."""
    return _BLOCK.sub(lambda m: m.group(1) + blocks.get(m["name"], "") + m.group(3), text)


def main(arguments: list[str]) -> int:
    """Write or check; the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = Results().blocks()
    stale = 0
    for path in (ROOT / "README.md", ROOT / "docs" / "fidelity.md"):
        before = path.read_text(encoding="utf-8")
        after = page(before, blocks)
        stale |= before != after
        if "--check" not in arguments:
            path.write_text(after, encoding="utf-8")
    return int("--check" in arguments and stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
