"""How one instance may be built: node type, role, degrees, formats and batch policy; and the estimator and clock of each."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from perfmodel import calibration, memory
from perfmodel.catalog import load_model
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.offer import Offer
from perfmodel.serving.clock import StepClock
from perfmodel.serving.encode import encode_clock, tower_bytes
from perfmodel.serving.images import LABEL
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.queueing import Mix
from perfmodel.serving.workload import Workload
from perfmodel.spec.choices import Choices
from perfmodel.spec.model import Model, Moe


@dataclass(frozen=True)
class Layout:
    """How one instance is built."""

    node: str
    role: str
    tp: int
    pp: int
    weight_dtype: str
    ep: int = 1
    dp: int = 1
    cp: int = 1
    policy: str = "chunked"
    chunk: int = 0
    """Tokens of a step; 0: the engine's default."""
    prefill_share: float = 0.0
    """Of the compute units, under the policy `split`."""
    encode_share: float = 0.0
    """Of a TTFT limit, which an encode pool takes; 0: the instance encodes its images itself."""
    techniques: tuple[str, ...] = ()

    @property
    def fed(self) -> bool:
        """Whether embeddings come from an encode pool."""
        return self.encode_share > 0 and self.role != "encode"

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def label(self) -> str:
        degrees = (("pp", self.pp), ("dp", self.dp), ("cp", self.cp), ("ep", self.ep))
        more = "".join(f" {name}{n}" for name, n in degrees if n > 1)
        more += f" {self.policy}" if self.policy != "chunked" else ""
        more += f" {self.prefill_share:.0%} for prefill" if self.prefill_share else ""
        more += f" chunk {self.chunk}" if self.chunk else ""
        if self.encode_share:
            more += f" {'within' if self.role == 'encode' else 'after encoding in'} {self.encode_share:.0%} of TTFT"
        more += "".join(f" +{t}" for t in self.techniques)
        return f"{self.node} {self.role} tp{self.tp}{more} {self.weight_dtype}"


Built = tuple[Estimator, StepClock] | str
"""An estimator and its clock, or why the layout cannot hold the model."""


def layouts(model: Model, offer: Offer, choices: Choices) -> list[Layout]:
    """Every combination of the choices on one node type. An instance stays inside a node unless tp may cross, or by pp, dp."""
    count = offer.machine.devices_per_node
    widest = count * (2 if choices.tp_across_nodes else 1)
    degrees = choices.tp or tuple(2**i for i in range(int(math.log2(widest)) + 1))
    experts = any(isinstance(b.ffn, Moe) for b in model.blocks.values())
    found: dict[Layout, None] = {}
    if "encode" in choices.roles and offer.machine.network:
        for tp, share in itertools.product(degrees, choices.encode_share):
            if tp <= count:
                found[Layout(offer.label, "encode", tp, 1, "checkpoint", encode_share=share)] = None
    others = [r for r in choices.roles if r != "encode"]
    for role, dtype, tp, pp, dp, cp in itertools.product(
        others, choices.weight_dtype or ("checkpoint",), degrees, choices.pp, choices.dp, choices.cp
    ):
        if tp > widest or (role != "colocated" and not offer.machine.network):
            continue
        group = tp * dp * cp
        for ep in choices.ep or sorted({1, group} if experts else {1}):
            if group % ep == 0:
                for policy, share, chunk in _policies(role, choices):
                    for part, more in itertools.product(_encoded(role, policy, offer, choices), _techniques(choices)):
                        found[Layout(offer.label, role, tp, pp, dtype, ep, dp, cp, policy, chunk, share, part, more)] = None
    return list(found)


def _techniques(choices: Choices) -> list[tuple[str, ...]]:
    """None, and each listed technique or set of them."""
    return [(), *((t,) if isinstance(t, str) else t for t in choices.techniques)]


def _policies(role: str, choices: Choices) -> list[tuple[str, float, int]]:
    """(policy, prefill share, chunk) that a role may take: only colocated instances mix phases, decode has no chunks."""
    if role == "decode":
        return [("chunked", 0.0, 0)]
    chunks = choices.chunk or (0,)
    if role == "prefill":
        return [("chunked", 0.0, c) for c in chunks]
    result: list[tuple[str, float, int]] = []
    for policy in choices.policy:
        shares = choices.prefill_share if policy == "split" else (0.0,)
        sizes = chunks if policy == "chunked" else (0,)
        result += [(policy, share, size) for share in shares for size in sizes]
    return result


def _encoded(role: str, policy: str, offer: Offer, choices: Choices) -> tuple[float, ...]:
    """Encode pools' shares of a TTFT limit: an instance that prefills in chunks may leave images to them, or not (0)."""
    able = "encode" in choices.roles and role != "decode" and policy == "chunked" and offer.machine.network
    return (0.0, *choices.encode_share) if able else (0.0,)


def build(model: str, offer: Offer, layout: Layout, choices: Choices, workload: Workload) -> Built:
    """Estimator and clock of a layout, or why it cannot hold the model."""
    if reason := _refused(model, layout, choices, workload):
        return reason
    try:
        e = Estimator(
            model, offer.node, tp=layout.tp, pp=layout.pp, dp=layout.dp, cp=layout.cp, ep=layout.ep, engine=choices.engine,
            kv_dtype=choices.kv_dtype, weight_dtype=None if layout.weight_dtype == "checkpoint" else layout.weight_dtype,
            mem_fraction=choices.mem_fraction, techniques=layout.techniques,
        )  # fmt: skip
    except (SpecError, Infeasible) as error:
        return str(error)
    if layout.role == "encode":
        return _tower(e, workload)
    longest = float(np.max(workload.requests.input + workload.requests.output))
    one = float(memory.cache_bytes(e.model, e.par, e.formats, layout.dp, longest, e.engine.block_tokens))
    if e.kv_free < one:
        weights = float(memory.weight_bytes(e.model, e.par, e.formats))
        return (
            f"needs {(weights + one) / 1e9:.1f} GB per device for weights and the longest request, and has "
            f"{(weights + e.kv_free) / 1e9:.1f} GB beside activations and engine"
        )
    inputs, outputs, weight = workload.sample()
    context = Mix(inputs, outputs, weight).context
    return e, policy_clock(
        e, context, layout.policy, chunk=layout.chunk, longest=float(workload.requests.input.max()),
        prefill_share=layout.prefill_share,
    )  # fmt: skip


def _tower(e: Estimator, workload: Workload) -> Built:
    """Estimator and clock of an encode instance, which holds the tower alone."""
    assert workload.image is not None
    room = e.kv_free + float(memory.weight_bytes(e.model, e.par, e.formats))
    if room < (need := tower_bytes(e)):
        return f"needs {need / 1e9:.1f} GB per device for the vision tower, and has {room / 1e9:.1f} GB"
    return e, encode_clock(e, workload.image)


def _refused(model: str, layout: Layout, choices: Choices, workload: Workload) -> str:
    """What is not served this way, and why; empty where nothing speaks against it."""
    if layout.policy == "static" and choices.prefix_caching:
        return "pads its batches, so it has no prefix cache: choose prefix_caching or the policy static"
    if workload.image is None or not workload.requests.labels[LABEL].any():
        return "has no images to encode: give the workload `images`" if layout.encode_share else ""
    if choices.prefix_caching:
        return "has no law of prefixes that hold images: leave prefix_caching out"
    if layout.role == "decode":
        return ""
    if layout.policy not in ("chunked", "whole"):
        return f"has no law of images under the policy {layout.policy}: chunked and whole have"
    if not layout.encode_share:
        return ""
    e = calibration.engine(choices.engine)
    if e.supports is None or not e.supports.encoders:
        return f"needs encode pools, which {e.title} does not have (`encoders` under supports in engines.yaml)"
    if layout.role == "encode" and layout.tp > e.supports.encoder_tp:
        return f"encodes on {layout.tp} devices, and an encode instance of {e.title} takes {e.supports.encoder_tp} at most"
    if load_model(model).vision is None:
        return "has no vision tower"
    return ""
