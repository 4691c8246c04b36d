"""What a setting measures under load: requests arrive at random, and limits on TTFT and TPOT decide what counts."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from perfmodel import cost, graph
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.papers.fleet import Fleet
from perfmodel.papers.metrics import Measured
from perfmodel.papers.pool import Pool, bisected, pool
from perfmodel.papers.setting import Resolved, estimator
from perfmodel.serving import goodput as goals_of
from perfmodel.serving.handoff import handoff
from perfmodel.serving.layered import expert_bytes, layer_groups, layered_program
from perfmodel.serving.queueing import Mix

_POINTS = 6  # of each length's distribution
_SHARES = (0.5, 0.9, 0.99)
_TIGHTEST, _LOOSEST, _FINE = 1e-3, 1e3, 24  # of factors on limits, and steps between them


class Served(Measured):
    """A setting under Poisson arrivals, its two phases in one pool or in pools of their own."""

    @cached_property
    def _mix(self) -> Mix:
        inputs, weight_in = _lognormal(self.input, self._value("input_spread"))
        outputs, weight_out = _lognormal(self.output, self._value("output_spread"))
        # No request is longer than the model's context, unless the mean is: then the model stands for a longer one.
        context = self._estimator.model.max_positions
        if context and self.input + self.output <= context:
            outputs = np.minimum(outputs, context / 2)
            inputs = np.minimum(inputs, context - float(outputs.max()))
        grid = np.meshgrid(inputs, outputs, indexing="ij")
        weight = np.outer(weight_in, weight_out).ravel()
        prefix = self._value("prefix")
        # What techniques find cached is not computed; what they fetch for it is taken to arrive behind the computation.
        asked = self._estimator.request(np.maximum(grid[0].ravel() - prefix, 1.0), prefix)
        found = np.broadcast_to(asked.cached, weight.shape)
        cached = np.minimum(np.floor(found), grid[0].ravel().round() - 1) if np.any(found > 0) else None
        return Mix(np.maximum(grid[0].ravel().round(), 1.0), np.maximum(grid[1].ravel().round(), 1.0), weight, cached)

    def _pool(self, setting: Resolved, role: str) -> Pool:
        return pool(setting, role, self._mix, self._handoff(estimator(setting)) if role == "decode" else 0.0)

    def _handoff(self, decode: Estimator) -> float:
        """Seconds per prompt token that a cache arrives after the prefill has ended, inside a node where both fit in one."""
        prefill = estimator(self.setting.roles["prefill"])
        tokens = np.array([self._mix.mean(self._mix.input)])
        near = prefill.machine.name == decode.machine.name and (
            prefill.par.devices + decode.par.devices <= decode.machine.devices_per_node
        )
        alone = np.array([prefill.prefill(1, tokens[0])])
        moved = handoff(prefill, decode, tokens, alone, same_node=bool(near), block_tokens=int(self._value("message")))
        return float(moved.exposed_s[0] / tokens[0])

    @cached_property
    def _together(self) -> Pool:
        if self.setting.roles:
            raise SpecError("this metric is of one pool; a setting with `roles` has two, whose goodput and limit_scale are known")
        return self._pool(self.setting, "colocated")

    def _goals(self, share: float) -> goals_of.Goals:
        ttft, tpot = self._value("ttft"), self._value("tpot")
        if not ttft and not tpot:
            raise SpecError("goodput needs a limit: give the setting `ttft`, `tpot` or both")
        return goals_of.Goals(ttft or None, tpot or None, share)

    @cached_property
    def goodput(self) -> float:
        """Requests per second and device at which `attainment` of the requests meets TTFT and TPOT."""
        share = self._value("attainment")
        if not self.setting.roles:
            return _positive(self._together.capacity(self._goals(share)), self.setting) / self.devices
        each = {}
        for role, setting in self.setting.roles.items():
            goals = self._goals(math.sqrt(share))
            prefills = role == "prefill"
            mine = goals_of.Goals(goals.ttft if prefills else None, None if prefills else goals.tpot, goals.share)
            rate = _positive(self._pool(setting, role).capacity(mine), setting)
            each[role] = rate / float(estimator(setting).par.devices)
        devices = {role: s.devices for role, s in self.setting.roles.items()}
        if all(devices.values()):
            return min(each[r] * devices[r] for r in each) / sum(devices.values())
        # Pools in proportion to what a request takes of each.
        return 1 / sum(1 / rate for rate in each.values())

    @cached_property
    def limit_scale(self) -> float:
        """Least factor on both limits, TTFT and TPOT, at which `attainment` of the requests still meet them at `rate`; of
        pools of their own with `devices` each, both as one chance."""
        share, rate = self._value("attainment"), self._value("rate")
        if rate <= 0:
            raise SpecError("limits under load need the setting's `rate` [1/s]")
        pools = {"": (self._together, rate)} if not self.setting.roles else {
            role: (self._pool(s, role), rate * estimator(s).par.devices / (s.devices or estimator(s).par.devices))
            for role, s in self.setting.roles.items()
        }  # fmt: skip
        goals = self._goals(share)

        def met(scale: float) -> float:
            found = 1.0
            for role, (pool_, own) in pools.items():
                ttft = None if role == "decode" or goals.ttft is None else float(goals.ttft) * scale
                tpot = None if role == "prefill" or goals.tpot is None else goals.tpot * scale
                found *= pool_.met(own, goals_of.Goals(ttft, tpot, share))
            return found

        return bisected(lambda x: met(1 / x) >= share, _TIGHTEST, _LOOSEST, _FINE) ** -1

    def _loaded(self) -> Any:
        rate = self._value("rate")
        if rate <= 0:
            raise SpecError("times under load need the setting's `rate` [1/s]")
        state = self._together.state(rate)
        if not state.feasible:
            raise Infeasible(f"{rate:g} requests/s: {state.reason}", binding=(state.reason,))
        return state

    def _first(self, p: float) -> float:
        pool_ = self._together
        return float(pool_.instance.ttft_quantile(p, self._loaded(), pool_.mix)) + pool_.mix.mean(pool_.fill)

    @property
    def loaded_ttft(self) -> float:
        """Median seconds to the first token at `rate`, waiting included."""
        return self._first(0.5)

    @property
    def mean_ttft(self) -> float:
        """Mean seconds to the first token at `rate`, waiting included."""
        pool_ = self._together
        return float(pool_.instance.mean_ttft(self._loaded(), pool_.mix)) + pool_.mix.mean(pool_.fill)

    @property
    def tail_ttft(self) -> float:
        """99th percentile of the seconds to the first token at `rate`."""
        return self._first(0.99)

    @property
    def loaded_tpot(self) -> float:
        """Median seconds per output token at `rate`."""
        return float(self._together.instance.tpot_quantile(0.5, self._loaded(), self._together.mix))

    @property
    def tail_tpot(self) -> float:
        """99th percentile of the seconds per output token at `rate`."""
        return float(self._together.instance.tpot_quantile(0.99, self._loaded(), self._together.mix))

    @property
    def loaded_latency(self) -> float:
        """Mean seconds of a request at `rate`: median TTFT and the output at the mean step."""
        state = self._loaded()
        return self.loaded_ttft + (self.output - 1) * float(state.step)

    @cached_property
    def saturation(self) -> float:
        """Highest stable rate of the instance [1/s]."""
        return self._together.highest(lambda _: True)

    @property
    def concurrency(self) -> float:
        """Sequences that decode at `rate`."""
        return float(self._loaded().batch)

    @property
    def tail_gap(self) -> float:
        """Seconds within which the share `gaps` of the tokens follow the one before, at `rate`."""
        return float(goals_of.itl_quantile(self._together.instance, self._value("gaps"), self._loaded(), self._together.mix))

    @cached_property
    def smooth_rate(self) -> float:
        """Requests per second and device at which the share `gaps` of the tokens keep the limit `gap` on the time since the
        one before, and half of the first tokens the limit `ttft`."""
        limit, share, first = self._value("gap"), self._value("gaps"), self._value("ttft")
        if not limit:
            raise SpecError("this metric needs the limit `gap` on the time between two tokens [s]")
        instance, mix = self._together.instance, self._together.mix

        def holds(s: Any) -> bool:
            smooth = goals_of.itl_met(instance, limit, s, mix) >= share
            return smooth and (not first or instance.ttft_met(first - self._together.fill, s, mix) >= 0.5)

        return _positive(self._together.highest(holds), self.setting) / self.devices

    def _passes(self) -> list[tuple[graph.Program, float, float]]:
        """Passes of one request's share of the time at `rate`: what each does, how many there are, and its seconds.

        Its prompt rides in steps beside the decoding sequences; the other steps only decode.
        """
        s, e, clock = self._loaded(), estimator(self.setting), self._together.instance.clock
        batch, context, new = max(s.batch, 1.0), self._mix.context, self.input - self._value("prefix")
        decoding = Group(batch, 1.0, context - 1, decode=True)
        work = float(self._mix.mean(s.work))
        if self.setting.policy == "layered":
            many = float(clock.iterations(np.array([new]), batch)[0])
            groups = layer_groups(e.model.n_layers, round(many))
            carrying = [(layered_program(e, batch, context, new, g), 1.0) for g in groups]
        else:
            room = max(clock.chunk - batch, 1.0)
            many, each = float(np.ceil(new / room)), min(room, new)
            mixed = e.lower(Phase((decoding, Group(1.0, each, (new - each) / 2))))
            carrying = [(mixed, new / each)]
        seconds = s.pure_step + work / many
        plain = max(1 / s.rate - many * seconds, 0.0) / s.pure_step * min(s.batch, 1.0)
        return [*((p, times, seconds) for p, times in carrying), (e.lower(Phase((decoding,))), plain, s.pure_step)]

    @property
    def expert_bytes(self) -> float:
        """Bytes of routed experts that one device reads per request at `rate`: steps that carry prefill, and plain ones."""
        return sum(expert_bytes(program) * times for program, times, _ in self._passes())

    @property
    def loaded_energy(self) -> float:
        """Joules per output token of all devices at `rate`."""
        e, total = estimator(self.setting), 0.0
        for program, times, seconds in self._passes():
            total += self._known(cost.program_energy(e, program, seconds)) * times
        return total / self.output

    # Several types of devices to choose from.

    @cached_property
    def _fleet(self) -> Fleet:
        return Fleet(self.setting, self._mix, self._value("rate"))

    @property
    def fleet_cost(self) -> float:
        """USD/h of the cheapest mix of the setting's `fleet` that serves `rate` within `tpot`."""
        return self._fleet.cost

    @property
    def cheapest_single(self) -> float:
        """USD/h of the cheapest fleet of one type."""
        return float(self._fleet.singles.min())

    @property
    def dearest_single(self) -> float:
        """USD/h of the dearest fleet of one type."""
        return float(self._fleet.singles.max())


def pool_of(measured: Served, setting: Resolved, role: str) -> Pool:
    """The pool of a setting, or of one of its roles, under its requests."""
    return measured._pool(setting, role)


def _positive(rate: float, setting: Resolved) -> float:
    if rate <= 0:
        raise Infeasible(f"{setting.model} on {setting.hardware} misses the limits even when idle", binding=("latency",))
    return rate


def _lognormal(mean: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of a lognormal of a mean and coefficient of variation (Gauss-Hermite)."""
    if spread <= 0:
        return np.array([float(mean)]), np.ones(1)
    x, w = np.polynomial.hermite_e.hermegauss(_POINTS)
    sigma = math.sqrt(math.log1p(spread**2))
    return mean * np.exp(sigma * x - sigma**2 / 2), w / w.sum()
