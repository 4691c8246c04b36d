"""What a request costs outside the engine's steps: tokeniser, API server, detokeniser, sampler; and the rates they carry.

A request keeps its API process busy for 1/R_api + n_out/R_stream (+ n_out t_detok where that process detokenises, + n_in/R_tok
where it tokenises itself) seconds; tokenisers beside it have cores of their own. Bottom-up, from `engines.yaml`.

The fitted `request_latency` and `request_token_latency` of an engine's serving rows hold these seconds already, as they were in
those benchmarks: unloaded, one request after another. So a first token takes the larger of the two and never their sum
(`ttft_overhead`); what no unloaded row can hold is waiting for a busy process (`waiting`) and the rate where it never ends
(`rate_bound`). `sampler_time` and the hand-over of tokens are parts of `host_per_sequence` for engines fitted on whole steps;
it is reported, and no step adds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perfmodel import calibration
from perfmodel.errors import Infeasible, SpecError
from perfmodel.spec.calibration import Engine, FrontEnd

if TYPE_CHECKING:
    from perfmodel.serving.queueing import Mix, State
    from perfmodel.serving.split import SplitState

_BUSY = 0.8
"""Utilisation of the API processes beyond which a plan would live off its luck: waiting grows as 1/(1 - u)."""


@dataclass(frozen=True)
class Overhead:
    """Seconds before the first token outside the engine's steps, without load."""

    tokenise: float
    api: float
    """Parsing the request, and the first chunk of the answer."""
    detokenise: float
    fitted: float
    """What the engine's serving rows say, all of these included."""

    @property
    def parts(self) -> float:
        """Bottom-up sum."""
        return self.tokenise + self.api + self.detokenise

    @property
    def beyond_fitted(self) -> float:
        """What the parts add to the fitted latency: prompts longer than any row's."""
        return max(self.parts - self.fitted, 0.0)

    @property
    def total(self) -> float:
        return self.fitted + self.beyond_fitted


@dataclass(frozen=True)
class StepOverhead:
    """Seconds of one step for what happens to its sequences' tokens on the way out."""

    sampler: float
    detokenise: float
    """0 where another process does it while the next step runs."""
    fitted: float
    """Host time per sequence of the engine's rows, which step times hold already."""

    @property
    def beyond_fitted(self) -> float:
        """What a step takes longer than its fitted host time says."""
        return max(self.sampler + self.detokenise - self.fitted, 0.0)


@dataclass(frozen=True)
class Capacity:
    """Highest rates of the front end [requests/s], by what limits them, and the processes they stand for."""

    api: float
    tokeniser: float
    detokeniser: float
    processes: int
    tokenizer_cores: int

    @property
    def rate(self) -> float:
        return min(self.api, self.tokeniser, self.detokeniser)

    @property
    def binding(self) -> str:
        return min(("api", "tokeniser", "detokeniser"), key=lambda name: float(getattr(self, name)))


def _front(engine: Engine) -> FrontEnd:
    if engine.frontend is None:
        raise SpecError(f"nobody wrote down what {engine.title} does outside its steps: engines.yaml has no `frontend` of it")
    return engine.frontend


def _value(front: FrontEnd, name: str) -> float:
    return front.parameters[name].value


def ttft_overhead(engine: Engine, input_tokens: float) -> Overhead:
    """Seconds a first token takes outside the engine's steps, without load.

    >>> o = ttft_overhead(calibration.engine("vllm"), 340_000)
    >>> round(o.tokenise, 3), o.beyond_fitted > 0.4
    (1.0, True)
    """
    front, law = _front(engine), calibration.law().everything
    latency = engine.parameters.get("request_latency")
    per_token = engine.parameters.get("request_token_latency") or law["request_token_latency"]
    return Overhead(
        tokenise=input_tokens / _value(front, "tokenize_rate"),
        api=1 / _value(front, "request_rate") + 1 / _value(front, "stream_rate"),
        detokenise=_value(front, "detokenize_time"),
        fitted=(latency.value if latency else 0.0) + per_token.value * input_tokens,
    )


def step_overhead(engine: Engine, sequences: float) -> StepOverhead:
    """Sampler and detokeniser of one step of `sequences`; only llama.cpp's exceed what its step times hold."""
    front = _front(engine)
    detokenise = _value(front, "detokenize_time") if front.detokenizer == "engine" else 0.0
    return StepOverhead(
        sampler=sequences * _value(front, "sampler_time"),
        detokenise=sequences * detokenise,
        fitted=sequences * engine.parameters["host_per_sequence"].value,
    )


def unloaded(engine: Engine, inputs: np.ndarray) -> np.ndarray:
    """`ttft_overhead(...).total` of many requests [s]; an engine nobody wrote a front end of has its fitted latency alone."""
    if engine.frontend is None:
        latency = engine.parameters.get("request_latency")
        return np.full(inputs.shape, latency.value if latency else 0.0)
    # Both sums are straight lines in the input length.
    none, many = ttft_overhead(engine, 0.0), ttft_overhead(engine, 1e6)
    share = np.asarray(inputs, float) / 1e6
    lines = [low + (high - low) * share for low, high in ((none.parts, many.parts), (none.fitted, many.fitted))]
    return np.asarray(np.maximum(*lines))


def before_engine(engine: Engine, s: State | SplitState, mix: Mix) -> np.ndarray:
    """Seconds of each request's TTFT outside the engine's steps: the front end and waiting for it, which may never end."""
    alone = unloaded(engine, mix.input)
    if engine.frontend is None:
        return alone
    lengths = mix.mean(mix.input), mix.mean(mix.output)
    if s.rate >= capacity(engine, *lengths).rate:
        return np.full(mix.input.shape, math.inf)
    return alone + waiting(engine, s.rate, *lengths, s.step if math.isfinite(s.step) else 0.0)


def busy_seconds(engine: Engine, input_tokens: float, output_tokens: float) -> float:
    """Seconds one request keeps an API process busy."""
    front = _front(engine)
    seconds = 1 / _value(front, "request_rate") + output_tokens / _value(front, "stream_rate")
    if not front.tokenizer_aside:
        seconds += input_tokens / _value(front, "tokenize_rate")
    if front.detokenizer == "api":
        seconds += output_tokens * _value(front, "detokenize_time")
    return seconds


def capacity(
    engine: Engine, input_tokens: float, output_tokens: float, *, processes: int | None = None, tokenizer_cores: int | None = None
) -> Capacity:
    """Rates at which each part is busy all the time, for mean lengths [token].

    processes: API processes, else the engine's default. tokenizer_cores: one per API process unless told.
    """
    front = _front(engine)
    count = processes or front.processes
    cores = tokenizer_cores or count
    detokenise = output_tokens * _value(front, "detokenize_time")
    return Capacity(
        api=count / busy_seconds(engine, input_tokens, output_tokens),
        tokeniser=cores * _value(front, "tokenize_rate") / input_tokens if front.tokenizer_aside and input_tokens else math.inf,
        detokeniser=1 / detokenise if front.detokenizer == "own" and detokenise else math.inf,
        processes=count,
        tokenizer_cores=cores,
    )


def rate_bound(
    engine: Engine, input_tokens: float, output_tokens: float, *, processes: int | None = None, tokenizer_cores: int | None = None
) -> float:
    """Highest rate [requests/s] a planner should give an instance's front end, processes busy 80 % of the time."""
    found = capacity(engine, input_tokens, output_tokens, processes=processes, tokenizer_cores=tokenizer_cores)
    return _BUSY * found.rate


def processes_for(engine: Engine, rate: float, input_tokens: float, output_tokens: float) -> int:
    """API processes that carry a rate."""
    return max(math.ceil(rate / rate_bound(engine, input_tokens, output_tokens, processes=1) - 1e-9), 1)


def waiting(
    engine: Engine, rate: float, input_tokens: float, output_tokens: float, tpot: float, *, processes: int | None = None
) -> float:
    """Mean seconds a first token waits for its API process, at a rate [requests/s] and a time per output token [s].

    The event loop runs pieces to completion, first come first served. A step of the engine hands over the tokens of all its
    sequences at once: a burst of T = u_s tpot seconds, u_s = rate n_out x / processes. Parsing (x_1, Poisson) waits for the
    work it finds, V = (rate x_1^2 + u_s T) / 2 (1 - rate x_1) (Pollaczek-Khinchine with the bursts' mean work added); the first
    token then waits for half of its burst and the parsing before it, T/2 + rate x_1^2 / 2 (1 - rate x_1).
    Raises Infeasible where a part is busy all the time, with the processes that would do.
    """
    found = capacity(engine, input_tokens, output_tokens, processes=processes)
    if rate >= found.rate:
        wanted = processes_for(engine, rate, input_tokens, output_tokens)
        raise Infeasible(
            f"{rate:g} requests/s exceed the {found.rate:.1f} that the {found.binding} of {found.processes} "
            f"process{'es' * (found.processes > 1)} of {engine.title} carries",
            nearest=f"{wanted} API processes, or {math.ceil(rate / found.rate)} instances",
            binding=("front end",),
        )
    each = rate / found.processes
    parse = busy_seconds(engine, input_tokens, 0)
    streaming = each * (busy_seconds(engine, input_tokens, output_tokens) - parse)
    burst = streaming * tpot
    parsing = each * parse**2 / 2
    return (parsing + streaming * burst / 2) / (1 - each * parse) + burst / 2 + parsing / (1 - each * parse)
