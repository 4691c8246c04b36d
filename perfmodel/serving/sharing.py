"""What prompts share, read from their block ids: conversations, and blocks common to many users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perfmodel.serving.requests import Blocks, Requests

_FORKS = 4  # full blocks that follow a block: so many conversations do not grow out of one answer, but of a system prompt
_POPULAR_SESSIONS = 3
_POPULAR_SHARE = 1e-3  # of all sessions


def full_blocks(requests: Requests) -> np.ndarray:
    """Blocks of each prompt that it fills to the end (the last may hold fewer tokens)."""
    blocks = _blocks(requests)
    return np.minimum(np.floor(requests.input / blocks.tokens), np.diff(blocks.start)).astype(int)


def _blocks(requests: Requests) -> Blocks:
    if requests.blocks is None:
        raise ValueError("requests without block ids share nothing that can be told")
    return requests.blocks


def conversations(requests: Requests) -> np.ndarray:
    """Session number of each request, from block ids: request i continues the last j < i such that all of j's full blocks
    head i's prompt and i is at least as long as j's prompt and answer.

    A block that four or more different full blocks follow is where users part (a system prompt or a document), and the
    last full block of j must lie beyond it. On Mooncake's conversation trace the tokens that a turn so found adds to
    the last prompt and answer are 38 in the median: a user's next line.
    """
    blocks, full = _blocks(requests), full_blocks(requests)
    order = np.argsort(requests.arrival, kind="stable")
    parting = _parting(blocks, full)
    ends: dict[int, int] = {}  # last full block -> latest request that ends with it
    need = requests.input + requests.output
    session = np.full(len(requests), -1)
    following = 0
    for i in order:
        ids = blocks.of(i)[: full[i]].tolist()
        for block in reversed(ids):
            if block in parting:
                break
            j = ends.get(block)
            if j is not None and requests.input[i] >= need[j]:
                session[i] = session[j]
                del ends[block]  # continued once: a retry is a conversation of its own
                break
        if session[i] < 0:
            session[i] = following
            following += 1
        if ids:
            ends[ids[-1]] = int(i)
    return session


def _parting(blocks: Blocks, full: np.ndarray) -> set[int]:
    """Blocks that `_FORKS` or more different full blocks follow."""
    steps = np.maximum(full - 1, 0)  # from each full block to the next
    place = np.repeat(blocks.start[:-1] - np.cumsum(steps) + steps, steps) + np.arange(steps.sum())
    pairs = np.unique(np.stack([blocks.ids[place], blocks.ids[place + 1]]), axis=1)
    block, followers = np.unique(pairs[0], return_counts=True)
    return set(block[followers >= _FORKS].tolist())


def previous_turn(requests: Requests) -> np.ndarray:
    """Index of the request before in the same session, -1 for the first and for requests of no session."""
    if requests.session is None:
        return np.full(len(requests), -1)
    order = np.lexsort((np.arange(len(requests)), requests.arrival, requests.session))
    same = (requests.session[order][1:] == requests.session[order][:-1]) & (requests.session[order][1:] >= 0)
    before = np.full(len(requests), -1)
    before[order[1:][same]] = order[:-1][same]
    return before


def popular(requests: Requests) -> np.ndarray:
    """Ids of the blocks common to many users, sorted: those that at least 3 sessions and 0.1 % of all sessions hold.

    A request of no session counts as its own. What is popular is a system prompt or a document that further users of
    the same service would send too; every other block is a user's own text.
    """
    blocks = _blocks(requests)
    lengths = np.diff(blocks.start)
    session = np.arange(len(requests)) + 2**40
    if requests.session is not None:
        session = np.where(requests.session >= 0, requests.session, session)
    pairs = np.unique(np.stack([blocks.ids, np.repeat(session, lengths)]), axis=1)
    ids, holders = np.unique(pairs[0], return_counts=True)
    least = max(_POPULAR_SESSIONS, _POPULAR_SHARE * np.unique(session).size)
    return np.asarray(ids[holders >= least])


def copies_apart(parts: list[Requests], shared: np.ndarray | None = None) -> list[Requests]:
    """Copies of one set of requests as other users' requests: sessions and blocks get numbers of their own in each copy,
    except the blocks in `shared` (default: `popular` of the first), which all copies share."""
    first = parts[0]
    if shared is None:
        shared = popular(first) if first.blocks is not None and len(parts) > 1 else np.zeros(0, int)
    step_block = max((int(p.blocks.ids.max(initial=0)) + 1 for p in parts if p.blocks is not None), default=0)
    step_session = max((int(p.session.max(initial=0)) + 1 for p in parts if p.session is not None), default=0)
    return [_renumbered(part, n * step_block, n * step_session, shared) for n, part in enumerate(parts)]


def _renumbered(requests: Requests, block: int, session: int, shared: np.ndarray) -> Requests:
    blocks, sessions = requests.blocks, requests.session
    if blocks is not None and block:
        blocks = replace(blocks, ids=np.where(np.isin(blocks.ids, shared), blocks.ids, blocks.ids + block))
    if sessions is not None and session:
        sessions = np.where(sessions >= 0, sessions + session, -1)
    return replace(requests, blocks=blocks, session=sessions)
