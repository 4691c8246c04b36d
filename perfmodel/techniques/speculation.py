"""Speculative decoding: several tokens per pass of the model, drafted by something cheaper and verified together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from perfmodel import catalog
from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency
from perfmodel.schedule import Node, Seq, operators
from perfmodel.spec.model import Model
from perfmodel.symbols import Num
from perfmodel.techniques.base import Companion, Draft, Quality, Request, Round, Technique, knob
from perfmodel.techniques.layer_skip import LayerSkip

_VOCABULARY = 0.05  # padding of embedding tables makes equal vocabularies differ by a few rows


def chain_tokens(acceptance: float, length: int) -> float:
    """Tokens emitted per verification of a chain of `length` drafted tokens, the model's own included.

    (1 - a^(k+1)) / (1 - a), each drafted token being accepted with probability a given the ones before it
    (Leviathan et al., arXiv:2211.17192, equation 1).

    >>> chain_tokens(0.8, 4)
    3.3616
    """
    return float(round(sum(acceptance**i for i in range(length + 1)), 12))


def tree_tokens(acceptance: float, branches: tuple[int, ...]) -> float:
    """Tokens emitted per verification of a tree whose nodes at depth i have `branches[i]` children.

    1 + sum over depths d of prod for i <= d of (1 - (1 - a)^b_i): a level goes on if any of b independent candidates is
    accepted (SpecInfer, arXiv:2305.09781).

    >>> tree_tokens(0.5, (2, 1))
    2.125
    """
    reached, total = 1.0, 1.0
    for b in branches:
        reached *= 1 - (1 - acceptance) ** b
        total += reached
    return total


def nested(text: Any) -> Any:
    """Techniques of a draft as text: several joined by `+`, their parameters by `/`."""
    if isinstance(text, str):
        return tuple(part.strip().replace("/", ",") for part in text.split("+") if part.strip())
    return text


def built(texts: tuple[str, ...]) -> tuple[Technique, ...]:
    """Techniques from text. The registry imports this module, so it is asked late."""
    from perfmodel.techniques.registry import techniques

    return techniques(texts)


def edited_model(name: str, model: Model, parts: tuple[Technique, ...]) -> Model:
    """A draft's architecture: of the catalogue or the model's own, as its techniques leave it."""
    found = catalog.load_model(name) if name else model
    for part in parts:
        found = part.of_model(found)
    return found


def check_draft(kind: str, name: str, model: Model) -> None:
    """Raise SpecError for a draft with another vocabulary."""
    if name:
        other = catalog.load_model(name)
        if abs(other.vocab - model.vocab) > _VOCABULARY * model.vocab:
            raise SpecError(
                f"{kind}: the draft {other.name} has {other.vocab} tokens in its vocabulary and {model.name} has "
                f"{model.vocab}; a draft must speak the model's tokens"
            )


class Speculation(Technique):
    """A draft proposes `length` tokens (or a tree), one pass of the model over all of them and one more verifies.

    Round = drafting + pass of k + 1 tokens per sequence; it emits (1 - a^(k+1)) / (1 - a) tokens (chain_tokens), or those
    of a tree (tree_tokens), or `tokens` where measured. Drafted by another model (`draft`), by the model itself with
    other techniques (`draft_with`: skipped layers, sparse or narrow caches), by heads on the model's last state (`by: heads`;
    EAGLE, arXiv:2401.15077 and MTP, arXiv:2412.19437: one layer each, in turn; Medusa, arXiv:2401.10774:
    `head_layers: 0`, all at once) or from the text (`by: lookup`: no cost). `adaptive`: the length from 0 to `length`
    with most tokens per second at the batch and context (SmartSpec, arXiv:2406.14066). `in_flight`: verifications of k tokens
    follow each other through a pipeline (PipeInfer, arXiv:2407.11798), each from what the one before it drafted last. A
    rejection, 1 - a^k of them, voids those behind it and starts a plain run of one token, which another verification follows
    with probability a: of all runs b = (1 - a^k) / (a + 1 - a^k) are plain, and a run emits (1 - b) (1 - a^k) / (1 - a) + b.
    """

    kind: ClassVar[str] = "speculation"
    reference: ClassVar[str] = "arXiv:2211.17192"
    by_layer: ClassVar[bool] = False
    quality: ClassVar[Quality] = "exact"
    excludes: ClassVar[dict[str, str]] = {"hierarchical-speculation": "a round has one way of drafting"}

    draft: str = knob("", "drafting model by catalogue name; empty: the model itself")
    by: Literal["model", "lookup", "heads"] = knob("model", "what drafts")
    length: int = knob(4, "drafted tokens in a chain; of a tree, its depth follows from `tree`", "token", low=0, high=64)
    acceptance: float = knob(0.8, "probability that a drafted token is accepted, given those before it", low=0, high=1)
    tokens: float | None = knob(None, "emitted tokens per round where measured; none: by the law", "token", low=1, high=64)
    tree: str = knob("", "children of a node at every depth, as in 4x2x1; empty: a chain")
    draft_with: tuple[str, ...] = knob((), "techniques of the draft; in text joined by + and their parameters by /")
    draft_tp: int = knob(0, "tensor-parallel degree of the draft; 0: cut as the model is", low=0, high=64)
    copied: int = knob(0, "most tokens of a sequence that self-drafting caches a second time", "token", low=0, high=10_000_000)
    head_layers: int = knob(1, "layers of the drafting head; 0: one matrix and an output matrix per drafted token", "layer",
                            low=0, high=8)  # fmt: skip
    adaptive: bool = knob(False, "the length is chosen by batch and context")
    aside: bool = knob(False, "the draft runs beside the model, on devices of its own")
    in_flight: int = knob(1, "verifications that follow each other through the pipeline", low=1, high=64)
    cancelled: float = knob(1.0, "share of a void verification's stage time that cancelling it saves", low=0, high=1)

    _nested = field_validator("draft_with", mode="before")(nested)

    @model_validator(mode="after")
    def _consistent(self) -> Speculation:
        if self.tree and not all(part.isdigit() and int(part) > 0 for part in self.tree.split("x")):
            raise ValueError("tree must be numbers of children joined by x, as in 4x2x1")
        if self.tokens is not None and self.tokens > self._nodes(self._branches()) + 1:
            raise ValueError(f"tokens cannot exceed the {self._depth() + 1} that a round can emit")
        if self.tokens is not None and self.adaptive:
            raise ValueError("tokens holds for one length; with adaptive give the acceptance")
        if self.by != "model" and (self.draft or self.draft_with):
            raise ValueError(f"with by: {self.by} there is no drafting model, so draft and draft_with say nothing")
        return self

    def _branches(self) -> tuple[int, ...]:
        return tuple(int(b) for b in self.tree.split("x")) if self.tree else (1,) * self.length

    def _depth(self) -> int:
        return len(self._branches())

    @staticmethod
    def _levels(branches: tuple[int, ...]) -> list[int]:
        return [math.prod(branches[: i + 1]) for i in range(len(branches))]

    def _nodes(self, branches: tuple[int, ...]) -> int:
        return sum(self._levels(branches))

    def round(self, round_: Round, batch: Num) -> Round:
        branches = self._branches()
        lengths = range(len(branches) + 1) if self.adaptive else [len(branches)]
        first, *others = [self._of(round_, branches[:n]) for n in reversed(lengths)]
        return replace(first, instead=(*round_.instead, *others))

    def _of(self, r: Round, branches: tuple[int, ...]) -> Round:
        if not branches:
            return r
        found = replace(r, before=(*r.before, *self._drafts(branches)), in_flight=self.in_flight)
        emitted = tree_tokens(self.acceptance, branches)
        if self.in_flight == 1:
            return replace(found, new=r.new + self._nodes(branches), tokens=r.tokens * (self.tokens or emitted))
        levels = [1 - (1 - self.acceptance) ** b for b in branches]
        kept = math.prod(levels)
        plain = (1 - kept) / (levels[0] + 1 - kept)
        # What follows a run that is kept whole is drafted already: it emits no token of its own.
        mean, new = self.tokens or (1 - plain) * (emitted - kept) + plain, r.new + self._nodes(branches) - 1
        return replace(found, new=new, tokens=r.tokens * mean, broken=plain, stuck=1 - self.cancelled)

    def _drafts(self, branches: tuple[int, ...]) -> list[Draft]:
        """Passes of the draft: every level of the tree from the one above it."""
        if self.by == "lookup" or (self.by == "heads" and not self.head_layers):
            return []
        parts = (f"layer-skip:layers={self.head_layers}",) if self.by == "heads" else self.draft_with
        widths = [1, *self._levels(branches)[:-1]]
        return [
            Draft(self.draft, widths.count(w), w, parts, self.draft_tp, aside=self.aside) for w in sorted(set(widths))
        ]

    def request(self, request: Request) -> Request:
        """The draft must have read the prompt too."""
        if self.by != "model" or not self.draft:
            return request
        read = Draft(self.draft, 1, 1, self.draft_with, self.draft_tp, aside=self.aside, prompt=True)
        return replace(request, before=(*request.before, read))

    def companions(self, model: Model) -> tuple[Companion, ...]:
        if self.aside or self.by == "lookup":
            return ()
        if self.by == "heads":
            one = LayerSkip(layers=self.head_layers).of_model(model) if self.head_layers else model
            return (Companion(one, weights="layers"),) if self.head_layers else ()
        parts = built(self.draft_with)
        if self.draft:
            return (Companion(edited_model(self.draft, model, parts), parts),)
        return (Companion(model, (), "none", self.copied),) if self.copied else ()

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        """Heads of one matrix and an output matrix per drafted token, cut like the model's head."""
        if self.by != "heads" or self.head_layers:
            return stored
        head = next((r for r in stored if r.name in ("head", "embedding")), None)
        width = head.width if head else 2
        mine = self._depth() * (model.hidden**2 + model.hidden * model.vocab) / par.tp
        return [*stored, Residency("weights", "draft_heads", mine, width)]

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        if self.by != "heads" or self.head_layers:
            return items
        rows = sum((g.n for g in shard.groups if g.decode), start=0.0)
        heads = [op for item in items for op, _, _ in operators(item) if op.name == "lm_head"]
        if not heads or (isinstance(rows, float) and rows == 0):
            return items
        return [*items, Seq(tuple(x for i in range(self._depth()) for x in self._head(i, rows, heads[0], shard)), "draft_heads")]

    def _head(self, i: int, rows: Num, head: Op, shard: Shard) -> list[Op]:
        """A residual block of one matrix and an output matrix over the last state of every sequence."""
        f, h, tp = shard.formats, shard.hidden, shard.par.tp
        common: dict[str, Any] = {"weight": f.stored("head"), "act": f.act, "dtype": f.compute("head")}
        block = gemm(f"draft_head_{i}", rows, h / tp, h, **common)
        return [*block, *gemm(f"draft_output_{i}", rows, head.shape["n"], head.shape["k"], **common)]

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        check_draft(self.kind, self.draft, model)
        if self.by == "model" and not self.draft and not self.draft_with:
            raise SpecError(
                "speculation: the model cannot draft for itself unchanged; name a draft (draft=llama-3.2-1b), say what it "
                "drafts with (draft_with=layer-skip:share=0.5), or by=lookup or by=heads"
            )
        if self.in_flight > 1 and par.pp < 2:
            raise SpecError("speculation: in_flight needs a pipeline to follow each other through; give --pp 2 or more")


class HierarchicalSpeculation(Technique):
    """Two levels: a small draft speeds up the model on a sparse cache, and that drafts for the model on its full cache.

    The middle level emits e1 = (1 - a1^(k1+1)) / (1 - a1) tokens per pass over k1 + 1; k2 / e1 such passes, each after k1
    passes of the small draft, gather k2 tokens; the full pass over k2 + 1 emits (1 - a2^(k2+1)) / (1 - a2)
    (TriForce, arXiv:2404.11912). Seconds per round: k2 / e1 (k1 t_draft + t_sparse(k1 + 1)) + t_full(k2 + 1).
    """

    kind: ClassVar[str] = "hierarchical-speculation"
    reference: ClassVar[str] = "arXiv:2404.11912"
    by_layer: ClassVar[bool] = False
    quality: ClassVar[Quality] = "exact"

    draft: str = knob("", "drafting model of the first level; empty: the middle level drafts alone")
    draft_length: int = knob(2, "tokens drafted at the first level", "token", low=0, high=64)
    draft_acceptance: float = knob(0.8, "acceptance by the middle level", low=0, high=1)
    draft_with: tuple[str, ...] = knob((), "techniques of the first level")
    length: int = knob(6, "tokens drafted by the middle level", "token", low=1, high=256)
    acceptance: float = knob(0.9, "acceptance by the full model", low=0, high=1)
    middle_with: tuple[str, ...] = knob((), "techniques of the middle level, as a sparse cache")
    copied: int = knob(0, "most tokens of a sequence in the middle level's own cache", "token", low=0, high=10_000_000)

    _nested = field_validator("draft_with", "middle_with", mode="before")(nested)

    def round(self, round_: Round, batch: Num) -> Round:
        small = self.draft_length if self.draft else 0
        passes = self.length / chain_tokens(self.draft_acceptance, small)
        drafts = [Draft("", passes, small + 1, self.middle_with)]
        if small:
            drafts.append(Draft(self.draft, passes * small, 1, self.draft_with))
        return replace(
            round_, new=round_.new + self.length, tokens=round_.tokens * chain_tokens(self.acceptance, self.length),
            before=(*round_.before, *drafts),
        )  # fmt: skip

    def request(self, request: Request) -> Request:
        if not self.draft:
            return request
        return replace(request, before=(*request.before, Draft(self.draft, 1, 1, self.draft_with, prompt=True)))

    def companions(self, model: Model) -> tuple[Companion, ...]:
        found = [Companion(model, (), "none", self.copied)] if self.copied else []
        if self.draft:
            parts = built(self.draft_with)
            found.append(Companion(edited_model(self.draft, model, parts), parts))
        return tuple(found)

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        check_draft(self.kind, self.draft, model)
        if not self.middle_with:
            raise SpecError("hierarchical-speculation: name the middle level's cache: middle_with=kv-eviction:budget=4096")
