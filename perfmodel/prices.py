"""What a node costs: the user's own price, else the dated lists of the catalogue."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import date

from perfmodel import catalog
from perfmodel.spec.hardware import PriceItem, PriceList

_STALE_DAYS = 90


class StalePrice(UserWarning):
    """A price older than 90 days."""


@dataclass(frozen=True)
class NodePrice:
    """USD per second for a whole node, and where it is from."""

    usd_per_s: float
    source: str


def on_demand(node: str) -> NodePrice | None:
    """Cheapest on-demand price of a whole node over all lists of the first root that has one, else what it costs to own."""
    return rented(node, "on-demand") or owned(node)


def rented(node: str, term: str) -> NodePrice | None:
    """Cheapest price of a whole node on a term (on-demand, 1y, 3y, spot) over all lists; None without."""
    offers = [
        (item.price * item.units_per_node, prices, item)
        for prices in catalog.load_prices()
        for item in prices.items
        if item.node == node and item.term == term and item.price is not None
    ]
    if not offers:
        return None
    usd, prices, item = min(offers, key=lambda o: o[0])
    return NodePrice(usd, _describe(prices, item))


def owned(node: str) -> NodePrice | None:
    """Straight-line price of a bought node: capital over its life plus host and power."""
    for prices in catalog.load_prices():
        for item in prices.items:
            if item.node == node and item.capital is not None and prices.amortisation:
                usd = item.capital * item.units_per_node / prices.amortisation + (prices.host_and_power or 0.0)
                return NodePrice(usd, _describe(prices, item))
    return None


def _describe(prices: PriceList, item: PriceItem) -> str:
    age = (date.today() - date.fromisoformat(prices.date)).days
    if age > _STALE_DAYS:
        warnings.warn(f"price of {item.instance} ({prices.provider}) is {age} days old ({prices.date})", StalePrice, 2)
    return f"{prices.provider} {prices.region} {item.instance} {item.term}, {prices.date}"
