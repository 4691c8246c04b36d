"""What serving engines log at start-up: weights, overheads and KV capacity per device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from perfmodel import calibration
from perfmodel.engine_memory import (
    Instance,
    activations,
    cache_pool,
    cache_tokens,
    graphs,
    has_encoder,
    loaded_weights,
    overhead,
    visible,
)
from perfmodel.errors import SpecError
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.spec.calibration import Engine, account
from perfmodel.spec.formats import Format, get_format
from perfmodel.spec.gguf import BITS, FILE_TYPES
from perfmodel.spec.model import Model
from perfmodel.validation.memory_lines import Line
from perfmodel.validation.rows import Predicted, Refused

_GIB = 2.0**30
_LEAST = 0.2  # one sigma of one number takes no more than four fifths of a quantity
# Storage formats behind spellings of the quant column, the first that matches. NF4 with an FP32 scale per 64 weights
# takes 4.5 bits, as int4_g32 does.
_WEIGHTS = (
    (r"(bnb|nf).*4|nf4", "int4_g32"), (r"gptq.*8|w8a16|int8-wo", "q8_0"), (r"awq|gptq|auto-?round|w4a16|int4", "int4"),
    (r"w8a8|int8|bnb.*8", "int8"), (r"fp8.*block", "fp8_block"), (r"fp8", "fp8"), (r"nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """One logged quantity: its value on a line (None: not logged) and what the engine's accounting says of it."""

    unit: str
    logged: Callable[[Line], float | None]
    predict: Callable[[Line], Predicted]


def instance(line: Line) -> Instance:
    """The start-up of a line. Raises Refused for an unknown engine, model or format."""
    model, engine = line.model, _engine(line)
    version = line.cells["engine_version"] if line.cells["engine"].lower() != "ollama" else ""
    counted = account(engine.memory, version)
    device = line.device
    stated = line.number("gpu_memory_gib")
    tp, pp, dp = (line.whole(name) or 1 for name in ("tp", "pp", "dp"))
    if dp > 1 and line.whole("n_gpus") == tp * pp:
        tp //= dp  # data-parallel attention inside the tensor-parallel ranks
    if counted.budget == "context" and tp > 1:
        tp, pp = 1, tp * pp  # layers are split by default, whatever the log calls it
    found = Instance(
        model, Parallelism(tp, pp, dp), _formats(line, model), counted,
        device.architecture if device else "default",
        context=line.whole("max_model_len"), sequences=line.whole("max_num_seqs"),
        step_tokens=_integer(line.noted(r"(?:max_num_batched_tokens|n_ubatch) (\d+)")),
        graphs=engine.graph_batch > 0 and line.cells.get("eager") != "1",
        flash=(line.noted(r"flash_attn (\d)") or ("1" if counted.windows == "bounded" else "0")) == "1",
        file=_is_file(line),
    )  # fmt: skip
    if stated is None:
        reported = device.memory.visible or device.memory.capacity if device and device.memory else 0.0
        return replace(found, total=visible(device, reported, counted)) if device else found
    # An engine that plans with what is free logs what is free, without its own context.
    return replace(found, total=stated * _GIB + (overhead(found) if counted.budget == "reserve" else 0.0))


def _engine(line: Line) -> Engine:
    name = calibration.known_engine(line.cells["engine"])
    if name is None:
        raise Refused(f"unknown engine {line.cells['engine']!r}")
    return calibration.engine(name)


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _is_file(line: Line) -> bool:
    return line.cells["quant"].lower().startswith("gguf")


def _formats(line: Line, model: Model) -> Formats:
    """Storage of weights and cache as the line states them; what it does not state is the checkpoint's."""
    quant = line.cells["quant"].lower().split(" ")[0]
    wide = get_format("fp16" if "fp16" in (line.cells.get("dtype"), quant) else "bf16")
    cache = _cache_format(line.cells.get("kv_dtype", ""), model, wide)
    if _is_file(line):
        stored = _file_format(quant)
        return Formats(stored, stored, wide, cache)
    own = {model.dtype, model.expert_dtype}
    spelled = next((name for pattern, name in _WEIGHTS if re.search(pattern, quant)), quant)
    try:
        wanted = get_format(spelled or model.dtype)
    except SpecError:
        raise Refused(f"unknown weight format {quant!r}") from None
    if wanted.name in own or (wanted.width >= 2 and get_format(model.dtype).width >= 2 and model.expert_dtype is None):
        stored, expert = get_format(model.dtype), get_format(model.expert_dtype or model.dtype)
    else:
        stored = expert = wanted
    kept = model.unquantized if min(stored.width, expert.width) < 2 else ()
    return Formats(stored, expert, wide, cache, kept)


def _file_format(quant: str) -> Format:
    """Storage of a GGUF file type; longer names first, so that Q4_K_M is not read as Q4_K."""
    name = next((n for n in sorted(FILE_TYPES, key=len, reverse=True) if n in quant), None)
    if name is None:
        raise Refused(f"unknown GGUF file type {quant!r}")
    return Format(name, BITS[FILE_TYPES[name].base], 0, 0, None, "GGUF")


def _cache_format(text: str, model: Model, wide: Format) -> Format:
    found = re.search(r"fp8|int8|q8_0|f32|fp32|nvfp4", text.lower())
    if found is None:
        return get_format(model.kv_dtype) if model.kv_dtype and text == "auto" else wide
    return get_format({"f32": "fp32"}.get(found.group(0), found.group(0)))


def _predicted(value: float, sigma: float) -> Predicted:
    spread = math.exp(calibration.P90 * sigma)
    return Predicted(value, value / spread, value * spread)


def _spread(i: Instance, value: Callable[[Instance], float], residual: str) -> Predicted:
    """A quantity of an instance with the effect of every number of its account, one sigma each."""
    expected = value(i)
    variance = calibration.law().residual[residual] ** 2
    for name, p in i.account.parameters.items():
        moved = {**i.account.parameters, name: p.model_copy(update={"value": p.value * math.exp(p.sigma)})}
        other = value(replace(i, account=i.account.model_copy(update={"parameters": moved})))
        if expected > 0:
            variance += math.log(max(other / expected, _LEAST)) ** 2
    return _predicted(expected, math.sqrt(variance))


def _weights(line: Line) -> Predicted:
    i = instance(line)
    _check_checkpoint(i)
    # llama.cpp logs every device, others the first rank.
    loaded = loaded_weights(i, "mean" if i.account.budget == "context" else "first")
    return _predicted(loaded / _GIB, calibration.law().residual["memory_weights"])


def _check_checkpoint(i: Instance) -> None:
    """Raise Refused where nobody knows which parts were quantised: 4-bit versions of hybrids differ by publisher."""
    recurrent = any(
        b.mixer is not None and b.mixer.kind not in ("attention", "latent") for b in i.model.blocks.values()
    )
    if recurrent and i.formats.weight.width < 1 and i.formats.weight.name != i.model.dtype and not i.file:
        raise Refused("inputs not logged: which parts of a hybrid are quantised")


def _overhead(line: Line) -> Predicted:
    return _spread(instance(line), lambda i: overhead(i) / _GIB, "memory_weights")


def _activations(line: Line) -> Predicted:
    i = instance(line)
    if has_encoder(i.model) and i.account.budget != "context":
        raise Refused("inputs not logged: images of the reserved step")
    if calibration.known_engine(line.cells["engine"]) == "pytorch":
        raise Refused("inputs not logged: the prompt")
    return _spread(i, lambda x: activations(x) / _GIB, "memory_activation")


def _graphs(line: Line) -> Predicted:
    return _spread(instance(line), lambda i: graphs(i) / _GIB, "memory_weights")


def _tokens_given_bytes(line: Line) -> Predicted:
    i = instance(line)
    pool = (line.number("kv_available_gib_per_gpu") or 0.0) * _GIB
    if pool <= 0:
        raise Refused("no bytes for keys and values")
    if i.account.budget == "context":
        # Logged per device as the mean over the layers' split.
        pool, i = pool * float(i.par.pp), replace(i, par=replace(i.par, pp=1))
    table = line.noted("(free-memory drop over)") is not None
    return _tokens(cache_tokens(i, pool, _block(line), table=table), calibration.law().residual["memory_cache"])


def _tokens_from_settings(line: Line) -> Predicted:
    i, engine = instance(line), _engine(line)
    fraction = line.number("gpu_memory_utilization")
    if i.account.budget == "context":
        raise Refused("the context is asked for, not derived")
    if fraction is None and i.account.budget == "free":
        fraction = engine.memory_fraction
    if fraction is None or i.total <= 0:
        raise Refused("inputs not logged: " + ("memory fraction" if fraction is None else "device memory"))
    if has_encoder(i.model) and i.account.budget != "reserve":
        raise Refused("inputs not logged: images of the reserved step")
    _check_checkpoint(i)
    share, block = fraction, _block(line)
    found = _spread(i, lambda x: cache_tokens(x, cache_pool(x, share), block), "memory_pool")
    if found.value <= 0:
        raise Refused("the weights leave no room by this accounting")
    return found


def _tokens(value: float, sigma: float) -> Predicted:
    if value <= 0:
        raise Refused("no token costs cache")
    return _predicted(value, sigma)


def _block(line: Line) -> int:
    return line.whole("block_size") or _engine(line).block_tokens


def _given(line: Line) -> float | None:
    return line.number("kv_tokens") if line.number("kv_available_gib_per_gpu") is not None else None


QUANTITIES = {
    "weights": Quantity("GiB", lambda line: line.number("weights_gib_per_gpu"), _weights),
    "kv_tokens_given_bytes": Quantity("tokens", _given, _tokens_given_bytes),
    "kv_tokens": Quantity("tokens", lambda line: line.number("kv_tokens"), _tokens_from_settings),
    "non_torch": Quantity("GiB", lambda line: line.number("non_torch_gib"), _overhead),
    "activation": Quantity("GiB", lambda line: line.number("activation_peak_gib"), _activations),
    "graphs": Quantity("GiB", lambda line: line.number("cuda_graph_gib"), _graphs),
}
