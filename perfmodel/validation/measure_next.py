"""Which benchmark would most narrow the error of a plan.

Parameters are independent normal variables on a logarithmic scale, one sigma each; an estimate and a benchmark respond
to them linearly, by the sensitivities the estimator itself computes. What the law cannot explain is one more variable
per phase, which a benchmark of the same model shares the more, the nearer its batch is. A benchmark's worth is the drop in
the variance of the plan's step times after conditioning on its result (Kalman update).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perfmodel import calibration, roofline
from perfmodel.estimator import Estimator
from perfmodel.machine import Machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.collective import collective
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.planner.run import Plan
from perfmodel.spec.formats import get_format

_REPEATABLE = 0.03  # sigma of a benchmark that is repeated on the same machine

Gradient = dict[str, float]


@dataclass(frozen=True)
class Use:
    """How a plan uses one kind of instance: its share of the devices, decode batch, lengths, share of time in prefill."""

    estimator: Estimator
    weight: float
    batch: float
    input: int
    output: int
    prefill_share: float


@dataclass(frozen=True)
class Candidate:
    """A benchmark to run: its command, and how each of its results responds to the parameters."""

    command: str
    hardware: str
    observations: tuple[Gradient, ...]


@dataclass(frozen=True)
class Ranked:
    """A candidate with the plan's spread (p90 over expected, minus 1) before and after its result is known."""

    candidate: Candidate
    before: float
    after: float
    settles: str
    """The parameter about which it says most that matters to the plan."""


def uses(plan: Plan) -> list[Use]:
    """The instances of a plan at their operating points."""
    total = sum(x.devices for x in plan.pools)
    found = []
    for x in plan.pools:
        mix = x.mix
        found.append(
            Use(
                x.column.estimator, x.devices / total, max(x.state.batch, 1.0), int(mix.mean(mix.input)),
                max(int(mix.mean(mix.output)), 1), 1.0 if x.column.layout.role == "prefill" else x.state.utilisation,
            )
        )  # fmt: skip
    return found


def rank(plan_uses: Sequence[Use]) -> list[Ranked]:
    """All candidates, the most useful first."""
    target = _target(plan_uses)
    found = []
    for candidate in (c for use in plan_uses for c in candidates(use)):
        names = sorted({n for g in (target, *candidate.observations) for n in g})
        t = np.array([target.get(n, 0.0) for n in names])
        p = np.eye(len(names))
        for g in candidate.observations:
            row = np.array([g.get(n, 0.0) for n in names])
            seen = p @ row
            p = p - np.outer(seen, seen) / (row @ seen + _REPEATABLE**2)
        # What each variable contributes less to the plan's variance.
        relieved = t**2 * (1 - np.diag(p))
        settles = names[int(np.argmax(relieved))].split(":")[-1]
        found.append(Ranked(candidate, _spread(float(t @ t)), _spread(float(t @ p @ t)), settles))
    unique = {r.candidate.command: r for r in found}
    return sorted(unique.values(), key=lambda r: r.after)


def _spread(variance: float) -> float:
    return math.expm1(calibration.P90 * math.sqrt(max(variance, 0.0)))


def _target(plan_uses: Sequence[Use]) -> Gradient:
    total: Gradient = {}
    for use in plan_uses:
        for share, gradient in (
            (1 - use.prefill_share, step(use, use.batch, is_decode=True)),
            (use.prefill_share, step(use, 1, is_decode=False)),
        ):
            for name, value in gradient.items():
                total[name] = total.get(name, 0.0) + use.weight * share * value
    return total


def step(use: Use, batch: float, *, is_decode: bool) -> Gradient:
    """Response of one step's logarithm to one sigma of each parameter, and of what the law leaves unexplained there."""
    e = use.estimator
    if is_decode:
        parts = e.parts(batch, 1, use.input + use.output / 2, is_decode=True)
    else:
        parts = e.parts(1, use.input, 0, is_decode=False)
    phase = "decode" if is_decode else "prefill"
    gradient = {f"{e.machine.device.name}:{k}": v for k, v in parts.sensitivity.items()}
    # The unexplained part changes slowly with the batch: a factor e apart shares e^-1 of it.
    left = calibration.law().residual[phase]
    near = math.exp(-abs(math.log(batch / use.batch))) if is_decode else 1.0
    label = f"{e.model.name} on {e.machine.device.name}: unexplained part of {phase}"
    gradient[label] = left * near
    gradient[f"{label} at batch {batch:.4g}"] = left * math.sqrt(1 - near**2)
    return gradient


def candidates(use: Use) -> list[Candidate]:
    """Benchmarks of the serving engine at and below the plan's batch, micro-benchmarks, and collectives."""
    e, m = use.estimator, use.estimator.machine
    engine = {"vllm": "vllm bench", "sglang": "python -m sglang.bench_", "trtllm": "trtllm-bench"}.get(e.engine_name)
    found = []
    for batch in dict.fromkeys((1, max(1, round(use.batch)))):
        both = (step(use, batch, is_decode=True), step(use, 1, is_decode=False))
        if e.engine_name == "vllm":
            command = (
                f"{engine} serve --model {e.model.name} --dataset-name random --random-input-len {use.input} "
                f"--random-output-len {use.output} --max-concurrency {batch} --num-prompts {10 * batch}"
                f"   # server: --tensor-parallel-size {e.par.tp} --pipeline-parallel-size {e.par.pp}"
            )
        elif e.engine_name == "sglang":
            command = (
                f"{engine}serving --backend sglang --dataset-name random --random-input-len {use.input} "
                f"--random-output-len {use.output} --max-concurrency {batch} --num-prompts {10 * batch}"
                f"   # server: --tp {e.par.tp} --pp-size {e.par.pp}"
            )
        else:
            command = f"a serving benchmark of {e.model.name}: {use.input} in, {use.output} out, {batch} clients, tp {e.par.tp}"
        found.append(Candidate(command, m.name, both))
    found.append(
        Candidate(
            "perfmodel calibrate --measure --out rows.csv   # on one "
            + m.device.name,
            m.name, tuple(_kernel(op, m) for op in _kernels(use)),
        )
    )  # fmt: skip
    if e.par.tp > 1:
        sizes = (2.0**16, 2.0**22, 2.0**27)
        ops = [collective("all_reduce", "all_reduce", size / 2, 2, e.par.tp) for size in sizes]
        found.append(
            Candidate(f"all_reduce_perf -b 64K -e 128M -f 8 -g {e.par.tp}   # nccl-tests, on one {m.name}", m.name,
                      tuple(_kernel(op, m) for op in ops))
        )  # fmt: skip
    return found


def _kernels(use: Use) -> list[Op]:
    """What the micro-benchmarks time: large and thin products, a copy, prefill and decode attention."""
    e = use.estimator
    bf16 = get_format("bf16")
    ops = [
        gemm(
            "gemm", rows, 8192, 8192, weight=e.formats.weight, act=e.formats.act, dtype=e.formats.compute("dense_ffn")
        )[-1]
        for rows in (16.0, 4096.0)
    ]
    ops.append(pointwise("copy", 2.0**28, bf16.width))
    for group in (Group(1, 8192.0, 0), Group(64.0, 1, 4095.0, decode=True)):
        ops.append(
            softmax_attention("attention", group, heads=32, kv_heads=8, qk_dim=128, v_dim=128, kv_elements=2048,
                              kv_width=2, act_width=2, dtype=str(e.formats.act.matrix))
        )  # fmt: skip
    return ops


def _kernel(op: Op, m: Machine) -> Gradient:
    rows = np.broadcast_to(np.asarray(roofline.op_cost(op, m.perturbed()).seconds, float), (len(m.sigma) + 1,))
    return {f"{m.device.name}:{k}": float(v) for k, v in zip(m.sigma, np.log(rows[1:] / rows[0]), strict=True)}
