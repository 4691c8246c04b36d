"""A paper: what it claims, and the settings in which the model is asked the same question.

Every number a setting uses is a named parameter with its origin, so that a verdict knows what it rests on.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from perfmodel.spec.base import Source, Spec

Origin = Literal["paper", "abstract", "assumed", "measured"]
"""paper: its text, with the place in `source`. abstract: its abstract. measured: read off the claim's own experiment, which
makes a verdict `derived`. assumed: ours, with the reason, and at most a factor of two wide."""

_WIDEST = 2.0


class Given(Spec):
    """One named parameter. A text names a model, a device or another choice; `others` are stand-ins as good as it."""

    value: float | str
    unit: str = "1"
    origin: Origin = Field(alias="from")
    source: str | None = None
    reason: str | None = None
    range: tuple[float, float] | None = None
    """Within which an assumed number may lie."""
    others: tuple[float | str, ...] = ()
    fixed: str | None = None
    """Why an assumed value without range and others stands for every other: nothing rests on it, or there is no other."""

    @model_validator(mode="after")
    def _honest(self) -> Given:
        if self.origin == "assumed" and not self.reason:
            raise ValueError("an assumed value needs a `reason`")
        if self.origin == "assumed" and not (self.range or self.others or self.fixed):
            raise ValueError("an assumed value needs a `range`, `others`, or `fixed` with why no other needs trying")
        if self.origin == "paper" and not self.source:
            raise ValueError("a value from the paper's text needs its `source` (section, table or figure)")
        if self.range is not None:
            low, high = self.range
            if isinstance(self.value, str):
                raise ValueError("a name has `others`, not a range")
            if not 0 < low <= self.value <= high:
                raise ValueError(f"the range {list(self.range)} must be positive and contain the value {self.value}")
            if high / low > _WIDEST * (1 + 1e-9):
                raise ValueError(f"the range {list(self.range)} is wider than a factor of {_WIDEST:g}")
        if self.origin != "assumed" and (self.range or self.others or self.fixed):
            raise ValueError("only an assumed value has `range`, `others` or `fixed`")
        return self


Quantity = float | str
"""A number, a name, or an expression that starts with `=`: of the parameters, and of metrics of other settings."""


class Setting(Spec):
    """A model on a machine at work. Fields left out come from `like`, then from the system, then from the defaults."""

    like: str | None = None
    model: str | None = None
    hardware: str | None = None
    system: str | None = None
    """A dated baseline of papers/systems.yaml, or an engine."""
    tp: Quantity | None = None
    pp: Quantity | None = None
    dp: Quantity | None = None
    ep: Quantity | None = None
    cp: Quantity | None = None
    weight_dtype: str | None = None
    act_dtype: str | None = None
    kv_dtype: str | None = None
    mem_fraction: Quantity | None = None
    techniques: tuple[str | dict[str, Any], ...] = ()
    """Added to those of `like` and of the system; one of a kind that is there already, and stands once, adds its knobs."""
    batch: Quantity | None = None
    """Sequences that decode together; `max`: as many as memory holds at `input + output` tokens."""
    largest: Quantity | None = None
    """Of `max`: no more than this."""
    input: Quantity | None = None
    output: Quantity | None = None
    prefix: Quantity | None = None
    """Prompt tokens already cached on the device."""
    batching: Literal["continuous", "static", "in-turn"] | None = None
    """static: the batch starts and ends together."""
    prompts: Quantity | None = None
    """Prompts that one prefill pass takes together."""
    rate: Quantity | None = None
    ttft: Quantity | None = None
    tpot: Quantity | None = None
    attainment: Quantity | None = None
    gap: Quantity | None = None
    """Limit on the time between two tokens [s], which the share `gaps` of them must meet."""
    gaps: Quantity | None = None
    input_spread: Quantity | None = None
    """Coefficient of variation of the input lengths (lognormal); 0: all alike."""
    output_spread: Quantity | None = None
    policy: str | None = None
    chunk: Quantity | None = None
    prefill_share: Quantity | None = None
    """Of the compute units, under the policy `split`."""
    alone_share: Quantity | None = None
    """Of the compute units, under the policy `split`, that a phase has while the other has no work; 0: its own."""
    fleet: tuple[dict[str, Quantity], ...] = ()
    """Types to choose from: `device` and `price` of one [USD/h]; every device is an instance of its own."""
    roles: dict[Literal["prefill", "decode"], dict[str, Any]] = {}
    """Pools of their own for the two phases: fields of a setting that differ, and `devices` of each."""
    message: Quantity | None = None
    """Tokens of one layer that go to the other role's pool at once; left out: a block of the engine."""
    steps: Quantity | None = None
    """Denoising steps of a diffusion model."""
    instances: Quantity | None = None
    """Equal instances that a replay deals its requests to."""
    routing: Literal["random", "round-robin", "least-loaded", "freest"] | None = None
    """Of a replay: which instance takes a request; left out: the one with fewest."""
    migration: Quantity | None = None
    """Of a replay: seconds between looks at whether a running sequence moves to another instance; 0: none moves."""
    spare: Quantity | None = None
    """Free tokens per running sequence below which an instance gives one away."""
    burst: Quantity | None = None
    """Of a replay: coefficient of variation of the gaps between arrivals, of a gamma law; 1: Poisson."""
    tick: Quantity | None = None
    """Of a replay: seconds of the coarse clock that a trace's arrivals were logged by, which come together; 0: a fine one."""
    classes: tuple[dict[str, Quantity], ...] = ()
    """Of a replay: kinds of requests that come mixed, each with its `share`, and its `input`, `output`, their spreads and
    `prefix` where they differ from the setting's."""
    requests: Quantity | None = None
    """How many a replay draws."""
    draw: Quantity | None = None
    """Of a replay: which draw of its gaps and lengths."""
    fetch: Quantity | None = None
    """Of a replay: seconds to fetch a token of `prefix`, beside the step that needs it; 0: it lies on the device."""
    overtaken: Quantity | None = None
    """Of a replay: requests that may pass a waiting one because more of their prompt is cached; 0: order of arrival."""
    longest: Quantity | None = None
    """Of a replay: longest prompt and longest answer [token]; left out: what the model's context allows."""
    cache: Quantity | None = None
    """Tokens that an instance may cache where its engine was told so; left out: what memory holds."""
    per_token: Quantity | None = None
    """Limit on a request's seconds over its output tokens [s]."""


class Claim(Spec):
    """One printed claim and the expression that predicts it, in the claim's own unit."""

    metric: str
    claimed: float | tuple[float, float]
    unit: str
    """x: a ratio. %: a relative change. Anything else is absolute (`% of peak`, `tokens/s`)."""
    direction: Literal["higher", "lower"]
    against: str
    """What the paper compares with."""
    setting: str
    """Where, in a few words."""
    reach: Literal["typical", "up-to"] = "typical"
    predict: str | None = None
    sweep: dict[str, tuple[float | str, ...]] = {}
    """Values of parameters over the paper's range: the best counts for `up-to`, both ends for a range."""
    bound: str | None = None
    """The same at datasheet rates with perfect overlap: what no implementation can beat."""
    not_ours: str | None = None
    """Why the claim is about an input, accuracy or a tool's own run time: verdict `input`."""
    open: str | None = None
    """Why nothing here predicts it."""
    reason: str | None = None
    """What explains the distance where the prediction does not meet the claim."""

    @model_validator(mode="after")
    def _one_way(self) -> Claim:
        if sum(x is not None for x in (self.predict, self.not_ours, self.open)) != 1:
            raise ValueError("give one of `predict`, `not_ours` and `open`")
        if isinstance(self.claimed, tuple) and self.claimed[0] > self.claimed[1]:
            raise ValueError(f"the range {list(self.claimed)} runs backwards")
        return self


class Prediction(Spec):
    """A number worth having where the paper claims none."""

    metric: str
    unit: str
    predict: str
    setting: str = ""
    sweep: dict[str, tuple[float | str, ...]] = {}


class Paper(Spec):
    """One publication."""

    id: str
    title: str
    date: str = ""
    arxiv: str | None = None
    system: str = ""
    family: str
    relation: Literal["core", "technique", "kernel"]
    mechanism: str
    """In our words."""
    parameters: dict[str, Given] = {}
    settings: dict[str, Setting] = {}
    claims: tuple[Claim, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    not_modelled: tuple[str, ...] = ()
    sources: dict[str, Source] = {}
    changed: tuple[str, ...] = ()
    """Notes on assumptions that were changed after the claims had been run."""

    @model_validator(mode="after")
    def _known(self) -> Paper:
        for name, setting in self.settings.items():
            if name in self.parameters:
                raise ValueError(f"{name!r} is both a setting and a parameter")
            if setting.like is not None and setting.like not in self.settings:
                raise ValueError(f"setting {name!r} is like {setting.like!r}, which is no setting here")
        asked = [(c.metric, c.sweep) for c in self.claims] + [(p.metric, p.sweep) for p in self.predictions]
        for metric, sweep in asked:
            for key in sweep:
                if key not in self.parameters:
                    raise ValueError(f"the sweep of {metric!r} varies {key!r}, which is no parameter")
        return self


class System(Spec):
    """A dated baseline as papers compare with it: the engine, and what it lacked, as techniques of their own."""

    title: str
    date: str
    engine: str
    techniques: tuple[str | dict[str, Any], ...] = ()
    batching: Literal["continuous", "static", "in-turn"] = "continuous"
    """static: a batch starts and ends together, its prompts pass together; in-turn: its prompts pass one after the other."""
    policy: str = "chunked"
    mem_fraction: float | None = None
    weaknesses: tuple[str, ...] = ()
    """What makes it slower than the roofline, each with where that is modelled."""
    source: str


class Systems(Spec):
    """All baselines."""

    kind: Literal["systems"]
    systems: dict[str, System]
