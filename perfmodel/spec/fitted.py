"""A workload without content: what `perfmodel trace fit` writes, and what requests are synthesised from."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from perfmodel.spec.base import Count, Fraction, Natural, Spec

Share = Annotated[float, Field(ge=0, le=1)]
Quantiles = tuple[float, ...]


class Arrivals(Spec):
    """Requests by window, and how uneven they are inside one."""

    windows: tuple[Natural, ...] = Field(min_length=1)
    """Requests in each of the equal windows that make up the span: the rate over time."""
    split: tuple[Annotated[float, Field(ge=-1, lt=1)], ...] = ()
    """Halving a window again and again: how alike the fates of two of its requests are at each halving, as correlation.
    0: each falls into either half by itself (Poisson); towards 1: all fall into the same half (bursts); below 0: evenly."""
    tick: float = Field(default=0.0, ge=0)
    """Seconds of the coarse clock the log was taken by; 0: a fine one."""


def _rising(at: Quantiles, *rows: Quantiles) -> None:
    """Check that rows are values of a distribution at probabilities, log-linear between them."""
    if len(at) < 2 or at[0] != 0 or at[-1] != 1 or any(b <= a for a, b in pairwise(at)):
        raise ValueError("probabilities rise from 0 to 1")
    for values in rows:
        if len(values) != len(at):
            raise ValueError(f"{len(values)} values at {len(at)} probabilities")
        if values[0] < 0 or any(b < a for a, b in pairwise(values)):
            raise ValueError("values at rising probabilities must not fall, nor be negative")


class JointLengths(Spec):
    """Input and output tokens: both distributions, and how they go together."""

    at: Quantiles
    """Probabilities of the tokens in `input` and `output`."""
    input: Quantiles
    output: Quantiles
    input_classes: Quantiles
    """Probabilities that part the input lengths into classes."""
    output_classes: Quantiles
    joint: tuple[tuple[Share, ...], ...]
    """Share of requests by input class (rows) and output class."""
    drift_input: Quantiles = (0.0,)
    """Mean rank of a segment's input lengths less 0.5, over equal segments of the span: how lengths drift with time."""
    drift_output: Quantiles = (0.0,)

    @model_validator(mode="after")
    def _fits(self) -> JointLengths:
        _rising(self.at, self.input, self.output)
        if min(self.input[0], self.output[0]) < 1:
            raise ValueError("a request has at least one input and one output token")
        rows, columns = len(self.input_classes) - 1, len(self.output_classes) - 1
        if len(self.joint) != rows or any(len(row) != columns for row in self.joint):
            raise ValueError(f"joint must have {rows} rows of {columns} shares")
        if not math.isclose(sum(map(sum, self.joint)), 1.0, rel_tol=0.01):
            raise ValueError("the shares of joint must sum to 1")
        if len(self.drift_input) != len(self.drift_output):
            raise ValueError("drift_input and drift_output must be of one length")
        if any(abs(x) > 0.5 for x in (*self.drift_input, *self.drift_output)):
            raise ValueError("a mean rank less 0.5 lies between -0.5 and 0.5")
        return self


class Root(Spec):
    """A prefix that many users send (a system prompt, a document)."""

    blocks: Count
    """Blocks from the start of the prompt."""
    under: Natural | None = None
    """Number of the root it extends, in this list; None: none."""
    share: Fraction
    """Share of requests that start with it and with no longer root."""


class Reuse(Spec):
    """Requests whose prompt starts like an earlier one's, beyond any root."""

    share: tuple[Share, ...]
    """Share of requests, by input class."""
    matched_at: Quantiles = (0.0, 1.0)
    matched: tuple[Quantiles, ...] = ()
    """Matched tokens over prompt tokens at these probabilities, by input class; empty where no block ids were logged."""
    lag_at: Quantiles
    lag: Quantiles
    """Seconds since that earlier request at these probabilities."""

    @model_validator(mode="after")
    def _distributions(self) -> Reuse:
        _rising(self.matched_at, *self.matched)
        _rising(self.lag_at, self.lag)
        if any(row[-1] > 1 for row in self.matched):
            raise ValueError("no more than the whole prompt can match")
        return self


class Sharing(Spec):
    """What prompts have in common."""

    block_tokens: Natural = 0
    """Prompt tokens of a block; 0: no block ids were logged."""
    roots: tuple[Root, ...] = ()
    continued: Reuse | None = None
    """A further turn: all full blocks of an earlier prompt, then more. Sessions are chains of these."""
    branched: Reuse | None = None
    """A part of an earlier prompt, then something else."""


class FittedWorkload(Spec):
    """A request log as numbers that hold no row of it."""

    kind: Literal["workload"]
    version: Literal[1]
    source: str = ""
    requests: Count
    span_s: float = Field(gt=0)
    arrivals: Arrivals
    lengths: JointLengths
    sharing: Sharing | None = None

    @model_validator(mode="after")
    def _whole(self) -> FittedWorkload:
        if sum(self.arrivals.windows) != self.requests:
            raise ValueError(f"the windows hold {sum(self.arrivals.windows)} requests, not {self.requests}")
        classes = len(self.lengths.input_classes) - 1
        for reuse in (self.sharing.continued, self.sharing.branched) if self.sharing else ():
            if reuse is not None and (len(reuse.share) != classes or len(reuse.matched) not in (0, classes)):
                raise ValueError(f"shares and matches are needed for each of the {classes} input classes")
        return self
