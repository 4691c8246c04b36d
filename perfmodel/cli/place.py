"""perfmodel place: where things should live, one formulation a verb."""

from __future__ import annotations

import click

from perfmodel.cli.group import Verbs, help_if_alone


@click.group(
    cls=Verbs,
    verbs={
        name: f"perfmodel.cli.place_{name}:place_{name}" for name in ("cache", "experts", "pipeline", "offload", "adapters")
    },
)
@click.pass_context
def place(context: click.Context) -> None:
    """Place cached prefixes, experts, layers, offloaded tensors or adapters where they are worth most."""
    help_if_alone(context)
