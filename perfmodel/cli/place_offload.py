"""perfmodel place offload: weights, cache and activations over a device, its host and a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perfmodel import units
from perfmodel.cli.group import common_options
from perfmodel.cli.options import Finite, Quantity
from perfmodel.cli.text import echo_json, heading, number, seconds, size, table
from perfmodel.errors import SpecError

if TYPE_CHECKING:
    from perfmodel.planner.placement.offload import Job, Policy

_TENSORS = ("weights", "cache", "activations")


@click.command("offload")
@click.option("--model", required=True, help="Name, alias or Hugging Face id; a YAML, a config.json or its folder.")
@click.option("--hw", "--hardware", "hardware", required=True, help="Node with a host, such as t4-server; one device of it.")
@click.option("--isl", type=click.IntRange(1), default=512, show_default=True, help="Prompt tokens each.")
@click.option("--osl", type=click.IntRange(1), default=32, show_default=True, help="Output tokens each.")
@click.option("--weight-dtype", "--quantization", "weight_dtype", help="Weight format.  [the checkpoint's]")
@click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", help="KV-cache format.  [the activations']")
@click.option("--engine", default="pytorch", show_default=True, help="Whose kernels and device memory account.")
@click.option("--attention", type=click.Choice(["either", "host", "device"]), default="either", show_default=True,
              help="Where attention over the cache off the device runs.")
@click.option("--host-share", type=Quantity("ratio"), default="1.0", show_default=True, help="Share of host memory to fill.")
@click.option("--host-memory", type=Quantity("size"), help="Bytes of host memory to fill.  [the node's]")
@click.option("--disk", type=Quantity("size"), help="Bytes of disk to fill.  [the node's drives]")
@click.option("--disk-read", type=Quantity("bandwidth"), help="Measured rate.  [the drives' data sheet]")
@click.option("--disk-write", type=Quantity("bandwidth"), help="Measured rate.  [the drives' data sheet]")
@click.option("--link", type=Quantity("bandwidth"), help="Measured rate to and from the device.  [the host link's]")
@click.option("--host-attention", type=Quantity("bandwidth"),
              help="Bytes of cache per second that attention on the host gets through.  [by the host's memory and cores]")
@click.option("--expand", type=Finite(), default=0.0, show_default=True,
              help="Bytes of device memory moved per narrow element that is expanded before its product.")
@click.option("--policy", metavar="W_G,W_C,C_G,C_C,H_G,H_C:BxK", help="Price this policy too: percentages, batch x batches.")
@click.option("--solver", type=click.Choice(["highs", "cbc"]), default="highs", show_default=True)
@common_options
def place_offload(
    model: str, hardware: str, isl: int, osl: int, weight_dtype: str | None, kv_dtype: str | None, engine: str,
    attention: str, host_share: float, expand: float, policy: str | None, solver: str, as_json: bool, **measured: float | None,
) -> None:  # fmt: skip
    """Split a model that fits on no device over device, host memory and disk, for the most tokens per second.

    \b
    perfmodel place offload --model opt-175b --hw t4-server --isl 512 --osl 32
    """
    from dataclasses import replace

    from perfmodel.estimator import Estimator
    from perfmodel.planner.placement import offload

    e = Estimator(model, hardware, weight_dtype=weight_dtype, kv_dtype=kv_dtype, engine=engine)
    job = offload.Job.of(e, isl, osl, host_share)
    names = {
        "host_memory": ("host_bytes",), "disk": ("disk_bytes",), "disk_read": ("disk_read",), "disk_write": ("disk_write",),
        "link": ("to_device", "from_device"), "host_attention": ("host_attention",),
    }  # fmt: skip
    changes: dict[str, Any] = {
        field: value for k, value in measured.items() if value is not None for field in names[k]
    }
    job = replace(job, paths=replace(job.paths, **changes), expand=expand)
    given = _given(job, policy, attention) if policy is not None else None
    where = {"either": None, "host": True, "device": False}[attention]
    best = offload.search(job, host_attention=where, solver=solver)
    data = {
        "model": e.model.name, "hardware": hardware, "isl": isl, "osl": osl, "best": _data(best),
        "given": _data(given) if given else None, "alternatives": offload.alternatives(job, best, where),
        "tenth_faster": offload.tenth_more(job, best),
    }  # fmt: skip
    if as_json:
        echo_json(data)
    else:
        click.echo(_page(job, best, given, data))


def _given(job: Job, text: str, attention: str) -> Policy:
    from perfmodel.planner.placement.offload import Block, evaluate

    shares, _, block = text.partition(":")
    try:
        w_g, w_c, c_g, c_c, h_g, h_c = (float(x) / 100 for x in shares.split(","))
        batch, batches = (int(x) for x in block.lower().split("x"))
    except ValueError:
        raise SpecError(f"--policy {text!r}: write it like '0,50,0,0,0,100:32x8'") from None
    if min(batch, batches) < 1:
        raise SpecError(f"--policy {text!r}: batch and batches must be at least 1")
    triples = (w_g, w_c, 1 - w_g - w_c, c_g, c_c, 1 - c_g - c_c, h_g, h_c, 1 - h_g - h_c)
    return evaluate(job, Block(batch, batches, attention != "device"), tuple(round(x, 9) for x in triples))


def _data(p: Policy) -> dict[str, Any]:
    from perfmodel.planner.placement.offload import SHARES

    return {
        "tokens_per_s": p.tokens_per_s, "batch": p.block.batch, "batches": p.block.batches,
        "host_attention": p.block.host_attention, "shares": dict(zip(SHARES, p.shares, strict=True)),
        "prefill_s": p.prefill, "decode_s": p.decode, "held_bytes": p.held, "binding": list(p.binding),
        "tokens_per_s_per_gb": p.prices,
    }  # fmt: skip


def _page(job: Job, best: Policy, given: Policy | None, data: dict[str, Any]) -> str:
    e = job.estimator
    lines = [f"{heading(e.model.name)} in {e.formats.weight.name} on one {e.machine.device.name}, {job.isl} + {job.osl} tokens"]
    lines += _policy_lines("best over the grid of block sizes, each to proven optimality", best, job)
    if given is not None:
        lines += _policy_lines("the policy given", given, job)
    other = [
        [name, number(v) if v else "does not fit", f"x {v / best.tokens_per_s:.2f}" if v else ""]
        for name, v in data["alternatives"].items()
    ]
    more = [[f"{k} + 10 %", f"+ {max(v - 1, 0):.2%}"] for k, v in data["tenth_faster"].items()]
    more += [[f"1 GB more on the {k}", f"+ {v / best.tokens_per_s:.2%}"] for k, v in (best.prices or {}).items()]
    lines += ["", heading("tokens/s otherwise"), table(other, right=(1, 2))]
    lines += ["", heading("what more would give, at this block size"), table(more, right=(1,))]
    return "\n".join(lines)


def _policy_lines(title: str, p: Policy, job: Job) -> list[str]:
    shares = [["", "device", "host", "disk"]]
    for i, tensor in enumerate(_TENSORS):
        shares.append([tensor, *(f"{x:.1%}" for x in p.shares[3 * i : 3 * i + 3])])
    shares.append(["bytes", *(size(p.held[t]) for t in ("device", "host", "disk"))])
    shares.append(["room", *(size(x) for x in (job.paths.device_bytes, job.paths.host_bytes, job.paths.disk_bytes))])
    busy = [["", "prefill", "a decode step"]] + [[r, seconds(p.prefill[r]), seconds(p.decode[r])] for r in p.prefill]
    where = "host" if p.block.host_attention else "device"
    return [
        "",
        heading(f"{title}: {units.show(p.tokens_per_s, 'rate', 3).removesuffix(' /s')} tokens/s"),
        f"  {p.block.batches} batches of {p.block.batch} sequences; attention over cache off the device on the {where}",
        table(shares, right=(1, 2, 3)),
        table(busy, right=(1, 2)),
        f"  binds: {p.binding[0]} in prefill, {p.binding[1]} in decode",
    ]
