"""Two ways to serve, such as one pool and a pool for each phase: what each does at the same load per device, where it ends, and
from where on the second helps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from perfmodel.errors import PerfmodelError
from perfmodel.explain.compare import crossing, seconds
from perfmodel.papers.pool import Pool
from perfmodel.papers.replayed import Replayed
from perfmodel.papers.run import Runner
from perfmodel.papers.served import Served, pool_of
from perfmodel.papers.setting import compared, estimator, merged
from perfmodel.spec.paper import Paper

_LOADS = (0.3, 0.6, 0.9)  # of the lesser saturation
_QUIET, _FULL = 0.02, 0.98
_TAIL = 0.9


@dataclass(frozen=True)
class Part:
    """The instances of one role. share: requests/s of one instance for each request/s and device of the whole."""

    role: str
    pool: Pool
    devices: float
    share: float

    def ttft(self, each: float) -> float | None:
        """90th percentile of the seconds to the first token at `each` requests/s and device; none where no prompt is computed."""
        if self.role == "decode":
            return None
        s = self.pool.state(each * self.share)
        found = float(self.pool.instance.ttft_quantile(_TAIL, s, self.pool.mix))
        return found + float(self.pool.mix.mean(self.pool.fill)) if s.feasible else math.inf

    def tpot(self, each: float) -> float | None:
        """90th percentile of the seconds per output token; none where nothing is decoded."""
        if self.role == "prefill":
            return None
        s = self.pool.state(each * self.share)
        return float(self.pool.instance.tpot_quantile(_TAIL, s, self.pool.mix)) if s.feasible else math.inf

    def data(self, each: float) -> dict[str, Any]:
        """What an instance does at `each` requests/s and device."""
        s = self.pool.state(each * self.share)
        return {
            "prompts_share": float(s.utilisation) if self.role != "decode" else None,
            "decoding": float(s.batch) if self.role != "prefill" else None,
            "memory_share": float(s.kv_share), "ttft_p90_s": self.ttft(each), "tpot_p90_s": self.tpot(each),
        }  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One of the two settings: its parts, and where it ends."""

    name: str
    parts: tuple[Part, ...]

    @cached_property
    def _end(self) -> tuple[float, Part]:
        return min(((p.pool.highest(lambda _: True) / p.share, p) for p in self.parts), key=lambda x: x[0])

    @property
    def saturation(self) -> float:
        """Highest stable rate per device [1/s]."""
        return self._end[0]

    @property
    def reason(self) -> str:
        """What ends it there."""
        rate, part = self._end
        why = part.pool.state(1.05 * rate * part.share).reason
        return why if not part.role or why.startswith(part.role) else f"{part.role}: {why}"

    def time(self, which: str, each: float) -> float:
        """TTFT or TPOT of the part that has one."""
        return next(x for p in self.parts if (x := getattr(p, which)(each)) is not None)


@dataclass(frozen=True)
class Pooled:
    """Two layouts for the same requests."""

    before: Layout
    after: Layout
    model: str
    input: float
    output: float

    @property
    def loads(self) -> tuple[float, ...]:
        """Requests/s and device at which both are described."""
        least = min(self.before.saturation, self.after.saturation)
        return tuple(x * least for x in _LOADS)

    def breakeven(self, which: str) -> dict[str, Any]:
        """Load from or up to which the second has the shorter TTFT or TPOT."""
        least = min(self.before.saturation, self.after.saturation)

        def gain(each: float) -> float:
            return math.log(self.before.time(which, each) / self.after.time(which, each))

        return crossing(gain, _LOADS[1] * least, _QUIET * least, _FULL * least)

    def data(self) -> dict[str, Any]:
        """Plain data in base SI."""
        return {
            "loads_per_device": list(self.loads),
            "settings": {
                x.name: {
                    "saturation_per_device": x.saturation, "ends_by": x.reason,
                    "parts": [
                        {"role": p.role or "both", "devices": p.devices, "at": [p.data(r) for r in self.loads]} for p in x.parts
                    ],
                }
                for x in (self.before, self.after)
            },
            "break_even": {which: self.breakeven(which) for which in ("ttft", "tpot")},
        }  # fmt: skip


def pooled(paper: Paper) -> Pooled | None:
    """The settings of the first claim that names two ways to serve the same requests, else any two of the file.

    One pool and one with `roles` are preferred, then two with roles, then two pools that differ otherwise; None where the
    paper has none.
    """
    runner = Runner(paper)
    for names in _candidates(paper):
        try:
            first, second = (runner.setting(name, runner.given, Replayed) for name in names)
            if not isinstance(first, Served) or not isinstance(second, Served) or not _comparable(first, second):
                continue
            if names[1] in _ancestors(paper, names[0]):
                names, first, second = (names[1], names[0]), second, first
            found = Pooled(_layout(names[0], first), _layout(names[1], second), first.setting.model, first.input, first.output)
            if min(found.before.saturation, found.after.saturation) > 0:
                return found
        except PerfmodelError:
            continue
    return None


def _comparable(first: Served, second: Served) -> bool:
    """Whether two settings serve the same requests, of one kind, on the same devices in ways that differ."""
    a, b = first.setting, second.setting
    same = (a.model, a.hardware, first.input, first.output) == (b.model, b.hardware, second.input, second.output)
    ways = [(x.engine, x.policy, x.techniques, x.formats, bool(x.roles)) for x in (a, b)]
    return same and first.output > 1 and not (a.classes or b.classes) and (bool(a.roles and b.roles) or ways[0] != ways[1])


def _candidates(paper: Paper) -> Iterator[tuple[str, str]]:
    roles = {name: bool(merged(paper, name).get("roles")) for name in paper.settings}
    for names in (*compared(paper), list(paper.settings)):
        for wanted in (1, 2, 0):
            for a, b in itertools.combinations(names, 2):
                if roles[a] + roles[b] == wanted:
                    yield (a, b) if roles[b] else (b, a)


def _ancestors(paper: Paper, name: str) -> list[str]:
    """Settings that this one is like: what it changes is the proposal."""
    like = paper.settings[name].like
    return [like, *_ancestors(paper, like)] if like else []


def _layout(name: str, measured: Served) -> Layout:
    setting = measured.setting
    if not setting.roles:
        whole = float(estimator(setting).par.devices)
        return Layout(name, (Part("", pool_of(measured, setting, "colocated"), whole, whole),))
    own = {role: float(estimator(s).par.devices) for role, s in setting.roles.items()}
    pools = {role: pool_of(measured, s, role) for role, s in setting.roles.items()}
    devices = {role: s.devices for role, s in setting.roles.items()}
    if not all(devices.values()):
        # In proportion to what a request takes of each.
        devices = {role: own[role] / pools[role].highest(lambda _: True) for role in own}
        devices = {role: x / sum(devices.values()) for role, x in devices.items()}
    total = sum(devices.values())
    return Layout(name, tuple(Part(r, pools[r], devices[r], total * own[r] / devices[r]) for r in pools))


def text(c: Pooled) -> str:
    """The comparison for a terminal."""
    columns = [(x, p) for x in (c.before, c.after) for p in x.parts]
    heads = [f"{x.name}: {p.role}" if p.role else x.name for x, p in columns]
    width = max(14, *(len(h) + 2 for h in heads))

    def row(name: str, cells: list[str]) -> str:
        return f"{name:<34}" + "".join(f"{cell:>{width}}" for cell in cells)

    out = [f"{c.model}, {c.input:,.0f} + {c.output:,.0f} tokens a request", "", row("", heads)]
    out.append(row("devices", [f"{p.devices:.3g}" for _, p in columns]))
    for each in c.loads:
        found = [p.data(each) for _, p in columns]
        out += ["", f"at {each:.3g} requests/s a device"]
        rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
            ("busy with prompts", "prompts_share", lambda x: f"{x:.0%}"),
            ("sequences that decode", "decoding", lambda x: f"{x:.1f}"),
            ("keys and values, of free memory", "memory_share", lambda x: f"{x:.0%}"),
            ("TTFT, 90th percentile", "ttft_p90_s", seconds), ("TPOT, 90th percentile", "tpot_p90_s", seconds),
        )  # fmt: skip
        for name, key, show in rows:
            out.append(row("  " + name, ["-" if d[key] is None else show(d[key]) for d in found]))
    out.append("")
    for x in (c.before, c.after):
        out.append(f"{x.name} carries {x.saturation:.3g} requests/s a device: {x.reason}")
    return "\n".join([*out, *(_where(which, c.breakeven(which)) for which in ("ttft", "tpot"))])


def _where(which: str, found: dict[str, Any]) -> str:
    helps, at, here = found["gain_here"] > 1, found["at"], found["here"]
    name, low, high = which.upper(), found["low"], found["high"]
    word, other = ("shorter", "longer") if helps else ("longer", "shorter")
    if at is None:
        return f"{name}: {word} at every load from {low:.3g} to {high:.3g} requests/s a device"
    side, rest = ("up to", "above") if at > here else ("from", "below")
    return f"{name}: {word} {side} {at:.3g} requests/s a device, {other} {rest}"
