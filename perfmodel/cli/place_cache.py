"""perfmodel place cache: cached prefixes over tiers of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Finite, Quantity
from perfmodel.cli.text import echo_json, heading, number, size, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.planner.placement.cache import Placement, TierUse
    from perfmodel.planner.placement.study import Study

_ROUTINGS = ("prefix-affine", "random", "round-robin", "least-loaded")


@click.command("cache")
@click.option("--model", required=True, help="Name, alias or Hugging Face id; a YAML, a config.json or its folder.")
@click.option("--hw", "--hardware", "hardware", required=True, help="Node: name, alias or YAML.")
@click.option("--trace", required=True, type=click.Path(exists=True, dir_okay=False), help="Requests with block ids.")
@click.option("--block-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a block of the trace.")
@click.option("--tp", "--tensor-parallel-size", "tp", type=click.IntRange(1), default=1, show_default=True,
              help="Tensor-parallel degree.")
@click.option("--pp", "--pipeline-parallel-size", "pp", type=click.IntRange(1), default=1, show_default=True,
              help="Pipeline stages.")
@click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", help="KV-cache format.  [the activations']")
@click.option("--weight-dtype", "--quantization", "weight_dtype", help="Weight format.  [the checkpoint's]")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang, trtllm or llama.cpp.")
@click.option("--replicas", type=click.IntRange(1), help="Instances.  [as few as carry the trace without hits]")
@click.option("--routing", type=click.Choice(_ROUTINGS), default="prefix-affine", show_default=True, help="Who gets a request.")
@click.option("--guard", type=Finite(1.0), help="Most work a replica may get for its prefixes, over the mean.  [none]")
@click.option("--tier", "wanted", multiple=True, metavar="NAME=WHAT",
              help="hbm, dram, cxl, ssd, csd or remote = a size (dram=1TB) or catalogue devices (csd=8xsmartssd) per node; hbm "
              "per replica, remote in all; 0 leaves it out.  [the node's host memory and drives]")
@click.option("--gb-price", "gb_prices", multiple=True, metavar="NAME=USD", help="USD per GB-month of a tier, such as dram=0.3.")
@click.option("--price", type=Quantity("price"), help="Of a whole node, such as '88 USD/h'.  [the catalogue's]")
@click.option("--drive-writes-per-day", type=Finite(above=True),
              help="Full writes a day that the drives' endurance allows.  [no limit]")
@click.option("--busy", type=Quantity("ratio"), default="0.8", show_default=True, help="Share of each path's rate to plan for.")
@click.option("--objective", type=click.Choice(["net", "gpu"]), default="net", show_default=True,
              help="net: prefill seconds saved less fetch seconds; gpu: prefill seconds alone, where fetching is quicker.")
@click.option("--overlap", is_flag=True, help="A layer's fetch hides behind the prefill of the layer before.")
@common_options
def place_cache(
    wanted: tuple[str, ...], gb_prices: tuple[str, ...], drive_writes_per_day: float | None, as_json: bool, **options: Any
) -> None:
    """Which tier should hold how much of a trace's cached prefixes, and what one more GB is worth.

    \b
    perfmodel place cache --model llama-3.1-70b --hw hgx-h100-8 --tp 8 --trace mooncake-conversation.csv.gz
    """
    from perfmodel.planner.placement.study import study

    if drive_writes_per_day is not None and drive_writes_per_day <= 0:
        raise SpecError(f"--drive-writes-per-day must be positive, got {drive_writes_per_day:g}")
    result = study(
        options.pop("model"), options.pop("hardware"), options.pop("trace"), wanted=_pairs("--tier", wanted),
        gb_prices={k: _number("--gb-price", v) for k, v in _pairs("--gb-price", gb_prices).items()},
        drive_writes_per_day=drive_writes_per_day, **options,
    )  # fmt: skip
    if as_json:
        echo_json(result.data())
    else:
        click.echo(page(result))


def _pairs(option: str, items: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not text.strip():
            raise SpecError(f"{option} {item!r}: write NAME=VALUE")
        if name in pairs:
            raise SpecError(f"{option} {name} is given twice")
        pairs[name.strip()] = text.strip()
    return pairs


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SpecError(f"{option}: {text!r} is not a number of USD per GB-month") from None
    if not 0 <= value < float("inf"):
        raise SpecError(f"{option}: {text} is not a price")
    return value


def page(s: Study) -> str:
    """The study as text."""
    p, e = s.profile, s.estimator
    devices = int(e.par.devices)
    lines = [
        heading(f"{e.model.name} on {s.replicas} x {devices} {e.machine.device.name}, {s.described}"),
        f"  Routing {s.routing}; the busiest replica gets {s.imbalance:.2f} times what a random deal would give it.",
        f"  {p.prompt:,.0f} prompt tokens/s need {number(p.work * devices)} GPU s/s of prefill; "
        f"{1 - s.placement.new:.1%} of them came to the same replica before (after a warm-up of {p.warm_up:,.0f} s).",
        "",
        table([_header(s), *(_row(s, u) for u in s.placement.uses)], right=range(1, 10)),
        "",
        f"  Found {s.placement.hit_share:.1%} of prompt tokens, computed again {s.placement.recomputed:.1%}, "
        f"new to the replica {s.placement.new:.1%}; saves {number(s.placement.saved * devices)} GPU s/s "
        f"({s.placement.saved / p.work:.0%} of prefill). {s.placement.solution.status}, "
        f"gap {s.placement.solution.gap:.1g}.",
        *_limits(s.placement),
        "",
        heading("Tier by tier"),
        table([["tiers", "found", "saved GPU s/s"], ["none", "0.0%", "0"],
               *([" + ".join(u.tier.name for u in x.uses), f"{x.hit_share:.1%}", number(x.saved * devices)] for x in s.ladder)],
              right=(1, 2)),
        "",
        heading("Everything under LRU instead"),
        table([["chain of tiers", "found", "saved GPU s/s", "too slow"],
               *([b.name, f"{sum(b.hits) / p.prompt:.1%}", number(b.saved * devices), b.limited] for b in s.baselines)],
              right=(1, 2)),
    ]  # fmt: skip
    if s.price is not None:
        lines.append(f"\n  One instance costs {s.price * 3600:,.2f} USD/h ({s.price_source}).")
    return "\n".join(lines)


def _header(s: Study) -> list[str]:
    worth = "GPU s/h of +1 GB" if s.price is None else "USD/month of +1 GB"
    return ["tier", "capacity", "used", "should be", "found", "saved GPU s/s", "read", "written", worth, "keeps for"]


def _row(s: Study, u: TierUse) -> list[str]:
    worth = s.worth(u)
    more = u.value_per_gb * int(s.estimator.par.devices) * 3600 if worth is None else worth
    sized = s.sizes.get(u.tier.name)
    return [
        u.tier.name, size(u.tier.bytes), size(u.used * u.tier.token_bytes),
        "-" if sized is None else size(sized * u.tier.token_bytes), f"{u.hits / s.profile.prompt:.1%}",
        number(u.saved * int(s.estimator.par.devices)), f"{u.read:.1%}", f"{u.write:.1%}", number(more),
        "/".join(f"{age:,.0f}" for age in cast(list[float], u.keeps.tolist())) + " s",
    ]  # fmt: skip


def _limits(best: Placement) -> list[str]:
    """What binds, and how to read the ages."""
    full = [u.tier.name for u in best.uses if u.value > 0]
    lines = [f"  Binding: the capacity of {', '.join(full)}." if full else "  No capacity binds."]
    paths = [f"{name} {way}" for name, way in _saturated(best)]
    if paths:
        lines.append(f"  Binding: the rate of {', '.join(paths)}.")
    lines.append("  Kept for: mean time since the last use, here and in faster tiers, of blocks used once / twice / more often.")
    return lines


def _saturated(best: Placement) -> list[tuple[str, str]]:
    duals = best.solution.duals
    return [
        (u.tier.name, way)
        for t, u in enumerate(best.uses)
        for way, row in (("reads", f"read_{t}"), ("writes", f"write_{t}"))
        if abs(duals.get(row, 0.0)) > 1e-12
    ]
