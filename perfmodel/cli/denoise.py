"""perfmodel denoise: a batch of images or texts from a denoiser."""

from __future__ import annotations

from typing import Any

import click

from perfmodel.cli.group import common_options
from perfmodel.cli.options import Quantity, estimate_arguments, instance_options
from perfmodel.cli.text import NO_PRICE, busiest, echo_json, heading, number, plural, seconds, size, table
from perfmodel.errors import SpecError


@click.command()
@instance_options
@click.option("--batch", "--batch-size", "batch", type=int, default=1, show_default=True, help="Images or texts together.")
@click.option("--size", "pixels", metavar="WxH", help="Size of an image, such as 1024x1024.")
@click.option("--tokens", type=int, help="Tokens of a text, or latent patches of an image.")
@click.option("--steps", type=int, default=50, show_default=True, help="Denoising steps.")
@click.option("--guidance", type=int, default=1, show_default=True,
              help="Conditions each is denoised under; classifier-free guidance: 2.")  # fmt: skip
@click.option("--price", type=Quantity("price"), help="Of a whole node, such as '88 USD/h'.  [the catalogue's]")
@common_options
def denoise(as_json: bool, pixels: str | None, **options: Any) -> None:
    """Time, memory, bottleneck and cost of a batch of images or texts made by denoising.

    Every step passes all latents (or tokens) through the model. Text encoder and decoder of the latents are not counted.

    \b
    perfmodel denoise --model stable-diffusion-xl --hw a100-sxm-80gb --size 1024x1024 --steps 50 --guidance 2
    """
    from perfmodel.generations import generations

    arguments = estimate_arguments(**options)
    result = generations(pixels=_pixels(pixels), **arguments)
    if as_json:
        echo_json(result)
    else:
        click.echo(page(result))


def _pixels(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() for p in parts):
        raise SpecError(f"--size: write WIDTHxHEIGHT in pixels, such as 1024x1024, not {text!r}")
    return int(parts[0]), int(parts[-1])


def page(result: dict[str, Any]) -> str:
    """The result as one page of text."""
    c, m = result["configuration"], result["memory"]
    what = plural(c["batch"], c["kind"])
    guided = f", each under {c['guidance']} conditions" if c["guidance"] > 1 else ""
    node = f" ({c['hardware']})" if c["hardware"] != c["device"] else ""
    title = (
        f"{heading(c['model'] + ' on ' + str(c['devices']) + ' x ' + c['device'] + node)}\n"
        f"  {what} of {plural(c['tokens'], 'token')} in {plural(c['steps'], 'step')}{guided}; "
        f"{number(result['passes'])} whole or partial passes\n"
        f"  weights {c['weight_dtype']}, arithmetic {c['compute_dtype']}"
    )
    low, high = result["interval"]
    rows = [
        ["", "expected", "p10 to p90", "least"],
        ["all steps", seconds(result["seconds"]), f"{seconds(low)} to {seconds(high)}", seconds(result["lower"])],
    ]
    times = table(rows, right=(1, 2, 3)) + "\n  least: everything overlaps at datasheet rates."
    rate = f"  {number(result['per_second'])} {c['kind']}s/s, {number(result['per_second_per_device'])} per device"
    if result["usd_per_thousand"] is None:
        rate += f"\n  {NO_PRICE}"
    else:
        rate += f"\n  {number(result['usd_per_thousand'])} USD per thousand {c['kind']}s ({result['price_source']})"
    shares = busiest(result["busy_s"], result["seconds"])
    bound = f"{heading('Busy time of each resource')} (they overlap)\n  {result['bottleneck']}-bound: {shares}"
    held = [["weights", size(m["weights"])], ["kept between steps", size(m["kept"])], ["device", size(m["capacity"])]]
    memory = f"{heading('Memory per device')} (without activations)\n{table(held, right=(1,))}"
    return "\n\n".join([title, times, rate, bound, memory, f"Evidence: {result['provenance']}."])
