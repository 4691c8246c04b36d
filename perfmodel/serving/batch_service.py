"""How long a static batch takes: its prefill in one pass, and its decode until the longest answer ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Mix

POINTS = 16  # of each law that is averaged over


class Service:
    """Seconds of a batch of n requests, as equally likely points of prefill and of decode.

    The longest answer of n has quantile F^-1(u^(1/n)); so has the longest prompt, where prompts are padded. Otherwise the
    prompts' work is a sum, with mean n m and variance n v. Prefill and decode are taken as independent.
    """

    def __init__(self, clock: StepClock, mix: Mix, n: int, *, pads: bool) -> None:
        u = (np.arange(POINTS) + 0.5) / POINTS
        answers, prompts = quantile(mix.output, mix.weight), quantile(mix.input, mix.weight)
        longest = answers(u ** (1 / n))
        mean_prompt = mix.mean(mix.input)
        if pads:
            each = prompts(u ** (1 / n))
            self.prefill = pass_seconds(clock, n, each, n * each)
            self.decode = decode_seconds(clock, n, float(each.mean()), longest)
        else:
            one = pass_seconds(clock, 1, mix.input, mix.input) - pass_seconds(clock, 1, np.ones(1), np.ones(1))
            spread = math.sqrt(max(mix.mean(one**2) - mix.mean(one) ** 2, 0.0) / n) / max(mix.mean(one), 1e-12)
            typical = pass_seconds(clock, n, np.array([mean_prompt]), np.array([n * mean_prompt]))
            lone = pass_seconds(clock, 1, prompts(u), prompts(u))
            self.prefill = typical * np.exp(spread * _normal(u) - spread**2 / 2) if n > 1 else lone
            self.decode = shrinking_seconds(clock, n, mean_prompt, mix, longest, last=True)
        self.n = n
        self.seconds = np.sort(np.add.outer(self.prefill, self.decode).ravel())
        self.mean = float(self.seconds.mean())
        self.prompt = float(each.mean()) if pads else mean_prompt  # tokens cached per slot


def pass_seconds(clock: StepClock, n: float, each: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Prefill of n prompts of `each` tokens, `total` together."""
    attention = clock.attention_array(each, np.zeros(each.shape))
    wise = np.array([clock.tokenwise(float(t)) for t in total])
    start = clock.step(0, 0.0, [(1.0, 0.0)]) - clock.tokenwise(1.0) - clock.host(1) - clock.attention(1.0, 0.0)
    return np.asarray(clock.host(n) + wise + n * attention + start)


def decode_seconds(clock: StepClock, n: int, prompt: float, answer: np.ndarray) -> np.ndarray:
    """Steps 1 … answer - 1 of n sequences that attend prompt + 1, prompt + 2, … tokens each."""
    steps = answer - 1
    return np.asarray(steps * clock.decode(n, n * (prompt + 1)) + clock.decode_slope[n] * n * steps * (steps - 1) / 2)


def shrinking_seconds(clock: StepClock, n: int, prompt: float, mix: Mix, ends: np.ndarray, *, last: bool) -> np.ndarray:
    """The same for one answer of each length in `ends`, where the n - 1 others leave the batch as they end.

    At its step k, 1 + (n - 1) P(other > k) are left; `last`: it is the batch's longest, so no other exceeds it.
    """
    grid = np.unique(np.concatenate([[1.0], ends, np.linspace(1, float(ends.max()), 4 * POINTS)]))
    order = np.argsort(mix.output)
    below = np.concatenate([[0.0], np.cumsum(mix.weight[order])])
    share = below[np.searchsorted(mix.output[order], grid, side="right")]
    result = []
    for end in ends:
        top = max(float(np.interp(end, grid, share)), 1e-12) if last else 1.0
        k = grid[grid <= end]
        left = 1 + (n - 1) * np.clip(1 - share[: k.size] / top, 0, 1)
        each = np.array([clock.decode(float(b), float(b) * (prompt + x)) for b, x in zip(left, k, strict=True)])
        result.append(float(np.sum((each[1:] + each[:-1]) / 2 * np.diff(k))))
    return np.array(result)


def quantile(values: np.ndarray, weight: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Inverse of the distribution of weighted values."""
    order = np.argsort(values)
    share = np.cumsum(weight[order]) / weight.sum()
    ordered = values[order]
    return lambda u: ordered[np.minimum(np.searchsorted(share, u - 1e-12), ordered.size - 1)]


def _normal(u: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return np.asarray(ndtri(u))
