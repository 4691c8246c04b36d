"""perfmodel explain: where the number comes from and what would change it."""

from __future__ import annotations

from typing import Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import FromPlan, estimate_arguments, estimate_options
from perfmodel.cli.text import echo_json

_NOT_EXPLAINED = ("price", "ttft", "tpot", "rate", "concurrency")


@click.command(cls=FromPlan)
@estimate_options
@common_options
def explain(as_json: bool, **options: Any) -> None:
    """Formulas, operators and sensitivities behind an estimate. Takes the options of `estimate`."""
    from perfmodel.estimates import check_request
    from perfmodel.estimator import Estimator
    from perfmodel.explain import explain as run

    arguments = estimate_arguments(**options)
    request = {k: arguments.pop(k) for k in ("batch", "isl", "osl", "prefix")}
    instance = {k: v for k, v in arguments.items() if k not in _NOT_EXPLAINED}
    estimator = Estimator(**instance)
    check_request(estimator.model, **request)
    explanation = run(estimator, **request)
    if as_json:
        echo_json(explanation.data())
    else:
        click.echo(explanation.text())
