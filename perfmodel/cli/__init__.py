"""The command line: one file per verb, imported when the verb is used.

``perfmodel --help`` must feel instant, so the modules here import nothing heavier than click at their top.
"""

from __future__ import annotations

import click

from perfmodel import __version__
from perfmodel.cli.group import Program, help_if_alone, specs_option

__all__ = ["main"]


@click.group(
    cls=Program,
    verbs={
        name.replace("_", "-"): f"perfmodel.cli.{name}:{name}"
        for name in (
            "estimate",
            "denoise",
            "explain",
            "plan",
            "replay",
            "report",
            "emit",
            "lint",
            "place",
            "validate",
            "calibrate",
            "ingest",
            "measure_next",
            "trace",
            "techniques",
            "papers",
            "models",
            "hardware",
        )
    },
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 bad input, 3 infeasible. Every verb takes --json and --help.",
)
@specs_option
@click.version_option(__version__, package_name="perfmodel", message="%(package)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Predict how fast, how large and how expensive a language model runs on given hardware, and plan its fleet.

    \b
    perfmodel estimate --model llama-3.1-8b --hw h100-sxm --batch 16 --isl 1024 --osl 256
    """
    help_if_alone(context)
