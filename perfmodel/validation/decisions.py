"""Do predictions choose well? What a planner that trusts them would lose against one that measured everything.

Serving rows of one device, model, format, lengths and engine are candidates: a layout at a concurrency, with its output
tokens per second and device, concurrency / TPOT / devices. For a TPOT limit the planner takes the candidate of highest
predicted throughput whose predicted TPOT meets it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.validation.rows import Predicted, Refused
from perfmodel.validation.score import Scored, spearman

QUANTILES = (0.3, 0.5, 0.7)
"""TPOT limits, as quantiles of the measured TPOTs of a group."""
_FEWEST = 4  # candidates of a group that is worth a decision
_NAMES = ("model", "dtype", "input_len", "output_len", "engine")
_LAYOUT = ("n_devices", "tp", "pp", "ep", "dp", "prefill_cfg", "decode_cfg")


@dataclass(frozen=True)
class Candidate:
    """One layout at one concurrency: measured and predicted seconds per token, and the throughput they mean."""

    device: str
    layout: Hashable
    tokens: float
    """Tokens in one step over devices: throughput per device is this over TPOT."""
    measured: float
    predicted: float
    cautious: float
    """Predicted TPOT at the asked confidence: what is compared with the limit."""

    @property
    def rate(self) -> float:
        """Measured output tokens per second and device."""
        return self.tokens / self.measured

    @property
    def predicted_rate(self) -> float:
        """Predicted output tokens per second and device."""
        return self.tokens / self.predicted


@dataclass(frozen=True)
class Choice:
    """What came of one decision."""

    regret: float
    """1 - measured throughput of the pick over the best measured one within the limit, not below 0."""
    broken: bool
    """Whether the pick's measured TPOT exceeds the limit."""
    top_two: bool
    """Whether the best measured layout is one of the two that predictions rank highest."""


@dataclass(frozen=True)
class Decisions:
    """Quality of all decisions; regrets as fractions."""

    groups: int
    decisions: int
    regret_mean: float
    regret_p90: float
    top_two: float
    limits_broken: float
    spearman: float
    """Mean over groups of the rank correlation of predicted and measured throughput per device."""
    device_decisions: int
    device_regret_mean: float
    """The same regret where candidates of several devices compete; NaN without such groups."""

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: NaN becomes None."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in self.__dict__.items()}


def decide(rows: Sequence[Scored], confidence: float = 0.5) -> Decisions:
    """Judge the choices that predictions of closed-loop TPOT rows lead to.

    confidence: probability with which a pick shall meet its limit; 0.5 compares the expected TPOT with it, 0.9 the p90.
    Flagged rows are no candidates, but those that tell of queueing are heeded. Raises SpecError for a confidence outside
    [0.5, 1), and where no group has candidates enough.
    """
    if not 0.5 <= confidence < 1:
        raise SpecError(f"--confidence must lie in [0.5, 1), got {confidence}")
    groups = [g for g in _grouped(rows, confidence, ("hardware", *_NAMES)) if _differ(g, lambda c: c.layout)]
    if not groups:
        raise SpecError(f"no group of {_FEWEST} TPOT rows at concurrency with several layouts: nothing to decide")
    choices = [_choose(g, limit) for g in groups for limit in _limits(g)]
    across = [g for g in _grouped(rows, confidence, _NAMES) if _differ(g, lambda c: c.device)]
    device = [_choose(g, limit) for g in across for limit in _limits(g)]
    regrets = np.array([c.regret for c in choices])
    ranks = [spearman(np.array([c.predicted_rate for c in g]), np.array([c.rate for c in g])) for g in groups]
    return Decisions(
        len(groups), len(choices), float(regrets.mean()), float(np.quantile(regrets, 0.9)),
        float(np.mean([c.top_two for c in choices])), float(np.mean([c.broken for c in choices])),
        float(np.nanmean(ranks)), len(device), float(np.mean([c.regret for c in device])) if device else float("nan"),
    )  # fmt: skip


def _grouped(rows: Sequence[Scored], confidence: float, names: tuple[str, ...]) -> list[list[Candidate]]:
    """Candidates by group; several measurements of one candidate are averaged.

    A TPOT whose own TTFT is flagged as queueing was not measured at its stated concurrency, so it is no candidate.
    """
    queued = {_configuration(s) for s in rows if "queueing" in s.row.text("flag")}
    found: dict[Hashable, dict[Hashable, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for s in rows:
        candidate = _candidate(s, confidence)
        if candidate is not None and _configuration(s) not in queued:
            group = tuple(s.row.text(n) for n in names)
            found[group][candidate.device, candidate.layout, candidate.tokens].append(candidate)
    groups = [[_mean(same) for same in group.values()] for group in found.values()]
    return [g for g in groups if len(g) >= _FEWEST]


def _configuration(s: Scored) -> Hashable:
    """Everything that tells one run from another."""
    return tuple(s.row.text(n) for n in ("hardware", *_NAMES, *_LAYOUT, "batch", "engine_version"))


def _candidate(s: Scored, confidence: float) -> Candidate | None:
    """The candidate behind a TPOT row; None for other rows and refused ones."""
    if s.kind != "closed-loop serving" or s.row.text("metric") != "tpot" or s.row.text("flag"):
        return None
    if not isinstance(s.outcome, Predicted):
        return None
    try:
        clients, devices = s.row.number("batch"), s.row.number("n_devices")
    except Refused:
        return None
    # The band is log-normal: p90 lies P90 standard deviations above the expected value.
    deviations = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(0.9)
    cautious = s.outcome.value * (s.outcome.high / s.outcome.value) ** deviations
    unit = s.row.unit
    layout = tuple(s.row.text(n) for n in _LAYOUT)
    return Candidate(
        s.row.hardware, layout, clients / devices, s.measured * unit, s.outcome.value * unit, cautious * unit
    )


def _mean(same: list[Candidate]) -> Candidate:
    first = same[0]
    m, p, c = (float(np.mean([getattr(x, f) for x in same])) for f in ("measured", "predicted", "cautious"))
    return Candidate(first.device, first.layout, first.tokens, m, p, c)


def _differ(group: list[Candidate], what: Callable[[Candidate], Hashable]) -> bool:
    return len({what(c) for c in group}) > 1


def _limits(group: list[Candidate]) -> list[float]:
    return [float(x) for x in np.quantile([c.measured for c in group], QUANTILES)]


def _choose(group: list[Candidate], limit: float) -> Choice:
    allowed = [c for c in group if c.cautious <= limit]
    # Where nothing seems to meet the limit, the fastest comes nearest.
    pick = max(allowed, key=lambda c: c.predicted_rate) if allowed else min(group, key=lambda c: c.predicted)
    best = max((c for c in group if c.measured <= limit), key=lambda c: c.rate)
    ranked: list[Hashable] = []
    for c in sorted(allowed or [pick], key=lambda c: -c.predicted_rate):
        if (c.device, c.layout) not in ranked:
            ranked.append((c.device, c.layout))
    return Choice(max(0.0, 1 - pick.rate / best.rate), pick.measured > limit, (best.device, best.layout) in ranked[:2])
