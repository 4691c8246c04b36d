"""What other limits, prices and choices would cost: each by solving again, not by extrapolation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from perfmodel.catalog import load_model
from perfmodel.planner.cells import Fleet, ask, fleet_of
from perfmodel.planner.certainty import certainty
from perfmodel.planner.columns import Column
from perfmodel.planner.confirm import confirm
from perfmodel.planner.explain import bought_text
from perfmodel.planner.layout import Layout
from perfmodel.planner.offer import Offer
from perfmodel.planner.optimum import Extra, Optimum, optimise
from perfmodel.planner.periods import held, merged
from perfmodel.planner.program import USD_PER_HOUR, Program, Question, nodes_bought
from perfmodel.planner.quality import lossy, technique
from perfmodel.spec.workload import Limit

LOOSER = 1.25
"""Factor by which each latency limit is loosened."""
CHEAPER = 0.9
"""Factor on each node type's price."""
BUDGET_S = 60.0
"""Seconds after which only the layouts nearest to the plan are sought anew under other limits."""
PROMISED = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "longest_gap": "longest gap", "e2e": "end to end"}
"""Metrics as promises name them."""
_GAP = 5e-3
_SECONDS = 3.0
_MARGIN = 1e-3
_ENTRY_STEPS = 5


def what_if(fleet: Fleet, question: Question, best: Optimum, *, replay_all: bool = False) -> dict[str, Any]:
    """Sensitivities of a plan, each a solved plan of its own. Keys are missing where the plan has nothing of the kind.

    replay_all: replay each of these plans, and say what it breaks.
    """
    ask_replay = _Replay(fleet if replay_all else None)
    found: dict[str, Any] = {"limits": latency_limits(fleet, best, ask_replay)}
    if question.objective == "cost":
        found["prices"] = prices(question, best, ask_replay)
    found["lossy"] = lossy_formats(fleet, best, ask_replay)
    found["certainty"] = certainty(fleet, best)
    if question.resilience is not None:
        found["resilience"] = without_resilience(question, best, ask_replay)
    if len(question.shares) > 1:
        found["elasticity"] = elasticity(fleet, question, best)
    return {k: v for k, v in found.items() if v}


@dataclass(frozen=True)
class _Replay:
    """Replays what is solved, where that was asked for."""

    fleet: Fleet | None

    def of(self, found: Optimum, fleet: Fleet | None = None) -> dict[str, Any]:
        """{"replayed": …} of a solution, of the plan's own fleet or another; nothing where no replay was asked for."""
        if self.fleet is None:
            return {}
        return {"replayed": confirm(fleet or self.fleet, found.program.question, found.values).data}


def _against(value: float, best: Optimum) -> float:
    """Relative change of the objective: positive is worse, whichever way the objective points."""
    now = best.solution.objective
    return (value - now) / max(abs(now), 1e-12)


def latency_limits(fleet: Fleet, best: Optimum, replayed: _Replay) -> list[dict[str, Any]]:
    """For every limit of every service: the objective with it a quarter looser, over all layouts.

    A looser limit raises only the columns that it limits, and those that it refused: they are sought anew. Past a time limit only
    those of the layouts nearest to the plan are (`restricted`): other layouts might save more. Where the replay has lowered
    columns of the plan, the change is counted from the plan without that, as the new columns have not been replayed.
    """
    rows = []
    begun = time.perf_counter()
    lowered = any("replay" in e.column.limited_by for e in best.program.question.entries)
    reference = fleet.with_() if lowered else fleet
    base = optimise(ask(reference), gap=_GAP, time_limit=_SECONDS) if lowered else best
    near = {c.layout for c in nearest(best)}
    for served in fleet.spec.served:
        goals = served.workload.objectives
        for metric in ("ttft", "tpot", "itl", "longest_gap", "e2e"):
            for name, limit in getattr(goals, metric).items():
                other = Limit(float(limit) * LOOSER, limit.per_token * LOOSER)
                restricted = time.perf_counter() - begun > BUDGET_S
                changed = _with_limit(reference, served.name, metric, name, other, near if restricted else None)
                solved = None
                if not any(s.unserved() for s in changed.services):
                    solved = optimise(ask(changed), gap=_GAP, time_limit=_SECONDS)
                rows.append({
                    "service": served.name, "metric": metric, "percentile": name, "limit_s": float(limit),
                    "looser_s": float(other), "restricted": restricted, **_solved(solved, base, replayed, changed),
                })  # fmt: skip
    return rows


def nearest(best: Optimum, more: int = 2) -> list[Column]:
    """Columns that a plan uses, and those unused ones of the smallest reduced cost."""
    entries = best.program.question.entries
    used = [i for i in range(len(entries)) if best.values.get(f"n_{i}", 0.0) > 0.5]
    rest = sorted(set(range(len(entries))) - set(used), key=lambda i: best.relaxed.reduced.get(f"n_{i}", 0.0))
    return [entries[i].column for i in used + rest[:more]]


def _with_limit(
    fleet: Fleet, name: str, metric: str, at: str, limit: Limit, among: Collection[Layout] | None
) -> Fleet:  # fmt: skip
    """The fleet with one limit of one service loosened; among: only these layouts are sought anew."""
    services = []
    for s in fleet.services:
        if s.name == name:
            goals = s.objectives.model_copy(update={metric: {**getattr(s.objectives, metric), at: limit}})
            promise = f"{PROMISED[metric]} {at}"
            found = {
                label: e.loosened(s.seen_by(goals, e.offers[0]), promise, among) for label, e in s.found.items()
            }  # fmt: skip
            s = replace(s, objectives=goals, found=found)
        services.append(s)
    return replace(fleet, services=services)


def _solved(
    found: Optimum | None, best: Optimum, replayed: _Replay, fleet: Fleet | None = None
) -> dict[str, Any]:
    if found is None or not found.solution.ok:
        return {"objective": None, "change": None, "buys": []}
    return {
        "objective": abs(found.solution.objective), "change": _against(found.solution.objective, best),
        "buys": bought_text(found.program.question, found.values), **replayed.of(found, fleet),
    }  # fmt: skip


def prices(question: Question, best: Optimum, replayed: _Replay) -> list[dict[str, Any]]:
    """For every offer that is bought: the plan at nine tenths of its price; of the others, the price at which they would be.

    The reduced cost of a node in the relaxation says how far its price must fall before it enters there. Whole nodes move that
    point, so it is sought with the integer program.
    """
    rows = []
    for t, offer in enumerate(question.offers):
        if offer.price is None:
            continue
        price = offer.price * USD_PER_HOUR
        row: dict[str, Any] = {"offer": offer.label, "price_usd_per_hour": price}
        if _buys(best, t):
            cheaper = _at_price(question, t, CHEAPER)
            row["cheaper"] = {"price_usd_per_hour": price * CHEAPER, **_solved(cheaper, best, replayed)}
        elif any(e.column.offer is offer for e in question.entries):
            row |= _entry_price(question, best, t, price)
        rows.append(row)
    return rows


def _buys(found: Optimum, t: int) -> bool:
    return any(v > 0.5 for name, v in found.values.items() if name.startswith(f"N_{t}_"))


def _at_price(question: Question, t: int, factor: float, extra: Extra | None = None) -> Optimum:
    """The plan with one offer's prices, all terms, multiplied."""
    old = question.offers[t]
    scaled = tuple(replace(x, price=None if x.price is None else x.price * factor) for x in old.paid)
    new = replace(old, price=(old.price or 0.0) * factor, tariffs=scaled)
    return optimise(with_offer(question, t, new), gap=_GAP, time_limit=_SECONDS, extra=extra)


def with_offer(question: Question, t: int, new: Offer) -> Question:
    """The question with one offer exchanged, in its columns too."""
    old = question.offers[t]
    demands = tuple(
        replace(d, columns=tuple(replace(c, offer=new) if c.offer is old else c for c in d.columns)) for d in question.demands
    )
    return replace(question, offers=(*question.offers[:t], new, *question.offers[t + 1 :]), demands=demands)


def _entry_price(question: Question, best: Optimum, t: int, price: float) -> dict[str, Any]:
    """Highest price at which an offer that is not bought now would be: there the best plan that buys it costs what this one does.

    With prices times f a plan that buys it costs C + f K, so it ties at f = (V - C)/K, V being the plan's cost. The best plan at
    that f ties at a higher one or at the same (Dinkelbach, Management Science 13, 1967, p. 492).
    """
    reduced = best.relaxed.reduced.get(f"N_{t}_0_0", 0.0) / question.offers[t].block
    value = best.solution.objective

    def buys_it(program: Program) -> None:
        program.problem += program.bought(t, 0) >= question.offers[t].block, "buys_it"

    factor, entered = 1.0, 0.0
    for _ in range(_ENTRY_STEPS):
        found = _at_price(question, t, factor, buys_it)
        if not found.solution.ok:
            break
        spent = _spent(found, t)
        tie = factor * (value - found.solution.objective + spent) / max(spent, 1e-12)
        if tie <= entered + _MARGIN:
            break
        entered = factor = min(tie, 1.0)
    return {
        "relaxed_entry_usd_per_hour": price - reduced,
        "enters_at_usd_per_hour": entered * price if entered > 0 else None,
        "enters_at_share": entered if entered > 0 else None,
    }  # fmt: skip


def _spent(found: Optimum, t: int) -> float:
    """USD/h of a solution on one offer."""
    q = found.program.question
    return sum(
        share * n * (tariff.price or 0.0) * USD_PER_HOUR
        for period, share in enumerate(q.shares)
        for n, tariff in zip(nodes_bought(q, found.values, t, period), q.offers[t].paid, strict=True)
    )  # fmt: skip


def lossy_formats(fleet: Fleet, best: Optimum, replayed: _Replay) -> list[dict[str, Any]]:
    """For every lossy format in use: the objective without it. Formats of weights by re-solving, of the cache by enumeration."""
    rows = []
    used = {
        e.column.layout.weight_dtype for i, e in enumerate(best.program.question.entries) if best.values.get(f"n_{i}", 0) > 0.5
    }  # fmt: skip
    known = {f for s in fleet.spec.served for f in lossy(fleet.choices, load_model(s.model))}
    for name in sorted(used & known):
        without = ask(fleet, lambda c, name=name: c.layout.weight_dtype != name)  # type: ignore[misc]
        found = _optimum(fleet, without)
        rows.append({"what": f"{name} weights", "without": _solved(found, best, replayed)})
    for several in sorted(_techniques_in_use(best)):
        if any(technique(t) == "lossy" for t in several):
            without = ask(fleet, lambda c, several=several: c.layout.techniques != several)  # type: ignore[misc]
            rows.append({"what": " + ".join(several), "without": _solved(_optimum(fleet, without), best, replayed)})
    kv = fleet.choices.kv_dtype
    if kv not in (None, "auto"):
        plain = fleet.choices.model_copy(update={"kv_dtype": None})
        built: dict[str, Any] = {}
        other = fleet_of(fleet.spec, fleet.base, fleet.load, fleet.offers, built, plain, fleet.levels)
        rows.append({"what": f"KV cache in {kv}", "without": _solved(_optimum(other, ask(other)), best, replayed, other)})
    return rows


def _techniques_in_use(best: Optimum) -> set[tuple[str, ...]]:
    entries = best.program.question.entries
    return {e.column.layout.techniques for i, e in enumerate(entries) if best.values.get(f"n_{i}", 0) > 0.5} - {()}


def _optimum(fleet: Fleet, question: Question) -> Optimum | None:
    for service, demand in zip(fleet.services, question.demands, strict=True):
        missing = set(range(len(service.buckets))) - {k for c in demand.columns for k in c.buckets}
        if missing:
            return None
    found = optimise(question, gap=_GAP, time_limit=_SECONDS)
    return found if found.solution.ok else None


def without_resilience(question: Question, best: Optimum, replayed: _Replay) -> dict[str, Any]:
    """What the plan would be if nothing ever failed."""
    return _solved(optimise(replace(question, resilience=None), gap=_GAP, time_limit=_SECONDS), best, replayed)


def elasticity(fleet: Fleet, question: Question, best: Optimum) -> dict[str, Any]:
    """The fixed fleet's price, the elastic one's at other lags, and the lag from which elasticity saves nothing.

    A longer lag only changes for how long each level is held, so every lag is the same program with other shares of time.
    """
    peak = _at_lag(fleet, question, math.inf)
    day = sum(s for s, _ in fleet.profile)
    saves: Callable[[float], bool] = lambda x: x < peak - _MARGIN * abs(peak)  # noqa: E731
    low, high = 0.0, day
    if not saves(_at_lag(fleet, question, 0.0)):
        high = 0.0
    for _ in range(8):
        if high - low < 0.01 * day:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if saves(_at_lag(fleet, question, middle)) else (low, middle)
    lags = [0.0, fleet.lag, 2 * fleet.lag, 4 * fleet.lag]
    return {
        "lag_s": fleet.lag, "fixed": peak, "change": (peak - best.solution.objective) / max(abs(best.solution.objective), 1e-12),
        "by_lag": [{"lag_s": x, "objective": _at_lag(fleet, question, x)} for x in dict.fromkeys(lags)],
        "stops_paying_at_s": high,
    }  # fmt: skip


def _at_lag(fleet: Fleet, question: Question, lag: float) -> float:
    """Objective with another lag: levels between those enumerated are held at the next higher one."""
    known = [level.multiple for level in fleet.levels]
    shares = [0.0] * len(known)
    for level in merged(held(fleet.profile, lag), most=10**6):
        place = max((i for i, m in enumerate(known) if m >= level.multiple - 1e-9), default=0)
        shares[place] += level.share
    return optimise(replace(question, shares=tuple(shares)), gap=_GAP, time_limit=_SECONDS).solution.objective
