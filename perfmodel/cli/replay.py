"""perfmodel replay: what the requests of a trace would see on a deployment."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Quantity, refuse_reading_options, trace_of
from perfmodel.cli.text import echo_json, heading, number, plural, seconds, table
from perfmodel.errors import SpecError, UnitError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from perfmodel.serving.replay.deploy import Deployed, Extras
    from perfmodel.serving.replay.outcome import Outcome
    from perfmodel.serving.requests import Requests
    from perfmodel.spec.deployment import Deployment
    from perfmodel.spec.workload import Limit

S = TypeVar("S", bound="BaseModel")


class LimitOption(click.ParamType):
    """A duration, or one that grows with the input."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Limit:
        from perfmodel.spec.workload import read_limit

        try:
            return read_limit(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_POOL_OPTIONS = (
    "hardware", "replicas", "tp", "pp", "dp", "cp", "ep", "weight_dtype", "kv_dtype", "policy", "prefill_share", "max_batch",
    "chunk",
)  # fmt: skip


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False))
@click.option("--plan", type=click.Path(exists=True, dir_okay=False),
              help="What runs: a plan.json (its key `deployment`), or a deployment as YAML.")
@click.option("--model", help="Instead of --plan, one pool of this model: name, alias, Hugging Face id or file.")
@click.option("--hw", "--hardware", "hardware", help="Device or node of that pool.")
@click.option("--replicas", type=click.IntRange(1), help="Instances of that pool.  [1]")
@click.option("--tp", "--tensor-parallel-size", type=click.IntRange(1), help="Tensor-parallel degree.  [1]")
@click.option("--pp", "--pipeline-parallel-size", type=click.IntRange(1), help="Pipeline stages.  [1]")
@click.option("--dp", "--data-parallel-size", type=click.IntRange(1), help="Data-parallel ranks of one instance.  [1]")
@click.option("--cp", type=click.IntRange(1), help="Context-parallel degree.  [1]")
@click.option("--ep", type=click.IntRange(1), help="Expert-parallel degree.  [1]")
@click.option("--weight-dtype", "--quantization", "weight_dtype", help="Weight format.  [the checkpoint's]")
@click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", help="KV-cache format.")
@click.option("--policy", help="chunked, whole, static, layered or split.  [chunked]")
@click.option("--prefill-share", type=Quantity("ratio"), help="Compute units that prefill under the policy split.  [0.5]")
@click.option("--max-batch", "--max-num-seqs", "max_batch", type=click.IntRange(1),
              help="Sequences decoded together.  [the engine's]")
@click.option("--chunk", "--max-num-batched-tokens", "chunk", type=click.IntRange(1),
              help="Tokens of a step.  [the engine's]")
@click.option("--engine", help="Serving engine.  [the plan's, else vllm]")
@click.option("--mem-fraction", "--gpu-memory-utilization", "mem_fraction", type=Quantity("ratio"), help="Memory share.")
@click.option("--routing", help="random, round-robin, least-loaded or prefix-affine.  [the plan's, else round-robin]")
@click.option("--prefix-caching/--no-prefix-caching", default=None, help="Keep prompt blocks.  [the plan's, else no]")
@click.option("--tier", multiple=True, metavar="'NAME SIZE BANDWIDTH'",
              help="A slower memory of each instance behind the prefix cache: 'dram 512 GB 50 GB/s'.")
@click.option("--fetch", type=click.Choice(["overlapped", "blocking"]), default="overlapped", show_default=True,
              help="Whether fetching from a tier hides behind the step.")
@click.option("--swap", type=Quantity("bandwidth"), help="Preempt by swapping to host memory at this rate.  [recompute]")
@click.option("--timeout", type=Quantity("time"), help="Reject what has not started after this time.")
@click.option("--rate", default="mean", show_default=True,
              help="mean (the whole trace), peak(300 s), percentile(95, 300 s), or requests per second such as '8 /s'.")
@click.option("--load", type=Quantity("ratio"), default="1", show_default=True, help="Multiple of that rate.")
@click.option("--scale", type=click.Choice(["superpose", "thin", "compress"]), help="How the multiple is made.")
@click.option("--column", multiple=True, metavar="ROLE=NAME", help="Column of arrival_s, arrival_ms, input, output, blocks …")
@click.option("--where", multiple=True, metavar="NAME=VALUE", help="Keep the rows that say so.")
@click.option("--block-tokens", type=click.IntRange(1), default=512, show_default=True, help="Prompt tokens of one block id.")
@click.option("--image", metavar="HEIGHTxWIDTH", help="Pixels of the images in prompts: '1024x1024'.  [the plan's]")
@click.option("--images-per-request", type=click.IntRange(0), help="Images of each prompt.  [the trace's column]")
@click.option("--images-counted", is_flag=True, help="The trace's input lengths hold the images' tokens already.")
@click.option("--limit-ttft", type=LimitOption(), help="Limit of goodput: '2 s', or '1 s + 0.3 ms/token'.")
@click.option("--limit-tpot", type=Quantity("time"), help="Limit of goodput: '50 ms'.")
@click.option("--window", type=Quantity("time"), default="300 s", show_default=True, help="Length of the worst window.")
@click.option("--compare", is_flag=True, help="Put measured times of the trace (ttft, tpot, e2e columns) beside ours.")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write one CSV row per request.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of random routing, shares and scaling.")
@common_options
def replay(as_json: bool, trace: str, compare: bool, out: str | None, **o: Any) -> None:
    """Simulate every engine step while a deployment serves the requests of TRACE.

    TRACE is CSV or JSON lines (arrival, input and output tokens; block ids and sessions where it has them), or a workload
    YAML written by `perfmodel trace fit`. Times count from arrival, front end and queueing included.

    \b
    perfmodel replay trace.csv --plan out/plan.json --limit-ttft '2 s' --limit-tpot '50 ms' --out requests.csv
    perfmodel replay trace.csv --model llama-3.1-8b --hw h100-sxm --replicas 2 --routing least-loaded
    """
    from perfmodel.serving.replay import deploy, measured, summary

    deployment = _deployment(o)
    images = _images(o, deployment)
    extras = replace(_extras(o), image=(images["height"], images["width"]) if images else None)
    if extras.tiers and not deployment.prefix_caching:
        raise SpecError("--tier holds cached prefixes: add --prefix-caching")
    requests, history, described = _requests(trace, o, deployment.model, images)
    if o["prefix_caching"] and requests.blocks is None:
        raise SpecError("--prefix-caching finds nothing: the trace does not say which prompts share blocks", file=trace)
    real = None
    if compare:
        if o["rate"] != "mean" or o["load"] != 1:
            raise SpecError("--compare needs the trace as it was measured: leave --rate and --load out")
        real = measured.measured(trace_of(trace, o["column"], o["where"], o["block_tokens"]), Path())
    deployed = deploy.deploy(deployment, requests, extras)
    outcome = _run(deployed, requests, history, o["seed"])
    limits = {"ttft": o["limit_ttft"], "tpot": o["limit_tpot"]}
    data = {
        "trace": trace, "described": described, "seed": o["seed"], "deployment": deployment.model_dump(mode="json"),
        **summary.summary(outcome, deployed.devices, **limits, window=o["window"]),
    }  # fmt: skip
    if real is not None:
        data["errors"] = measured.errors(outcome, real, summary.PERCENTILES)
    if out is not None:
        with open(out, "w", encoding="utf-8", newline="") as stream:
            met = outcome.met(**limits) if any(v is not None for v in limits.values()) else None
            summary.write_rows(outcome, stream, real, met)
    if as_json:
        echo_json(data)
    else:
        click.echo(page(data))


def _deployment(o: dict[str, Any]) -> Deployment:
    """The plan's deployment, or one pool from the options; routing, engine and caching may be overridden."""
    from perfmodel.spec import deployment

    said = {k: o[k] for k in _POOL_OPTIONS if o[k] is not None}
    if o["plan"] is not None:
        if said or o["model"]:
            name = next(iter(said), "model").replace("_", "-")
            raise SpecError(f"--plan says what runs: leave --{name} out, or give the pool by options alone")
        found = deployment.read(o["plan"])
    elif not (o["model"] and o["hardware"]):
        raise SpecError("say what runs: --plan FILE, or --model and --hw")
    else:
        found = _checked({"model": o["model"], "pools": [said]}, deployment.Deployment)
    changed = {k: o[k] for k in ("engine", "mem_fraction", "routing", "prefix_caching") if o[k] is not None}
    return _checked({**found.model_dump(mode="json"), **changed}, deployment.Deployment)


def _checked(data: dict[str, Any], model: type[S]) -> S:
    """A spec made from options; a problem names the key."""
    from perfmodel.spec import yaml

    keys: dict[tuple[Any, ...], int] = {}

    def note(part: Any, path: tuple[Any, ...]) -> None:
        keys[path] = 0
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            note(value, (*path, key))

    note(data, ())
    try:
        return yaml.validate(yaml.Document(data, "", keys), model)
    except SpecError as error:
        said = error.path.rpartition(".")[2].replace("_", "-")
        raise SpecError(str(error).removeprefix(f"{error.path}: "), path=f"--{said}" if said else "") from None


def _requests(file: str, o: dict[str, Any], model: str, images: dict[str, Any] | None) -> tuple[Requests, Requests | None, str]:
    """Requests to replay, those before them that warm prefix caches, and what they are."""
    from perfmodel.serving.images import build
    from perfmodel.spec import workload

    fitted = Path(file).suffix in (".yaml", ".yml")
    if fitted:
        refuse_reading_options(o["column"], o["where"])
    source = {"fitted": file} if fitted else {"trace": trace_of(file, o["column"], o["where"], o["block_tokens"]).model_dump()}
    data = {**source, "rate": o["rate"], "load": (o["load"],), "scale": o["scale"], "images": images, "objectives": {}}
    spec = _checked(data, workload.Workload)
    built = build(spec, Path(), o["load"], o["seed"], model, at_once=True)
    pace = f", {built.rate:.4g} requests/s" if built.span else ""
    return built.requests, built.before, built.described + pace


def _images(o: dict[str, Any], deployment: Deployment) -> dict[str, Any] | None:
    """Size and number of the images in prompts: as told, else of the size that the plan was made for."""
    size = deployment.image
    if o["image"] is not None:
        sides = o["image"].lower().split("x")
        if len(sides) != 2 or not all(side.strip().isdigit() and int(side) for side in sides):
            raise SpecError(f"--image {o['image']!r}: write height and width in pixels, such as '1024x1024'")
        size = (int(sides[0]), int(sides[1]))
    if size is None:
        if o["images_per_request"]:
            raise SpecError("--images-per-request needs --image: how large they are")
        return None
    return {"height": size[0], "width": size[1], "per_request": o["images_per_request"], "counted": o["images_counted"]}


def _extras(o: dict[str, Any]) -> Extras:
    from perfmodel import units
    from perfmodel.serving.replay.deploy import Extras, TierSpec

    tiers = []
    for text in o["tier"]:
        words = text.split()
        if len(words) != 5:
            raise SpecError(f"--tier {text!r}: write a name, a size and a bandwidth, such as 'dram 512 GB 50 GB/s'")
        try:
            size, rate = units.parse(" ".join(words[1:3]), "size"), units.parse(" ".join(words[3:]), "bandwidth")
        except UnitError as error:
            raise SpecError(f"--tier {text!r}: {error}") from None
        if size <= 0 or rate <= 0:
            raise SpecError(f"--tier {text!r}: size and bandwidth must be positive")
        tiers.append(TierSpec(words[0], size, rate))
    timeout = float("inf") if o["timeout"] is None else o["timeout"]
    return Extras(o["swap"], timeout, tuple(tiers), o["fetch"] == "overlapped")


def _run(deployed: Deployed, requests: Requests, history: Requests | None, seed: int) -> Outcome:
    """Replay, with a progress bar where a person is watching; requests that only warm the caches are left out again."""
    from perfmodel.serving.requests import Requests as Many

    every = requests if history is None else Many.join([history, requests])
    front = deployed.front(every)
    if not sys.stderr.isatty():
        outcome = deployed.fleet.run(every, seed=seed, front=front)
    else:
        with click.progressbar(length=len(every), label="requests", file=sys.stderr) as bar:
            done = 0

            def progress(arrived: int, _total: int) -> None:
                nonlocal done
                bar.update(arrived - done)
                done = arrived

            outcome = deployed.fleet.run(every, seed=seed, front=front, progress=progress)
    return outcome if history is None else outcome.take(every.arrival >= 0)


def page(d: dict[str, Any]) -> str:
    """The result as one page of text."""
    parts = [
        f"{heading('Replay')}: {d['described']}\n"
        f"  {plural(d['requests'], 'request')} in {seconds(d['duration_s'])} on {plural(d['devices'], 'device')}, "
        f"{number(d['output_tokens_per_s'] or 0)} output tokens/s, seed {d['seed']}",
        _percentiles(d), _use(d),
    ]  # fmt: skip
    if "attainment" in d:
        limits = d["limits"]
        named = [f"TTFT {limits['ttft_s']}"] * (limits["ttft_s"] is not None)
        named += [f"TPOT {seconds(limits['tpot_s'])}"] * (limits["tpot_s"] is not None)
        parts.append(
            f"{heading('Goodput')} ({', '.join(named)})\n  {d['attainment']:.2%} of the requests meet the limits: "
            f"{number(d['goodput_per_s'])} requests/s, {number(d['goodput_per_s_per_device'])} per device"
        )
    if "errors" in d:
        rows = [["", "p50", "p90", "p95", "p99", "median of requests, either way"]]
        for metric, e in d["errors"].items():
            rows.append([metric.upper(), *(f"{e[p]:+.1%}" for p in rows[0][1:5]), f"{e['median_abs_per_request']:.1%}"])
        parts.append(f"{heading('Predicted against measured')}\n{table(rows, right=(1, 2, 3, 4, 5))}")
    return "\n\n".join(parts)


def _percentiles(d: dict[str, Any]) -> str:
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "between tokens", "longest_gap": "longest gap", "e2e": "end to end"}
    rows = [["", "p50", "p90", "p95", "p99", f"p99 in the worst {seconds(d['window_s'])}"]]
    for metric, name in names.items():
        worst = d["worst_window"][metric]["p99"]
        values = [_time(v) for v in d["percentiles"][metric].values()]
        rows.append([name, *values, f"{_time(worst['value'])} at {number(worst['start_s'])} s"])
    return f"{heading('Latency')}\n{table(rows, right=(1, 2, 3, 4))}"


def _time(x: float) -> str:
    return "never" if x == float("inf") else seconds(x)


def _use(d: dict[str, Any]) -> str:
    rows = [["pool", "instances", "requests", "busy", "prefilling", "KV mean", "KV peak", "busiest/mean"]]
    for n, (use, pool) in enumerate(zip(d["pools"], d["deployment"]["pools"], strict=True)):
        uneven = use["busiest_over_mean"]
        rows.append([
            f"{n + 1} {pool['role']} {pool['hardware']} tp{pool['tp']}", str(use["instances"]), f"{use['requests']:,}",
            *(f"{use[k]:.0%}" for k in ("busy", "prefilling", "kv_mean", "kv_peak")), "-" if uneven is None else f"{uneven:.2f}",
        ])  # fmt: skip
    notes = [f"{plural(d['preemptions'], 'preemption')} of {plural(d['preempted_requests'], 'request')}",
             f"{d['rejected']:,} rejected"]  # fmt: skip
    if d["deployment"]["prefix_caching"]:
        notes.append(f"{d['hit_rate']:.1%} of the prompt tokens from the prefix cache")
    return f"{heading('Use')}\n{table(rows, right=(1, 2, 3, 4, 5, 6, 7))}\n  {', '.join(notes)}"
