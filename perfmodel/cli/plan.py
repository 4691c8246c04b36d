"""perfmodel plan: the cheapest fleet that serves a workload within its objectives."""

from __future__ import annotations

import sys

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Finite, Quantity
from perfmodel.cli.text import echo_json

OBJECTIVES = ["cost", "devices", "power", "carbon", "latency", "goodput"]


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", default="out", show_default=True, metavar="DIR", help="Folder of the report.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="What to minimise.  [the file's]")
@click.option("--confidence", type=Quantity("ratio"), help="Probability of keeping the promises, 0.5 to 1.  [the file's]")
@click.option("--budget", help="Most the fleet may cost, such as '60 USD/h'.  [the file's]")
@click.option("--load", type=Finite(above=True), help="Multiple of the rate to plan for.  [the file's]")
@click.option("--quick", is_flag=True, help="Only the plan: no runners-up, no sensitivities.")
@click.option("--replay-all", is_flag=True, help="Replay runners-up, alternatives and what-ifs too.")
@click.option("--measure", is_flag=True, help="Look also among rates measured by replay: may be cheaper, takes minutes.")
@click.option("--no-report", is_flag=True, help="Write no report.")
@common_options
def plan(
    file: str, out: str, objective: str | None, confidence: float | None, budget: str | None, load: float | None,
    quick: bool, replay_all: bool, measure: bool, no_report: bool, as_json: bool,
) -> None:  # fmt: skip
    """Choose the fleet for the workload in FILE (YAML)."""
    from perfmodel.planner.run import plan as run

    def progress(line: str) -> None:
        click.echo(f"{line} ...", err=True)

    # A plan takes minutes; say so where a person is watching.
    shown = progress if sys.stderr.isatty() else None
    result = run(
        file, objective=objective, confidence=confidence, budget=budget, load=load, explain=not quick, replay_all=replay_all,
        measured=measure, progress=shown,
    )  # fmt: skip
    if as_json:
        echo_json(result.data)
    else:
        click.echo(result.text())
    if not no_report:
        from perfmodel.report import page

        written = page.write(result, out)
        # Beside the result, so that --json leaves one document on stdout.
        click.echo(f"report: {written}", err=True)
