"""perfmodel lint: what a serving command will do, and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Quantity
from perfmodel.cli.text import echo_json, heading, number, size, table

if TYPE_CHECKING:
    from perfmodel.lint import Report
    from perfmodel.lint.finding import Fit


@click.command()
@click.argument("command")
@click.option("--hw", "--hardware", "hardware", help="Node or device it runs on.  [a manifest's nodeSelector]")
@click.option("--model", help="What the checkpoint is, where its name does not tell.")
@click.option("--engine-version", default="", help="Version whose options count, such as 0.10.2.  [the newest]")
@click.option("--isl", "--input-len", "isl", type=click.IntRange(1), help="Prompt tokens of the workload.")
@click.option("--osl", "--output-len", "osl", type=click.IntRange(1), help="Output tokens of the workload.")
@click.option("--trace", type=click.Path(exists=True, dir_okay=False), help="CSV of requests: mean lengths, and the rate.")
@click.option("--rate", type=Quantity("rate", bare=True), help="Requests per second.")
@common_options
def lint(
    command: str, hardware: str | None, model: str | None, engine_version: str, isl: int | None, osl: int | None,
    trace: str | None, rate: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Check COMMAND: a line for vLLM, SGLang, trtllm-serve or llama-server, a script or Kubernetes file, or - for stdin.

    Exit code 2 where an error is found.

    \b
    perfmodel lint "vllm serve meta-llama/Llama-3.1-70B-Instruct --tensor-parallel-size 4" --hardware hgx-h100-8
    """
    from perfmodel.errors import SpecError
    from perfmodel.lint import lint as run

    if (isl is None) != (osl is None):
        raise SpecError("--isl and --osl describe a workload together; give both")
    lengths = (isl, osl) if isl is not None and osl is not None else None
    if trace is not None:
        if lengths is not None:
            raise SpecError("--trace and --isl/--osl both give the lengths; leave one out")
        lengths, mean_rate = _workload(trace)
        rate = mean_rate if rate is None else rate
    if rate is not None and lengths is None:
        raise SpecError("--rate needs the lengths of the requests: --isl and --osl, or --trace")
    text = sys.stdin.read() if command == "-" else command
    reports = run(text, hardware, model=model, version=engine_version, lengths=lengths, rate=rate)
    if as_json:
        echo_json([r.data() for r in reports])
    else:
        click.echo("\n\n".join(page(r) for r in reports))
    if any(r.worst == "error" for r in reports):
        sys.exit(2)


def _workload(path: str) -> tuple[tuple[int, int], float | None]:
    """Mean lengths and mean rate of a trace."""
    import numpy as np

    from perfmodel.serving.trace import read_trace
    from perfmodel.spec.workload import Trace

    file = Path(path).resolve()
    requests = read_trace(Trace(file=file.name), file.parent)
    span = float(np.ptp(requests.arrival))
    lengths = round(float(requests.input.mean())), max(round(float(requests.output.mean())), 1)
    return lengths, len(requests) / span if span > 0 else None


def page(r: Report) -> str:
    """A report as text."""
    where = f" on {r.hardware}" if r.hardware else ""
    parts = [heading(f"{r.source['title']} {r.source['version']}: {r.model or 'model unknown'}{where}")]
    if r.fit is not None:
        parts.append(_fit(r.fit))
    if r.findings:
        parts.append("\n".join(f"  {f.severity:7}  {f.message}  [{f.code}]" for f in r.findings))
    else:
        parts.append("  Nothing to report.")
    if r.better:
        parts.append(f"{heading('Better')}\n  {r.better}")
    return "\n\n".join(parts)


def _fit(f: Fit) -> str:
    rows = [
        ["weights", size(f.weights)], ["activations and sampler", size(f.activations)],
        ["context, communication", size(f.overhead)], ["captured graphs", size(f.graphs)],
        ["left for the cache", size(f.kv_pool) if f.kv_pool > 0 else "nothing"],
    ]  # fmt: skip
    lines = [f"  Per device ({f.devices} x {f.device}, {size(f.visible)} each)", table(rows, right=(1,), indent=4)]
    ranks = f" per rank, {f.ranks} ranks" if f.ranks > 1 else ""
    most = f"{number(f.concurrency_at_context)} sequences of {f.context:,} tokens at once"
    lines.append(f"  Cache {f.kv_tokens:,} tokens{ranks}; {most}")
    if f.lengths is not None and f.concurrency_at_lengths is not None:
        lines.append(f"  {number(f.concurrency_at_lengths)} sequences of the workload's {sum(f.lengths):,} tokens at once")
    lines.append(f"  Scheduler {f.limit_sequences:,} sequences, {f.step_tokens:,} tokens a step")
    lines.append(f"  Binds: {f.binding}, {f.binding_why}")
    return "\n".join(lines)
