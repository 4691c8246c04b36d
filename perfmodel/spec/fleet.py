"""What may be bought, where, on which terms, and what the fleet must survive: the market half of a plan file."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, model_validator

from perfmodel.errors import did_you_mean
from perfmodel.spec.base import Bandwidth, Count, EnergyPrice, Fraction, Natural, Power, Price, Rate, Spec, Time

TermName = Literal["on-demand", "1y", "3y", "spot"]
TERMS: tuple[str, ...] = get_args(TermName)
RESERVED = ("1y", "3y")
"""Terms that are paid around the clock."""
Domain = Literal["device", "node", "rack"]

_GRAMS = {"g": 1.0, "kg": 1e3, "t": 1e6}
_JOULES = {"kWh": 3.6e6, "MWh": 3.6e9, "Wh": 3.6e3, "MJ": 1e6, "J": 1.0}
_SECONDS = {"s": 1.0, "h": 3600.0, "day": 86400.0}
_MASS = re.compile(r"([0-9.eE+-]+)\s*(kg|g|t)\s*/\s*(\w+)")


def _mass_per(value: Any, units: dict[str, float], example: str) -> float:
    match = _MASS.fullmatch(str(value).strip())
    if match is None or match[3] not in units:
        raise ValueError(f"{value!r} is not read: write it like '{example}'")
    try:
        grams = float(match[1]) * _GRAMS[match[2]]
    except ValueError:
        raise ValueError(f"{value!r} is not read: write it like '{example}'") from None
    if not (math.isfinite(grams) and grams >= 0):
        raise ValueError(f"{value!r} must not be negative")
    return grams / units[match[3]]


if TYPE_CHECKING:
    CarbonIntensity: TypeAlias = float
    CarbonRate: TypeAlias = float
else:
    CarbonIntensity = Annotated[float, BeforeValidator(lambda v: _mass_per(v, _JOULES, "380 g/kWh"))]
    """Grams of CO2 equivalent per joule."""
    CarbonRate = Annotated[float, BeforeValidator(lambda v: _mass_per(v, _SECONDS, "12 kg/h"))]
    """Grams of CO2 equivalent per second."""


class Term(Spec):
    """One way to pay for a node type."""

    price: Price | None = None
    """Per whole node; None: from the dated lists of the catalogue."""
    quota: Natural | None = None
    """Most nodes on this term."""
    interruptions: Rate | None = None
    """spot only: how often the provider takes one node back, such as ``0.05 /h``."""


def _terms(value: Any) -> Any:
    """A list of names stands for terms at the catalogue's prices."""
    if not isinstance(value, (list, tuple, dict)):
        raise ValueError(f"{value!r} is neither a list nor a mapping of terms; known: {', '.join(TERMS)}")
    if not value:
        raise ValueError(f"name at least one of {', '.join(TERMS)}")
    for name in value:
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r}{did_you_mean(str(name), TERMS)}; known: {', '.join(TERMS)}")
    return value if isinstance(value, dict) else {name: {} for name in value}


class FleetItem(Spec):
    """A node type that may be bought or rented, in one region."""

    node: str
    region: str = ""
    """A name under `regions`; empty: none is told apart."""
    max_nodes: Count | None = None
    min_nodes: Natural = 0
    """Smallest purchase: none at all, or at least this many."""
    block: Count = 1
    """Nodes of one purchase unit: 4 sells 4, 8, 12 …"""
    price: Price | None = None
    """Per whole node, on demand; else from the catalogue's price lists."""
    terms: Annotated[dict[TermName, Term], BeforeValidator(_terms)] = {"on-demand": Term()}
    rack_nodes: Count | None = None
    """Nodes that fail together, for `survive: [rack]`."""
    mtbf: Time | None = None
    """Mean time between failures of a whole node, its devices included."""
    mttr: Time | None = None
    """Mean time to repair or replace it."""

    @model_validator(mode="after")
    def _consistent(self) -> FleetItem:
        if self.price is not None and "on-demand" not in self.terms:
            raise ValueError("'price' is that of the term on-demand, which 'terms' leaves out")
        if self.price is not None and self.terms["on-demand"].price is not None:
            raise ValueError("give the on-demand price once: as 'price' or under 'terms'")
        if (self.mtbf is None) != (self.mttr is None):
            raise ValueError("give mtbf and mttr together")
        if self.mtbf is not None and self.mtbf <= 0:
            raise ValueError("mtbf must be positive")
        for name, term in self.terms.items():
            if (name == "spot") != (term.interruptions is not None) and (name == "spot" or term.interruptions):
                wrong = "spot needs 'interruptions', such as 0.05 /h" if name == "spot" else f"{name} is not interrupted"
                raise ValueError(wrong)
        if self.max_nodes is not None and self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} exceeds max_nodes {self.max_nodes}")
        if self.max_nodes is not None and self.block > self.max_nodes:
            raise ValueError(f"a block of {self.block} nodes exceeds max_nodes {self.max_nodes}")
        return self


class Region(Spec):
    """A site: how far it is from the users, and what its power costs."""

    rtt: Time = 0.0
    """Round trip between users and site; it is part of TTFT."""
    carbon: CarbonIntensity | None = None
    electricity: EnergyPrice | None = None
    """Charged on top of the nodes' prices, so leave it out where those include power."""
    pue: float = Field(default=1.0, ge=1, le=3)
    power: Power | None = None
    """Most watts at the meter, PUE included."""


class Limits(Spec):
    """What the whole fleet may take."""

    budget: Price | None = None
    devices: Count | None = None
    power: Power | None = None
    carbon: CarbonRate | None = None
    spot_share: Fraction = 1.0
    """Most requests of each service that spot nodes may serve, as a share."""


class Resilience(Spec):
    """What may fail while the rest still meets every objective."""

    survive: tuple[Domain, ...] = ()
    """Loss of any one: device (its whole instance goes down), node, rack."""
    availability: float | None = Field(default=None, gt=0, lt=1)
    """Probability with which enough nodes are up, from each node type's mtbf and mttr."""

    @model_validator(mode="after")
    def _something(self) -> Resilience:
        if not self.survive and self.availability is None:
            raise ValueError("say what to survive (device, node, rack), an availability, or both")
        return self


class Startup(Spec):
    """From the decision to start a node until it serves, beside loading the weights."""

    provisioning: Time
    """Until the node has booted."""
    weights: Bandwidth
    """Bytes per second at which one node reads the weights (registry, object store or local drives)."""
    engine_init: Time
    graph_capture: Time = 0.0


class Profile(Spec):
    """Load over a day (or the trace's span), and whether the fleet follows it."""

    hours: tuple[tuple[float, float], ...] = ()
    """(hours, multiple of the planned rate), in order of time; the day repeats."""
    window: Time | None = None
    """Instead of `hours`: windows of this length of the workload's trace."""
    fleet: Literal["fixed", "elastic"] = "fixed"

    @model_validator(mode="after")
    def _positive(self) -> Profile:
        if bool(self.hours) == (self.window is not None):
            raise ValueError("give 'hours' or 'window', one of them")
        if any(h <= 0 or m < 0 for h, m in self.hours):
            raise ValueError("hours must be positive and multiples not negative")
        if self.hours and max(m for _, m in self.hours) <= 0:
            raise ValueError("some period must have load")
        if self.window is not None and self.window <= 0:
            raise ValueError("the window must be positive")
        return self
