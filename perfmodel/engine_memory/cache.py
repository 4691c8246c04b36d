"""The pool an engine gives to keys, values and states, and the tokens it says fit in it."""

from __future__ import annotations

import math
from dataclasses import replace

from perfmodel.engine_memory.instance import Instance
from perfmodel.engine_memory.reserve import activations, graphs, overhead
from perfmodel.engine_memory.weights import loaded_weights
from perfmodel.graph import cache_residency
from perfmodel.ops.traffic import Residency
from perfmodel.spec.model import Attention, Model

_LLAMA_CPP_PAD = 256  # cells of a llama.cpp cache come in multiples of this
_TABLE_WIDTH = 4  # bytes of one entry of the table of request slots


def cache_pool(i: Instance, fraction: float, weights: float | None = None) -> float:
    """Bytes left for keys, values and states by the engine's own rule; negative: does not fit.

    fraction: `gpu_memory_utilization`, `mem_fraction_static` or the free-memory fraction. weights: as loaded.
    """
    loaded = loaded_weights(i) if weights is None else weights
    total, outside, peak, captured = i.total, overhead(i), activations(i), graphs(i)
    rest = total - loaded - outside - peak - captured
    match i.account.budget:
        case "share":
            return fraction * total - loaded - outside - peak - captured * i.account.graphs_inside
        case "reserve":
            return min(fraction * (total - outside) - loaded, rest)
        case "free":
            return fraction * rest
        case "context":
            return rest


def cache_tokens(i: Instance, pool: float, block: int, *, table: bool = False, length: float = 1.0) -> float:
    """Tokens an engine says fit in `pool` bytes per device.

    table: the pool was measured with the table of request slots in it. length: tokens of a sequence, which matter where
    techniques keep a budget of them or store the newest in another width.
    """
    records = [
        replace(r, elements=r.elements / length) if r.tensor == "kv" else r
        for r in cache_residency(i.model, i.par, i.formats, i.par.dp, length) if r.tier == "hbm"
    ]  # fmt: skip
    attention = [r for r in records if r.tensor == "kv"]
    state = sum(float(r.bytes) for r in records if r.tensor == "state")
    per_token = sum(float(r.bytes) for r in attention)
    local = sum(float(r.bytes) for r in attention if _window(i.model, r))
    if i.account.windows == "groups" and (state or 0 < local < per_token):
        return _grouped_tokens(i, records, pool, block)
    if i.account.windows == "pools" and 0 < local < per_token:
        per_token -= local * (1 - i.number("memory_window_share"))
    if i.account.windows == "bounded" and local:
        cells = max(_window(i.model, r) or 0 for r in attention) + i.profiled_tokens
        pool -= local * math.ceil(cells / _LLAMA_CPP_PAD) * _LLAMA_CPP_PAD * (i.sequences or 1)
        per_token -= local
    if i.account.budget == "context":
        pool -= state * (i.sequences or 1)
    if per_token <= 0:
        return 0.0
    tokens = pool / per_token
    if table:
        tokens = _without_table(i, pool, per_token)
    return math.floor(tokens / block + 1e-9) * block


def _window(model: Model, record: Residency) -> int | None:
    block = model.blocks.get(record.name.split(".")[0])
    mixer = block.mixer if block else None
    return mixer.window if isinstance(mixer, Attention) else None


def _without_table(i: Instance, pool: float, per_token: float) -> float:
    """Tokens where the pool also holds `requests x context` slot numbers; requests follow from the tokens."""
    row = _TABLE_WIDTH * i.longest
    if i.sequences:
        return (pool - i.sequences * row) / per_token
    if i.account.request_table is None:
        return pool / per_token
    factor, least, most = i.account.request_table
    tokens = pool / (per_token + factor * row / i.longest)
    requests = max(tokens / i.longest * factor, least)
    requests = min(requests, most) if most else requests
    return (pool - requests * row) / per_token


def _grouped_tokens(i: Instance, records: list[Residency], pool: float, block: int) -> float:
    """vLLM deals equal pages to groups of equally many layers (hybrid cache manager).

    Attention pages are as large as the largest; beside recurrent layers blocks grow until a page holds a state. With
    recurrent layers the figure is concurrency x longest context, else pages / groups.
    """
    counts: dict[tuple[str, int | None], int] = {}
    page = 0.0
    state: dict[str, float] = {}
    own = [r for r in records if r.name.split(".")[0] in i.model.blocks]
    # A draft's cache grows beside the model's own.
    pool *= sum(float(r.bytes) for r in own) / sum(float(r.bytes) for r in records)
    for record in own:
        name = record.name.split(".")[0]
        layers = i.model.block_counts()[name] / float(i.par.pp)
        each = float(record.bytes) / layers
        if record.tensor == "kv":
            key = ("kv", _window(i.model, record))
            counts[key] = counts.get(key, 0) + round(layers)
            page = max(page, each)
        else:
            state[name] = state.get(name, 0.0) + each
    for name in state:
        key = ("state", None)
        counts[key] = counts.get(key, 0) + round(i.model.block_counts()[name] / float(i.par.pp))
    if state and page:
        block = max(block, math.ceil(max(state.values()) / page / block) * block)
    sizes = list(counts.values())
    size = max(sizes) if max(sizes) < 1.25 * min(sizes) else min(sizes)
    groups = {key: math.ceil(n / size) for key, n in counts.items()}
    page_bytes = page * block if page else max(state.values())
    pages = math.floor(pool / (page_bytes * size))
    if not state:
        return math.floor(pages / sum(groups.values())) * block
    needed = 0
    for (kind, window), n in groups.items():
        span = i.longest if window is None else min(i.longest, window - 1 + i.profiled_tokens)
        needed += n * (1 if kind == "state" else math.ceil(span / block) + (window is not None))
    return pages / needed * i.longest
