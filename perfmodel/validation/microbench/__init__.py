"""Micro-benchmarks of the machine they run on, as rows of the tidy format. Needs PyTorch."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from perfmodel import calibration
from perfmodel.errors import SpecError
from perfmodel.validation.microbench.harness import NOISY, Stopwatch

_NOISIEST = 0.3  # share of noisy results above which the whole run is refused
_COLUMNS = (
    "hardware", "n_devices", "dtype", "kv_dtype", "phase", "op", "batch", "input_len", "context_len", "engine",
    "engine_version", "metric", "value", "unit", "flag", "m", "n", "k", "n_heads", "n_kv_heads", "head_dim", "msg_bytes",
    "spread", "measured",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Rows that were taken, and where they were written."""

    hardware: str
    rows: list[dict[str, Any]]
    written: list[Path]

    def data(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"hardware": self.hardware, "rows": self.rows, "written": [str(p) for p in self.written]}

    def text(self) -> str:
        """What was taken and what to do with it."""
        noisy = sum(bool(r["flag"]) for r in self.rows)
        files = ", ".join(map(str, self.written))
        lines = [f"{len(self.rows)} rows of {self.hardware}, {noisy} of them too noisy and flagged: {files}"]
        specs = f" --specs {self.written[0].parent}" if len(self.written) > 1 else ""
        lines.append(f"Next: perfmodel calibrate {self.written[0]} --hw {self.hardware}{specs} --out FILE.yaml")
        return "\n".join(lines)


def run(
    hardware: str | None, *, budget: float, out: Path, stopwatch: Stopwatch | None = None, progress: bool | None = None
) -> Result:
    """Measure this machine for about `budget` seconds and write the rows to `out` (CSV).

    hardware: the catalogue's name of the device; None: a CPU no catalogue knows, whose device file is written beside the
    rows. stopwatch: how time is taken, by default a clock or the device's events. Raises SpecError without PyTorch, and
    when too many results are noisy to be trusted.
    """
    if find_spec("torch") is None:
        raise SpecError(
            "the micro-benchmarks need PyTorch: pip install torch (on a machine without a GPU its CPU build)"
        )
    import torch

    from perfmodel.validation.microbench import cuda, parallel, this_machine
    from perfmodel.validation.microbench.cases import Target, cases, transfers

    on_gpu = torch.cuda.is_available()
    if hardware is None and on_gpu:
        raise SpecError(f"--hw is missing: which catalogue device is {torch.cuda.get_device_name()}?")
    name = calibration.device_behind(hardware) if hardware else this_machine.NAME
    if on_gpu:
        target, watch = cuda.target(), stopwatch or cuda.stopwatch()
        todo = [*cases(target), *transfers()]
    else:
        target = Target("cpu", ("fp32",), this_machine.cache_bytes(), large=False)
        watch, todo = stopwatch or Stopwatch(), cases(target)
    rows = _timed(todo, watch, budget * 0.8, progress)
    with tempfile.TemporaryDirectory() as folder:
        rows += parallel.files(Path(folder))
        ranks = torch.cuda.device_count() if on_gpu else 2
        if ranks > 1:
            rows += parallel.collectives("nccl" if on_gpu else "gloo", ranks, Path(folder))
    for row in rows:
        row |= {
            "hardware": name, "measured": date.today().isoformat(), "n_devices": row.get("n_devices", 1),
            "engine": row.get("engine", "pytorch"), "engine_version": torch.__version__,
            "flag": "noisy" if row["spread"] > NOISY else "",
        }  # fmt: skip
    _refuse_noise(rows)
    written = [_write(out, rows)]
    if hardware is None:
        largest = max(r["msg_bytes"] for r in rows if r["phase"] == "memcpy")  # smaller ones fit in the cache
        fastest = max(float(r["value"]) for r in rows if r["phase"] == "memcpy" and r["msg_bytes"] == largest)
        spec = this_machine.describe(date.today().isoformat(), fastest * 1e9, torch.get_num_threads())
        path = out.parent / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        written.append(path)
    return Result(name, rows, written)


def _timed(todo: Sequence[Any], watch: Stopwatch, budget: float, progress: bool | None) -> list[dict[str, Any]]:
    rows = []
    deadline = watch.now() + budget
    with _bar(len(todo), progress) as advance:
        for i, case in enumerate(todo):
            left = deadline - watch.now()
            if left <= 0:
                break
            timing = watch.measure(case.prepare(), left / (len(todo) - i))
            value = case.work / timing.seconds / 1e9 if case.work else timing.seconds * 1e6
            rows.append(
                {"metric": "kernel_time", **case.cells, "value": value, "unit": case.unit, "spread": timing.spread}
            )
            advance()
    return rows


class _bar:
    """A progress bar on a terminal's stderr; nothing elsewhere."""

    def __init__(self, total: int, shown: bool | None) -> None:
        self.total, self.shown = total, sys.stderr.isatty() if shown is None else shown

    def __enter__(self) -> Callable[[], None]:
        if not self.shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.progress.start()
        task = self.progress.add_task("measuring", total=self.total)
        return lambda: self.progress.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.progress.stop()


def _refuse_noise(rows: Sequence[dict[str, Any]]) -> None:
    noisy = [r for r in rows if r["flag"]]
    if len(noisy) > _NOISIEST * len(rows):
        raise SpecError(
            f"too noisy: {len(noisy)} of {len(rows)} results vary by more than {NOISY:.0%} between samples, after three tries. "
            "Stop what else runs here, fix the clock (nvidia-smi -lgc, or the performance governor) and measure again"
        )


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return path
