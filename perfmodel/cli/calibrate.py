"""perfmodel calibrate: fit a device to measured rows, or measure this machine first."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json, heading, plural, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.validation.calibrate import Report


@click.command()
@click.argument("measurements", nargs=-1, metavar="MEASUREMENTS...", type=click.Path(exists=True, dir_okay=False))
@click.option("--hw", "--hardware", "hardware", help="The device the rows are of.")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="Calibration file (YAML), or with --measure the rows (CSV)."
)
@click.option("--measure", is_flag=True, help="Run the micro-benchmarks on this machine.")
@click.option("--budget", default="60 s", show_default=True, help="With --measure: about how long.")
@common_options
def calibrate(
    measurements: tuple[str, ...], hardware: str | None, out: str | None, measure: bool, budget: str, as_json: bool
) -> None:
    """Fit the parameters of one device to measured rows (tidy CSV) and write them with their spread.

    \b
    perfmodel calibrate rows.csv --hw h100-sxm --out h100.yaml
    perfmodel estimate --calibration-file h100.yaml --model llama-3.1-8b --hw h100-sxm
    """
    if measure:
        _measure(hardware, out, budget, as_json)
        return
    if not measurements:
        raise SpecError("name one file of measurements or more, or give --measure to take them on this machine")
    if hardware is None:
        raise SpecError("--hw is missing: which device are the rows of?")
    from perfmodel.validation import calibrate as fitting
    from perfmodel.validation.run import load

    report = fitting.calibrate(load(measurements), hardware)
    if out:
        fitting.write(report, Path(out), today=date.today())
    if as_json:
        echo_json(data(report))
    else:
        click.echo(page(report) + (f"\n\nWritten: {out}" if out else "\n\nNothing written: --out FILE keeps it."))


def _measure(hardware: str | None, out: str | None, budget: str, as_json: bool) -> None:
    from perfmodel import units
    from perfmodel.validation import microbench

    if out is None:
        raise SpecError("--measure needs --out FILE.csv for the rows")
    result = microbench.run(hardware, budget=units.parse(budget, "time"), out=Path(out))
    if as_json:
        echo_json(result.data())
    else:
        click.echo(result.text())


def data(report: Report) -> dict[str, object]:
    """The report as JSON."""
    return {
        "device": report.device, "stack": report.stack, "rows": report.fitted.rows, "scatter": report.fitted.scatter,
        "parameters": {k: {"prior": a, "value": b, "sigma": s} for k, (a, b, s) in report.kept.items()},
        "uninformed": report.uninformed, "ignored": report.ignored,
        "kinds": {k: {"rows": n, "before": a, "after": b} for k, (n, a, b) in report.kinds.items()},
        "held_back": None if report.held_back is None
        else dict(zip(("rows", "before", "after"), report.held_back, strict=True)),
    }  # fmt: skip


def page(report: Report) -> str:
    """Residuals before and after, parameters before and after, and what the rows could not tell."""
    lines = [heading(f"{report.device}, {report.stack}: fitted to {plural(report.fitted.rows, 'row')}")]
    errors = [["kind", "rows", "median error before", "after"]]
    errors += [[k, f"{n:,}", f"{a:.1%}", f"{b:.1%}"] for k, (n, a, b) in report.kinds.items()]
    if report.held_back:
        n, a, b = report.held_back
        errors.append(["held back (in no fit)", f"{n:,}", f"{a:.1%}", f"{b:.1%}"])
    lines.append(table(errors, right=(1, 2, 3)))
    lines.append("")
    rows = [["parameter", "prior", "fitted", "sigma"]]
    rows += [[k, f"{a:.4g}", f"{b:.4g}", f"{s:.2g}"] for k, (a, b, s) in report.kept.items()]
    lines.append(table(rows, right=(1, 2, 3)) if len(rows) > 1 else "  No parameter was informed beyond its prior.")
    if report.uninformed:
        lines.append("\nLeft at their priors, for these rows say too little: " + ", ".join(report.uninformed))
    if report.ignored:
        lines.append("Ignored: " + ", ".join(f"{n:,} {why}" for why, n in report.ignored.items()))
    return "\n".join(lines)
