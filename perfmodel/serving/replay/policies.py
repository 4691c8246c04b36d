"""Batch policies: which waiting prompts the next step carries, in the order of the queue.

chunked   prefill fills the tokens that decoding leaves of the step's budget (arXiv:2403.02310)
layered   as many steps as in chunks, but each takes the whole prompt through a share of the layers (arXiv:2510.08055)
whole     steps of whole prompts, without decoding, go before decode steps (arXiv:2309.06180)
split     prefill passes and decode steps side by side, each on its share of the device (replay.side_by_side)
static    a batch starts together, is padded to its longest prompt and answer, and the next starts when it has ended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from perfmodel.serving.replay.settings import Item

if TYPE_CHECKING:
    from perfmodel.serving.replay.instance import Instance

Chunks = list[tuple[Item, int]]
"""Requests and how many tokens of each the step prefills."""


def chunked(x: Instance) -> Chunks:
    """Fill what decoding leaves of the step's tokens and of the batch's places."""
    return _fill(x, x.chunk - x.slots)


def _fill(x: Instance, budget: int) -> Chunks:
    places = x.max_batch - x.slots
    chunks: Chunks = []
    for item in x.waiting:
        if budget <= 0 or places <= 0 or item.delivered or not (item.begun or x.reserve(item)):
            break
        q = item.prompt - item.done
        if q > budget:
            q = budget
        budget -= q
        places -= 1
        chunks.append((item, q))
    return chunks


def split(x: Instance) -> Chunks:
    """A pass takes the whole budget of tokens: decoding runs beside it."""
    return _fill(x, x.chunk)


def whole(x: Instance) -> Chunks:
    """As many whole prompts as the step's tokens allow; one that is longer runs alone."""
    budget, places = x.chunk, x.max_batch - x.slots
    chunks: Chunks = []
    for item in x.waiting:
        if places <= 0 or item.delivered or (chunks and item.prompt > budget) or not x.reserve(item):
            break
        q = item.prompt - item.done
        budget -= q
        places -= 1
        chunks.append((item, q))
    return chunks


def static(x: Instance) -> Chunks:
    """All prompts of the next batch in one step, if none runs: as many as fit when all are as long as the longest."""
    chosen: list[Item] = []
    prompt = answer = 0
    for item in x.waiting if not x.slots else ():
        longer, answers = max(prompt, item.prompt), max(answer, item.left)
        if chosen and (len(chosen) >= x.max_batch or (len(chosen) + 1) * x.kv.of(longer + answers) > x.kv.capacity):
            break
        chosen.append(item)
        prompt, answer = longer, answers
    for item in chosen:
        x.prefill_left += prompt - item.prompt
        item.prompt = prompt
        x.reserve(item)
    return [(item, prompt) for item in chosen]


def overtake(waiting: deque[Item], most: int) -> None:
    """The last in line passes those that have less of their prompt cached for what is left of it, each of them `most` times."""
    at = len(waiting) - 1
    while at:
        item, before = waiting[at], waiting[at - 1]
        behind = before.done * (item.prompt - item.done) >= item.done * (before.prompt - before.done)
        if behind or before.begun or before.delivered or before.passed >= most:
            return
        before.passed += 1
        waiting[at - 1], waiting[at] = item, before
        at -= 1


POLICIES: dict[str, Callable[[Instance], Chunks]] = {
    "chunked": chunked, "layered": chunked, "split": split, "whole": whole, "static": static,
}  # fmt: skip
