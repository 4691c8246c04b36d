"""What may be bought: nodes with a price, a limit and a machine."""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel import catalog, prices
from perfmodel.errors import SpecError
from perfmodel.machine import Machine, from_node
from perfmodel.spec.hardware import Node
from perfmodel.spec.plan import FleetItem


@dataclass(frozen=True)
class Offer:
    """A node type on the list. price: USD per second for the whole node, None when nobody states one."""

    node: Node
    machine: Machine
    max_nodes: int | None
    price: float | None
    price_source: str

    @property
    def devices(self) -> int:
        return self.node.devices.count


def offers(fleet: tuple[FleetItem, ...], objective: str, file: str, lines: dict[int, int | None]) -> list[Offer]:
    """Load the fleet list. Raises SpecError for a missing price when the objective is cost, or a repeated node."""
    result: list[Offer] = []
    for i, item in enumerate(fleet):
        node = catalog.load_node(item.node)
        if any(o.node.name == node.name for o in result):
            raise SpecError(f"{node.name} is listed twice", file=file, line=lines.get(i), path=f"fleet.{i}")
        price, source = item.price, "the plan file"
        if price is None:
            offer = prices.on_demand(node.name)
            price, source = (offer.usd_per_s, offer.source) if offer else (None, "no price")
        if price is None and objective == "cost":
            raise SpecError(
                f"no price for {node.name}: add `price: … USD/h` (per whole node) or choose another objective",
                file=file, line=lines.get(i), path=f"fleet.{i}",
            )  # fmt: skip
        result.append(Offer(node, from_node(node), item.max_nodes, price, source))
    return result
