"""Low-rank adapters over replicas: which stay in device memory, which in host memory, which are read from disk.

Adapter a has s_a bytes and l_a requests/s; R equal replicas of the base model serve them. x_ar = 1 where replica r keeps
a in device memory for good, z_ar = 1 where its host does. Requests go to replicas by adapter: y_ar meet it on the device,
u_ar fetch it from host memory in t_a, v_ar from disk in t'_a, over the host link. With e the imbalance allowed and d the
seconds a request keeps its adapter,

    minimise  sum_ar (t_a u_ar + t'_a v_ar)                    [seconds of fetching per second]
    sum_r (y + u + v)_ar = l_a                                 every request is served
    y_ar <= l_a x_ar,  u_ar <= l_a z_ar                        from where it lies
    sum_a x_ar + d sum_a (u + v)_ar <= slots                   kept ones, and by Little's law those of requests under way
    sum_a s_a (x_ar + d (u + v)_ar) <= device bytes
    sum_a s_a z_ar <= host bytes
    sum_a (y + u + v)_ar <= (1 + e) sum_a l_a / R              no replica is overrun

Fetched adapters are dropped after use: what a cache of the remaining slots would save is not counted, and requests under
way for the same adapter are counted as if they shared no slot, so a plan promises no more than it keeps. Several
adapters in one batch: S-LoRA (arXiv:2311.03285), Punica (arXiv:2310.18547).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pulp

from perfmodel import catalog
from perfmodel.errors import Infeasible, SpecError
from perfmodel.kernels.transfer import drives, host_copy_seconds
from perfmodel.machine import Machine
from perfmodel.parameters import block_weights
from perfmodel.planner.solver import Solution, solve
from perfmodel.spec.model import Model

Targets = Literal["attention", "linear"]
_PARTS = {"attention": ("attention", "latent", "ssm"), "linear": ("attention", "latent", "ssm", "dense_ffn", "shared")}
_WIDTH = 2  # bytes per element: adapters are kept in 16 bits whatever the base
GAP = 1e-3


def adapter_bytes(model: Model, rank: int, targets: Targets = "linear") -> float:
    """Bytes of one adapter: rank (rows + columns) elements for every matrix it changes (arXiv:2106.09685).

    Llama-2-7B, rank 16 on q, k, v and o: 32 layers x 4 x 16 x (4096 + 4096) x 2 B = 33.6 MB.

    >>> adapter_bytes(catalog.load_model("llama-2-7b"), 16, "attention")
    33554432.0
    """
    if rank < 1:
        raise SpecError(f"an adapter's rank must be at least 1, got {rank}")
    elements = 0
    for name, layers in model.block_counts().items():
        weights = block_weights(model.blocks[name], model.hidden)
        changed = [w for w in weights if w.matrix and w.part in _PARTS[targets]]
        elements += layers * sum(rank * (w.rows + w.cols) * w.copies for w in changed)
    return float(elements * _WIDTH)


@dataclass(frozen=True)
class Adapter:
    """One adapter: requests/s that ask for it, and bytes."""

    name: str
    rate: float
    size: float


@dataclass(frozen=True)
class Replicas:
    """Equal replicas of the base model, and how long an adapter of `size` bytes takes to reach the device."""

    count: int
    slots: int
    """Adapters in device memory at once (vLLM: max_loras; SGLang: max_loras_per_batch)."""
    device_bytes: float = math.inf
    host_bytes: float = math.inf
    request_s: float = 0.0
    """Seconds a request keeps its adapter."""
    imbalance: float = 0.1
    machine: Machine | None = None
    link_rate: float = math.inf
    """Bytes/s from host memory where no machine is given."""
    disk_rate: float = math.inf

    def __post_init__(self) -> None:
        if self.count < 1 or self.slots < 1 or self.request_s < 0 or self.imbalance < 0:
            raise SpecError("replicas and slots must be at least 1, request time and imbalance at least 0")
        if min(self.device_bytes, self.host_bytes) < 0:
            raise SpecError("device and host bytes must not be negative")

    def fetch_seconds(self, size: float) -> tuple[float, float]:
        """(from host memory, from disk)."""
        m = self.machine
        if m is None:
            near = size / self.link_rate
            return near, near + size / self.disk_rate
        near = float(host_copy_seconds(m, size))
        if m.node is None or not m.node.drives:
            return near, math.inf
        drive = drives(catalog.load_device(m.node.drives[0].device), m.node.drives[0].count, write=False)
        return near, near + float(drive.seconds(size, 1.0, random=False))


@dataclass(frozen=True)
class Pinning:
    """Where adapters lie and how requests reach them; arrays (adapters, replicas)."""

    on_device: np.ndarray
    on_host: np.ndarray
    met: np.ndarray
    """Requests/s that meet their adapter on the device."""
    from_host: np.ndarray
    from_disk: np.ndarray
    fetching: float
    """Seconds of fetching per second, all replicas."""
    bound: float
    seconds: float
    method: str

    @property
    def gap(self) -> float:
        return (self.fetching - self.bound) / self.fetching if self.fetching > 1e-12 else 0.0

    @property
    def hits(self) -> float:
        """Share of requests that meet their adapter on the device."""
        return float(self.met.sum() / (self.met + self.from_host + self.from_disk).sum())

    @property
    def loads(self) -> np.ndarray:
        """Requests/s of each replica."""
        total: np.ndarray = (self.met + self.from_host + self.from_disk).sum(axis=0)
        return total


@dataclass(frozen=True)
class Rules:
    """What restricts the program beside the formulation: alternatives, and the relaxation."""

    fixed: np.ndarray | None = None
    """On-device placement (adapters, replicas) that is given."""
    at_most: int | None = None
    """Replicas that may keep one adapter."""
    whole: bool = True
    """False: shares of adapters may be kept (the linear relaxation)."""


def program(adapters: list[Adapter], replicas: Replicas, rules: Rules = Rules()) -> pulp.LpProblem:
    """The integer program of the module's head."""
    p = pulp.LpProblem("adapters", pulp.LpMinimize)
    where = range(replicas.count)
    kind = "Binary" if rules.whole else "Continuous"
    names = [(a, r) for a in range(len(adapters)) for r in where]
    x = {k: p.add_variable(f"x_{k[0]}_{k[1]}", 0, 1, cat=kind) for k in names}
    y, u, v = ({k: p.add_variable(f"{n}_{k[0]}_{k[1]}", lowBound=0) for k in names} for n in "yuv")
    ample = sum(a.size for a in adapters) <= replicas.host_bytes
    z = {} if ample else {k: p.add_variable(f"z_{k[0]}_{k[1]}", 0, 1, cat=kind) for k in names}
    times = [replicas.fetch_seconds(a.size) for a in adapters]
    reachable = [math.isfinite(t[1]) for t in times]
    p.setObjective(pulp.lpSum(times[a][0] * u[a, r] + (times[a][1] * v[a, r] if reachable[a] else 0) for a, r in names))
    for a, adapter in enumerate(adapters):
        p += pulp.lpSum(y[a, r] + u[a, r] + v[a, r] for r in where) == adapter.rate, f"served_{a}"
        if rules.at_most is not None:
            p += pulp.lpSum(x[a, r] for r in where) <= rules.at_most, f"at_most_{a}"
        for r in where:
            p += y[a, r] <= adapter.rate * x[a, r], f"kept_{a}_{r}"
            if not ample:
                p += u[a, r] <= adapter.rate * z[a, r], f"host_{a}_{r}"
            if not reachable[a]:
                p += v[a, r] <= 0, f"no_disk_{a}_{r}"
            if rules.fixed is not None:
                p += x[a, r] == int(rules.fixed[a, r]), f"given_{a}_{r}"
    if rules.whole and rules.fixed is None:
        # How many a replica keeps: whole, so that solvers branch on it, and the largest first, replicas being alike.
        n = [p.add_variable(f"n_{r}", 0, replicas.slots, cat="Integer") for r in where]
        for r in where:
            p += pulp.lpSum(x[a, r] for a in range(len(adapters))) == n[r], f"count_{r}"
            if r:
                p += n[r - 1] >= n[r], f"numbered_{r}"
    d, share = replicas.request_s, sum(a.rate for a in adapters) / replicas.count
    for r in where:
        every = list(enumerate(adapters))
        p += pulp.lpSum(x[a, r] + d * (u[a, r] + v[a, r]) for a, _ in every) <= replicas.slots, f"slots_{r}"
        if math.isfinite(replicas.device_bytes):
            held = pulp.lpSum(i.size / 1e9 * (x[a, r] + d * (u[a, r] + v[a, r])) for a, i in every)
            p += held <= replicas.device_bytes / 1e9, f"device_{r}"
        if not ample:
            p += pulp.lpSum(i.size / 1e9 * z[a, r] for a, i in every) <= replicas.host_bytes / 1e9, f"memory_{r}"
        served = pulp.lpSum(y[a, r] + u[a, r] + v[a, r] for a, _ in every)
        p += served <= (1 + replicas.imbalance) * share * (1 + 1e-9), f"load_{r}"
    return p


def pin(
    adapters: list[Adapter],
    replicas: Replicas,
    rules: Rules = Rules(),
    *,
    solver: str = "highs",
    time_limit: float = 10.0,
) -> Pinning:
    """The best placement found. Raises Infeasible with the nearest change where requests under way exceed the slots."""
    _check(adapters)
    found = solve(program(adapters, replicas, rules), solver=solver, time_limit=time_limit, gap=GAP)
    if not found.ok:
        raise _overrun(adapters, replicas)
    return _read(found, adapters, replicas)


def relaxed(adapters: list[Adapter], replicas: Replicas) -> float:
    """Fetching seconds per second if shares of adapters could be kept; inf where even that is infeasible."""
    found = solve(program(adapters, replicas, Rules(whole=False)))
    return found.objective


def alternatives(adapters: list[Adapter], replicas: Replicas) -> dict[str, float]:
    """Fetching seconds per second of plainer ways; inf where one cannot serve the load."""
    order = np.argsort([-a.rate for a in adapters], kind="stable")

    def hottest(n: int) -> float:
        return _or_inf(adapters, replicas, Rules(fixed=_kept(adapters, replicas, order[:n])))

    # The most asked-for ones everywhere, as many as leave slots for requests under way.
    same = (hottest(n) for n in range(replicas.slots, -1, -1))
    return {
        "each adapter on one replica": _or_inf(adapters, replicas, Rules(at_most=1)),
        "none kept": hottest(0),
        "the same ones everywhere": next((s for s in same if math.isfinite(s)), math.inf),
    }


def worth(adapters: list[Adapter], replicas: Replicas) -> dict[str, float]:
    """Fetching seconds per second saved by one more of each limit on every replica, by the relaxation."""
    now = relaxed(adapters, replicas)
    more = {
        "one more slot": replace(replicas, slots=replicas.slots + 1),
        "one more GB of device memory": replace(replicas, device_bytes=replicas.device_bytes + 1e9),
        "one more GB of host memory": replace(replicas, host_bytes=replicas.host_bytes + 1e9),
        "one more replica": replace(replicas, count=replicas.count + 1),
    }
    return {name: max(now - relaxed(adapters, r), 0.0) for name, r in more.items()}


def _kept(adapters: list[Adapter], replicas: Replicas, which: np.ndarray) -> np.ndarray:
    kept = np.zeros((len(adapters), replicas.count), bool)
    kept[which] = True
    return kept


def _or_inf(adapters: list[Adapter], replicas: Replicas, rules: Rules) -> float:
    try:
        return pin(adapters, replicas, rules, time_limit=4.0).fetching
    except Infeasible:
        return math.inf


def _check(adapters: list[Adapter]) -> None:
    if not adapters or any(a.rate < 0 or a.size <= 0 for a in adapters) or not any(a.rate for a in adapters):
        raise SpecError("adapters need sizes above 0 and rates of 0 or more, not all 0")
    if len({a.name for a in adapters}) < len(adapters):
        seen: set[str] = set()
        twice = next(a.name for a in adapters if a.name in seen or seen.add(a.name))  # type: ignore[func-returns-value]
        raise SpecError(f"adapter {twice!r} is listed twice")


def _read(found: Solution, adapters: list[Adapter], replicas: Replicas) -> Pinning:
    shape = (len(adapters), replicas.count)

    def table(name: str, default: float = 1.0) -> np.ndarray:
        return np.array([[found.values.get(f"{name}_{a}_{r}", default) for r in range(shape[1])] for a in range(shape[0])])

    y, u, v = (np.maximum(table(n), 0.0) for n in "yuv")
    return Pinning(
        table("x") > 0.5, table("z") > 0.5, y, u, v, found.objective, min(found.bound, found.objective), found.seconds,
        f"integer program ({found.solver})",
    )  # fmt: skip


def _overrun(adapters: list[Adapter], replicas: Replicas) -> Infeasible:
    rate = sum(a.rate for a in adapters)
    for slots in (replicas.slots * 2**i for i in range(1, 12)):
        if math.isfinite(relaxed(adapters, replace(replicas, slots=slots, device_bytes=math.inf))):
            limit = f"{slots} slots per replica"
            limit += " and device memory for them" if math.isfinite(replicas.device_bytes) else ""
            break
    else:
        limit = "host memory for the adapters that have no disk to come from, or an imbalance the hottest ones allow"
    return Infeasible(
        f"{rate:g} requests/s of {replicas.request_s:g} s for {len(adapters)} adapters keep more of them under way than "
        f"{replicas.count} x {replicas.slots} slots hold beside each other",
        nearest=limit, binding=("slots",),
    )  # fmt: skip
