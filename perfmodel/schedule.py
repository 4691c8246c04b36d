"""What runs after what, what overlaps, and how often: a series-parallel tree of operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num


@dataclass(frozen=True, slots=True)
class Seq:
    """Items one after the other."""

    items: tuple[Op | Seq | Par | Repeat, ...]
    name: str = ""


EVERYTHING = ("everything",)


@dataclass(frozen=True, slots=True)
class Par:
    """Branches at the same time: max(longest branch, demand per shared resource / rate) x interference."""

    branches: tuple[Op | Seq | Par | Repeat, ...]
    shared: tuple[str, ...] = ()
    """Resources that branches take in turn; EVERYTHING: all but launches."""
    interference: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Repeat:
    """The same body `times` over, one after the other."""

    body: Op | Seq | Par | Repeat
    times: Num
    name: str = ""


Node = Op | Seq | Par | Repeat


def operators(node: Node, times: Num = 1, where: str = "") -> Iterator[tuple[Op, Num, str]]:
    """Every operator with its multiplicity and the name of the innermost named part it stands in."""
    match node:
        case Op():
            yield node, times, where
        case Repeat():
            yield from operators(node.body, times * node.times, node.name or where)
        case Seq():
            for item in node.items:
                yield from operators(item, times, node.name or where)
        case Par():
            for branch in node.branches:
                yield from operators(branch, times, node.name or where)
