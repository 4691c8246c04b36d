"""Layered prefill: each step takes the whole prompt through one group of layers, beside the decode of all layers.

Chunked prefill cuts a prompt along its tokens, so every chunk reads the experts of every layer again. Cutting along the
layers reads them once per prompt (layered prefill, arXiv:2510.08055). The records of both are those of the same
forward pass: a step is the mixed pass in the layers of its group and the decode pass in the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from perfmodel import graph, roofline
from perfmodel.estimator import Estimator
from perfmodel.ops.shard import Group
from perfmodel.schedule import Node, Repeat, Seq, operators
from perfmodel.serving.clock import StepClock


@dataclass(frozen=True)
class LayerGroup:
    """Contiguous layers [first, last) of the model, counted from 0."""

    first: int
    last: int


def layer_groups(layers: int, groups: int) -> list[LayerGroup]:
    """Cut `layers` into contiguous groups that differ by one layer at most."""
    edges = [round(i * layers / groups) for i in range(groups + 1)]
    return [LayerGroup(a, b) for a, b in pairwise(edges)]


def layered_program(e: Estimator, batch: float, context: float, prompt: float, group: LayerGroup) -> graph.Program:
    """Operators of one step: `batch` sequences decode in all layers, a prompt of `prompt` tokens passes through `group`.

    context: tokens each decoding sequence attends. The prompt is embedded with its first group, and its last token goes
    through the head with its last. batch 0: only the group runs.
    """
    prompt_group = Group(1.0, prompt, 0.0)
    decoding = Group(batch, 1, context - 1, decode=True)
    mixed = _items(e, (decoding, prompt_group) if batch else (prompt_group,))
    alone = _items(e, (decoding,)) if batch else [None] * len(mixed)
    names = [name for part in e.model.layers for _ in range(part.repeat) for name in part.blocks]
    inside = names[group.first : group.last]
    items: list[Node] = []
    for both, only in zip(mixed, alone, strict=True):
        if isinstance(both, Repeat) and both.name in e.model.blocks:
            share = inside.count(both.name) / names.count(both.name)
            items.append(replace(both, times=both.times * share))
            if isinstance(only, Repeat):
                items.append(replace(only, times=only.times * (1 - share)))
        else:
            name = getattr(both, "name", "")
            here = group.first == 0 if name == "embedding" else group.last == len(names)
            chosen = both if here else only
            items += [chosen] if chosen is not None else []
    return graph.Program(Seq(tuple(items), "pass"))


def _items(e: Estimator, groups: tuple[Group, ...]) -> list[Node]:
    schedule = e.lower(graph.Phase(groups)).schedule
    assert isinstance(schedule, Seq)
    return list(schedule.items)


def expert_bytes(program: graph.Program) -> float:
    """Bytes of routed experts that one device reads in a pass."""
    return float(sum(op.bytes(tensor="experts") * times for op, times, _ in operators(program.schedule)))


class LayeredClock(StepClock):
    """Step times under layered prefill.

    A prompt of P tokens takes ceil(P / chunk) steps, as it would in chunks, each through an equal share of the layers: so a
    chunk of q of its P tokens stands for q/P of the layers with all P tokens in them.
    """

    def __init__(self, estimator: Estimator, context: float, longest: float) -> None:
        # Whole prompts pass through a layer at once, so the tables reach to the longest of them.
        wide = replace_engine(estimator, chunk_tokens=math.ceil(longest))
        super().__init__(wide, context)
        self.estimator = estimator
        self.chunk = estimator.engine.chunk_tokens * self.ranks
        self._layers = self._layer_seconds()

    def _layer_seconds(self) -> np.ndarray:
        """Token-wise seconds of all layers, without embedding and head, over the tokens of the table."""
        of_rank = np.maximum(self._tokens / self.ranks, 1.0)
        items = _items(self.estimator, (Group(1.0, of_rank, 0.0),))
        layers = Seq(tuple(i for i in items if isinstance(i, Repeat) and i.name in self.estimator.model.blocks))
        seconds = roofline.cost(layers, self.estimator.machine, contextual=False).seconds
        return np.broadcast_to(np.asarray(seconds, float), self._tokens.shape)

    def layer_work(self, new: np.ndarray, batch: float, cached: np.ndarray | float = 0.0) -> np.ndarray:
        """Seconds that all layers take longer because of a whole prompt beside `batch` decoding sequences [prompt]."""
        layers = np.interp(batch + new, self._tokens, self._layers) - np.interp(batch, self._tokens, self._layers)
        return np.maximum(layers, 0.0) + self.attention_array(new, np.zeros(new.shape) + cached)

    def iterations(self, prompts: np.ndarray, batch: float = 0.0) -> np.ndarray:
        """Steps a prompt takes [prompt]: alone on the device one, since nothing waits between groups."""
        room = max(self.chunk - batch, 1.0)
        count = np.minimum(np.ceil(prompts / room), self.estimator.model.n_layers)
        return count if batch >= 1 else np.ones(prompts.shape)

    def step(
        self, batch: int, total_context: float, chunks: list[tuple[float, float]], prompts: list[float] | None = None
    ) -> float:
        """As StepClock.step; `prompts`: tokens of the prompt that each chunk is part of (else the chunk ends it)."""
        if not chunks:
            return self.decode(batch, total_context)
        whole = np.array(prompts if prompts is not None else [q + c for q, c in chunks])
        share = np.array([q for q, _ in chunks]) / whole
        if not batch:
            # Groups of a lone prompt follow each other without a decode step between them.
            alone = self.host(1) + np.interp(whole, self._tokens, self._tokenwise) + self._floor
            return float(share @ (alone + self.attention_array(whole, np.zeros(whole.shape))))
        seconds = self.decode(batch, total_context) + self.host(len(chunks)) - self.host(0)
        return float(seconds + share @ self.layer_work(whole, batch))

    def prefill_line(self, batch: int, tokens: float) -> tuple[np.ndarray, float, np.ndarray]:
        """As StepClock.prefill_line: prompts of a step are in different groups of layers, so each takes its own time."""
        return np.array([1.0, max(self.chunk - batch, 1.0)]), 0.0, np.zeros(2)

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds that prefilling each input adds to the steps it shares: its one pass through every layer."""
        new = inputs - cached
        alone = np.interp(new, self._tokens, self._tokenwise) + self._floor + self.host(1)
        alone = alone + self.attention_array(new, np.zeros(new.shape) + cached)
        beside = max(batch, 1.0)
        host = (self.host(1) - self.host(0)) * self.iterations(new, beside)
        # Fewer than one decoding sequence: so often is there one.
        share = min(batch, 1.0)
        return np.asarray((1 - share) * alone + share * (self.layer_work(new, beside, cached) + host))


def replace_engine(e: Estimator, **changes: int) -> Estimator:
    """The same estimator under other scheduler limits."""
    other = object.__new__(type(e))
    other.__dict__.update(e.__dict__)
    other.engine = e.engine.model_copy(update=changes)
    return other
