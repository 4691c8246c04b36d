"""Requests as arrays: arrival, lengths, and what else a trace says of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.spec.model import Model


@dataclass(frozen=True)
class Blocks:
    """Ids of the prompt blocks of each request: equal ids at the head of two prompts mean a shared prefix.

    Request i's blocks are ``ids[start[i] : start[i + 1]]``; each stands for `tokens` prompt tokens (the last may be partial).
    """

    ids: np.ndarray
    start: np.ndarray
    tokens: int

    def of(self, i: int) -> np.ndarray:
        """Block ids of request i, first block first."""
        return self.ids[self.start[i] : self.start[i + 1]]

    def take(self, chosen: np.ndarray) -> Blocks:
        """Blocks of some requests, by index."""
        lengths = (self.start[1:] - self.start[:-1])[chosen]
        start = np.concatenate([[0], np.cumsum(lengths)])
        place = np.repeat(self.start[:-1][chosen] - start[:-1], lengths) + np.arange(start[-1])
        return Blocks(self.ids[place], start, self.tokens)


def check_positions(requests: Requests, model: Model) -> None:
    """Raise SpecError for requests that are longer than the model's longest context; an engine would refuse them."""
    total = requests.input + requests.output
    beyond = int(np.count_nonzero(total > model.max_positions)) if model.max_positions else 0
    if beyond:
        raise SpecError(
            f"{beyond:,} of {len(requests):,} requests exceed the {model.max_positions:,} positions of {model.name}, the longest "
            f"with {int(total.max()):,} tokens; take a model with a longer context, or leave those requests out"
        )


@dataclass(frozen=True)
class Requests:
    """Arrival seconds (sorted, from 0), input and output tokens of each request."""

    arrival: np.ndarray
    input: np.ndarray
    output: np.ndarray
    blocks: Blocks | None = None
    """Prompt block ids, where the trace has them."""
    session: np.ndarray | None = None
    """Number of the conversation a request belongs to, -1 for none: its turns follow each other in time."""
    think: np.ndarray | None = None
    """Seconds between the answer to the session's previous turn and this request; nan for a request that arrives by the clock."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Further columns a router sees on arrival: `tenant`, `model`, `max_tokens`."""
    tick: float = 0.0
    """Seconds of the coarse clock that arrivals were logged by; 0: a fine one."""

    def __len__(self) -> int:
        return int(self.arrival.size)

    def take(self, chosen: Any) -> Requests:
        """A subset by slice, mask or index, arrivals kept."""
        index = np.arange(len(self))[chosen]
        pick = lambda a: None if a is None else a[index]  # noqa: E731
        return Requests(
            self.arrival[index], self.input[index], self.output[index],
            None if self.blocks is None else self.blocks.take(index), pick(self.session), pick(self.think),
            {name: values[index] for name, values in self.labels.items()}, self.tick,
        )  # fmt: skip

    def at(self, arrival: np.ndarray) -> Requests:
        """The same requests at other arrival times, in order of arrival."""
        order = np.argsort(arrival, kind="stable")
        return replace(self.take(order), arrival=arrival[order])

    @staticmethod
    def join(parts: list[Requests]) -> Requests:
        """Several sets in one, sorted by arrival. What only some of them carry (blocks, sessions, labels) is refused."""
        kinds = {(p.blocks is None, p.session is None, p.think is None, frozenset(p.labels)) for p in parts}
        if len(kinds) != 1:
            raise ValueError("requests to join must carry the same columns")
        arrival, input_, output = (np.concatenate([getattr(p, f) for p in parts]) for f in ("arrival", "input", "output"))
        blocks = session = think = None
        first = parts[0]
        if first.blocks is not None:
            lengths = np.concatenate([np.diff(p.blocks.start) for p in parts if p.blocks is not None])
            ids = np.concatenate([p.blocks.ids for p in parts if p.blocks is not None])
            blocks = Blocks(ids, np.concatenate([[0], np.cumsum(lengths)]), first.blocks.tokens)
        if first.session is not None:
            session = np.concatenate([p.session for p in parts if p.session is not None])
        if first.think is not None:
            think = np.concatenate([p.think for p in parts if p.think is not None])
        labels = {name: np.concatenate([p.labels[name] for p in parts]) for name in first.labels}
        return Requests(arrival, input_, output, blocks, session, think, labels, max(p.tick for p in parts)).at(arrival)
