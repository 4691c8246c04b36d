"""Fused mixture-of-experts layers: router scores in, expert outputs summed per token out, on one rank."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from perfmodel import calibration
from perfmodel.kernels.grouped import portable_by_default
from perfmodel.ops.moe import Routed, routed_experts
from perfmodel.spec.formats import get_format
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, engine_machine, seconds_with_spread, times
from perfmodel.validation.rows import Refused, Row

# Storage, matrix dtype and bytes per activation (where activations are cast) behind the names rows use.
_FORMATS = {
    "bf16": ("bf16", "bf16", None),
    "fp16": ("fp16", "fp16", None),
    "fp8": ("fp8", "fp8", 1.0),
    "fp8_block": ("fp8_block", "fp8", 1.0),
    "nvfp4": ("nvfp4", "fp4", 0.5625),
    "int8_wo": ("q8_0", "bf16", None),
    "int4_wo": ("int4_g64", "bf16", None),
    "w4afp8": ("int4", "fp8", 1.0),
    "w4a16_mxfp4": ("mxfp4", "bf16", None),
    "w4a8_mxfp4_mxfp8": ("mxfp4", "fp8", 1.0),
}


class _Setting(NamedTuple):
    """What the rows of one batch share."""

    hardware: str
    engine: str
    version: str
    dtype: str
    kernel: str
    distribution: str
    experts: float
    top_k: float
    ep: float
    tp: float


def _key(row: Row) -> _Setting:
    if row.text("dtype") not in _FORMATS:
        raise Refused(f"unknown expert format {row.text('dtype')!r}")
    return _Setting(
        row.hardware, calibration.known_engine(row.text("engine")) or "", row.text("engine_version"), row.text("dtype"),
        row.text("kernel"), row.text("distribution"), row.number("n_experts"), row.number("topk"), row.number("ep", 1),
        row.number("tp", 1),
    )  # fmt: skip


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, _Setting)
    stored, runs, narrow = _FORMATS[key.dtype]
    tokens = column(rows, "num_tokens")
    m = engine_machine(key.hardware, key.engine)
    portable = _portable(key.kernel)
    if portable is None:
        portable = portable_by_default(narrow is None and runs != stored, m)
    routed = _routed(tokens, key)
    if portable:
        routed = _every_choice(routed, tokens, key)
        if key.engine == "sglang" and "mxfp4" in key.dtype:
            stored = "bf16"  # SGLang expands MXFP4 for its Triton kernel when it loads the weights
    ops = routed_experts(
        routed, column(rows, "hidden"), column(rows, "inter") / key.tp, gated=True, weight=get_format(stored),
        act=get_format("fp16" if key.dtype == "fp16" else "bf16"), dtype=runs, narrow=narrow, portable=portable,
    )  # fmt: skip
    return times(rows, *seconds_with_spread(ops, m, "moe"))


def _portable(kernel: str) -> bool | None:
    """Whether a row's kernel is portable, by its name; None where the name does not tell."""
    if any(word in kernel for word in ("triton", "marlin", "vllm_fused_moe")):
        return True
    return False if any(word in kernel for word in ("cutlass", "trtllm", "flashinfer", "deepgemm")) else None


def _exponent(distribution: str) -> float:
    """Exponent of the experts' popularity: 0 for equal loads. Raises Refused for an unknown distribution."""
    if distribution in ("", "balanced", "uniform"):
        return 0.0
    found = re.fullmatch(r"power_law_(\d+(?:\.\d+)?)", distribution)
    if found is None:
        raise Refused(f"unknown routing {distribution!r}")
    return float(found[1])


def _routed(tokens: np.ndarray, key: _Setting) -> Routed:
    """Pairs, touched experts and tokens of the busiest of ep ranks, each holding experts/ep.

    Balanced: equal loads on as many experts as there are pairs. Otherwise the load of an expert follows a power law:
    see `skewed`.
    """
    local, exponent = key.experts / key.ep, _exponent(key.distribution)
    if not exponent:
        mine = np.maximum(tokens * key.top_k / key.ep, 1.0)
        return Routed(mine, np.minimum(mine, local), tokens, even=1)
    mine, touched = np.transpose([skewed(float(t), key.experts, key.top_k, key.ep, exponent) for t in tokens])
    return Routed(mine, np.minimum(local, touched), tokens)


def skewed(tokens: float, experts: float, top_k: float, ep: float, exponent: float) -> tuple[float, float]:
    """Pairs and touched experts of the busiest rank when the popularity of experts has density x^-a, lo < x < hi.

    With more pairs than experts the most popular one may see 0.8 of the tokens and the least popular one (lo = 1,
    hi = 0.8 tokens); otherwise popularities lie within 0.01 to 2 (the generator behind AIConfigurator's rows). Experts
    take the E mid-quantiles x_i; expert i serves pairs x_i / sum x, rounded, and pairs that rounding loses go to
    experts without any. The share of a rank of E/ep independent experts is taken as gamma distributed with coefficient of
    variation c = std(load)/mean(load)/sqrt(E/ep); the largest of ep such shares is (1 - c^2/9 + z c/3)^3 of the mean
    (Wilson and Hilferty, PNAS 17(12), 1931) with z = Phi^-1(exp(-exp(-0.5772)/ep)), the mean of a Gumbel maximum; at most
    what the E/ep most popular experts draw. Its touched experts hold as many pairs each as touched experts do on average.
    """
    pairs = tokens * top_k
    low, high = (1.0, max(0.8 * tokens, 2.0)) if pairs > experts else (0.01, 2.0)
    power = 1 - exponent if abs(1 - exponent) > 1e-6 else 1e-6
    quantiles = (np.arange(experts) + 0.5) / experts
    popularity = (low**power + quantiles * (high**power - low**power)) ** (1 / power)
    load = np.minimum(tokens, pairs * popularity / popularity.sum())
    served = np.round(load)
    touched = min(float(np.sum(served > 0)) + max(pairs - float(served.sum()), 0.0), experts)
    local = experts / ep
    c = float(load.std() / load.mean()) / local**0.5
    z = NormalDist().inv_cdf(np.exp(-np.exp(-np.euler_gamma) / ep)) if ep > 1 else 0.0
    most = float(np.sort(load)[-round(local) :].sum())
    mine = max(min((1 - c**2 / 9 + z * c / 3) ** 3 * pairs / ep, most), 1.0) if ep > 1 else pairs
    return mine, max(mine * touched / pairs, 1.0)


def _every_choice(r: Routed, tokens: np.ndarray, key: _Setting) -> Routed:
    """Portable kernels keep a row for every choice of a token that enters, those of other ranks' experts included.

    SGLang's rows were timed on the tokens that visit the rank; up to 0.5.10 choices of other ranks were computed too, on
    the first expert.
    """
    if key.engine != "sglang" or key.ep == 1 or "mxfp4" in key.dtype:
        return r._replace(slots=tokens * key.top_k)
    visiting = np.minimum(tokens, r.pairs)
    slots = visiting * key.top_k
    version = tuple(int(x) for x in re.findall(r"\d+", key.version)[:3])
    if version and version <= (0, 5, 10):
        return r._replace(pairs=slots, tokens=visiting, slots=slots, even=0)
    return r._replace(tokens=visiting, slots=slots)


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _held_out(row: Row) -> Hashable:
    return row.text("n_experts"), row.text("topk"), row.text("hidden"), row.text("inter")


MOE = Kind(
    "mixture of experts", lambda r: r.text("op") == "fused_moe" or bool(r.text("topk")), _predict, _held_out,
    (
        "law.expert_latency", "law.portable_expert_latency", "law.portable_efficiency", "law.expert_feed",
        "law.expert_token_bytes", "architecture.*.expert_efficiency",
    ),
)  # fmt: skip
