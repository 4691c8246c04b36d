"""Weights, cache and activations over device memory, host memory and disk, for inference that fits on no device.

The schedule is the block schedule of FlexGen (arXiv:2303.06865, sections 4.2 and 4.3; formulas are ours): a block of
k device batches of b sequences passes one layer after the other, so a layer's weights travel once per block, and while
one layer computes, the next one's weights, caches and activations are loaded and the last one's stored. With shares

    w, c, h  of weights, cache, activations;  g, c, d  on the device, the host, the disk;  each triple sums to 1

a pass over all layers takes the longest of what its resources do (all overlap), n = b k sequences, S prompt tokens:

    to device     (w_c + w_d) W + (h_c + h_d) A  [+ cache (c_c + c_d) C, or outputs of host attention]    / link rate
    from device   (h_c + h_d) A + (c_c + c_d) C_new  [+ queries of host attention]                        / link rate
    disk reads    w_d W + c_d C + h_d A                                                                   / read rate
    disk writes   c_d C_new + h_d A                                                                       / write rate
    device        k (linear layers of b sequences + share of attention on the device)
    host          (c_c + c_d) attention over C  +  all of the above that passes host memory               / memory rate

W bytes of weights the block touches, C cache it reads, C_new cache it adds, A activations between layers. Seconds of a
block are T_prefill + (output - 1) T_decode with T at least every row; memory of each tier limits the shares. For a given
(b, k) and place of attention this is a linear program; the best over a grid of b and k is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pulp

from perfmodel import catalog, graph, memory, roofline
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.kernels.transfer import drives, host_copy_seconds
from perfmodel.machine import Machine, from_device
from perfmodel.planner.solver import solve
from perfmodel.schedule import Repeat, Seq, operators
from perfmodel.spec.hardware import Node

SHARES = ("w_g", "w_c", "w_d", "c_g", "c_c", "c_d", "h_g", "h_c", "h_d")
TIERS = ("device", "host", "disk")
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PER_BLOCK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_LARGE = 2.0**30  # bytes of a copy whose latency does not matter
_REQUEST = 2.0**20  # bytes of one request to a drive


@dataclass(frozen=True)
class Paths:
    """Achieved bytes/s, and bytes of each tier that may be filled."""

    to_device: float
    from_device: float
    disk_read: float
    disk_write: float
    host_memory: float
    device_bytes: float
    host_bytes: float
    disk_bytes: float
    host_attention: float | None = None
    """Bytes/s of cache that attention on the host gets through, where measured; None: by the law of the host's processor."""


@dataclass(frozen=True)
class Job:
    """A model on one accelerator of a node, and requests of equal lengths without end."""

    estimator: Estimator
    host: Machine
    paths: Paths
    isl: int
    osl: int
    expand: float = 0.0
    """Bytes of device memory moved per weight and per cached element that is expanded before the product that uses it,
    for each device batch; 0: kernels expand on the fly."""

    @classmethod
    def of(cls, e: Estimator, isl: int, osl: int, host_share: float = 1.0) -> Job:
        """A job on the node the estimator's device stands in. Raises SpecError for a node without host or lengths < 1."""
        if min(isl, osl) < 1 or e.par.devices != 1 or not 0 < host_share <= 1:
            raise SpecError("offloading takes one device, lengths of at least 1 and a share of host memory in (0, 1]")
        node = e.machine.node
        if node is None or node.host is None:
            raise SpecError(f"{e.machine.name} has no host in the catalogue: name a node, with its memory and drives")
        cpu = from_device(catalog.load_device(node.host.cpu), None)
        host = replace(cpu, bandwidth=node.host.memory_bandwidth, units=cpu.units * node.host.sockets)
        return cls(e, host, _paths(e, node, host, host_share), isl, osl)


def _paths(e: Estimator, node: Node, host: Machine, host_share: float) -> Paths:
    link = _LARGE / float(host_copy_seconds(e.machine, _LARGE))
    held = memory.resident(e.model, e.par, e.formats, e.machine, e.engine, sequences=0, tokens=1)
    rates, disk_bytes = [1.0, 1.0], 0.0
    if node.drives:
        drive, count = catalog.load_device(node.drives[0].device), node.drives[0].count
        for i, write in enumerate((False, True)):
            rates[i] = _REQUEST / float(drives(drive, count, write=write).seconds(_REQUEST, np.inf, random=False))
        disk_bytes = drive.storage.capacity * count if drive.storage else 0.0
    host_bytes = node.host.memory * host_share if node.host else 0.0
    return Paths(
        link, link, rates[0], rates[1], float(host.bandwidth * host.bandwidth_efficiency),
        e.machine.capacity - float(held.overhead), host_bytes, disk_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Block:
    """b sequences at a time on the device, k times per layer; attention over cache off the device on the host or not."""

    batch: int
    batches: int
    host_attention: bool

    @property
    def sequences(self) -> int:
        return self.batch * self.batches


@dataclass(frozen=True)
class Rows:
    """Linear expressions over SHARES with a constant last: seconds by resource, bytes by tier."""

    prefill: dict[str, np.ndarray]
    decode: dict[str, np.ndarray]
    held: dict[str, np.ndarray]
    room: dict[str, float]


@dataclass(frozen=True)
class Policy:
    """Shares in the order of SHARES for a block size, and what they give."""

    block: Block
    shares: tuple[float, ...]
    prefill: dict[str, float]
    """Seconds of the prefill pass of a block by resource; it lasts as long as the longest."""
    decode: dict[str, float]
    held: dict[str, float]
    """Bytes by tier."""
    tokens_per_s: float
    overlapped: bool = True
    prices: dict[str, float] | None = None
    """Tokens/s that one more GB of a tier is worth at this block size, from the program's duals."""

    @property
    def binding(self) -> tuple[str, str]:
        """The resource that decides prefill, and the one that decides decode."""
        return max(self.prefill, key=lambda r: self.prefill[r]), max(self.decode, key=lambda r: self.decode[r])


@lru_cache(maxsize=512)
def _device_seconds(e: Estimator, batch: int, new: int, context: float, decode: bool) -> tuple[float, float]:
    """(linear layers, attention) of one pass on the device."""
    phase = graph.decode(batch, context) if decode else graph.prefill(batch, new)
    schedule = e.lower(phase).schedule
    fixed = roofline.cost(schedule, e.machine, contextual=False).seconds
    return float(fixed), float(roofline.cost(schedule, e.machine, contextual=True).seconds)


def _touched_bytes(e: Estimator, phase: graph.Phase) -> tuple[float, float]:
    """(weight bytes all layers read, activation bytes of the largest operator) in one pass."""
    schedule = e.lower(phase).schedule
    assert isinstance(schedule, Seq)
    weights = largest = 0.0
    for item in schedule.items:
        for op, times, _ in operators(item):
            kinds = {t.tensor: 0.0 for t in op.traffic}
            for t in op.traffic:
                kinds[t.tensor] += float(t.bytes)
            if isinstance(item, Repeat):
                weights += float(times) * (kinds.get("weights", 0.0) + kinds.get("experts", 0.0))
                largest = max(largest, kinds.get("activations", 0.0))
    return weights, largest


def rows(job: Job, block: Block) -> Rows:
    """Coefficients of the program for one block size."""
    e, p, n = job.estimator, job.paths, block.sequences
    layers, width = e.model.n_layers, e.formats.act.width * e.model.hidden
    mean, longest = job.isl + job.osl / 2, job.isl + job.osl
    stored = {r.name: float(r.bytes) for r in graph.weight_residency(e.model, e.par, e.formats)}
    inner = sum(v for k, v in stored.items() if "." in k)
    outer = sum(stored.values()) - inner
    read_pre, work = _touched_bytes(e, graph.prefill(n, job.isl))
    work /= block.batches
    read_gen, _ = _touched_bytes(e, graph.decode(n, mean))

    def cached(sequences: float, tokens: float) -> float:
        return float(memory.cache_bytes(e.model, e.par, e.formats, sequences, tokens))

    fresh = memory.kv_bytes_per_token(e.model, e.formats) * n
    off_w, off_c, off_h = _on("w_c", "w_d"), _on("c_c", "c_d"), _on("h_c", "h_d")
    act_pre, act_gen = layers * job.isl * n * width, layers * n * width
    pre_fixed, pre_attention = _device_seconds(e, block.batch, job.isl, 0.0, False)
    gen_fixed, gen_attention = _device_seconds(e, block.batch, 1, mean, True)
    history = cached(n, mean)
    passes = job.expand / float(e.machine.bandwidth * e.machine.bandwidth_efficiency)
    pre_fixed += passes * read_pre / e.formats.weight.width
    gen_fixed += passes * read_gen / e.formats.weight.width
    gen_attention += passes * history / block.batches / e.formats.kv.width
    # Host attention: queries (and new keys and values) go down, outputs come up.
    to_gen = off_c * (act_gen if block.host_attention else history)
    from_gen = off_c * (fresh + (act_gen if block.host_attention else 0.0))
    prefill = {
        "to device": (off_w * read_pre + off_h * act_pre) / p.to_device,
        "from device": (off_h * act_pre + off_c * cached(n, job.isl)) / p.from_device,
        "disk reads": (_on("w_d") * read_pre + _on("h_d") * act_pre) / p.disk_read,
        "disk writes": (_on("c_d") * cached(n, job.isl) + _on("h_d") * act_pre) / p.disk_write,
        "device": _constant(block.batches * (pre_fixed + pre_attention)),
    }
    decode = {
        "to device": (off_w * read_gen + off_h * act_gen + to_gen) / p.to_device,
        "from device": (off_h * act_gen + from_gen) / p.from_device,
        "disk reads": (_on("w_d") * read_gen + _on("c_d") * history + _on("h_d") * act_gen) / p.disk_read,
        "disk writes": (_on("c_d") * fresh + _on("h_d") * act_gen) / p.disk_write,
        "device": _constant(block.batches * gen_fixed)
        + (_on("c_g") if block.host_attention else _constant(1.0)) * (block.batches * gen_attention),
    }
    rates = {"to device": p.to_device, "from device": p.from_device, "disk reads": p.disk_read, "disk writes": p.disk_write}
    for phase in (prefill, decode):
        phase["host"] = sum((phase[r] * rate for r, rate in rates.items()), start=_constant(0.0)) / p.host_memory
    if block.host_attention:
        decode["host"] = decode["host"] + off_c * _host_seconds(job, n, mean, history)
    # Two buffers of what is streamed: one in use, one on its way.
    layer_w, batch_c = inner / layers, cached(block.batch, longest) / layers
    held = {
        "device": _on("w_g") * inner + _on("c_g") * cached(n, longest) + _on("h_g") * (n * job.isl * width)
        + off_w * 2 * layer_w + off_c * 2 * batch_c + _constant(outer + work + 2 * block.batch * job.isl * width),
        "host": _on("w_c") * inner + _on("c_c") * cached(n, longest) + _on("h_c") * (n * job.isl * width)
        + _on("w_d") * 2 * layer_w + _on("c_d") * 2 * batch_c + _on("h_d") * (2 * block.batch * job.isl * width),
        "disk": _on("w_d") * inner + _on("c_d") * cached(n, longest) + _on("h_d") * (n * job.isl * width),
    }  # fmt: skip
    return Rows(prefill, decode, held, dict(zip(TIERS, (p.device_bytes, p.host_bytes, p.disk_bytes), strict=True)))


def _on(*names: str) -> np.ndarray:
    return np.array([float(s in names) for s in SHARES] + [0.0])


def _constant(value: float) -> np.ndarray:
    return np.array([0.0] * len(SHARES) + [value])


def _host_seconds(job: Job, sequences: int, context: float, history: float) -> float:
    """Attention of one decode pass over a cache of `history` bytes, all of it on the host."""
    if job.paths.host_attention is not None:
        return history / job.paths.host_attention
    schedule = job.estimator.lower(graph.decode(sequences, context)).schedule
    return float(roofline.cost(schedule, job.host, contextual=True).seconds)


def evaluate(job: Job, block: Block, shares: tuple[float, ...], *, overlapped: bool = True) -> Policy:
    """What any shares give, whether or not they fit. Raises SpecError for shares that are none."""
    s = np.array(shares)
    if s.size != len(SHARES) or s.min() < 0 or not np.allclose(s.reshape(3, 3).sum(axis=1), 1.0, atol=1e-6):
        raise SpecError(f"shares {', '.join(SHARES)} must be 0 or more and each three must add up to 1, got {shares}")
    r, x = rows(job, block), np.append(s, 1.0)
    prefill, decode, held = ({k: float(v @ x) for k, v in part.items()} for part in (r.prefill, r.decode, r.held))
    longest = [max(part.values()) if overlapped else sum(part.values()) for part in (prefill, decode)]
    seconds = longest[0] + (job.osl - 1) * longest[1]
    return Policy(block, shares, prefill, decode, held, block.sequences * job.osl / seconds, overlapped)


def solve_block(job: Job, block: Block, *, solver: str = "highs") -> Policy | None:
    """The best shares for one block size; None where no shares fit."""
    r = rows(job, block)
    p = pulp.LpProblem("offload", pulp.LpMinimize)
    share = [p.add_variable(name, lowBound=0, upBound=1) for name in SHARES]
    t_pre, t_gen = p.add_variable("T_prefill", lowBound=0), p.add_variable("T_decode", lowBound=0)
    p.setObjective(t_pre + (job.osl - 1) * t_gen)

    def value(row: np.ndarray, scale: float = 1.0) -> pulp.LpAffineExpression:
        return pulp.lpSum(float(c) / scale * v for c, v in zip(row, share, strict=False) if c) + float(row[-1]) / scale

    for i, tensor in enumerate("wch"):
        p += pulp.lpSum(share[3 * i : 3 * i + 3]) == 1, f"all_{tensor}"
    for longest, part, name in ((t_pre, r.prefill, "prefill"), (t_gen, r.decode, "decode")):
        for resource, row in part.items():
            p += longest >= value(row), f"{name}_{resource.replace(' ', '_')}"
    for tier, row in r.held.items():
        p += value(row, 1e9) <= r.room[tier] / 1e9, f"room_{tier}"
    found = solve(p, solver=solver, gap=1e-9)
    if not found.ok:
        return None
    shares = np.clip([found.values[s] for s in SHARES], 0.0, 1.0).reshape(3, 3)
    result = evaluate(job, block, tuple((shares / shares.sum(axis=1, keepdims=True)).ravel().tolist()))
    # d(tokens/s)/d(GB) = -tokens/s / seconds x d(seconds)/d(GB).
    worth = {t: -found.duals.get(f"room_{t}", 0.0) * result.tokens_per_s / found.objective for t in TIERS}
    return replace(result, prices={t: max(v, 0.0) for t, v in worth.items()})


def search(
    job: Job, *, host_attention: bool | None = None, batches: tuple[int, ...] = _PER_BLOCK, solver: str = "highs"
) -> Policy:
    """The best policy over all block sizes of the grid. Raises Infeasible with what is missing.

    host_attention: attention over cache off the device runs on the host (True), on the device (False), either (None).
    """
    ways = (True, False) if host_attention is None else (host_attention,)
    best: Policy | None = None
    for attention in ways:
        for batch in _BATCHES:
            for k in batches:
                found = solve_block(job, Block(batch, k, attention), solver=solver)
                if found is None:
                    break  # a larger block needs more of everything
                if best is None or found.tokens_per_s > best.tokens_per_s * (1 + 1e-9):
                    best = found
    if best is None:
        raise _no_room(job)
    return best


def alternatives(job: Job, best: Policy, host_attention: bool | None = None) -> dict[str, float]:
    """Tokens/s of ways not chosen; 0 where one does not fit. host_attention: what the best was restricted to."""

    def best_of(job: Job, **limits: object) -> float:
        try:
            return search(job, **limits).tokens_per_s  # type: ignore[arg-type]
        except Infeasible:
            return 0.0

    where = "device" if best.block.host_attention else "host"
    return {
        f"attention over the cache on the {where}": best_of(job, host_attention=not best.block.host_attention),
        "one device batch per block": best_of(job, host_attention=host_attention, batches=(1,)),
        "nothing on disk": best_of(replace(job, paths=replace(job.paths, disk_bytes=0.0)), host_attention=host_attention),
        "nothing on the host": best_of(replace(job, paths=replace(job.paths, host_bytes=0.0)), host_attention=False),
        "the same, no overlap": evaluate(job, best.block, best.shares, overlapped=False).tokens_per_s,
    }


_PATHS = ("to_device", "from_device", "disk_read", "disk_write", "host_memory")


def tenth_more(job: Job, best: Policy) -> dict[str, float]:
    """Tokens/s that a path a tenth as fast again would give at the best block size, over today's."""
    gains = {}
    for name in _PATHS:
        faster = replace(job, paths=replace(job.paths, **{name: getattr(job.paths, name) * 1.1}))
        found = solve_block(faster, best.block)
        gains[name.replace("_", " ")] = (found.tokens_per_s if found else 0.0) / best.tokens_per_s
    return gains


def _no_room(job: Job) -> Infeasible:
    r = rows(job, Block(1, 1, False))
    everything = float(r.held["disk"].sum())
    have = sum(r.room.values())
    least = float(r.held["device"][-1])
    if least > r.room["device"]:
        return Infeasible(
            f"the table, the head and one prompt need {least / 1e9:.1f} GB of the device's {r.room['device'] / 1e9:.1f} GB",
            nearest="a shorter --isl or a device with more memory", binding=("device memory",),
        )  # fmt: skip
    return Infeasible(
        f"{job.estimator.model.name} with one sequence takes {everything / 1e9:,.1f} GB; device, host and disk have "
        f"{have / 1e9:,.1f} GB",
        nearest=f"{max(everything - have, 0) / 1e9:,.1f} GB more disk, or a narrower --weight-dtype",
        binding=("memory",),
    )
