"""perfmodel measure-next: the benchmark that would tell most about a plan."""

from __future__ import annotations

import sys

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json, table


@click.command("measure-next")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@common_options
def measure_next(file: str, as_json: bool) -> None:
    """Rank benchmarks by how much they would narrow the step times behind the plan in FILE (YAML)."""
    from perfmodel.planner.run import plan
    from perfmodel.validation.measure_next import rank, uses

    def progress(line: str) -> None:
        click.echo(f"{line} ...", err=True)

    first = plan(file, progress=progress if sys.stderr.isatty() else None).plans[0]
    ranked = rank(uses(first))
    if as_json:
        echo_json([
            {"command": r.candidate.command, "hardware": r.candidate.hardware, "spread_before": r.before,
             "spread_after": r.after, "settles": r.settles} for r in ranked
        ])  # fmt: skip
        return
    best = ranked[0]
    click.echo(f"The step times of this plan are uncertain by +{best.before:.0%} (p90). Measure next:\n")
    click.echo(f"  {best.candidate.command}\n")
    click.echo(f"on {best.candidate.hardware}; it leaves +{best.after:.0%}, mostly by settling {best.settles}.\n")
    rows = [["p90 after", "settles", "benchmark"]]
    rows += [[f"+{r.after:.0%}", r.settles, r.candidate.command] for r in ranked]
    click.echo(table(rows, right=(0,)))
    click.echo(
        "\nFeed the results back: perfmodel ingest RESULT.json --out rows.csv, then perfmodel calibrate rows.csv."
    )
