"""perfmodel validate: predict every row of measurement files and say how far off the predictions are."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json, heading, plural, table

if TYPE_CHECKING:
    from perfmodel.validation.score import Score, Scored

_COLUMNS = ("predicted", "p10", "p90", "error", "refused")


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, dir_okay=False))
@click.option("--by", default="file,hardware,phase,metric", show_default=True, metavar="COLUMNS",
              help="Columns to group by; `kind` and `file` count as columns.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="Write every row with its prediction as CSV.")
@click.option("--report", metavar="DIR", help="Write a page with plots into this folder.")
@click.option("--flagged", is_flag=True, help="Score rows with a flag too.")
@click.option("--zero-shot", is_flag=True, help="Use no constant that was fitted to any row of the row's device.")
@click.option("--leave-out", type=click.Choice(["hardware"]),
              help="Refit to the rows of all other devices, then score each device.")  # fmt: skip
@click.option("--decisions", is_flag=True, help="Score the choice of a layout under TPOT limits instead of the times.")
@click.option("--confidence", type=click.FloatRange(0.5, 0.99), default=0.5, show_default=True,
              help="With --decisions: how sure a limit must be met.")  # fmt: skip
@click.option("--requests-per-client", type=click.IntRange(1), default=10, show_default=True,
              help="Requests each client of a closed loop sends.")  # fmt: skip
@common_options
def validate(
    files: tuple[str, ...],
    by: str,
    out: str | None,
    report: str | None,
    flagged: bool,
    zero_shot: bool,
    leave_out: str | None,
    decisions: bool,
    confidence: float,
    requests_per_client: int,
    as_json: bool,
) -> None:
    """Score predictions on measured rows: tidy CSV files, plain or gzipped, or engine memory logs.

    A row that cannot be predicted is counted with its reason and as an error of 100 %.
    """
    from perfmodel.validation.leave_out import leave_one_out
    from perfmodel.validation.run import check_columns, client_sensitivity, validate
    from perfmodel.validation.score import by as grouped
    from perfmodel.validation.score import score

    keys = check_columns(by, files)
    if leave_out:
        rows = leave_one_out(files, flagged=flagged, requests_per_client=requests_per_client)
    else:
        # Flags tell which serving rows were measured while requests queued: decisions heed them.
        rows = validate(files, flagged=flagged or decisions, zero_shot=zero_shot, requests_per_client=requests_per_client)
    if out:
        write_predictions(Path(out), rows)
    if report:
        _report(rows, report, files, zero_shot=zero_shot, leave_out=leave_out)
    if decisions:
        _decide(rows, confidence, as_json)
        return
    groups = grouped(rows, keys)
    overall = score(rows)
    if as_json:
        echo_json({"groups": [{**k, **s.as_dict()} for k, s in groups], "overall": overall.as_dict()})
    else:
        click.echo(page(groups, overall))
        changes = client_sensitivity(rows)
        if changes:
            said = ", ".join(f"{metric} {change:+.1%}" for metric, change in changes.items())
            click.echo(f"\nClosed loops: twice the requests per client would change predictions by (median) {said}.")


def _report(rows: list[Scored], folder: str, files: tuple[str, ...], *, zero_shot: bool, leave_out: str | None) -> None:
    from perfmodel.report import fidelity

    how = "each device by a law that never saw it" if zero_shot or leave_out else "with the catalogue's parameters"
    names = ", ".join(Path(f).name for f in files)
    click.echo(f"report: {fidelity.write(rows, folder, f'{names}; predicted {how}.')}", err=True)


def _decide(rows: list[Scored], confidence: float, as_json: bool) -> None:
    from perfmodel.validation.decisions import decide

    d = decide(rows, confidence)
    if as_json:
        echo_json(d.as_dict())
        return
    lines = [
        ("groups of layouts to choose from", f"{d.groups:,}"),
        ("decisions (limits at the 30, 50 and 70 % quantiles of TPOT)", f"{d.decisions:,}"),
        ("throughput lost by the layout chosen: mean", f"{d.regret_mean:.1%}"),
        ("  nine in ten lose less than", f"{d.regret_p90:.1%}"),
        ("best layout among our first two", f"{d.top_two:.0%}"),
        (f"choices that break their limit, at confidence {confidence:g}", f"{d.limits_broken:.0%}"),
        ("rank correlation within a group, mean", f"{d.spearman:.3f}"),
    ]
    if d.device_decisions:
        lines.append(("throughput lost by the device chosen: mean", f"{d.device_regret_mean:.1%}"))
    click.echo(table(lines, right=(1,), indent=0))


def page(groups: list[tuple[dict[str, str], Score]], overall: Score) -> str:
    """One line per group, the total, and why rows were refused."""
    keys = list(groups[0][0]) if groups else []
    head = [*keys, "rows", "predicted", "median", "mean", "p90", "bias", "rank", "in band", "width"]
    rows = [head] + [[*k.values(), *_cells(s)] for k, s in groups]
    rows.append(["all", *[""] * (len(keys) - 1), *_cells(overall)])
    lines = [table(rows, right=range(len(keys), len(head)), indent=0)]
    summary = [
        f"mean |log| {_or_dash(overall.mean_abs_log, '.3f')}",
        f"time-weighted error {_or_dash(overall.time_weighted_ape, '.1%')}",
        f"pinball loss {_or_dash(overall.pinball, '.4f')} of the measured value",
    ]
    lines.append(
        "\nmedian, mean, p90: |predicted/measured - 1|, a refused row counts 100 %. bias: median signed error. rank: Spearman.\n"
        "in band: share of measurements inside p10-p90. width: median (p90 - p10)/expected.\n"
        + ", ".join(summary)
        + "."
    )
    if overall.refused:
        lines.append("\n" + heading(f"Refused: {plural(overall.rows - overall.predicted, 'row')}"))
        lines.append(table([[f"{n:,}", reason] for reason, n in overall.refused.items()], right=(0,)))
    return "\n".join(lines)


def _cells(s: Score) -> list[str]:
    return [
        f"{s.rows:,}", f"{s.predicted:,}", f"{s.median_ape:.1%}", f"{s.mape:.1%}", f"{s.p90_ape:.1%}",
        *(_or_dash(x, form) for x, form in
          ((s.bias, "+.1%"), (s.spearman, ".3f"), (s.coverage, ".0%"), (s.width, ".2f"))),
    ]  # fmt: skip


def _or_dash(x: float, form: str) -> str:
    return format(x, form) if math.isfinite(x) else "-"


def write_predictions(path: Path, rows: list[Scored]) -> None:
    """Every row as read, with prediction, p10, p90, signed error or the reason of refusal."""
    from perfmodel.validation.rows import Predicted

    names = list(dict.fromkeys(name for s in rows for name in s.row.cells))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer: Any = csv.writer(stream)
        writer.writerow(["file", "line", *names, *_COLUMNS])
        for s in rows:
            o = s.outcome
            if isinstance(o, Predicted):
                added = [f"{o.value:.6g}", f"{o.low:.6g}", f"{o.high:.6g}", f"{o.value / s.measured - 1:.4f}", ""]
            else:
                added = ["", "", "", "", str(o)]
            writer.writerow([s.row.file, s.row.line, *(s.row.cells.get(n, "") for n in names), *added])
