"""What a pipeline stage costs on each device: seconds and bytes of single layers, of the table and of the head."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from perfmodel import calibration, catalog, memory, roofline, units
from perfmodel.collectives import collective_seconds
from perfmodel.errors import SpecError, UnitError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode as decode_phase
from perfmodel.graph import prefill as prefill_phase
from perfmodel.graph import weight_residency
from perfmodel.schedule import Repeat, Seq
from perfmodel.spec.hardware import Network
from perfmodel.spec.model import Layers, Model


@dataclass(frozen=True)
class Link:
    """Bytes/s and seconds of one message between two hosts."""

    rate: float
    latency: float
    name: str

    def seconds(self, size: float) -> float:
        return self.latency + size / self.rate


def link(text: str) -> Link:
    """A link by catalogue name (`ethernet-10g`), or a plain rate (`100 Mbit/s`) with Ethernet's efficiency and latency.

    Raises SpecError for what is neither.
    """
    try:
        rate, technology, name = units.parse(text, "bandwidth"), "ethernet", text
    except UnitError as error:
        if re.match(r"\s*[\d.]", text):
            raise SpecError(str(error)) from None
        spec = catalog.load_hardware(text)
        if not isinstance(spec, Network):
            raise SpecError(f"{text!r} is of kind {spec.kind!r}, and a link is wanted: a network or '10 Gbit/s'") from None
        rate, technology, name = spec.bandwidth, spec.name, spec.name
    if rate <= 0:
        raise SpecError(f"a link of {text!r} moves nothing")
    found = calibration.link_parameters(technology)
    efficiency, latency = found["link_efficiency"].parameter.value, found["link_latency"].parameter.value
    return Link(rate * efficiency, latency, name)


@dataclass(frozen=True)
class Entry:
    """Equal stage devices on one host: `2x a100-pcie-80gb`, or `4x rtx-4090/tp2`, two devices of two cards each."""

    name: str
    count: int
    tp: int = 1

    @property
    def label(self) -> str:
        return self.name + (f"/tp{self.tp}" if self.tp > 1 else "")


_ENTRY = re.compile(r"^\s*(?:(\d+)\s*[x×]\s*)?([^\s/]\S*?)(?:/tp(\d+))?\s*$")


def entry(text: str) -> Entry:
    """Read one entry of a device list.

    >>> entry("4x rtx-4090/tp2")
    Entry(name='rtx-4090', count=2, tp=2)
    """
    match = _ENTRY.match(text)
    if match is None:
        raise SpecError(f"cannot read {text!r} as devices; write '2x a100-pcie-80gb' or '4x rtx-4090/tp2'")
    cards, tp = int(match[1] or 1), int(match[3] or 1)
    if cards < 1 or tp < 1 or cards % tp:
        raise SpecError(f"{text!r}: {cards} cards do not make whole stages of {tp}")
    return Entry(match[2], cards // tp, tp)


@dataclass(frozen=True)
class Request:
    """What every request asks for, and how many are in flight over the whole pipeline."""

    isl: int
    osl: int
    batch: int

    def __post_init__(self) -> None:
        if min(self.isl, self.osl, self.batch) < 1:
            raise SpecError("input length, output length and batch must be at least 1")


@dataclass(frozen=True)
class Seconds:
    """Per request: of each layer, shape (layers,), of the table, of the head, and of the host of any stage."""

    layers: np.ndarray
    table: float
    head: float
    host: float


@dataclass(frozen=True)
class StageCosts:
    """One kind of stage device: seconds per request and bytes for each layer; the table and the head apart."""

    shared: Seconds
    """What a request costs: its prefill, and its share of its decode steps."""
    alone: Seconds
    """What a request waits: its prefill, and its decode steps with all that share them."""
    layer_bytes: np.ndarray
    """Weights and cache of each layer on one card, shape (layers,)."""
    table_bytes: float
    head_bytes: float
    shared_bytes: float
    """What the table and the head are both counted for where one device has both (tied embeddings)."""
    room: float
    """Bytes of one card for weights and cache."""
    token_bytes: float
    """Hidden state of one token between stages."""


def stage_costs(model: Model, device: Entry, request: Request, micro: float, engine: str) -> StageCosts:
    """Costs of layers on a device when micro-batches have `micro` sequences.

    A layer's seconds per request: prefill(1, isl) + osl decode(micro, isl + osl/2)/micro. All `batch` sequences keep
    isl + osl tokens in every stage's cache.
    """
    e = Estimator(model, device.name, tp=device.tp, engine=engine)
    context = request.isl + request.osl / 2
    first = _parts(e, prefill_phase(1, request.isl))
    step = _parts(e, decode_phase(micro, context))
    kinds = layer_kinds(model)
    pre, dec = np.array([first[k] for k in kinds]), np.array([step[k] for k in kinds])
    host_pre, host_dec = float(e.host_seconds(1)), float(e.host_seconds(micro))

    def seconds(steps: float) -> Seconds:
        table, head = (first[part] + steps * step[part] for part in ("embedding", "head"))
        return Seconds(pre + steps * dec, table, head, host_pre + steps * host_dec)

    size = {k: _layer_bytes(e, k, request) for k in set(kinds)}
    outer = {r.name: float(r.bytes) for r in weight_residency(model, e.par, e.formats) if "." not in r.name}
    table = outer.get("embedding", 0.0)
    head = outer.get("head", table if model.tied_embeddings else 0.0)
    front = sum(v for k, v in outer.items() if k in ("positions", "project_in", "embedding_norm", "vision"))
    m = memory.resident(e.model, e.par, e.formats, e.machine, e.engine, sequences=0, tokens=1)
    room = float(m.capacity - m.activations - m.overhead - m.graphs)
    return StageCosts(
        seconds(request.osl / micro),
        seconds(request.osl),
        np.array([size[k] for k in kinds]),
        table + front,
        head + sum(outer.values()) - table - front - outer.get("head", 0.0),
        table if model.tied_embeddings else 0.0,
        room,
        e.formats.act.width * model.hidden,
    )


def layer_kinds(model: Model) -> list[str]:
    """Block name of every layer, first to last."""
    return [name for group in model.layers for _ in range(group.repeat) for name in group.blocks]


def _parts(e: Estimator, phase: object) -> dict[str, float]:
    """Device seconds of the embedding, of one layer of each kind and of the head in one pass."""
    seconds: dict[str, float] = {}
    schedule = e.lower(phase).schedule  # type: ignore[arg-type]
    assert isinstance(schedule, Seq)
    for item in schedule.items:
        body = item.body if isinstance(item, Repeat) else item
        name = getattr(item, "name", "")
        seconds[name] = float(roofline.cost(body, e.machine).seconds)
    return seconds


def _layer_bytes(e: Estimator, kind: str, request: Request) -> float:
    """Weights and cache of one layer on one card."""
    one = e.model.model_copy(update={"layers": (Layers(blocks=(kind,)),)})
    weights = sum(float(r.bytes) for r in weight_residency(one, e.par, e.formats) if r.name.startswith(f"{kind}."))
    tokens = request.isl + request.osl
    cached = memory.cache_bytes(one, e.par, e.formats, request.batch, tokens, e.engine.block_tokens)
    return weights + float(cached)


def inside_seconds(model: Model, device: Entry, size: float, engine: str) -> float:
    """Seconds of one message of `size` bytes between two stage devices of the same host."""
    m = Estimator(model, device.name, engine=engine).machine
    return float(collective_seconds("p2p", size, size, 2, m, 2))
