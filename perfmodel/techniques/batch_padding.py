"""Static batches of ragged lengths: every sequence is as long as the longest."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Group
from perfmodel.symbols import Num
from perfmodel.techniques.base import Request, Round, Technique, knob


class BatchPadding(Technique):
    """Prompts are padded to the longest of their batch, and a batch steps on until its longest answer ends.

    Tokens computed, cached and attended = `prompt` (longest over mean) x tokens asked for; seconds per wanted token =
    `output` (longest answer over mean) x seconds of a step. Iteration-level scheduling (Orca, OSDI 2022, 3.1) removes the
    second, kernels for ragged batches the first.
    """

    kind: ClassVar[str] = "batch-padding"
    reference: ClassVar[str] = "Orca, OSDI 2022, 3.1"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 1

    prompt: float = knob(1.0, "longest prompt of a batch over the mean", low=1, high=1000)
    output: float = knob(1.0, "longest answer of a batch over the mean", low=1, high=1000)

    def request(self, request: Request) -> Request:
        return replace(request, new=request.new * self.prompt)

    def shortened(self, group: Group) -> Group:
        return replace(group, c=group.c * self.prompt)

    def allocated(self, tokens: Num, site: Site) -> Num:
        return tokens * self.prompt

    def round(self, round_: Round, batch: Num) -> Round:
        return replace(round_, tokens=round_.tokens / self.output)
