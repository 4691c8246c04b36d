"""perfmodel report: the page of a plan from its JSON, without solving it again."""

from __future__ import annotations

from pathlib import Path

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", metavar="DIR", help="Folder of report.html.  [that of FILE]")
@click.option("--trace", "traces", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="The trace the plan was made for, where it has moved; once for each service that reads one.")
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False), help="Another choice of sections.  [reports/plan.yaml]")
@common_options
def report(file: str, out: str | None, traces: tuple[str, ...], recipe: str | None, as_json: bool) -> None:
    """Write the page of the plan in FILE, the plan.json that `perfmodel plan` writes.

    Closed forms, replay and charts are computed anew from the plan's pools and its trace; the proof, alternatives and
    what-ifs are those stored. Percentiles more than 2 % from the stored ones are warned of.

    \b
    perfmodel report out/plan.json --out page
    """
    from perfmodel.planner import page as text
    from perfmodel.planner.stored import read
    from perfmodel.report import page

    run = read(file, traces)
    written = page.write(run, out if out is not None else Path(file).parent, recipe, data=False)
    if as_json:
        echo_json({"report": str(written), "plans": [p.data for p in run.plans]})
    else:
        click.echo("\n\n".join(text.percentiles(p.data) for p in run.plans))
    click.echo(f"report: {written}", err=True)
