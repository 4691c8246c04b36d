"""perfmodel papers: what the literature claims, held against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import Verbs, common_options, help_if_alone
from perfmodel.cli.text import echo_json, heading, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.papers.run import Result, Score


@click.group(cls=Verbs, verbs={"list": f"{__name__}:list_papers", "show": f"{__name__}:show", "run": f"{__name__}:run"})
@click.pass_context
def papers(context: click.Context) -> None:
    """List the papers, show one, or run their claims."""
    help_if_alone(context)


@click.command("list")
@common_options
def list_papers(as_json: bool) -> None:
    """Every paper of the catalogue."""
    from perfmodel import catalog
    from perfmodel.papers.run import load

    found = [load(name) for name in catalog.names("papers")]
    if as_json:
        echo_json([{"id": p.id, "title": p.title, "family": p.family, "claims": len(p.claims)} for p in found])
        return
    rows = [["id", "claims", "family", "title"], *([p.id, str(len(p.claims)), p.family, p.title] for p in found)]
    click.echo(table(rows, right=(1,), indent=0))


@click.command()
@click.argument("name", metavar="ID|FILE")
@common_options
def show(name: str, as_json: bool) -> None:
    """Mechanism, parameters with their origin, settings and claims of one paper."""
    from perfmodel.papers.run import load

    p = load(name)
    if as_json:
        echo_json(p.model_dump(by_alias=True))
        return
    click.echo(f"{heading(p.title)}  {p.date}{'  arXiv:' + p.arxiv if p.arxiv else ''}\n\n  {p.mechanism.strip()}\n")
    rows = [["parameter", "value", "from", ""]]
    for key, g in p.parameters.items():
        span = f" in {g.range[0]:g}..{g.range[1]:g}" if g.range else f" or {', '.join(map(str, g.others))}" if g.others else ""
        rows.append([key, f"{g.value}{'' if g.unit == '1' else ' ' + g.unit}{span}", g.origin, g.source or g.reason or ""])
    click.echo(table(rows))
    for claim in p.claims:
        what = _claimed(claim.metric, claim.claimed, claim.unit, claim.direction)
        click.echo(f"\n  {what}; against {claim.against}; {claim.setting}")
        click.echo(f"    {claim.predict or claim.not_ours or claim.open}")
    for text in p.not_modelled:
        click.echo(f"\n  not modelled: {text}")


@click.command()
@click.argument("names", metavar="[ID|FILE]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every paper of the catalogue.")
@common_options
def run(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Predict what papers claim: verdict, prediction, and its range over what was assumed."""
    from perfmodel import catalog
    from perfmodel.papers.run import load, score
    from perfmodel.papers.several import run_several

    if everything == bool(names):
        raise SpecError("name papers (ids or files), or say --all")
    chosen = catalog.names("papers") if everything else list(names)
    results = [r for rows in run_several([load(name) for name in chosen]) for r in rows]
    if as_json:
        claims = [r.data() for r in results if r.verdict is not None]
        echo_json({"claims": claims, "predictions": [r.data() for r in results if r.verdict is None]})
        return
    click.echo(listing(results))
    click.echo(summary(score(results)))


def listing(results: list[Result]) -> str:
    """One line per claim, its reason below where it is not met."""
    rows = [["paper", "metric", "claimed", "predicted", "range", "verdict"]]
    for r in results:
        claimed = "" if r.claimed is None else _number(r.claimed) + _unit(r.unit)
        span = "" if r.low is None or r.high is None or r.low == r.high else f"{r.low:.3g}..{r.high:.3g}"
        predicted = "-" if r.predicted is None else f"{r.predicted:.3g}{_unit(r.unit)}"
        rows.append([r.paper, r.metric, claimed, predicted, span, r.verdict or ""])
    lines = table(rows, right=(2, 3), indent=0).splitlines()
    out = lines[:1]
    for r, line in zip(results, lines[1:], strict=True):
        out.append(line)
        if r.reason and r.verdict not in ("reproduced",):
            out.append(f"    {r.reason}")
    return "\n".join(out)


def summary(s: Score) -> str:
    """Counts of each verdict, and the null models beside ours."""
    parts = ", ".join(f"{n} {v}" for v, n in sorted(s.verdicts.items(), key=lambda x: -x[1]))
    if not parts:
        return "\nno claims, predictions only"
    sourced = ", ".join(f"{n} {v}" for v, n in sorted(s.sourced.items(), key=lambda x: -x[1])) or "none"
    return (
        f"\n{sum(s.verdicts.values())} claims: {parts}\n"
        f"of {s.counted} counted: {s.share('reproduced'):.0%} reproduced, "
        f"{s.share('reproduced', 'bounded'):.0%} reproduced or bounded\n"
        f"fully sourced: {sourced}\n"
        f"null models: no effect meets {s.null_no_effect}, bytes or FLOPs alone {s.null_ratio_alone}"
    )


def _claimed(metric: str, value: Any, unit: str, direction: str) -> str:
    return f"{metric} {_number(value)}{_unit(unit)} {direction}"


def _number(value: Any) -> str:
    return f"{value[0]:g}-{value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


def _unit(unit: str) -> str:
    return unit if unit in ("x", "%") else f" {unit}"
