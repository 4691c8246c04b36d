"""perfmodel emit: the commands that start a plan."""

from __future__ import annotations

import re

import click

from perfmodel.cli.group import common_options
from perfmodel.errors import SpecError

_LONGEST_NAME = 40  # of the 63 that a label may have; roles, pools and numbers follow
_LABEL = re.compile(rf"[a-z]([a-z0-9-]{{0,{_LONGEST_NAME - 2}}}[a-z0-9])?")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--engine", help="vllm, sglang, trtllm or llama.cpp.  [the plan's]")
@click.option("--format", "form", type=click.Choice(["shell", "kubernetes", "json"]), default="shell", show_default=True)
@click.option("--checkpoint", metavar="ID", help="Hub id or path of the weights.  [the catalogue's]")
@click.option("--name", default="serve", show_default=True, help="First word of the names of Kubernetes objects.")
@common_options
def emit(file: str, engine: str | None, form: str, checkpoint: str | None, name: str, as_json: bool) -> None:
    """Commands and manifests that start the plan in FILE.

    FILE is the JSON that `perfmodel plan` writes, or a deployment in YAML.

    \b
    perfmodel emit out/plan.json --format kubernetes | kubectl apply -f -
    """
    from perfmodel.degrees import check_parallelism
    from perfmodel.engines import kubernetes, shell
    from perfmodel.engines.launch import launches
    from perfmodel.ops.shard import Parallelism
    from perfmodel.spec import deployment

    if form == "kubernetes" and not _LABEL.fullmatch(name):
        raise SpecError(f"--name {name!r}: Kubernetes takes lower-case letters, digits and -, at most {_LONGEST_NAME} here")
    if checkpoint is not None and not checkpoint.strip():
        raise SpecError("--checkpoint is empty: give a hub id or a path")
    found = launches(deployment.read(file), engine, checkpoint)
    for launch in found:
        p = launch.pool.spec
        check_parallelism(launch.pool.model, Parallelism(p.tp, p.pp, p.dp, p.ep, p.cp))
    if as_json or form == "json":
        click.echo(shell.plan_json(found))
    elif form == "kubernetes":
        click.echo(kubernetes.text(found, name), nl=False)
    else:
        click.echo(shell.script(found), nl=False)
