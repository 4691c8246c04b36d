"""Running sequences that move to another instance with their caches, where memory runs short (Llumnix, arXiv:2406.03243)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfmodel.serving.replay.instance import Instance


@dataclass(frozen=True)
class Migration:
    """When running sequences move to another instance with their caches."""

    period: float
    """Seconds between looks at all instances."""
    threshold: float
    """Free tokens per running sequence, less what the first in line asks for, below which an instance gives a sequence away and
    above which one takes it; the fullest gives to the emptiest."""
    halt: float = 0.025
    """Seconds without a token: the rest of a cache is copied beside decoding (20 to 30 ms, section 6.2)."""


def freeness(x: Instance) -> float:
    """Tokens of free memory, less what the first in line asks for, per sequence that runs, with that one; infinite without any
    (algorithm 1; instance_info.py of the authors' artifact)."""
    kv, sequences = x.kv, x.slots
    free = kv.capacity - kv.held
    if x.waiting and not x.waiting[0].begun:
        free -= kv.of(x.waiting[0].prompt + 1)
        sequences += 1
    return free * kv.block / sequences if sequences else math.inf


def room(x: Instance) -> float:
    """Tokens of free memory, less what all that wait ask for, per request inside: what dispatching compares."""
    if not x.resident:
        return math.inf
    kv = x.kv
    free = kv.capacity - kv.held
    for item in x.waiting:
        if not item.begun:
            free -= kv.of(item.prompt + 1)
    return free * kv.block / x.resident


def look(instances: Sequence[Instance], migration: Migration, time: float) -> list[Instance]:
    """Instances short of memory are offered to give a sequence to those that have most, the first to the last and so on.

    Returns those whose next turn comes earlier than announced.
    """
    free = [freeness(x) for x in instances]
    sooner: list[Instance] = []
    if min(free) >= migration.threshold:
        return sooner
    found = sorted(zip(free, range(len(free)), strict=True))
    for (needs, source), (has, target) in zip(found, reversed(found), strict=True):
        if not needs < migration.threshold < has:
            break
        instances[source].offers.append(instances[target])
        if instances[source].interrupt(time, full=True):
            sooner.append(instances[source])
    return sooner


def give_away(x: Instance) -> None:
    """The shortest sequence that fits goes to each instance that offered to take one; the last stays."""
    offers, x.offers = x.offers, []
    for other in offers:
        free = other.kv.capacity - other.kv.held
        fitting = [d[2] for d in x.decoding if x.kv.of(d[2].offset + x.steps) <= free]
        if len(x.decoding) < 2 or not fitting:
            return
        item = min(fitting, key=lambda item: item.offset)
        item.prompt = x.take_out(item) - 1
        item.done, item.delivered = item.prompt, True
        x.resident -= 1
        x.moving.append((item, other))
