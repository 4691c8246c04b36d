"""One complete estimate: times, throughput, bounds, intervals, memory, price and provenance."""

from __future__ import annotations

from typing import Any

import numpy as np

from perfmodel import memory, prices
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.parts import Parts
from perfmodel.spec.model import Model
from perfmodel.symbols import ALPHABET
from perfmodel.techniques.base import finding


def estimate(
    model: str,
    hardware: str,
    *,
    batch: int = 1,
    isl: int = 1024,
    osl: int = 128,
    prefix: int = 0,
    price: float | None = None,
    ttft: float | None = None,
    tpot: float | None = None,
    rate: float | None = None,
    concurrency: int | None = None,
    **instance: Any,
) -> dict[str, Any]:
    """Estimate a static batch: `batch` sequences of `isl` prompt tokens that each produce `osl` tokens.

    prefix: prompt tokens already cached. price: USD/s of a whole node, else from the catalogue. ttft, tpot:
    limits [s] to be judged. rate [1/s], concurrency: add a `serving` section. instance: as for Estimator.
    Returns plain data in base SI. Raises SpecError for bad input and Infeasible when the weights do not fit.

    ttft_s is one unchunked pass of batch x (isl - prefix) tokens; tpot_s the mean of the osl - 1 decode steps at
    contexts isl + 1 … isl + osl - 1; e2e_s = ttft_s + (osl - 1) tpot_s.
    """
    e = Estimator(model, hardware, **instance)
    check_request(e.model, batch, isl, osl, prefix)
    if prefix and (kind := finding(e.techniques)):
        raise SpecError(f"--prefix and {kind} both say which tokens of a prompt are cached; give one of them")
    e.require_fit()
    first = e.parts(batch, isl - prefix, prefix, is_decode=False)
    step = _decode_parts(e, batch, isl, osl)
    result = _times(first, step, osl)
    result |= _throughput(e, result, batch, osl, price)
    used = e.memory(batch, isl + osl)
    result["memory"] = {
        "weights": float(used.weights), "kv": float(used.kv), "activations": float(used.activations),
        "overhead": float(used.overhead), "graphs": float(used.graphs), "other": float(used.other),
        "total_per_device": float(used.total), "capacity": float(used.capacity),
        "fits": bool(used.fits), "max_batch": e.max_batch(isl + osl),
        "kv_tokens": memory.kv_tokens(e.model, e.par, e.formats, e.machine, e.engine, e.mem_fraction, isl + osl),
        "account": e.engine.account.title,
    }  # fmt: skip
    result["provenance"] = f"{e.machine.provenance}; engine {e.engine_name}"
    result["configuration"] = _configuration(e, batch, isl, osl, prefix)
    limits = {"ttft": (ttft, result["ttft_s"]), "tpot": (tpot, result["tpot_s"])}
    meets = {k: v is None or v <= limit for k, (limit, v) in limits.items() if limit is not None}
    if meets:
        result["meets"] = meets
    if rate is not None or concurrency is not None:
        from perfmodel.serving.batching import serving_summary

        result["serving"] = serving_summary(e, isl, osl, rate=rate, concurrency=concurrency, ttft=ttft, tpot=tpot)
    return result


def check_request(model: Model, batch: int, isl: int, osl: int, prefix: int) -> None:
    """Raise SpecError for sizes that are not whole or positive, or beyond the alphabet's range or the model's."""
    model.require_next_token()
    sizes = (("batch", batch, 1, "B"), ("isl", isl, 1, "Q"), ("osl", osl, 1, "Q"), ("prefix", prefix, 0, "Q"))
    for name, value, least, letter in sizes:
        whole = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and value % 1 == 0
        if not whole or value < least:
            raise SpecError(f"--{name} must be a whole number of at least {least}, got {value!r}")
        if value > ALPHABET[letter].high:
            raise SpecError(f"--{name} must not exceed {ALPHABET[letter].high:,.0f}, got {value:,}")
    if prefix >= isl:
        raise SpecError(f"--prefix ({prefix}) must be smaller than --isl ({isl}): the last token is always computed")
    longest = model.max_positions
    if longest and isl + osl > longest:
        raise SpecError(f"isl + osl = {isl + osl} exceeds the {longest} positions of {model.name}")
    if longest == 0 and model.learned_positions:
        raise SpecError(f"{model.name} states no longest context")


def _decode_parts(e: Estimator, batch: int, isl: int, osl: int) -> tuple[float, Parts] | None:
    """Mean step time over the contexts, and the parts of the step in the middle; None without a decode step."""
    if osl == 1:
        return None
    mean = float(np.mean(e.decode(batch, np.arange(isl + 1, isl + osl))))
    return mean, e.parts(batch, 1, isl + (osl - 2) // 2, is_decode=True)


def _times(first: Parts, step: tuple[float, Parts] | None, osl: int) -> dict[str, Any]:
    steps = osl - 1
    mean = step[0] if step else None
    result: dict[str, Any] = {"ttft_s": first.seconds, "tpot_s": mean, "e2e_s": first.seconds + steps * (mean or 0.0)}
    bounds = {"ttft_s": [first.lower, first.upper], "tpot_s": None}
    interval: dict[str, Any] = {"ttft_s": list(first.interval), "tpot_s": None}
    if step:
        # The middle step stands for all: its relative bounds and spread are moved to the mean.
        scale = step[0] / step[1].seconds
        bounds["tpot_s"] = [step[1].lower * scale, step[1].upper * scale]
        interval["tpot_s"] = [x * scale for x in step[1].interval]
    for table in (bounds, interval):
        per_step = table["tpot_s"] or [0.0, 0.0]
        # Prefill and decode share their parameters, so their errors add.
        table["e2e_s"] = [a + steps * b for a, b in zip(table["ttft_s"] or [], per_step, strict=True)]
    result |= {"bounds": bounds, "interval": interval}
    result["bottleneck"] = {"prefill": first.bottleneck, "decode": step[1].bottleneck if step else None}
    result["busy_s"] = {"prefill": first.busy, "decode": step[1].busy if step else None}
    return result


def _throughput(e: Estimator, times: dict[str, Any], batch: int, osl: int, price: float | None) -> dict[str, Any]:
    rate = batch * osl / times["e2e_s"]
    devices = int(e.par.devices)
    usd, source = instance_price(e, price)
    return {
        "output_tokens_per_s": rate,
        "output_tokens_per_s_per_device": rate / devices,
        "usd_per_million_output_tokens": usd / rate * 1e6 if usd is not None else None,
        "usd_per_hour": usd * 3600 if usd is not None else None,
        "price_source": source,
    }


def instance_price(e: Estimator, price: float | None) -> tuple[float | None, str | None]:
    """USD/s of the instance's devices and where that is from: `price` [USD/s] of a whole node, else the catalogue's."""
    source = "given" if price is not None else None
    if price is None:
        offer = prices.on_demand(e.machine.node.name) if e.machine.node else None
        price, source = (offer.usd_per_s, offer.source) if offer else (None, None)
    return (price * int(e.par.devices) / e.machine.devices_per_node if price is not None else None), source


def _configuration(e: Estimator, batch: int, isl: int, osl: int, prefix: int) -> dict[str, Any]:
    p = e.par
    return {
        "model": e.model.name, "hardware": e.machine.name, "device": e.machine.device.name, "devices": int(p.devices),
        "tp": int(p.tp), "pp": int(p.pp), "dp": int(p.dp), "ep": int(p.ep), "cp": int(p.cp), "engine": e.engine_name,
        "weight_dtype": e.formats.weight.name, "kv_dtype": e.formats.kv.name,
        "compute_dtype": e.formats.compute("dense_ffn"),
        "batch": batch, "isl": isl, "osl": osl, "prefix": prefix,
    }  # fmt: skip
