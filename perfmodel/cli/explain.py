"""perfmodel explain: where the number comes from and what would change it."""

from __future__ import annotations

from typing import Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import FromPlan, estimate_arguments, estimate_options
from perfmodel.cli.text import echo_json, heading

_NOT_EXPLAINED = ("price", "ttft", "tpot", "rate", "concurrency")


@click.command(cls=FromPlan)
@estimate_options
@click.option("--paper", metavar="ID", help="A paper's two settings instead: what its proposal relieves.")
@common_options
def explain(as_json: bool, paper: str | None, **options: Any) -> None:
    """Formulas, operators and sensitivities behind an estimate. Takes the options of `estimate`.

    With techniques: what each resource does without and with them, and from where on they stop helping.
    """
    from perfmodel.estimates import check_request
    from perfmodel.estimator import Estimator
    from perfmodel.explain import explain as run

    if paper is not None:
        _paper(paper, as_json)
        return
    arguments = estimate_arguments(**options)
    request = {k: arguments.pop(k) for k in ("batch", "isl", "osl", "prefix")}
    instance = {k: v for k, v in arguments.items() if k not in _NOT_EXPLAINED}
    estimator = Estimator(**instance)
    check_request(estimator.model, **request)
    if estimator.techniques:
        plain = Estimator(**{**instance, "techniques": ()})
        title = f"{plain.model.name} on {plain.machine.name}: without and with {', '.join(instance['techniques'])}"
        _compared(plain, estimator, request["batch"], request["isl"], request["osl"], title, as_json)
        return
    explanation = run(estimator, **request)
    if as_json:
        echo_json(explanation.data())
    else:
        click.echo(explanation.text())


def _paper(name: str, as_json: bool) -> None:
    """The two settings that a paper's first predicted claim compares."""
    from perfmodel.errors import SpecError
    from perfmodel.papers.pair import pair
    from perfmodel.papers.run import load
    from perfmodel.papers.setting import estimator

    paper = load(name)
    try:
        before, after = pair(paper)
    except SpecError as error:
        if not _pooled(paper, as_json):
            raise error
        return
    title = f"{paper.title}\n{before.name} against {after.name}: {after.setting.model} on {after.setting.hardware}"
    plain, changed = estimator(before.setting), estimator(after.setting)
    if before.steps:
        _denoised(plain, changed, (after.batch, after.input, after.steps), title, as_json)
        return
    _compared(plain, changed, before.batch, round(before.input), round(before.output), title, as_json)


def _pooled(paper: Any, as_json: bool) -> bool:
    """Two ways to serve the same requests, under load; whether the paper has them."""
    from perfmodel.papers.pooled import pooled, text

    found = pooled(paper)
    if found is None:
        return False
    if as_json:
        echo_json(found.data())
        return True
    click.echo(heading(f"{paper.title}\n{found.before.name} against {found.after.name}"))
    click.echo(text(found))
    return True


def _compared(before: Any, after: Any, batch: float, isl: int, osl: int, title: str, as_json: bool) -> None:
    from perfmodel.explain.compare import compare, text

    found = compare(before, after, batch, isl, osl)
    if as_json:
        echo_json(found.data())
        return
    click.echo(heading(title))
    click.echo(text(found, batch, isl, osl))
    _equations(before, after)


def _denoised(before: Any, after: Any, work: tuple[float, float, float], title: str, as_json: bool) -> None:
    from perfmodel.explain.denoised import compare, text

    found = compare(before, after, *work)
    if as_json:
        echo_json(found.data())
        return
    click.echo(heading(title))
    click.echo(text(found, *work))
    _equations(before, after)


def _equations(before: Any, after: Any) -> None:
    for technique in after.techniques:
        if technique not in before.techniques:
            equation = (type(technique).__doc__ or "").strip().split("\n\n", 1)[-1]
            click.echo(f"\n{technique.kind}: " + " ".join(equation.split()))
