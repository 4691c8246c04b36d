"""The two settings of a paper that `explain --paper` sets side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from perfmodel.errors import PerfmodelError, SpecError
from perfmodel.papers.replayed import Replayed
from perfmodel.papers.run import Runner
from perfmodel.papers.setting import Resolved, compared, merged
from perfmodel.spec.paper import Paper

_SAME = ("model", "hardware")
_STACK = ("system", "weight_dtype", "kv_dtype")
_DEGREES = ("tp", "pp", "dp", "ep", "cp")
_WORK = ("input", "output", "steps", *_DEGREES)


@dataclass(frozen=True)
class Side:
    """One of the two settings that a paper compares."""

    name: str
    setting: Resolved
    batch: float
    input: float
    output: float

    @property
    def steps(self) -> float:
        """Denoising steps; 0: prompts and decode steps."""
        return float(self.setting.values["steps"])


def pair(paper: Paper) -> tuple[Side, Side]:
    """Baseline and proposal: the settings of the first claim that names two, else two of one model on one machine.

    The one with more techniques is the proposal, else the later one in the file. Raises SpecError where no two can be set
    side by side.
    """
    runner, alike = Runner(paper), False
    for names in _candidates(paper):
        try:
            first, second = (_side(runner, name) for name in names)
        except PerfmodelError:
            continue
        if _way(first) != _way(second):
            return (first, second) if len(first.setting.techniques) <= len(second.setting.techniques) else (second, first)
        alike = True
    why = (
        "its settings differ in queues, limits or mixes of requests alone, so a prompt and a step take the same"
        if alike
        else "it compares no two settings of one model on a machine"
    )
    raise SpecError(f"{paper.id}: {why}; see `perfmodel papers show {paper.id}` and `perfmodel papers run {paper.id}`")


def _way(side: Side) -> tuple[object, ...]:
    """All that the time of a prompt or of a step depends on; settings may differ in limits, rates and mixes alone."""
    s = side.setting
    work = (side.batch, side.input, side.output, *(s.values[k] for k in (*_DEGREES, "prefix", "steps")))
    return s.engine, s.techniques, s.formats, s.batching, *work


def _side(runner: Runner, name: str) -> Side:
    measured = runner.setting(name, runner.given, Replayed)
    if measured.setting.roles or not measured.setting.model:
        raise SpecError(f"{name} has pools of its own, or no model")
    return Side(name, measured.setting, measured.batch, measured.input, measured.output)


def _candidates(paper: Paper) -> Iterator[tuple[str, str]]:
    """Pairs of settings, the likeliest first: of a claim that names two; a setting and the same with more techniques; two
    that do the same work; any two of one model on one machine."""
    named = compared(paper)
    yield from ((a, b) for a, b in (n for n in named if len(n) == 2))
    for more, fields in ((True, (*_SAME, *_WORK, *_STACK)), (False, (*_SAME, *_WORK)), (False, _SAME)):
        for names in (*named, list(paper.settings)):
            for a, b in itertools.combinations(names, 2):
                one, other = merged(paper, a), merged(paper, b)
                before, after = one.get("techniques", ()), other.get("techniques", ())
                adds = before != after and all(x in after for x in before)
                changed = adds if more else before != after or any(one.get(f) != other.get(f) for f in _STACK)
                if changed and all(one.get(f) == other.get(f) for f in fields):
                    yield a, b
