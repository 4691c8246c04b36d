"""Generation by denoising: diffusion transformers and U-Nets over latents, diffusion language models over text.

Every step is a pass of the whole model in which each token attends every other, cached ones as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import parts, roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.schedule import Node, Repeat, Seq
from perfmodel.symbols import Num
from perfmodel.techniques.base import Denoising, Pass, Request, Round


@dataclass(frozen=True)
class Generation:
    """One batch of generations by denoising."""

    seconds: Num
    passes: tuple[Pass, ...]
    cached_bytes: Num
    """Kept on each device from one step to the next."""
    lower: Num
    """Seconds at datasheet rates with perfect overlap."""
    busy: dict[str, Num]
    """Seconds that each resource works."""


def denoise(e: Estimator, batch: Num, tokens: Num, steps: Num, *, guidance: int = 1, beside: Num = 0.0) -> Generation:
    """Seconds of `steps` denoising passes over `batch` sequences of `tokens` latent patches (or text tokens).

    guidance: conditions each sequence is denoised under (classifier-free guidance: 2). beside: seconds of text encoder and
    decoder of the latents. Raises SpecError for pipeline parallelism, whose stages a single batch leaves idle, and for
    techniques of prompts and decode rounds.

    >>> d = denoise(Estimator("dit-xl-2", "a100-sxm-80gb"), 1, 256, 50)
    >>> 50 * 2 * 119e9 / 312e12 < d.seconds < 10 * 50 * 2 * 119e9 / 312e12  # 119 G multiply-adds a pass
    True
    """
    if e.par.pp > 1:
        raise SpecError("denoising runs all layers in every step: give --pp 1")
    if np.any(np.asarray(batch) < 1) or np.any(np.asarray(tokens) < 1) or np.any(np.asarray(steps) < 1):
        raise SpecError("batch, tokens and steps must be at least 1")
    n = np.asarray(batch, float) * guidance
    found = Denoising((Pass(np.asarray(steps, float), np.asarray(tokens, float)),))
    prompt = Request(float(np.max(tokens)))
    for technique in e.techniques:
        if technique.request(prompt) != prompt or technique.round(Round(), float(np.max(n))) != Round():
            raise SpecError(f"{technique.kind} changes prompts or decode rounds; a denoiser has neither")
        found = technique.denoise(found, n, e.model, e.formats, e.par)
    seconds: Any = np.asarray(beside, float)
    lower: Any = 0.0
    busy: dict[str, Any] = {}
    for p in found.passes:
        total, host = roofline.cost(_schedule(e, n, p), e.machine), e.host_seconds(n)
        for resource, worked in {**total.busy, "host": host}.items():
            busy[resource] = busy.get(resource, 0.0) + p.times * worked
        seconds = seconds + p.times * (total.seconds + host)
        lower = lower + p.times * total.lower
    cached = sum((r.bytes for r in found.stored if r.tier == "hbm"), start=0.0)
    return Generation(_plain(seconds), found.passes, _plain(cached), _plain(lower), {r: _plain(x) for r, x in busy.items()})


def spread(e: Estimator, batch: float, made: Generation, *, guidance: int = 1) -> float:
    """Standard deviation of the logarithm of a generation's seconds, from that of the parameters."""
    n, shaken = np.asarray(batch, float) * guidance, e.machine.perturbed()
    varied = sum(
        (p.times * (roofline.cost(_schedule(e, n, p), shaken).seconds + e.host_seconds(n, shaken)) for p in made.passes),
        start=np.zeros(len(e.machine.sigma) + 1),
    )
    return parts.spread(np.log(varied[1:] / varied[0]), "prefill", e.machine)


def _schedule(e: Estimator, n: Num, p: Pass) -> Node:
    """Operators of one pass, with a share of the layers, and what runs beside them."""
    whole = e.lower(Phase((Group(n, p.new, p.cached),), logits="all", causal=False)).schedule
    assert isinstance(whole, Seq)
    share = dict(p.only)
    items = tuple(
        replace(x, times=x.times * p.layers * (share.get(x.name, 0.0) if share else 1.0)) if isinstance(x, Repeat) else x
        for x in whole.items
    )
    return Seq((*items, *p.ops), whole.name)


def _plain(x: Any) -> Any:
    return x if np.ndim(x) else float(x)
