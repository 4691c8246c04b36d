"""The integer program: one module per family of constraints, one `define_*` per constraint; each docstring is the equation.

Variables and indices are those of `perfmodel.planner.program`.
"""

from __future__ import annotations

from perfmodel.planner.constraints.capacity import define_link
from perfmodel.planner.constraints.limits import (
    define_budget,
    define_carbon,
    define_devices,
    define_power,
    define_spot_share,
)
from perfmodel.planner.constraints.nodes import (
    define_availability,
    define_purchase_unit,
    define_quota,
    define_whole_nodes,
    footprint,
)
from perfmodel.planner.constraints.objective import define_objective
from perfmodel.planner.constraints.survive import define_service
from perfmodel.planner.constraints.uptime import define_uptime
from perfmodel.planner.program import Program, Question, start

__all__ = ["build", "footprint"]


def build(
    question: Question, *, relaxed: bool = False, elastic: bool = False, keep: list[int] | None = None, linked: bool = True
) -> Program:
    """The whole program, but for failures that must be survived, which are added as they turn out to matter.

    relaxed: without integrality. elastic: limits may be exceeded and the objective is by how much. keep: only these entries.
    linked: with the valid inequalities that speed the proof up, without which the duals are the shadow prices of the load.
    """
    program = start(question, relaxed=relaxed, elastic=elastic, keep=keep)
    define_service(program)
    if linked:
        define_link(program)
    needed = define_uptime(program)
    define_whole_nodes(program, needed)
    define_availability(program)
    define_quota(program)
    define_purchase_unit(program)
    define_budget(program)
    define_devices(program)
    define_power(program)
    define_carbon(program)
    define_spot_share(program)
    define_objective(program)
    return program
