"""perfmodel trace: look at a request trace, or turn it into a workload without content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import F, Verbs, common_options, help_if_alone
from perfmodel.cli.options import refuse_reading_options, trace_of
from perfmodel.cli.text import echo_json, heading, number, plural, seconds, table, tally
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.serving.requests import Requests


@click.group(cls=Verbs, verbs={"show": f"{__name__}:show", "fit": f"{__name__}:fit"})
@click.pass_context
def trace(context: click.Context) -> None:
    """Look at a request trace, or fit a workload that can be shared in its place."""
    help_if_alone(context)


def _reading(function: F) -> F:
    """How to read the file."""
    options: list[Callable[[F], F]] = [
        click.argument("file", metavar="TRACE", type=click.Path(exists=True, dir_okay=False)),
        click.option("--column", "columns", multiple=True, metavar="ROLE=NAME",
                     help="A column that its name does not give away: arrival_s, arrival_ms, input, output, blocks, session, "
                          "think_s, elapsed_s, tenant, model or max_tokens."),
        click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Keep these rows only."),
        click.option("--block-tokens", type=click.IntRange(1), default=512, show_default=True,
                     help="Prompt tokens one block id stands for."),
        click.option("--keep-ticks", is_flag=True, help="Leave arrivals on the ticks of a coarse clock."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _read(file: str, columns: tuple[str, ...], where: tuple[str, ...], block_tokens: int, keep_ticks: bool) -> Requests:
    from perfmodel.serving.trace import read_trace

    return read_trace(trace_of(file, columns, where, block_tokens, keep_ticks=keep_ticks), Path())


def _is_fitted(file: str) -> bool:
    return Path(file).suffix in (".yaml", ".yml")


@click.command()
@_reading
@common_options
def show(file: str, as_json: bool, **how: Any) -> None:
    """Requests, rates, bursts, lengths, conversations and shared prefixes of TRACE.

    \b
    perfmodel trace show examples/traces/azure-code-2023.csv.gz
    perfmodel trace show log.jsonl --column arrival_ms=ts --block-tokens 16

    TRACE is CSV or JSON lines, also as .gz, or a workload.yaml that `trace fit` wrote (then of requests like the log's).
    """
    from perfmodel.serving.trace_summary import summary

    if _is_fitted(file):
        refuse_reading_options(how["columns"], how["where"])
        from perfmodel.serving.synthesis import synthesise
        from perfmodel.serving.workload import read_fitted

        requests = synthesise(read_fitted(Path(file)))
    else:
        requests = _read(file, **how)
    data = summary(requests)
    if as_json:
        echo_json(data)
    else:
        click.echo(_page(file, data))


@click.command()
@_reading
@click.option("--out", required=True, type=click.Path(dir_okay=False), metavar="FILE", help="Workload YAML to write.")
@common_options
def fit(file: str, out: str, as_json: bool, **how: Any) -> None:
    """Describe TRACE by a few hundred numbers: no rows, no content, no identifiers.

    \b
    perfmodel trace fit log.jsonl --out workload.yaml
    perfmodel trace show workload.yaml

    A plan file takes it as `workload: {fitted: workload.yaml, ...}`: requests like the log's are made from it. Labels
    (tenant, model, max_tokens) are not kept: fit each part of the traffic with --where.
    """
    from perfmodel.serving.synthesis import synthesise
    from perfmodel.serving.trace_fit import fit as describe
    from perfmodel.serving.trace_fit import to_yaml
    from perfmodel.serving.trace_summary import summary

    if _is_fitted(file):
        raise SpecError("a fit describes a trace (CSV or JSON lines), and this is YAML: a workload needs no fit", file=file)
    requests = _read(file, **how)
    fitted = describe(requests, Path(file).name)
    Path(out).write_text(to_yaml(fitted), encoding="utf-8")
    log, like = summary(requests), summary(synthesise(fitted))
    if as_json:
        echo_json({"file": out, "log": log, "like": like})
        return
    rows = [["", "log", "like it"], *([name, *(f(x) for x in (log, like))] for name, f in _COMPARED)]
    click.echo(f"{out}: {len(requests):,} requests\n{table(rows, right=(1, 2))}")


def _of(*keys: str) -> Callable[[dict[str, Any]], str]:
    def value(data: Any) -> str:
        for key in keys:
            data = data.get(key) if data else None
        return "-" if data is None else number(data)

    return value


_COMPARED = (
    ("mean requests/s", _of("rate", "mean")),
    ("fullest second / mean", _of("dispersion", "peak_to_mean_1s")),
    ("index of dispersion, 10 s", _of("dispersion", "index_of_dispersion", "10")),
    ("input p50", _of("input", "p50")),
    ("input p99", _of("input", "p99")),
    ("output p50", _of("output", "p50")),
    ("output p99", _of("output", "p99")),
    ("turns per session", _of("sessions", "turns_mean")),
    ("reusable prompt share", _of("sharing", "reusable_share")),
    ("cache tokens for 90 % of it", _of("sharing", "cache_tokens", "0.9")),
)


def _page(file: str, x: dict[str, Any]) -> str:
    rate, burst = x["rate"], x["dispersion"]
    peaks = [[f"fullest {seconds(float(w))}", f"{number(p['rate'])} /s", f"from {number(p['start_s'])} s"]
             for w, p in rate["peaks"].items()]  # fmt: skip
    mean = "-" if rate["mean"] is None else f"{number(rate['mean'])} /s"
    parts = [
        heading(f"{Path(file).name}: {plural(x['requests'], 'request')} over {seconds(x['span_s'])}"),
        f"{heading('Rate')}\n{table([['mean', mean], *peaks])}",
        f"{heading('Bursts')} (Poisson: 1)\n" + table([
            ["CV of gaps", "-" if burst["cv"] is None else number(burst["cv"])],
            *([f"index of dispersion, {w} s", "-" if v is None else number(v)]
              for w, v in burst["index_of_dispersion"].items()),
            ["fullest second / mean", "-" if burst["peak_to_mean_1s"] is None else number(burst["peak_to_mean_1s"])],
            ["clock", f"{number(x['clock_tick_s'])} s ticks" if x["clock_tick_s"] else "fine"],
        ]),
        f"{heading('Tokens')}\n" + table(
            [["", *x["input"]], *([name, *(tally(v) for v in x[name].values())] for name in ("input", "output"))],
            right=range(1, len(x["input"]) + 1),
        ),
    ]  # fmt: skip
    if x["sessions"]:
        s = x["sessions"]
        rows = [["sessions", tally(s["sessions"])], ["turns, mean", number(s["turns_mean"])],
                ["turns, p95", number(s["turns_p95"])], ["requests that are further turns", f"{s['further_turns']:.0%}"],
                ["gap between turns, median", seconds(s["gap_median_s"])],
                ["think time, median", seconds(s["think_median_s"])]]  # fmt: skip
        parts.append(f"{heading('Sessions')}\n{table(rows)}")
    if x["sharing"]:
        s = x["sharing"]
        rows = [["prompt tokens sent before", f"{s['reusable_share']:.1%}"],
                ["blocks", f"{tally(s['distinct_blocks'])} of {s['block_tokens']} tokens, {s['popular_blocks']} popular"],
                *([f"cache that finds {float(share):.0%} of them", f"{tally(tokens)} tokens"]
                  for share, tokens in s["cache_tokens"].items())]  # fmt: skip
        parts.append(f"{heading('Shared prefixes')} (one LRU cache for all instances)\n{table(rows)}")
    for name, shares in x["labels"].items():
        parts.append(f"{heading(name)}\n{table([[v or '(none)', f'{s:.1%}'] for v, s in shares.items()])}")
    return "\n\n".join(parts)
