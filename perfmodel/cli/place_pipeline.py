"""perfmodel place pipeline: layers over unequal devices and links."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.text import echo_json, heading, number, seconds, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.planner.placement.pipeline import Answer, Fleet
    from perfmodel.planner.placement.stages import Link


@click.command("pipeline")
@click.option("--model", required=True, help="Name, alias or Hugging Face id; a YAML, a config.json or its folder.")
@click.option("--devices", required=True, metavar="LIST",
              help="Hosts with their devices: '2x a100-pcie-80gb, 4x rtx-4090/tp2, l40s'; /tpN joins N cards to one stage.")
@click.option("--link", default="ethernet-10g", show_default=True, help="Between hosts: a network's name or '10 Gbit/s'.")
@click.option("--between", multiple=True, metavar="I:J=LINK", help="Another link between the I-th and the J-th host (from 1).")
@click.option("--isl", type=click.IntRange(1), default=1024, show_default=True, help="Prompt tokens each.")
@click.option("--osl", type=click.IntRange(1), default=128, show_default=True, help="Output tokens each.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True,
              help="Sequences in flight over the whole pipeline.")
@click.option("--goal", type=click.Choice(["throughput", "latency"]), default="throughput", show_default=True)
@click.option("--ordered", is_flag=True, help="Stages only in the order of the list.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang, trtllm or llama.cpp.")
@click.option("--solver", type=click.Choice(["dp", "highs", "cbc"]), default="dp", show_default=True,
              help="dp: exact dynamic program; the others solve the same as an integer program.")
@common_options
def place_pipeline(
    model: str, devices: str, link: str, between: tuple[str, ...], isl: int, osl: int, batch: int, goal: Any,
    ordered: bool, engine: str, solver: str, as_json: bool,
) -> None:  # fmt: skip
    """Cut a model's layers over unequal devices: the fastest pipeline, which devices it leaves idle, and why.

    \b
    perfmodel place pipeline --model llama-3-70b --devices "2x a100-pcie-80gb, 4x rtx-4090, l40s" --link ethernet-10g
    """
    from perfmodel import catalog
    from perfmodel.planner.placement import pipeline, stages

    entries = tuple(stages.entry(text) for text in devices.split(","))
    links = _links(len(entries), link, between)
    fleet = pipeline.Fleet(
        catalog.load_model(model), entries, links, stages.Request(isl, osl, batch), goal, ordered, engine
    )
    answer = pipeline.split(fleet, solver=solver)
    if as_json:
        echo_json(_data(fleet, answer))
    else:
        click.echo(_page(fleet, answer))


def _links(hosts: int, default: str, between: tuple[str, ...]) -> dict[tuple[int, int], Link]:
    from perfmodel.planner.placement.stages import link

    usual = link(default)
    links = dict.fromkeys(itertools.combinations(range(hosts), 2), usual)
    for text in between:
        pair, _, name = text.partition("=")
        ends = pair.split(":")
        if len(ends) != 2 or not all(e.strip().isdigit() for e in ends) or not name:
            raise SpecError(f"--between {text!r}: write it like '1:3=ethernet-100g'")
        low, high = sorted(int(e) - 1 for e in ends)
        if (low, high) not in links:
            raise SpecError(f"--between {text!r}: there are hosts 1 to {hosts}, and a link joins two of them")
        links[low, high] = link(name)
    return links


def _data(fleet: Fleet, a: Answer) -> dict[str, Any]:
    kind, index = a.best.binding
    return {
        "model": fleet.model.name, "goal": fleet.goal, "seconds_per_request": a.best.objective, "bound": a.best.bound,
        "gap": a.best.gap, "method": a.best.method, "micro_batches": a.micro_batches,
        "stages": [
            {
                "device": fleet.entries[s.group].label, "host": s.group + 1, "first_layer": s.first, "last_layer": s.last,
                "seconds": s.seconds, "hop_seconds": s.hop,
            }
            for s in a.best.stages
        ],
        "binding": {"kind": kind, "stage": index + 1},
        "alternatives": a.alternatives,
        "changes": a.values,
    }  # fmt: skip


def _page(fleet: Fleet, a: Answer) -> str:
    best, throughput = a.best, fleet.goal == "throughput"
    r = fleet.request
    rows = [["stage", "device", "host", "layers", "seconds/request", "link before it"]]
    for i, s in enumerate(best.stages, start=1):
        rows.append([
            str(i), fleet.entries[s.group].label, str(s.group + 1), f"{s.first}-{s.last}", seconds(s.seconds),
            seconds(s.hop) if i > 1 else "-",
        ])  # fmt: skip
    rate = f" = {number(1 / best.objective)} requests/s, {number(r.osl / best.objective)} output tokens/s" if throughput else ""
    kind, index = best.binding
    what = f"stage {index + 1} ({fleet.entries[best.stages[index].group].label})"
    used = {g: sum(s.group == g for s in best.stages) for g in range(len(fleet.entries))}
    idle = [f"{d.count - used[g]} x {d.label}" for g, d in enumerate(fleet.entries) if used[g] < d.count]
    lines = [
        f"{heading(fleet.model.name)}: {r.batch} sequences of {r.isl} + {r.osl} tokens in flight, best {fleet.goal}",
        table(rows, right=(0, 2, 4, 5)),
        f"  {'bottleneck' if throughput else 'one request alone'} {seconds(best.objective)} per request{rate}, "
        f"{a.micro_batches} micro-batches",
        f"  proven by {best.method}: gap {best.gap:.2%}",
        f"  {'binds' if throughput else 'longest'}: {'the link before ' if kind == 'link' else ''}{what}",
        f"  idle: {', '.join(idle) or 'none'}",
        "",
        heading("other splits"),
        table([_compared(name, value, best.objective) for name, value in a.alternatives.items()], right=(1, 2)),
        "",
        heading("if"),
        table([_compared(name, value, best.objective) for name, value in a.values.items()], right=(1, 2)),
    ]
    return "\n".join(lines)


def _compared(name: str, value: float, best: float) -> list[str]:
    return [name, "does not fit" if math.isinf(value) else seconds(value), "" if math.isinf(value) else f"x {value / best:.2f}"]
