"""A plan as a report sees it: what is bought and runs at one load, and what closed forms and replay say of it.

The planner makes one while it solves; `stored` makes one again from a plan's JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfmodel.catalog import load_model
from perfmodel.planner.layout import Built, Layout, layouts
from perfmodel.planner.offer import Offer
from perfmodel.planner.pools import Pool
from perfmodel.planner.verify import Replayed
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.choices import Choices
from perfmodel.spec.plan import PlanFile
from perfmodel.spec.workload import Objectives


@dataclass
class Served:
    """One model's traffic at one load, and what it may run on."""

    name: str
    model: str
    workload: Workload
    buckets: list[Bucket]
    objectives: Objectives
    choices: Choices
    offers: list[Offer]
    built: dict[Layout, Built]

    def steady(self, offer: Offer) -> Offer | None:
        """The offer of the same nodes on steady terms."""
        return next((o for o in self.offers if o.item == offer.item and not o.spot), None)

    @property
    def layouts(self) -> list[Layout]:
        """Every layout on every offer; spot capacity runs those of its steady terms where it has any."""
        own = [o for o in self.offers if not o.spot or self.steady(o) is None]
        return [x for o in own for x in layouts(load_model(self.model), o, self.choices)]


@dataclass
class Running:
    """One service with its pools and what their replay saw."""

    service: Served
    pools: list[Pool]
    replayed: list[Replayed]


@dataclass
class Evaluated:
    """One load's plan. `peak`: every service at its highest load; `nodes`: of each offer."""

    offers: list[Offer]
    peak: Sequence[Running]
    nodes: list[int]
    data: dict[str, Any]

    @property
    def workload(self) -> Workload:
        """Of the first service."""
        return self.peak[0].service.workload

    @property
    def buckets(self) -> list[Bucket]:
        """Of the first service."""
        return self.peak[0].service.buckets

    @property
    def pools(self) -> list[Pool]:
        """Pools of every service."""
        return [p for c in self.peak for p in c.pools]

    @property
    def replayed(self) -> list[Replayed]:
        return [r for c in self.peak for r in c.replayed]


@dataclass
class Run:
    """All loads of one planning job."""

    spec: PlanFile
    file: str
    plans: Sequence[Evaluated]
    request: dict[str, Any]
    """The plan file's content, with what the command line changed."""
    listing: str = field(default="", kw_only=True)
    """The plan file as its author wrote it; empty where only its content is known."""
    note: str = field(default="", kw_only=True)
    """What a reader must know of where this is from."""

    @property
    def data(self) -> dict[str, Any]:
        """Plain data: the first load's plan at the top level, every plan under `plans`, and under `request` what was asked:
        paths in its content count from its `folder`, and that from here."""
        every = [p.data for p in self.plans]
        asked = {"file": Path(self.file).name, "folder": Path(self.file).parent.as_posix(), "content": self.request}
        return {**every[0], "request": asked, "plans": every}
