"""One adapter around PuLP: HiGHS (or CBC for cross-checks), our own status, bound and gap."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulp

from perfmodel.errors import SpecError

TIME_LIMIT_S = 30.0
GAP = 1e-4


class MissingSolver(SpecError, pulp.PulpSolverError):
    """A solver was asked for that is not installed."""


@dataclass(frozen=True)
class Solution:
    """status: optimal | feasible (time limit) | infeasible. bound and gap are for the enumerated columns."""

    status: str
    objective: float
    bound: float
    gap: float
    values: dict[str, float] = field(default_factory=dict)
    duals: dict[str, float] = field(default_factory=dict)
    slacks: dict[str, float] = field(default_factory=dict)
    reduced: dict[str, float] = field(default_factory=dict)
    """Reduced costs of a continuous problem: what the objective gains per unit if a variable is forced up."""
    seconds: float = 0.0
    solver: str = "HiGHS"
    note: str = ""
    """What the bound rests on beside the solver's own."""

    @property
    def ok(self) -> bool:
        return self.status in ("optimal", "feasible")


class _Started(pulp.HiGHS):
    """HiGHS that begins with values of some variables, which it completes where it can."""

    def __init__(self, values: Mapping[str, float], **options: Any) -> None:
        super().__init__(**options)
        self._values = values

    def callSolver(self, lp: pulp.LpProblem) -> None:
        import numpy as np

        known = [(v.index, self._values[v.name]) for v in lp.variables() if v.name in self._values]
        if known:
            places, values = zip(*known, strict=True)
            lp.solverModel.setSolution(len(known), np.array(places, np.int32), np.array(values, float))
        super().callSolver(lp)


def solve(
    problem: pulp.LpProblem, *, solver: str = "highs", time_limit: float = TIME_LIMIT_S, gap: float = GAP,
    begin: Mapping[str, float] | None = None,
) -> Solution:  # fmt: skip
    """Solve and read back. Duals are those of the last LP and meaningful only for a continuous problem.

    begin: values of some variables to start from, by name; they change how long it takes, not what is optimal.
    """
    start = time.perf_counter()
    if solver == "highs":
        engine = _Started(begin or {}, msg=False, timeLimit=time_limit, gapRel=gap, threads=1)
        name = "HiGHS"
    else:
        engine = cbc(time_limit, gap)
        name = "CBC"
    stats = problem.solve(engine)
    seconds = time.perf_counter() - start
    found, bound = _outcome(problem, stats)
    if not found:
        return Solution("infeasible", math.inf, math.inf, math.inf, seconds=seconds, solver=name)
    objective = float(pulp.value(problem.objective) or 0.0)
    # A continuous optimum, and a solver that does not tell, prove no more than what they found.
    bound = objective if bound is None or not math.isfinite(bound) else bound
    relative = abs(objective - bound) / max(abs(objective), 1e-9)
    status = "optimal" if relative <= gap * 1.01 else "feasible"
    return Solution(
        status,
        objective,
        bound,
        relative,
        {v.name: float(v.value() or 0.0) for v in problem.variables()},
        {c.name: float(c.pi) for c in problem.constraints() if c.pi is not None},
        {c.name: float(c.slack) for c in problem.constraints() if c.slack is not None},
        {v.name: float(v.dj) for v in problem.variables() if v.dj is not None},
        seconds,
        name,
    )


def cbc(time_limit: float = TIME_LIMIT_S, gap: float = GAP) -> pulp.LpSolver:
    """The CBC on the path, or the one bundled with PuLP 3; raises MissingSolver when there is none."""
    with warnings.catch_warnings():
        # PuLP 3 deprecates its bundled CBC, PuLP 4 no longer has it.
        warnings.simplefilter("ignore", DeprecationWarning)
        for kind in (pulp.COIN_CMD, getattr(pulp, "PULP_CBC_CMD", None)):
            candidate = kind(msg=False, timeLimit=time_limit, gapRel=gap) if kind is not None else None
            if candidate is not None and candidate.available():
                return candidate
    raise MissingSolver("no CBC solver is installed; the default, HiGHS, comes with perfmodel")


def _outcome(problem: pulp.LpProblem, stats: Any) -> tuple[bool, float | None]:
    """(has a solution, proven bound): PuLP 4 returns them, PuLP 3 leaves them on the problem and its HiGHS model.

    At a time limit PuLP 3 still says `Optimal` as its status, so its `sol_status` is read.
    """
    if hasattr(stats, "has_solution"):
        return bool(stats.has_solution), stats.best_bound
    found = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    model = getattr(problem, "solverModel", None)
    whole = any(v.cat == pulp.LpInteger for v in problem.variables())
    if not (found and whole) or model is None or not hasattr(model, "getInfo"):
        return found, None
    # PuLP 3 hands HiGHS a minimisation, and keeps the constant of the objective to itself.
    sign = -1.0 if problem.sense == pulp.LpMaximize else 1.0
    return found, sign * float(model.getInfo().mip_dual_bound) + float(problem.objective.constant)
