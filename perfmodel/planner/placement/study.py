"""The question `perfmodel place cache` answers: which tier should hold how much of a trace's prefixes, and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel import memory, prices
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.placement.cache import MONTH_S, Baseline, Placement, TierUse, lru, place, sizes
from perfmodel.planner.placement.profile import Profile, profile
from perfmodel.planner.placement.tiers import Tier, tiers
from perfmodel.serving.clock import StepClock
from perfmodel.serving.prefix import imbalance, route, uses
from perfmodel.serving.queueing import Instance, Mix
from perfmodel.serving.requests import Requests
from perfmodel.serving.trace import read_trace
from perfmodel.spec.deployment import Routing
from perfmodel.spec.workload import Trace

_SAMPLES = 600
_MOST_REPLICAS = 4096


@dataclass(frozen=True)
class Study:
    """A placement, what it is compared with, and what it assumes."""

    estimator: Estimator
    replicas: int
    routing: Routing
    imbalance: float
    profile: Profile
    tiers: tuple[Tier, ...]
    placement: Placement
    sizes: dict[str, float]
    """Tokens that each tier should hold."""
    ladder: tuple[Placement, ...]
    """The best placements over the fastest tier, the two fastest, and so on."""
    baselines: tuple[Baseline, ...]
    price: float | None
    """USD per second of one instance."""
    price_source: str
    described: str

    def worth(self, use: TierUse) -> float | None:
        """USD per month that one more GB saves; None without a price."""
        return None if self.price is None else use.value_per_gb * self.price * MONTH_S

    def data(self) -> dict[str, Any]:
        """Everything in base SI (and USD per GB-month), for JSON."""
        p, devices = self.profile, int(self.estimator.par.devices)
        return {
            "model": self.estimator.model.name, "hardware": self.estimator.machine.name, "devices_per_replica": devices,
            "replicas": self.replicas, "routing": self.routing, "imbalance": self.imbalance, "trace": self.described,
            "prompt_tokens_per_s": p.prompt, "prefill_gpu_s_per_s": p.work * devices, "warm_up_s": p.warm_up,
            "hit_share": self.placement.hit_share, "recomputed_share": self.placement.recomputed,
            "new_share": self.placement.new, "saved_gpu_s_per_s": self.placement.saved * devices,
            "status": self.placement.solution.status, "gap": self.placement.solution.gap,
            "price_usd_per_s": self.price, "price_source": self.price_source,
            "tiers": [self._tier(u) for u in self.placement.uses],
            "ladder": [{"tiers": [u.tier.name for u in x.uses], "hit_share": x.hit_share,
                        "saved_gpu_s_per_s": x.saved * devices} for x in self.ladder],
            "lru": [{"tiers": b.name, "hit_share": sum(b.hits) / p.prompt, "saved_gpu_s_per_s": b.saved * devices,
                     "limited_by": b.limited} for b in self.baselines],
        }  # fmt: skip

    def _tier(self, u: TierUse) -> dict[str, Any]:
        t, devices = u.tier, int(self.estimator.par.devices)
        return {
            "tier": t.name, "what": t.title, "capacity_bytes": t.bytes, "used_bytes": u.used * t.token_bytes,
            "size_bytes": self.sizes[t.name] * t.token_bytes if t.name in self.sizes else None,
            "hit_share": u.hits / self.profile.prompt, "saved_gpu_s_per_s": u.saved * devices,
            "fetch_s_per_token": t.fetch, "read_share": u.read, "write_share": u.write, "keeps_s": u.keeps,
            "gpu_s_per_s_per_gb": u.value_per_gb * devices, "usd_per_gb_month": self.worth(u),
            "price_usd_per_gb_month": t.usd_per_gb_month,
        }  # fmt: skip


def study(
    model: str, hardware: str, trace: str, *, replicas: int | None = None, routing: Routing = "prefix-affine",
    guard: float | None = None, wanted: Mapping[str, str] | None = None, gb_prices: Mapping[str, float] | None = None,
    drive_writes_per_day: float | None = None, busy: float = 0.8, objective: str = "net", overlap: bool = False,
    price: float | None = None, block_tokens: int = 512, **instance: Any,
) -> Study:  # fmt: skip
    """Place the prefixes of a trace with block ids over the tiers of a fleet of equal instances.

    replicas: as few as carry the trace without any cache hit, unless given. price: USD per second of a whole node, else the
    catalogue's. busy: share of each path's rate that may be planned for. The rest as in `tiers` and `place`.
    """
    if not 0 < busy <= 1:
        raise SpecError(f"--busy must lie in (0, 1], got {busy:g}")
    e = Estimator(model, hardware, **instance)
    e.require_fit()
    shared: dict[str, Any] = {"gb_prices": gb_prices, "drive_writes_per_day": drive_writes_per_day}
    # A mistyped tier is told before the trace is read.
    tiers(e, 1, block_tokens, 0.0, wanted, **shared)
    requests = read_trace(Trace(file=trace, block_tokens=block_tokens), Path())
    span = float(requests.arrival[-1])
    if span <= 0:
        raise SpecError("all requests arrive at the same time: no rate can be read from the trace", file=trace)
    given = (wanted or {}).get("hbm")
    count, spare = (replicas, 0.0) if replicas and given else _fleet(e, requests, len(requests) / span, replicas)
    homes = route(requests, count, routing, guard=guard)
    u = uses(requests, homes)
    p = profile(e, requests, u)
    held = tiers(e, count, block_tokens, spare, wanted, **shared)
    usd, source = _price(e, price)
    options: dict[str, Any] = {"busy": busy, "objective": objective, "overlap": overlap}
    best = place(p, held, usd_per_second=usd, **options)
    ladder = [place(p, held[: n + 1], usd_per_second=usd, **options) for n in range(len(held))]
    chains = [held, *([t] for t in held)] if len(held) > 1 else [held]
    return Study(
        e, count, routing, imbalance(requests, count, routing, guard=guard), p, tuple(held), best,
        sizes(p, held, usd_per_second=usd, **options), tuple(ladder),
        tuple(lru(e, u, p, chain, count, busy=busy) for chain in chains), usd, source,
        f"{Path(trace).name}: {len(requests):,} requests in {span:,.0f} s",
    )  # fmt: skip


def _fleet(e: Estimator, requests: Requests, rate: float, replicas: int | None) -> tuple[int, float]:
    """(replicas, tokens of cache beside the running batch of one): the running batch as it is without any cache hit."""
    chosen = requests.take(np.unique(np.linspace(0, len(requests) - 1, _SAMPLES).astype(int)))
    mix = Mix(chosen.input, chosen.output, np.full(len(chosen), 1 / len(chosen)))
    block = e.engine.block_tokens
    held = float(memory.cache_bytes(e.model, e.par, e.formats, e.par.dp, mix.context, block)) / mix.context
    room = e.kv_free / held * int(e.par.dp)
    one = Instance(StepClock(e, mix.context), "colocated", room)

    def fits(n: int) -> bool:
        return one.state(rate / n, mix).feasible

    if replicas is None or not fits(replicas):
        least = next((n for n in range(1, _MOST_REPLICAS + 1) if fits(n)), None)
        if least is None:
            raise Infeasible("no number of replicas serves the trace: its requests do not fit one", nearest="a larger --tp")
        if replicas is not None:
            raise Infeasible(
                f"{replicas} replicas cannot carry the trace without cache hits: {one.state(rate / replicas, mix).reason}",
                nearest=f"--replicas {least}, or state the cache's room with --tier hbm=SIZE",
            )
        replicas = least
    return replicas, room * (1 - one.state(rate / replicas, mix).kv_share)


def _price(e: Estimator, node: float | None) -> tuple[float | None, str]:
    """USD per second of one instance: its part of a node's price."""
    share = int(e.par.devices) / e.machine.devices_per_node
    if node is not None:
        return node * share, "as given"
    found = prices.on_demand(e.machine.name)
    return (found.usd_per_s * share, found.source) if found else (None, "")
