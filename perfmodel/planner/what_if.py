"""What other limits, prices and choices would cost: each by solving again, not by extrapolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from perfmodel.catalog import load_model
from perfmodel.planner.cells import Fleet, ask, fleet_of
from perfmodel.planner.certainty import certainty
from perfmodel.planner.columns import Column
from perfmodel.planner.explain import bought_text
from perfmodel.planner.offer import Offer
from perfmodel.planner.optimum import Optimum, optimise
from perfmodel.planner.periods import held, merged
from perfmodel.planner.program import USD_PER_HOUR, Question
from perfmodel.planner.quality import lossy
from perfmodel.spec.workload import Limit, Objectives

LOOSER = 1.25
"""Factor by which each latency limit is loosened."""
CHEAPER = 0.9
"""Factor on each node type's price."""
_GAP = 5e-3
_SECONDS = 3.0
_MARGIN = 1e-3


def what_if(fleet: Fleet, question: Question, best: Optimum) -> dict[str, Any]:
    """Sensitivities of a plan, each a solved plan of its own. Keys are missing where the plan has nothing of the kind."""
    found: dict[str, Any] = {"limits": latency_limits(fleet, best)}
    if question.objective == "cost":
        found["prices"] = prices(question, best)
    found["lossy"] = lossy_formats(fleet, best)
    found["certainty"] = certainty(fleet, best)
    if question.resilience is not None:
        found["resilience"] = without_resilience(question, best)
    if len(question.shares) > 1:
        found["elasticity"] = elasticity(fleet, question, best)
    return {k: v for k, v in found.items() if v}


def _against(value: float, best: Optimum) -> float:
    """Relative change of the objective: positive is worse, whichever way the objective points."""
    now = best.solution.objective
    return (value - now) / max(abs(now), 1e-12)


def latency_limits(fleet: Fleet, best: Optimum) -> list[dict[str, Any]]:
    """For every limit of every service: the objective with it a quarter looser, over the layouts nearest to the plan.

    Their columns are found anew; other layouts might save more, so a saving is at least what is told. Where the replay has
    tightened columns of the plan, the change is counted from the plan without that, as the new columns have not been replayed.
    """
    rows = []
    near = nearest(best)
    tightened = any("replay" in e.column.limited_by for e in best.program.question.entries)
    base = optimise(ask(fleet.with_(near)), gap=_GAP, time_limit=_SECONDS) if tightened else best
    for at, served in enumerate(fleet.spec.served):
        goals = served.workload.objectives
        for metric in ("ttft", "tpot", "itl", "longest_gap", "e2e"):
            for name, limit in getattr(goals, metric).items():
                other = Limit(float(limit) * LOOSER, limit.per_token * LOOSER)
                solved = _with_limit(fleet, near, at, goals, metric, name, other)
                rows.append({
                    "service": served.name, "metric": metric, "percentile": name, "limit_s": float(limit),
                    "looser_s": float(other), **_solved(solved, base),
                })  # fmt: skip
    return rows


def nearest(best: Optimum, more: int = 2) -> list[Column]:
    """Columns that a plan uses, and those unused ones of the smallest reduced cost."""
    entries = best.program.question.entries
    used = [i for i in range(len(entries)) if best.values.get(f"n_{i}", 0.0) > 0.5]
    rest = sorted(set(range(len(entries))) - set(used), key=lambda i: best.relaxed.reduced.get(f"n_{i}", 0.0))
    return [entries[i].column for i in used + rest[:more]]


def _with_limit(
    fleet: Fleet, near: list[Column], at: int, goals: Objectives, metric: str, name: str, limit: Limit
) -> Optimum | None:
    changed = goals.model_copy(update={metric: {**getattr(goals, metric), name: limit}})
    services = list(fleet.spec.served)
    workload = services[at].workload.model_copy(update={"objectives": changed})
    services[at] = services[at].model_copy(update={"workload": workload})
    other = fleet.with_(near, services=tuple(services))
    if any(s.unserved() for s in other.services):
        return None
    return optimise(ask(other), gap=_GAP, time_limit=_SECONDS)


def _solved(found: Optimum | None, best: Optimum) -> dict[str, Any]:
    if found is None or not found.solution.ok:
        return {"objective": None, "change": None, "buys": []}
    return {
        "objective": abs(found.solution.objective), "change": _against(found.solution.objective, best),
        "buys": bought_text(found.program.question, found.values),
    }  # fmt: skip


def prices(question: Question, best: Optimum) -> list[dict[str, Any]]:
    """For every offer that is bought: the plan at nine tenths of its price; of the others, the price at which they would be.

    The reduced cost of a node in the relaxation says how far its price must fall before it enters there. Whole nodes move that
    point, so it is sought again with the integer program: the highest price at which the offer is bought.
    """
    rows = []
    for t, offer in enumerate(question.offers):
        if offer.price is None:
            continue
        price = offer.price * USD_PER_HOUR
        row: dict[str, Any] = {"offer": offer.label, "price_usd_per_hour": price}
        if _buys(best, t):
            cheaper = _at_price(question, t, CHEAPER)
            row["cheaper"] = {"price_usd_per_hour": price * CHEAPER, **_solved(cheaper, best)}
        elif any(e.column.offer is offer for e in question.entries):
            row |= _entry_price(question, best, t, price)
        rows.append(row)
    return rows


def _buys(found: Optimum, t: int) -> bool:
    return any(v > 0.5 for name, v in found.values.items() if name.startswith(f"N_{t}_"))


def _at_price(question: Question, t: int, factor: float) -> Optimum:
    """The plan with one offer's prices, all terms, multiplied."""
    old = question.offers[t]
    scaled = tuple(replace(x, price=None if x.price is None else x.price * factor) for x in old.paid)
    new = replace(old, price=(old.price or 0.0) * factor, tariffs=scaled)
    return optimise(with_offer(question, t, new), gap=_GAP, time_limit=_SECONDS)


def with_offer(question: Question, t: int, new: Offer) -> Question:
    """The question with one offer exchanged, in its columns too."""
    old = question.offers[t]
    demands = tuple(
        replace(d, columns=tuple(replace(c, offer=new) if c.offer is old else c for c in d.columns)) for d in question.demands
    )
    return replace(question, offers=(*question.offers[:t], new, *question.offers[t + 1 :]), demands=demands)


def _entry_price(question: Question, best: Optimum, t: int, price: float) -> dict[str, Any]:
    """Highest price (to 2 %) at which an offer that is not bought now would be."""
    reduced = best.relaxed.reduced.get(f"N_{t}_0_0", 0.0) / question.offers[t].block
    low, high = 0.0, 1.0
    guess = max(1 - reduced / price, 0.0)
    for _ in range(6):
        factor = guess if low == 0.0 and high == 1.0 and 0.02 < guess < 0.98 else (low + high) / 2
        low, high = (factor, high) if _buys(_at_price(question, t, factor), t) else (low, factor)
        if high - low < 0.02:
            break
    entered = low > 0
    return {
        "relaxed_entry_usd_per_hour": price - reduced,
        "enters_at_usd_per_hour": low * price if entered else None,
        "enters_at_share": low if entered else None,
    }  # fmt: skip


def lossy_formats(fleet: Fleet, best: Optimum) -> list[dict[str, Any]]:
    """For every lossy format in use: the objective without it. Formats of weights by re-solving, of the cache by enumeration."""
    rows = []
    used = {
        e.column.layout.weight_dtype for i, e in enumerate(best.program.question.entries) if best.values.get(f"n_{i}", 0) > 0.5
    }  # fmt: skip
    known = {f for s in fleet.spec.served for f in lossy(fleet.choices, load_model(s.model))}
    for name in sorted(used & known):
        without = ask(fleet, lambda c, name=name: c.layout.weight_dtype != name)  # type: ignore[misc]
        found = _optimum(fleet, without)
        rows.append({"what": f"{name} weights", "without": _solved(found, best)})
    kv = fleet.choices.kv_dtype
    if kv not in (None, "auto"):
        plain = fleet.choices.model_copy(update={"kv_dtype": None})
        built: dict[str, Any] = {}
        other = fleet_of(fleet.spec, fleet.base, fleet.load, fleet.offers, built, plain, fleet.levels)
        rows.append({"what": f"KV cache in {kv}", "without": _solved(_optimum(other, ask(other)), best)})
    return rows


def _optimum(fleet: Fleet, question: Question) -> Optimum | None:
    for service, demand in zip(fleet.services, question.demands, strict=True):
        missing = set(range(len(service.buckets))) - {k for c in demand.columns for k in c.buckets}
        if missing:
            return None
    found = optimise(question, gap=_GAP, time_limit=_SECONDS)
    return found if found.solution.ok else None


def without_resilience(question: Question, best: Optimum) -> dict[str, Any]:
    """What the plan would be if nothing ever failed."""
    return _solved(optimise(replace(question, resilience=None), gap=_GAP, time_limit=_SECONDS), best)


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
