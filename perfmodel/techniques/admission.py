"""Room for keys and values: what a sequence reserves beyond what it has, and what happens when it runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import model_validator

from perfmodel.ops.cached import Site
from perfmodel.symbols import Num, ceil, log, maximum
from perfmodel.techniques.base import Draft, Quality, Round, Technique, knob


class KvAllocation(Technique):
    """Tokens a sequence of T tokens has room for; attention still reads T.

    used: T. max: the longest sequence, reserved whole (FasterTransformer, Orca). doubled: the next power of two. block:
    ceil(T / b) b (PagedAttention, arXiv:2309.06180). page: like block with b = page bytes over the bytes one token has in
    one tensor (keys or values) of a layer: physical pages behind contiguous addresses (vAttention, arXiv:2405.04437).
    predicted: T times an overshoot, in buckets (S3, arXiv:2306.06000). Sequences admitted too boldly are evicted: a share
    `evicted` of them once before its `output` tokens are out, its context being computed again (Past-Future,
    arXiv:2507.10150): B evicted / output prefills a step.
    """

    kind: ClassVar[str] = "kv-allocation"
    reference: ClassVar[str] = "arXiv:2309.06180"
    quality: ClassVar[Quality] = "exact"

    reserve: Literal["used", "max", "doubled", "block", "page", "predicted"] = knob("used", "rule")
    longest: int = knob(0, "tokens of the longest sequence, for max", "token", low=0, high=100_000_000)
    block: int = knob(16, "tokens of a block, for block and predicted", "token", low=1, high=1_000_000)
    page: float = knob(2097152.0, "bytes of a physical page, for page", "byte", low=1, high=1e10)
    overshoot: float = knob(1.0, "predicted over actual tokens", low=1, high=100)
    evicted: float = knob(0.0, "evictions per sequence before it ends", low=0, high=100)
    output: int = knob(0, "output tokens of a sequence", "token", low=0, high=10_000_000)

    @model_validator(mode="after")
    def _consistent(self) -> KvAllocation:
        if self.reserve == "max" and not self.longest:
            raise ValueError("reserve=max needs the tokens it reserves: give longest")
        if self.evicted and not self.output:
            raise ValueError("evictions are spread over the output: give output")
        return self

    def allocated(self, tokens: Num, site: Site) -> Num:
        match self.reserve:
            case "max":
                return maximum(tokens, self.longest)
            case "doubled":
                return 2.0 ** ceil(log(maximum(tokens, 1)) / log(2.0) - 1e-12)
            case "block":
                return ceil(tokens / self.block) * self.block
            case "page":
                tensors = 2 if site.mixer.kind == "attention" else 1
                each = self.page / (site.kv_elements / tensors * site.width)
                return ceil(tokens / each) * each
            case "predicted":
                return ceil(self.overshoot * tokens / self.block) * self.block
            case "used":
                return tokens

    def round(self, round_: Round, batch: Num) -> Round:
        if not self.evicted:
            return round_
        again = Draft("", batch * self.evicted / self.output, techniques=None, prompt=True, per_token=True)
        return replace(round_, before=(*round_.before, again))
