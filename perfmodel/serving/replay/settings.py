"""How an engine schedules, and a request inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perfmodel.serving.replay.prefix import Tier


@dataclass(frozen=True)
class Settings:
    """How an engine schedules. Zero means the clock's own limit."""

    policy: str = "chunked"
    """One of policies.POLICIES."""
    max_batch: int = 0
    """Sequences that decode together at most."""
    chunk: int = 0
    """Tokens of a step."""
    block_tokens: int = 0
    """Tokens of a KV block."""
    swap_seconds_per_token: float | None = None
    """Time to move a token's cache to or from host memory when preempted; None: recompute it instead."""
    timeout: float = math.inf
    """Seconds after which a request that has not started is rejected."""
    prefix_caching: bool = False
    tiers: tuple[Tier, ...] = ()
    """Slower memories behind the prefix cache, nearest first."""
    fetch_overlaps: bool = True
    """Fetching from a slower tier hides behind the step (layer by layer); else the step waits for it."""
    fetch_seconds_per_token: float = 0.0
    """To fetch a token of a prompt that was cached before the replay began, as from a slower tier."""
    overtaken: int = 0
    """Requests that may pass a waiting one because more of their prompt is cached, over what is left to compute (RAGCache,
    arXiv:2404.12457, 5.2); 0: in order of arrival."""


class Item:
    """A request inside an instance."""

    __slots__ = (
        "answer", "begun", "counter", "delivered", "done", "held", "hit", "ids", "images", "index", "keys", "last", "left",
        "longest", "offset", "order", "owned", "passed", "prompt", "started",
    )  # fmt: skip

    def __init__(self, index: int, prompt: int, output: int) -> None:
        self.index = index
        self.prompt = prompt
        """Tokens to have in the cache before the next one can be produced."""
        self.left = output
        """Tokens to produce still, as of when it began to decode."""
        self.order = 0
        """Of arrival at the instance."""
        self.done = 0
        """Tokens in the cache."""
        self.hit = 0
        """Those of them that the prefix cache had."""
        self.begun = False
        """Whether it holds blocks."""
        self.held = 0
        """Blocks of the whole sequence when it began, shared ones included."""
        self.delivered = False
        """Its cache comes from elsewhere: it needs blocks and a place in the batch, but no prefill."""
        self.ids: list[int] | None = None
        """Ids of its prompt's full blocks."""
        self.keys: list[int] = []
        """What a router matches: its block ids, or its session."""
        self.owned: list[int] = []
        """Those that it uses in the prefix cache."""
        self.answer: list[int] | None = None
        """Ids of the blocks that its answer completes."""
        self.images = 0
        """Those that the instance has to encode before it prefills."""
        self.offset = 0
        """Tokens in the cache less the instance's step counter, while it decodes."""
        self.counter = 0
        """Of gaps, when it began to decode."""
        self.last = math.nan
        """When its last token came, as of when it began to decode."""
        self.longest = 0.0
        """Longest gap before it began to decode here."""
        self.passed = 0
        """Requests that came later and wait before it."""
        self.started = math.nan
        """When its prefill began."""
