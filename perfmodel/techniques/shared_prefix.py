"""Tokens that sequences of a batch have in common: stored once, and read once for all where the kernel can."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import model_validator

from perfmodel import catalog
from perfmodel.ops.cache import Cache, Run, Segment, split_oldest
from perfmodel.ops.cached import Site
from perfmodel.spec.model import Model
from perfmodel.symbols import Num, minimum
from perfmodel.techniques.base import Companion, Draft, Quality, Round, Technique, knob


def shared(run: Run, tokens: Num, sharers: float, *, together: bool, piece: float = 0.0) -> Run:
    """The oldest `tokens` of a run shared by that many sequences, beyond what they share already."""
    first, rest = split_oldest(run.segments, tokens)
    mine = [s if _more(s, sharers) else replace(s, sharers=sharers, together=together, piece=piece) for s in first]
    return replace(run, segments=(*mine, *rest))


def _more(s: Segment, sharers: float) -> bool:
    return bool(s.sharers > sharers)


class SharedPrefix(Technique):
    """`group` sequences begin with the same `tokens` tokens: one copy for n / g sequences' worth of storage.

    Stored = n (T - P) + (n / g) P tokens. With `together` a kernel of its own attends the prefix with the g queries at
    once, reading (n / g) P instead of n P, and the partial outputs are merged (ChunkAttention, arXiv:2402.15220; Hydragen,
    arXiv:2402.05099; FlashInfer's composable formats, arXiv:2501.01005). Without, only storage is shared (block tables of
    vLLM, arXiv:2309.06180; SGLang's radix tree, arXiv:2312.07104). With a `chunk` every so many tokens are a work item of
    their own, whose partial output goes to memory and is read by the merge (ChunkAttention, section 3.2). Its prefill is a
    matter of prefix-cache.
    """

    kind: ClassVar[str] = "shared-prefix"
    reference: ClassVar[str] = "arXiv:2402.15220"
    repeats: ClassVar[bool] = True
    quality: ClassVar[Quality] = "exact"
    # Which tokens are shared is said of the sequence as it came, before any are dropped.
    cache_turn: ClassVar[int] = -3

    tokens: int = knob(0, "tokens at the beginning of every sequence of a group", "token", low=0, high=10_000_000)
    group: float = knob(1.0, "sequences that share them (no more than the batch)", low=1, high=1e6)
    together: bool = knob(True, "attention reads them once for the group; false: stored once, read by each")
    chunk: int = knob(0, "tokens that one block of threads attends; 0: as the kernel splits", "token", low=0, high=65536)

    def cache(self, cache: Cache, site: Site) -> Cache:
        if not self.tokens or self.group == 1:
            return cache
        # Where older tokens were dropped, they came out of the prefix first.
        tokens = minimum(self.tokens, cache.total)
        return cache.each(lambda run: shared(run, tokens, self.group, together=self.together, piece=self.chunk))


class TreeSearch(Technique):
    """`width` branches of one prompt are decoded side by side (parallel samples, beams, a tree search).

    Distinct tokens = P + u w (T - P): the prompt once, and of the branches' tokens the share u that is distinct, either
    given (`distinct`) or of a tree that branches by `fanout` every `step` tokens: a step at depth d of D has
    min(w, fanout^(d+1)) distinct nodes for w branches. `together`: shared nodes are read once (tree or cascade attention),
    else shared in storage only (ETS, arXiv:2502.13575, without kernels of its own). `reward`: a model that reads every step
    of every branch. Batches count branches. Test-time scaling costs: Kinetics, arXiv:2506.05333.
    """

    kind: ClassVar[str] = "tree-search"
    reference: ClassVar[str] = "arXiv:2502.13575"
    quality: ClassVar[Quality] = "exact"
    cache_turn: ClassVar[int] = -3
    excludes: ClassVar[dict[str, str]] = {
        "shared-prefix": "the branches of a tree search already share their prompt; say how with its `together`"
    }

    width: float = knob(1.0, "branches of one prompt", low=1, high=1e6)
    prompt: int = knob(0, "prompt tokens", "token", low=0, high=10_000_000)
    distinct: float = knob(1.0, "distinct tokens over all tokens of the branches", low=0.000001, high=1)
    fanout: float = knob(0.0, "children of a node every `step` tokens; 0: `distinct` says what is shared", low=0, high=1000)
    step: int = knob(0, "tokens of one node", "token", low=0, high=1_000_000)
    together: bool = knob(False, "attention reads shared nodes once")
    reward: str = knob("", "model that scores every step of every branch, by catalogue name")

    @model_validator(mode="after")
    def _consistent(self) -> TreeSearch:
        if self.fanout > 1 and not self.step:
            raise ValueError("fanout needs the tokens of a node: give step")
        if self.reward and not self.step:
            raise ValueError("reward needs the tokens it scores at a time: give step")
        if self.distinct * self.width < 1 - 1e-9:
            raise ValueError(f"of {self.width:g} branches at least 1/{self.width:g} of the tokens are distinct")
        return self

    def cache(self, cache: Cache, site: Site) -> Cache:
        if self.width == 1:
            return cache
        sharing = [(self.prompt, self.width)]
        if self.fanout > 1:
            nodes, depth = self.fanout, 1
            while nodes < self.width:
                sharing.append((self.prompt + depth * self.step, self.width / nodes))
                nodes, depth = nodes * self.fanout, depth + 1
        elif self.distinct < 1:
            sharing.append((cache.total, 1 / self.distinct))
        for tokens, sharers in sharing:
            at = minimum(tokens, cache.total)
            cache = cache.each(lambda run, t=at, g=sharers: shared(run, t, g, together=self.together))  # type: ignore[misc]
        return cache

    def round(self, round_: Round, batch: Num) -> Round:
        if not self.reward:
            return round_
        scored = Draft(self.reward, 1 / self.step, self.step, per_token=True)
        return replace(round_, before=(*round_.before, scored))

    def companions(self, model: Model) -> tuple[Companion, ...]:
        return (Companion(catalog.load_model(self.reward)),) if self.reward else ()
