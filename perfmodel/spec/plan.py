"""The plan file: what is asked of the planner."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from perfmodel.spec.base import Natural, Spec
from perfmodel.spec.choices import Choices
from perfmodel.spec.fleet import FleetItem, Limits, Profile, Region, Resilience, Startup
from perfmodel.spec.workload import Workload

Objective = Literal["cost", "devices", "power", "carbon", "latency", "goodput"]


class ServiceSpec(Spec):
    """One model with its own traffic and objectives, on the fleet that all services share."""

    name: str
    model: str
    workload: Workload


class PlanFile(Spec):
    """One planning job."""

    services: tuple[ServiceSpec, ...] = ()
    """Several models on one fleet; a single one may be given as `model` and `workload` instead."""
    model: str
    workload: Workload
    fleet: tuple[FleetItem, ...] = Field(min_length=1)
    regions: dict[str, Region] = {}
    limits: Limits = Limits()
    resilience: Resilience | None = None
    profile: Profile | None = None
    startup: Startup | None = None
    choices: Choices = Choices()
    objective: Objective = "cost"
    confidence: float = Field(default=0.5, ge=0.5, lt=1)
    """Probability with which the promises hold, given how sure the times of each device and stack are."""
    seed: Natural = 1

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("services"):
            return data
        if "model" in data or "workload" in data:
            raise ValueError("give either 'services' or one 'model' with its 'workload'")
        first = data["services"][0] if isinstance(data["services"], (list, tuple)) else None
        if not isinstance(first, dict) or not {"model", "workload"} <= set(first):
            return {**data, "model": "", "workload": {}}  # the service's own error comes first
        return {**data, "model": first["model"], "workload": first["workload"]}

    @model_validator(mode="after")
    def _consistent(self) -> PlanFile:
        names = [s.name for s in self.services]
        if len(set(names)) < len(names):
            raise ValueError(f"service names must differ: {', '.join(names)}")
        if len({s.workload.load for s in self.services}) > 1:
            raise ValueError("services must list the same load multiples")
        return self

    @property
    def served(self) -> tuple[ServiceSpec, ...]:
        """The services; a single one carries the model's name."""
        return self.services or (ServiceSpec(name=self.model, model=self.model, workload=self.workload),)
