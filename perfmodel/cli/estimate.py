"""perfmodel estimate: one static batch on one instance."""

from __future__ import annotations

from typing import Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import FromPlan, estimate_arguments, estimate_options
from perfmodel.cli.text import NO_PRICE, busiest, echo_json, heading, number, plural, seconds, size, table


@click.command(cls=FromPlan)
@estimate_options
@common_options
def estimate(as_json: bool, **options: Any) -> None:
    """Time, memory, bottleneck and cost of a batch of requests.

    The batch is static: BATCH sequences of ISL prompt tokens are prefilled together, then each produces OSL tokens.

    \b
    perfmodel estimate --model llama-3.1-70b --hw h100-sxm --tp 4 --batch 32 --isl 2048 --osl 512
    """
    from perfmodel.estimates import estimate as run

    arguments = estimate_arguments(**options)
    result = run(**arguments)
    if as_json:
        echo_json(result)
    else:
        click.echo(page(result, {k: arguments[k] for k in ("ttft", "tpot")}))


def page(result: dict[str, Any], limits: dict[str, float | None]) -> str:
    """The result as one page of text."""
    parts = [_title(result), _times(result), _busy(result), _memory(result)]
    if "meets" in result:
        parts.append(_limits(result, limits))
    if "serving" in result:
        parts.append(_serving(result["serving"]))
    parts.append(f"Evidence: {result['provenance']}. `perfmodel explain` with the same options shows the formulas.")
    return "\n\n".join(parts)


def _title(result: dict[str, Any]) -> str:
    c = result["configuration"]
    cut = [f"{k} {c[k]}" for k in ("tp", "pp", "dp", "cp", "ep") if c[k] > 1]
    node = f" ({c['hardware']})" if c["hardware"] != c["device"] else ""
    first = f"{c['model']} on {c['devices']} x {c['device']}{node}" + (f", {', '.join(cut)}" if cut else "")
    cached = f", {c['prefix']:,} of them cached" if c["prefix"] else ""
    formats = f"weights {c['weight_dtype']}, KV cache {c['kv_dtype']}, arithmetic {c['compute_dtype']}"
    return (
        f"{heading(first)}\n"
        f"  {plural(c['batch'], 'sequence')} of {plural(c['isl'], 'prompt token')}{cached} "
        f"and {plural(c['osl'], 'output token')}\n"
        f"  {formats}, engine {c['engine']}"
    )


def _times(result: dict[str, Any]) -> str:
    rows = [["", "expected", "p10 to p90", "bounds"]]
    names = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "end to end"}
    for key, name in names.items():
        if result[key] is not None:
            rows.append([name, seconds(result[key]), _range(result["interval"][key]), _range(result["bounds"][key])])
    note = (
        "  p10 to p90: spread of the parameters. bounds: everything overlaps at peak rates; nothing overlaps at\n"
        "  expected rates."
    )
    rate, each = result["output_tokens_per_s"], result["output_tokens_per_s_per_device"]
    text = f"{table(rows, right=(1, 2, 3))}\n{note}\n\n  {number(rate)} output tokens/s, {number(each)} per device"
    if result["usd_per_million_output_tokens"] is None:
        return f"{text}\n  {NO_PRICE}"
    return (
        f"{text}\n  {number(result['usd_per_million_output_tokens'])} USD per million output tokens "
        f"at {number(result['usd_per_hour'])} USD/h ({result['price_source']})"
    )


def _range(pair: list[float]) -> str:
    return f"{seconds(pair[0])} to {seconds(pair[1])}"


def _busy(result: dict[str, Any]) -> str:
    """Busy time of each resource as a share of the step, longest first."""
    rows = []
    for phase, key in (("prefill", "ttft_s"), ("decode", "tpot_s")):
        busy, whole = result["busy_s"][phase], result[key]
        if busy is None:
            continue
        rows.append([phase, f"{result['bottleneck'][phase]}-bound", busiest(busy, whole)])
    return heading("Busy time of each resource") + " (they overlap)\n" + table(rows)


def _memory(result: dict[str, Any]) -> str:
    m, c = result["memory"], result["configuration"]
    tokens = c["isl"] + c["osl"]
    rows = [["weights", size(m["weights"])], ["KV cache and states", size(m["kv"])]]
    rows += [["activations and sampler", size(m["activations"])], ["context, communication", size(m["overhead"])]]
    rows += [["captured graphs", size(m["graphs"])]]
    rows.append(["total", size(m["total_per_device"]), f"of {size(m['capacity'])} the engine may use"])
    verdict = "It fits" if m["fits"] else "It does NOT fit"
    most = f"room for at most {plural(m['max_batch'], 'sequence')} of {tokens:,} tokens"
    counted = f"As {c['engine']} counts ({m['account']}): {m['kv_tokens']:,} tokens of KV cache per data-parallel rank."
    return f"{heading('Memory per device')}\n{table(rows, right=(1,))}\n  {verdict}: {most}.\n  {counted}"


def _limits(result: dict[str, Any], limits: dict[str, float | None]) -> str:
    rows = []
    for name, met in result["meets"].items():
        verdict = "met" if met else "MISSED"
        rows.append([name.upper(), verdict, f"{seconds(result[f'{name}_s'])}, limit {seconds(limits[name])}"])
    return f"{heading('Limits')}\n{table(rows)}"


def _pressure(memory: dict[str, Any] | None) -> str:
    """What a cache that is full at times costs; nothing where it hardly ever is."""
    if memory is None or memory["full_share"] < 0.001:
        return ""
    if memory["wait_s"] is None:
        return "; preemptions cause ever more of them"
    preempted, wait = 100 * memory["preemptions_per_request"], seconds(memory["wait_s"])
    return f"; full {memory['full_share']:.1%} of the time: {preempted:.2g} preemptions per 100 requests, {wait} of waiting each"


def _serving(s: dict[str, Any]) -> str:
    flight = f"{number(s['concurrency'])} requests in flight, {number(s['decode_batch'])} of them decoding"
    rows = [
        ["load", f"{number(s['rate_per_s'])} requests/s: {flight}"],
        ["output", f"{number(s['output_tokens_per_s'])} tokens/s"],
        ["prefill", f"{s['prefill_utilisation']:.0%} of the time"],
        ["KV memory", f"{s['kv_share']:.0%} of what is free{_pressure(s.get('memory'))}"],
    ]
    for name, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("longest_gap", "longest gap")):
        if f"{name}_s" in s:
            rows.append([title, ", ".join(f"{k} {seconds(v)}" for k, v in s[f"{name}_s"].items())])
    front = s["front_end"]
    rows.append(["front end", f"{seconds(front['ttft_s'])} of the TTFT, busy {front['utilisation']:.0%} of the time"])
    if found := s["fetched"]:
        over = f", {found['over']} busy {found['utilisation']:.0%} of the time" if found["over"] else ""
        rows.append(["cached tokens", f"{seconds(found['ttft_s'])} of the TTFT{over}"])
    for name, share in s.get("met_share", {}).items():
        rows.append([f"{name.upper()} limit", f"met by {share:.1%} of the requests"])
    if "attainment" in s:
        rows.append(["attainment", f"{s['attainment']:.1%} of the requests meet all limits"])
        met = f"{s['attainment_target']:.0%} of the requests meeting all limits"
        for name, meaning in (("goodput", "that meet all limits"), ("capacity", f"at most, {met}")):
            worth, each = (number(s[f"{name}_per_s{k}"]) for k in ("", "_per_device"))
            rows.append([name, f"{worth} requests/s {meaning}; {each} per device"])
    if s.get("closed_form", "valid") != "valid":
        rows.append(["caution", f"percentiles are {s['closed_form']}; replay decides"])
    return f"{heading('Under load, continuous batching')}\n{table(rows)}"
