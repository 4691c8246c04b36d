"""One complete estimate of a batch of images or texts made by denoising."""

from __future__ import annotations

from typing import Any

from perfmodel import memory
from perfmodel.denoising import denoise, spread
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimates import instance_price
from perfmodel.estimator import Estimator
from perfmodel.parts import interval
from perfmodel.spec.model import Model


def generations(
    model: str,
    hardware: str,
    *,
    batch: int = 1,
    steps: int = 50,
    tokens: int | None = None,
    pixels: tuple[int, int] | None = None,
    guidance: int = 1,
    price: float | None = None,
    **instance: Any,
) -> dict[str, Any]:
    """Estimate `batch` images of `pixels` (width, height), or texts of `tokens`, made in `steps` denoising steps.

    guidance: conditions each is denoised under (classifier-free guidance: 2). price: USD/s of a whole node, else from the
    catalogue. instance: as for Estimator. Text encoder and decoder of the latents are not in the model and not counted.
    Returns plain data in base SI. Raises SpecError for bad input and Infeasible when the weights do not fit.
    """
    e = Estimator(model, hardware, **instance)
    if e.model.denoises is None:
        raise SpecError(f"{e.model.name} generates token by token: `perfmodel estimate --model {e.model.name}`")
    for name, value in (("batch", batch), ("steps", steps), ("guidance", guidance)):
        if value < 1 or value % 1:
            raise SpecError(f"--{name} must be a whole number of at least 1, got {value!r}")
    count = _tokens(e.model, tokens, pixels)
    e.require_fit()
    made = denoise(e, batch, count, steps, guidance=guidance)
    weights, kept = float(memory.weight_bytes(e.model, e.par, e.formats)), float(made.cached_bytes)
    if weights + kept > e.machine.capacity * (e.mem_fraction or 1.0):
        raise Infeasible(
            f"weights of {weights / 1e9:.1f} GB and {kept / 1e9:.1f} GB kept between steps exceed the memory of "
            f"{e.machine.device.name}", nearest="a smaller --batch, or --tp", binding=("memory",),
        )  # fmt: skip
    seconds, lower, usd = float(made.seconds), float(made.lower), instance_price(e, price)
    return {
        "seconds": seconds,
        "interval": list(interval(seconds, spread(e, batch, made, guidance=guidance), lower)),
        "lower": lower,
        "per_second": batch / seconds,
        "per_second_per_device": batch / seconds / int(e.par.devices),
        "usd_per_thousand": usd[0] * seconds / batch * 1000 if usd[0] is not None else None,
        "price_source": usd[1],
        "passes": sum(float(p.times) for p in made.passes if p.layers),
        "busy_s": {r: float(x) for r, x in made.busy.items()},
        "bottleneck": max(made.busy, key=lambda r: float(made.busy[r])),
        "memory": {"weights": weights, "kept": kept, "capacity": float(e.machine.capacity)},
        "provenance": f"{e.machine.provenance}; engine {e.engine_name}",
        "configuration": {
            "model": e.model.name, "kind": e.model.denoises, "hardware": e.machine.name, "device": e.machine.device.name,
            "devices": int(e.par.devices), "tp": int(e.par.tp), "cp": int(e.par.cp), "dp": int(e.par.dp),
            "weight_dtype": e.formats.weight.name, "compute_dtype": e.formats.compute("dense_ffn"),
            "batch": batch, "tokens": count, "steps": steps, "guidance": guidance,
        },
    }  # fmt: skip


def _tokens(model: Model, tokens: int | None, pixels: tuple[int, int] | None) -> int:
    """Tokens of one image or text; raises SpecError where they cannot be told or do not suit the model."""
    if (tokens is None) == (pixels is None):
        raise SpecError("give either --size in pixels or --tokens")
    if pixels is not None:
        if model.denoises != "image":
            raise SpecError(f"{model.name} makes text: give --tokens")
        edge = model.token_edge * max(b.shrink for b in model.blocks.values())
        if any(x < edge or x % edge for x in pixels):
            raise SpecError(f"--size: {model.name} needs multiples of {edge} pixels, got {pixels[0]}x{pixels[1]}")
        return pixels[0] * pixels[1] // model.token_edge**2
    if tokens is None or tokens < 1 or tokens % 1:
        raise SpecError(f"--tokens must be a whole number of at least 1, got {tokens!r}")
    if model.denoises == "text" and model.max_positions and tokens > model.max_positions:
        raise SpecError(f"--tokens {tokens} exceeds the {model.max_positions} positions of {model.name}")
    return tokens
