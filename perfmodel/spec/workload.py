"""What arrives, and what latency is promised: the `workload:` section of a plan file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from perfmodel import units
from perfmodel.spec.base import Count, Fraction, Natural, Spec, Time

Label = Literal["tenant", "model", "max_tokens"]
"""Further columns that a router sees on arrival."""


class Columns(Spec):
    """Names of a trace's columns; empty ones are found by the names that public traces use. `where` keeps matching rows."""

    arrival_s: str | None = None
    arrival_ms: str | None = None
    input: str | None = None
    output: str | None = None
    blocks: str | None = None
    """Prompt block ids: a list, or ranges such as ``0;14-27``."""
    session: str | None = None
    think_s: str | None = None
    """Seconds between the answer to the session's previous turn and this request."""
    elapsed_s: str | None = None
    """Seconds from arrival to last token where the trace was taken: what is left of the gap to the next turn is think time."""
    images: str | None = None
    """Images of each request."""
    labels: dict[Label, str] = {}
    where: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_clock(self) -> Columns:
        if self.arrival_s is not None and self.arrival_ms is not None:
            raise ValueError("name either arrival_s or arrival_ms")
        return self


class Trace(Spec):
    """A request trace: CSV or JSON lines (optionally .gz) with arrivals, input and output tokens."""

    file: str
    columns: Columns = Columns()
    block_tokens: Count = 512
    """Prompt tokens one block id stands for."""
    spread_ticks: bool = True
    """Spread requests that share a tick of a coarse clock evenly over it; the report says when that happened."""


class Lengths(Spec):
    """Fixed lengths instead of a trace."""

    input: Count
    output: Count


class Images(Spec):
    """Images in the prompts of a model with a vision tower, all of one size."""

    height: Count
    """Pixels."""
    width: Count
    per_request: Natural | dict[int, float] | None = None
    """How many a request carries: a number, or the share of the requests by number (``{0: 0.6, 1: 0.4}``), drawn independently of
    the lengths. None: what the trace's column says."""
    counted: bool = False
    """Whether the input lengths hold the images' tokens already."""

    @model_validator(mode="after")
    def _shares(self) -> Images:
        said = self.per_request
        if isinstance(said, dict) and (not said or any(n < 0 or share <= 0 for n, share in said.items())):
            raise ValueError("per_request lists numbers of images with positive shares, such as {0: 0.6, 1: 0.4}")
        return self


class Limit(float):
    """Seconds a request may take: its own value plus `per_token` for each of the request's input tokens.

    >>> Limit(1.0, 0.5e-3).at(2000).item()
    2.0
    """

    per_token: float

    def __new__(cls, seconds: float, per_token: float = 0.0) -> Limit:
        self = super().__new__(cls, seconds)
        self.per_token = per_token
        return self

    def at(self, input_tokens: Any) -> np.ndarray:
        """Limit of requests of so many input tokens [s]."""
        return np.asarray(float(self) + self.per_token * np.asarray(input_tokens, float))

    def __str__(self) -> str:
        more = f" + {units.show(self.per_token, 'time')}/token" if self.per_token else ""
        return units.show(float(self), "time") + more


def read_limit(value: Any) -> Limit:
    """A limit as written in a plan file: ``2 s``, or ``1 s + 0.3 ms/token``. Raises ValueError."""
    if isinstance(value, Limit):
        return value
    parts = str(value).split("+")
    slope = 0.0
    if len(parts) == 2 and parts[1].strip().endswith("/token"):
        slope = units.parse(parts[1].strip().removesuffix("/token"), "time")
    elif len(parts) != 1:
        raise ValueError(f"{value!r} is not a limit; write '2 s', or '1 s + 0.3 ms/token' to let it grow with the input")
    seconds = units.parse(parts[0] if len(parts) > 1 else value, "time")
    if seconds < 0 or slope < 0 or seconds + slope <= 0:
        raise ValueError(f"limit {value!r} must be positive")
    return Limit(seconds, slope)


def _percentiles(value: Any) -> Any:
    for key in value if isinstance(value, dict) else ():
        if not (re.fullmatch(r"p\d{1,2}(\.\d+)?", str(key)) and 0 < float(str(key)[1:]) < 100):
            raise ValueError(f"{key!r} is not a percentile; write it like 'p95'")
    return value


if TYPE_CHECKING:
    LimitField: TypeAlias = Limit
else:
    LimitField = Annotated[float, PlainValidator(read_limit), Field(json_schema_extra={"unit": "time"})]
Limits = Annotated[dict[str, LimitField], BeforeValidator(_percentiles)]


class Joint(Spec):
    """A share of requests that meet TTFT and TPOT together; rejected and preempted requests count as misses."""

    share: Fraction = 0.95
    ttft: LimitField | None = None
    tpot: LimitField | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> Joint:
        if self.ttft is None and self.tpot is None:
            raise ValueError("attainment needs a limit for ttft, tpot or both")
        if self.tpot is not None and self.tpot.per_token:
            raise ValueError("a TPOT limit does not depend on the input length")
        return self


class Objectives(Spec):
    """Latency limits by percentile of requests, each to hold in the worst window."""

    ttft: Limits = {}
    """Arrival to first token at the client, queueing included. May grow with the input: ``1 s + 0.3 ms/token``."""
    tpot: Limits = {}
    """(last - first token)/(output - 1) per request, KV hand-off included."""
    itl: Limits = {}
    """Gap between two tokens, over all tokens."""
    longest_gap: Limits = {}
    """A request's longest gap between two tokens, over requests."""
    e2e: Limits = {}
    """Arrival to last token."""
    attainment: Joint | None = None
    window: Time = 300.0
    """Percentiles must hold in every window of this length, not only over the whole trace."""

    @model_validator(mode="after")
    def _slopes(self) -> Objectives:
        for metric in ("tpot", "itl", "longest_gap"):
            if any(limit.per_token for limit in getattr(self, metric).values()):
                raise ValueError(f"a limit on {metric} does not depend on the input length; only those of ttft and e2e may")
        return self


@dataclass(frozen=True)
class RateSpec:
    """Which rate of a trace to plan for: `kind` is mean, peak, percentile (of the rates of windows) or given."""

    kind: str
    window: float = 300.0
    share: float = 1.0
    value: float = 0.0


_RATE = re.compile(r"(mean|peak|percentile)\s*(?:\(\s*([^()]*?)\s*\))?")


def _rate(value: Any) -> RateSpec:
    if isinstance(value, RateSpec):
        return value
    match = _RATE.fullmatch(str(value).strip())
    if match is None:
        try:
            rate = units.parse(value, "rate")
        except ValueError as error:
            raise ValueError(f"{error}; or write mean, peak(300 s) or percentile(95, 300 s)") from None
        if rate <= 0:
            raise ValueError(f"rate {value!r} must be positive")
        return RateSpec("given", value=rate)
    kind, inside = match[1], [p.strip() for p in (match[2] or "").split(",") if p.strip()]
    share = 1.0
    if kind == "percentile":
        if not inside:
            raise ValueError("percentile needs a number: write percentile(95) or percentile(95, 300 s)")
        share = units.parse(inside.pop(0), "ratio") / 100
        if not 0 < share < 1:
            raise ValueError("a percentile lies between 0 and 100")
    window = units.parse(inside.pop(0), "time") if inside else 300.0
    if inside or window <= 0 or (kind == "mean" and match[2]):
        raise ValueError(f"rate {value!r}: write mean, peak(300 s) or percentile(95, 300 s)")
    return RateSpec(kind, window, share)


class Workload(Spec):
    """What arrives."""

    trace: Trace | None = None
    lengths: Lengths | None = None
    fitted: str | None = None
    """A workload file written by `perfmodel trace fit`."""
    images: Images | None = None
    """Images in the prompts; a tower of the model encodes them before prefill."""
    rate: Annotated[RateSpec, BeforeValidator(_rate)] = RateSpec("peak")
    """mean | peak(window) | percentile(p, window) of the trace, or requests per second."""
    load: tuple[float, ...] = (1.0,)
    """Multiples of the rate to plan for."""
    scale: Literal["superpose", "thin", "compress"] | None = None
    """How a multiple is made: superpose shifted copies (smooths bursts), thin (drops requests; below 1 only), or compress the
    clock (keeps burstiness; think times shrink too). It makes the whole multiple: a given rate over the trace's, times load and
    headroom. Not said: a given rate compresses the clock to it, and the load superposes above 1 and thins below."""
    headroom: float = Field(default=0.0, ge=0, lt=10)
    """Extra rate to plan for, as a share: 0.2 plans for 1.2 times the rate."""
    objectives: Objectives

    @model_validator(mode="after")
    def _one_source(self) -> Workload:
        if sum(x is not None for x in (self.trace, self.lengths, self.fitted)) != 1:
            raise ValueError("give one of 'trace', 'lengths' or 'fitted'")
        if self.lengths is not None and self.rate.kind != "given":
            raise ValueError(f"rate {self.rate.kind!r} needs a trace; with 'lengths' write a number such as \"8.5 /s\"")
        if not self.load or any(k <= 0 for k in self.load):
            raise ValueError("load must list positive multiples")
        # Of a given rate only the trace tells the multiple.
        multiples = [k * (1 + self.headroom) for k in self.load] if self.rate.kind != "given" else []
        if self.scale == "thin" and any(k > 1 for k in multiples):
            raise ValueError("thin drops requests, so it cannot reach a load above 1; write superpose or compress")
        if self.scale == "superpose" and any(k < 1 for k in multiples):
            raise ValueError("superpose adds copies, so it cannot reach a load below 1; write thin or compress")
        return self
