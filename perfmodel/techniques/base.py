"""What a technique is: validated parameters, and edits of the records a forward pass is made of.

A technique never scales a time. It edits, in this order, the model's architecture, the formats, the segments of the
cache, the operators of a layer or of the pass, what is stored where, the machine, and the passes of one decode round.
Those that touch different records commute; those that cannot stand together say why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import Field, model_validator

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Formats, Group, Load, Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency
from perfmodel.schedule import Node
from perfmodel.spec.base import Spec
from perfmodel.spec.calibration import Engine
from perfmodel.spec.model import Attention, Block, LatentAttention, Model
from perfmodel.symbols import Num

Quality = Literal["exact", "lossy"]


def knob(default: Any, meaning: str, unit: str = "1", *, low: float | None = None, high: float | None = None) -> Any:
    """A parameter with its meaning, unit and range."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, ge=low, le=high)


def limits(field: Any) -> str:
    """Range of a numeric parameter, as ``0.5 to 16``; empty where it has none."""
    low = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    high = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    if low is None:
        return ""
    return f"{low:g} to {high:g}" if high is not None else f"from {low:g}"


def words(kind: Any) -> list[str]:
    """Words that a parameter of this type may be."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in words(part)] if get_origin(kind) in (Union, UnionType) else []


@dataclass(frozen=True)
class Request:
    """Tokens of one request on their way into the model."""

    new: Num
    """Prompt tokens to be computed."""
    cached: Num = 0.0
    """Prompt tokens whose keys and values are at hand."""
    loads: tuple[Load, ...] = ()
    """Of those, tokens that a farther tier holds and that must be fetched."""
    before: tuple[Draft, ...] = ()
    """Passes of other models over the prompt before it (a draft's prefill, a compressor)."""
    wait: Num = 0.0
    """Seconds before the pass can begin: look-ups, retrieval, a place in the queue lost."""
    answered: Num = 0.0
    """Share of requests that are answered without the model."""
    instead: tuple[Request, ...] = ()
    """Other ways to the same end: the fastest is taken."""


@dataclass(frozen=True)
class Round:
    """What one decode round runs and emits: a plain step is one pass of the model over one new token."""

    new: Num = 1
    """Tokens per sequence that the model's own pass takes (a verification takes the draft and one more)."""
    tokens: Num = 1.0
    """Tokens emitted per sequence."""
    before: tuple[Draft, ...] = ()
    """Passes of drafts before it."""
    in_flight: Num = 1
    """Passes that follow each other through the pipeline without waiting for a result."""
    broken: Num = 0.0
    """Share of the passes in flight that are plain ones of one token, before which the pipeline ran empty."""
    stuck: Num = 0.0
    """Share of a void pass that still holds the first stage."""
    instead: tuple[Round, ...] = ()
    """Other rounds to choose from: the one with most tokens per second is run."""


@dataclass(frozen=True)
class Draft:
    """`times` passes over `new` tokens of each sequence by a drafting model, or by the model itself."""

    model: str
    """Catalogue name; empty: the model itself."""
    times: Num
    new: Num = 1
    techniques: tuple[str, ...] | None = ()
    """What it runs with, as text; none: the run's own techniques."""
    tp: int = 0
    """Its tensor-parallel degree, without pipeline; 0: cut as the model is."""
    aside: bool = False
    """Runs beside the passes of the model, on devices of its own."""
    prompt: bool = False
    """Before a prompt: it reads what the model reads. In a round: each pass prefills the context of one sequence."""
    per_token: bool = False
    """`times` are for every token that the round emits."""


@dataclass(frozen=True)
class Companion:
    """A model that is stored beside the model on the same devices, cut alike: a draft, a reward model."""

    model: Model
    techniques: tuple[Technique, ...] = ()
    weights: Literal["all", "layers", "none"] = "all"
    """What it has of its own; layers: the embedding and the head are the model's."""
    tokens: Num = math.inf
    """Most tokens of each sequence in its cache."""


@dataclass(frozen=True)
class Pass:
    """`times` passes of a denoiser over `new` tokens of each sequence, which attend `cached` others as well."""

    times: Num
    new: Num
    cached: Num = 0.0
    layers: float = 1.0
    """Share of the layers that run."""
    only: tuple[tuple[str, float], ...] = ()
    """Kinds of layers that run, each with the share of its layers that does; empty: every kind, whole."""
    ops: tuple[Op, ...] = ()
    """Operators beside the model's."""


@dataclass(frozen=True)
class Denoising:
    """Passes of one generation by denoising, and what they keep from one step to the next."""

    passes: tuple[Pass, ...]
    stored: tuple[Residency, ...] = ()


class Technique(Spec):
    """One kind of change with its parameters. A subclass sets `kind` and overrides the edits it makes."""

    kind: ClassVar[str]
    reference: ClassVar[str]
    """Where the equation is from."""
    quality: ClassVar[Quality] = "lossy"
    """exact: the model's answers stay what they are."""
    order: ClassVar[float] = 0
    """Place among the techniques of a run, however they were given: paths (-1), which layers there are (-0.5), what a layer
    computes (0), where weights lie (0.1), adapters (0.2), what is skipped (0.3), how weights are unpacked (0.4), where the
    cache lies (0.5), products elsewhere (0.6), and those that arrange what others leave (1 and later)."""
    excludes: ClassVar[dict[str, str]] = {}
    """Kinds it cannot stand beside, and why."""
    repeats: ClassVar[bool] = False
    """Whether several of its kind can stand beside each other, with parameters of their own."""
    cache_turn: ClassVar[int] = 2
    """When it edits cache and layer: -3 which tokens are shared, -2 which of a prompt go on,
    -1 which heads keep all, 0 which tokens are stored, 1 which are read and in what form,
    2 how wide and where."""

    spare_layers: int = knob(0, "first layers that stay as they were", "layer", low=0, high=1000)

    by_layer: ClassVar[bool] = True
    """False: it edits requests, rounds or whole passes, so that no layer can be spared."""

    @model_validator(mode="after")
    def _spares_what_it_can(self) -> Technique:
        if self.spare_layers and not self.by_layer:
            raise ValueError(f"spare_layers means nothing to {self.kind}: it changes no single layer")
        return self

    def spared_layers(self, count: Num) -> int:
        """How many of `count` layers of a kind keep their old form."""
        return min(self.spare_layers, int(count))

    def clash(self, other: Technique) -> str:
        """Why it cannot stand beside another; empty: it can."""
        once = "" if self.repeats or other.kind != self.kind else "give the parameters of both to one"
        return self.excludes.get(other.kind, once)

    def effects(self) -> Quality:
        """Quality at these parameters."""
        return self.quality

    def of_model(self, model: Model) -> Model:
        """Architecture: heads, layers, shared caches."""
        return model

    def formats(self, formats: Formats, machine: Machine) -> Formats:
        """Widths and arithmetic of weights and activations."""
        return formats

    def cache(self, cache: Cache, site: Site) -> Cache:
        """Segments of the keys and values of one layer and sequence."""
        return cache

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        """Operators of one layer."""
        return ops

    def shortened(self, group: Group) -> Group:
        """New and cached tokens in the layers it applies to."""
        return group

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        """Order and overlap inside one layer: `build` makes it for this shard, or for parts of its batch."""
        return build(shard)

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        """Embedding, groups of layers, head: the parts of a pass."""
        return items

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        """Weights and what else is stored, by tier."""
        return stored

    def allocated(self, tokens: Num, site: Site) -> Num:
        """Tokens that one layer has room for where a sequence has `tokens`."""
        return tokens

    def held(self, sequences: Num) -> Num:
        """Sequences whose caches are kept while `sequences` run."""
        return sequences

    def companions(self, model: Model) -> tuple[Companion, ...]:
        """Models that are stored beside the model."""
        return ()

    def machine(self, machine: Machine) -> Machine:
        """Clocks, paths and places that compute."""
        return machine

    def engine(self, engine: Engine) -> Engine:
        """Launch mode, host times and limits of the serving engine."""
        return engine

    def request(self, request: Request) -> Request:
        """Prompt tokens that must be computed."""
        return request

    def round(self, round_: Round, batch: Num) -> Round:
        """Passes and emitted tokens of a decode round."""
        return round_

    def bound(self, model: Model, machine: Machine, par: Parallelism) -> Technique:
        """Itself with the parameters that follow from model and machine (a balanced split of work between two places)."""
        return self

    def denoise(
        self, denoising: Denoising, batch: Num, model: Model, formats: Formats, par: Parallelism
    ) -> Denoising:
        """Steps of a diffusion model over `batch` sequences."""
        return denoising

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        """Raise SpecError where this model or machine cannot be changed so."""


def requests(techniques: tuple[Technique, ...], request: Request) -> tuple[Request, ...]:
    """Every way in which techniques let a request be prefilled. Raises SpecError for those that change denoisers only."""
    _prompted(techniques)
    ways: tuple[Request, ...] = (request,)
    for technique in techniques:
        edited = [technique.request(way) for way in ways]
        ways = tuple(way for r in edited for way in (replace(r, instead=()), *r.instead))
    return ways


def rounds(techniques: tuple[Technique, ...], batch: Num) -> tuple[Round, ...]:
    """Every way in which techniques let a batch be decoded. Raises SpecError for those that change denoisers only."""
    _prompted(techniques)
    ways: tuple[Round, ...] = (Round(),)
    for technique in techniques:
        edited = [technique.round(way, batch) for way in ways]
        ways = tuple(way for r in edited for way in (replace(r, instead=()), *r.instead))
    return ways


def finding(techniques: tuple[Technique, ...]) -> str:
    """The kind that says which tokens of a prompt are found in a cache of earlier ones; empty: none does."""
    prompt = Request(1e6)
    return next((t.kind for t in techniques if t.request(prompt).cached > 0), "")


def beforehand(techniques: tuple[Technique, ...]) -> str:
    """The kind that finds, delays or answers requests before the model sees them, which queues must follow one by one."""
    prompt = Request(1e6)
    met = ((t.kind, t.request(prompt)) for t in techniques)
    return next((kind for kind, r in met if float(r.cached) > 0 or float(r.wait) > 0 or float(r.answered) > 0), "")


def require_cache(kind: str, model: Model) -> None:
    """Raise SpecError for a model whose layers cache no keys and values (or latents)."""
    if not any(isinstance(b.mixer, (Attention, LatentAttention)) for b in model.blocks.values()):
        raise SpecError(f"{kind}: {model.name} caches no keys and values")


def _prompted(techniques: tuple[Technique, ...]) -> None:
    for technique in techniques:
        if type(technique).denoise is not Technique.denoise:
            raise SpecError(f"{technique.kind} changes the steps of a denoiser; prompts and decode steps have none")


def edit_ops(ops: list[Op], wanted: Any, edit: Any) -> list[Op]:
    """The operators with those that `wanted` accepts edited."""
    return [edit(op) if wanted(op) else op for op in ops]
