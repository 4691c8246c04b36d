"""perfmodel ingest: benchmark output of other tools as rows of the tidy format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json, plural


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="Tidy CSV to write.  [print to stdout]")
@click.option("--hw", "--hardware", "hardware", help="Device or node the benchmark ran on.")
@click.option("--model", help="Where the file does not say it, or says it by a path.")
@click.option("--engine", help="Serving engine, such as vllm.")
@click.option("--engine-version", help="Its version.")
@click.option("--dtype", help="Weight format.  [the checkpoint's]")
@click.option("--kv-dtype", help="KV-cache format.")
@click.option("--tp", type=click.IntRange(1), help="Tensor-parallel degree.")
@click.option("--pp", type=click.IntRange(1), help="Pipeline stages.")
@click.option("--dp", type=click.IntRange(1), help="Data-parallel ranks.")
@click.option("--ep", type=click.IntRange(1), help="Expert-parallel degree.")
@click.option("--batch", type=click.IntRange(1), help="Sequences, or clients of a closed loop.")
@click.option("--input-len", type=click.IntRange(1), help="Prompt tokens.")
@click.option("--output-len", type=click.IntRange(1), help="Output tokens.")
@common_options
def ingest(files: tuple[str, ...], out: str | None, as_json: bool, **given: Any) -> None:
    """Read results of vllm bench, SGLang bench, AIPerf, GenAI-Perf or llama-bench.

    \b
    perfmodel ingest serve.json --hw h100-sxm --tp 4 --out rows.csv
    perfmodel calibrate rows.csv --hw h100-sxm --out h100.yaml
    """
    from perfmodel.validation import ingest as reading

    rows = [row for file in files for row in reading.ingest(file, given)]
    if out:
        reading.write(rows, Path(out))
        click.echo(f"{plural(len(rows), 'row')} written to {out}", err=True)
    if as_json:
        echo_json(rows)
    elif not out:
        columns = [c for c in reading.COLUMNS if any(row.get(c) not in (None, "") for row in rows)]
        click.echo(",".join(columns))
        for row in rows:
            click.echo(",".join("" if row.get(c) is None else str(row[c]) for c in columns))
