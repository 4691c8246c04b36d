"""What a router asks for, and what experts and copies of tokens cost: from popularity, a model and an instance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode as decode_phase
from perfmodel.ops.moe import Routed, distinct_ranks, routed_experts
from perfmodel.planner.placement.experts import Demand, Ranks
from perfmodel.schedule import operators
from perfmodel.spec.model import Moe

# A secant of the law over half to one and a half times the mean: how loads of real placements spread.
_SPREAD = 0.5


def sample(
    popularity: np.ndarray, top_k: int, tokens: int, *, groups: int = 1, top_groups: int = 1, seed: int = 0
) -> np.ndarray:
    """Choices (tokens, top_k) of a router whose scores are log-popularity plus Gumbel noise: k without replacement.

    Group-limited routing keeps the `top_groups` groups whose two best scores add up highest (arXiv:2412.19437, 2.1.2),
    then the k best experts in them. Raises SpecError where the groups kept hold fewer than k experts.
    """
    n = popularity.size
    if n % groups or top_groups * (n // groups) < top_k:
        raise SpecError(f"top {top_k} of {n} experts do not come out of {top_groups} of {groups} groups")
    with np.errstate(divide="ignore"):
        scores = np.log(popularity) + np.random.default_rng(seed).gumbel(size=(tokens, n))
    if groups > 1 and top_groups < groups:
        grouped = scores.reshape(tokens, groups, n // groups)
        two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        rank = np.argsort(np.argsort(-two, axis=1), axis=1)
        scores = np.where((rank < top_groups)[:, :, None], grouped, -np.inf).reshape(tokens, n)
    chosen: np.ndarray = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return chosen


def demand_of(choices: np.ndarray, experts: int, tokens: float) -> Demand:
    """Loads and co-activation of a sample of choices (samples, top_k), scaled to `tokens` tokens a step."""
    one = np.zeros((len(choices), experts))
    np.put_along_axis(one, choices, 1.0, axis=1)
    scale = tokens / len(choices)
    together = one.T @ one * scale
    np.fill_diagonal(together, 0.0)
    return Demand(one.sum(axis=0) * scale, choices.shape[1], together)


def nodes_visited(choices: np.ndarray, held: np.ndarray, ranks: Ranks) -> float:
    """Distinct nodes a token visits on average, counted over the sample where no expert is on two nodes.

    An expert with replicas on several nodes is served by the one its tokens meet most experts on: the first node, in
    order of how many of the token's choices it holds, takes all it can (greedy set cover).
    """
    by_node = np.any(held.reshape(len(held), ranks.nodes, ranks.per_node), axis=2)
    open_ = by_node[choices]
    left = np.ones(choices.shape, bool)
    visits = np.zeros(len(choices))
    for _ in range(min(ranks.nodes, choices.shape[1])):
        covers = (open_ & left[:, :, None]).sum(axis=1)
        node = covers.argmax(axis=1)
        busy = covers.max(axis=1) > 0
        visits += busy
        left &= ~np.take_along_axis(open_, node[:, None, None], axis=2)[:, :, 0]
    return float(visits.mean())


@dataclass(frozen=True)
class Layer:
    """One layer of experts of a model on an instance whose expert-parallel ranks are to be filled."""

    estimator: Estimator
    moe: Moe
    layers: int
    """Layers with such experts in the model."""
    tokens: float
    """Tokens of a step over all ranks."""

    @classmethod
    def of(cls, e: Estimator, tokens: float) -> Layer:
        """The first layer with experts. Raises SpecError for a model without."""
        blocks = e.model.block_counts()
        found = [(e.model.blocks[name].ffn, n) for name, n in blocks.items() if isinstance(e.model.blocks[name].ffn, Moe)]
        if not found:
            raise SpecError(f"{e.model.name} has no experts to place")
        moe = found[0][0]
        assert isinstance(moe, Moe)
        return cls(e, moe, sum(n for _, n in found), tokens)

    def seconds(self, pairs: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Seconds of the routed experts on ranks with `pairs` (token, expert) pairs on `active` experts each.

        The products and passes of ops/moe.py by the law of kernels/grouped.py, which takes the slower of arithmetic and
        reading the weights of the active experts.
        """
        e, m, f = self.estimator, self.moe, self.estimator.formats
        dtype = f.compute("experts")
        ops = routed_experts(
            Routed(pairs, active, np.minimum(self.tokens, pairs)), e.model.hidden, m.inter / e.par.moe_tp, gated=m.gated,
            weight=f.expert, act=f.act, dtype=dtype, narrow=f.expert.width if dtype != f.act.matrix else None,
        )  # fmt: skip
        # What the engine adds to a layer of a served model; the law of the kernels alone leaves it out.
        total = sum((roofline.op_cost(op, e.machine).seconds for op in ops), start=e.machine.law["expert_layer"])
        return np.broadcast_to(np.asarray(total, float), np.shape(pairs))

    def layer_seconds(self, held: np.ndarray, demand: Demand) -> float:
        """Seconds of the slowest rank under a placement; an expert is read when at least one token chose it."""
        per_replica = (demand.loads / held.sum(axis=1))[:, None] * held
        active = -np.expm1(-per_replica).sum(axis=0)
        return float(self.seconds(per_replica.sum(axis=0), np.maximum(active, 1e-9)).max())

    def ranks(self, demand: Demand, count: int, slots: int, nodes: int) -> Ranks:
        """The costs of the program: slopes of the time law around an even load, and the link's seconds per copy.

        A copy between nodes is one token's activations sent out, and one sum of them sent back, over the NIC of each
        rank of a node, all at once: 2 hidden bytes / (ranks x NIC rate).
        """
        even = demand.loads.sum() / count
        active = max(-np.expm1(-demand.loads).sum() / count, 1.0)
        low, high = 1 - _SPREAD, 1 + _SPREAD
        pairs = np.array([even * low, even * high, even, even])
        t = self.seconds(pairs, np.array([active, active, active * low, active * high]))
        per_token = max(float(t[1] - t[0]) / (2 * _SPREAD * even), 0.0)
        per_expert = max(float(t[3] - t[2]) / (2 * _SPREAD * active), 0.0)
        return Ranks(count, slots, nodes, per_token, per_expert, self._per_copy(count) if nodes > 1 else 0.0)

    def _per_copy(self, count: int) -> float:
        e, m = self.estimator, self.estimator.machine
        if not m.network:
            raise SpecError(f"{m.name} has no network, so its ranks cannot lie on several nodes")
        sent = e.formats.expert.width if e.formats.quantise else e.formats.act.width
        copy = e.model.hidden * (sent + e.formats.act.width)
        return float(copy / (count * m.network * m.network_efficiency))

    def tokens_per_s(self, context: float, experts_s: float, nodes_visited: float, ranks: Ranks) -> float:
        """Decode tokens/s of the instance when a layer's experts take `experts_s` and a token visits so many nodes.

        The Estimator's step, with what it assumes of both (even random routing) replaced.
        """
        e = self.estimator
        step = float(e.decode(self.tokens, context))
        program = e.lower(decode_phase(self.tokens, context - 1))
        assumed = sum(
            float(times * roofline.op_cost(op, e.machine).seconds)
            for op, times, _ in operators(program.schedule) if op.name.startswith("experts.")
        )  # fmt: skip
        more_nodes = nodes_visited - distinct_ranks(self.moe, ranks.nodes)
        crossing = ranks.per_copy * self.tokens * (1 - 1 / ranks.nodes) * more_nodes
        return self.tokens / (step - assumed + self.layers * (experts_s + crossing))


def popularity_demand(shares: np.ndarray, moe: Moe, tokens: float, samples: int, seed: int) -> tuple[Demand, np.ndarray]:
    """Demand of one layer of a model, and the sampled choices, for expert popularities `shares`."""
    if shares.size != moe.experts:
        raise SpecError(f"{shares.size} expert loads for a model with {moe.experts} experts")
    choices = sample(shares, moe.top_k, samples, groups=moe.groups, top_groups=moe.top_groups, seed=seed)
    return demand_of(choices, moe.experts, tokens), choices
