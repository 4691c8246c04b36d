"""One adapter around PuLP: HiGHS (or CBC for cross-checks), our own status, bound and gap."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field

import pulp

TIME_LIMIT_S = 30.0
GAP = 1e-4


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
    seconds: float = 0.0
    solver: str = "HiGHS"

    @property
    def ok(self) -> bool:
        return self.status in ("optimal", "feasible")


def solve(
    problem: pulp.LpProblem, *, solver: str = "highs", time_limit: float = TIME_LIMIT_S, gap: float = GAP
) -> Solution:
    """Solve and read back. Duals are those of the last LP and meaningful only for a continuous problem."""
    start = time.perf_counter()
    if solver == "highs":
        engine = pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, threads=1)
        name = "HiGHS"
    else:
        engine = cbc(time_limit, gap)
        name = "CBC"
    problem.solve(engine)
    seconds = time.perf_counter() - start
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Solution("infeasible", math.inf, math.inf, math.inf, seconds=seconds, solver=name)
    objective = float(pulp.value(problem.objective) or 0.0)
    bound = _bound(problem, objective) if name == "HiGHS" else objective
    relative = abs(objective - bound) / max(abs(objective), 1e-9)
    status = "optimal" if problem.sol_status == pulp.LpSolutionOptimal and relative <= gap * 1.01 else "feasible"
    return Solution(
        status,
        objective,
        bound,
        relative,
        {v.name: float(v.value() or 0.0) for v in problem.variables()},
        {c.name: float(c.pi) for c in problem.constraints() if c.pi is not None},
        {c.name: float(c.slack) for c in problem.constraints() if c.slack is not None},
        seconds,
        name,
    )


def cbc(time_limit: float = TIME_LIMIT_S, gap: float = GAP) -> pulp.LpSolver:
    """The CBC on the path, or the one bundled with PuLP 3; raises PulpSolverError when there is none."""
    with warnings.catch_warnings():
        # PuLP 3 deprecates its bundled CBC, PuLP 4 no longer has it.
        warnings.simplefilter("ignore", DeprecationWarning)
        for kind in (pulp.COIN_CMD, getattr(pulp, "PULP_CBC_CMD", None)):
            candidate = kind(msg=False, timeLimit=time_limit, gapRel=gap) if kind is not None else None
            if candidate is not None and candidate.available():
                return candidate
    raise pulp.PulpSolverError("no CBC solver is installed")


def _bound(problem: pulp.LpProblem, objective: float) -> float:
    """Best proven bound; for a continuous problem the objective itself."""
    model = getattr(problem, "solverModel", None)
    if model is None or not any(v.cat == pulp.LpInteger for v in problem.variables()):
        return objective
    return float(model.getInfo().mip_dual_bound)
