"""How one instance may be built: node type, role, degrees, formats and batch policy; and the estimator and clock of each."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from perfmodel import memory
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.offer import Offer
from perfmodel.serving.clock import StepClock
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
    for role, dtype, tp, pp, dp, cp in itertools.product(
        choices.roles, choices.weight_dtype or ("checkpoint",), degrees, choices.pp, choices.dp, choices.cp
    ):
        if tp > widest or (role != "colocated" and not offer.machine.network):
            continue
        group = tp * dp * cp
        for ep in choices.ep or sorted({1, group} if experts else {1}):
            if group % ep == 0:
                for policy, share, chunk in _policies(role, choices):
                    found[Layout(offer.label, role, tp, pp, dtype, ep, dp, cp, policy, chunk, share)] = None
    return list(found)


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


def build(model: str, offer: Offer, layout: Layout, choices: Choices, workload: Workload) -> Built:
    """Estimator and clock of a layout, or why it cannot hold the model."""
    try:
        e = Estimator(
            model, offer.node, tp=layout.tp, pp=layout.pp, dp=layout.dp, cp=layout.cp, ep=layout.ep, engine=choices.engine,
            kv_dtype=choices.kv_dtype, weight_dtype=None if layout.weight_dtype == "checkpoint" else layout.weight_dtype,
            mem_fraction=choices.mem_fraction,
        )  # fmt: skip
    except SpecError as error:
        return str(error)
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
