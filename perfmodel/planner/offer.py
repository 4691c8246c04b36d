"""What may be bought: nodes with their prices, limits and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from perfmodel import catalog, prices
from perfmodel.errors import SpecError
from perfmodel.machine import Machine, from_node
from perfmodel.spec.fleet import FleetItem, Region
from perfmodel.spec.hardware import Node


@dataclass(frozen=True)
class Tariff:
    """One way to pay. price: USD per second of a whole node, None when nobody states one."""

    term: str
    price: float | None
    source: str
    quota: int | None = None


@dataclass(frozen=True)
class Offer:
    """A node type in one region, either on steady terms or as spot capacity."""

    node: Node
    machine: Machine
    max_nodes: int | None
    price: float | None
    """USD per second of a whole node on the first tariff."""
    price_source: str
    tariffs: tuple[Tariff, ...] = ()
    """Empty: `price` alone."""
    item: int = 0
    """Place on the fleet list; steady and spot offers of one item share its limits."""
    region: str = ""
    site: Region = field(default_factory=Region)
    spot: bool = False
    interruptions: float = 0.0
    """Times per second that the provider takes one node back."""
    block: int = 1
    min_nodes: int = 0
    rack_nodes: int | None = None
    mtbf: float | None = None
    mttr: float | None = None

    @property
    def devices(self) -> int:
        return self.node.devices.count

    @property
    def label(self) -> str:
        """``hgx-h100-8``, with region and ``spot`` where they tell offers apart."""
        return self.node.name + (f" in {self.region}" if self.region else "") + (" (spot)" if self.spot else "")

    @property
    def paid(self) -> tuple[Tariff, ...]:
        """Every way to pay."""
        return self.tariffs or (Tariff("on-demand", self.price, self.price_source),)

    @property
    def up(self) -> float | None:
        """Share of time one node is up: MTBF/(MTBF + MTTR)."""
        if self.mtbf is None or self.mttr is None:
            return None
        return self.mtbf / (self.mtbf + self.mttr)

    @property
    def idle_power(self) -> float | None:
        """Watts of one node whose devices idle; None where a device's limit is unknown."""
        m = self.machine
        return m.node_overhead_power + self.devices * self.idle_device if m.tdp else None

    @property
    def idle_device(self) -> float:
        """Watts of one idle device."""
        return self.machine.tdp * float(self.machine.law["power_idle"])


def offers(
    fleet: tuple[FleetItem, ...], objective: str, file: str, lines: dict[int, int | None],
    regions: Mapping[str, Region] | None = None, *, priced: bool = False,
) -> list[Offer]:  # fmt: skip
    """Load the fleet list; an item with spot and other terms makes two offers.

    Raises SpecError for a repeated item, and for a missing price when the objective is cost or `priced` says that a budget
    or a choice of terms needs it.
    """
    result: list[Offer] = []
    for i, item in enumerate(fleet):
        node = catalog.load_node(item.node)
        if any((o.node.name, o.region) == (node.name, item.region) for o in result):
            where = f" for region {item.region}" if item.region else ""
            raise SpecError(f"{node.name} is listed twice{where}", file=file, line=lines.get(i), path=f"fleet.{i}")
        tariffs = [_tariff(item, node.name, str(term)) for term in item.terms]
        for tariff in tariffs:
            if tariff.price is None and (objective == "cost" or priced or len(tariffs) > 1):
                name = "price" if tariff.term == "on-demand" else f"terms.{tariff.term}.price"
                how = "" if tariff.term == "on-demand" else f" on the term {tariff.term}"
                raise SpecError(
                    f"no price for {node.name}{how}: add `{name}: … USD/h` (per whole node) or choose another objective",
                    file=file, line=lines.get(i), path=f"fleet.{i}",
                )  # fmt: skip
        base = Offer(
            node, from_node(node), item.max_nodes, None, "", (), i, item.region, (regions or {}).get(item.region, Region()),
            block=item.block, min_nodes=item.min_nodes, rack_nodes=item.rack_nodes, mtbf=item.mtbf, mttr=item.mttr,
        )  # fmt: skip
        steady = tuple(t for t in tariffs if t.term != "spot")
        spot = tuple(t for t in tariffs if t.term == "spot")
        if steady:
            result.append(replace(base, price=steady[0].price, price_source=steady[0].source, tariffs=steady))
        if spot:
            rate = item.terms["spot"].interruptions or 0.0
            result.append(replace(
                base, price=spot[0].price, price_source=spot[0].source, tariffs=spot, spot=True, interruptions=rate,
            ))  # fmt: skip
    return result


def _tariff(item: FleetItem, node: str, name: str) -> Tariff:
    term = item.terms[name]  # type: ignore[index]
    price = term.price if term.price is not None else item.price if name == "on-demand" else None
    if price is not None:
        return Tariff(name, price, "the plan file", term.quota)
    listed = prices.on_demand(node) if name == "on-demand" else prices.rented(node, name)
    return Tariff(name, listed.usd_per_s, listed.source, term.quota) if listed else Tariff(name, None, "no price", term.quota)
