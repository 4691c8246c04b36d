"""What every spec shares: frozen records that refuse unknown keys, unit-typed fields, and sources."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from perfmodel import units


class Spec(BaseModel):
    """A frozen record; a key nobody declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _positive(text: Any, kind: str) -> float:
    value = units.parse(text, kind)
    if value <= 0:
        raise ValueError(f"{text!r} must be positive")
    return value


def _non_negative(text: Any, kind: str) -> float:
    value = units.parse(text, kind)
    if value < 0:
        raise ValueError(f"{text!r} must not be negative")
    return value


def _number(value: Any) -> Any:
    """Pydantic reads `true` as 1; a count that says so is a mistake."""
    if isinstance(value, (bool, str)):
        raise ValueError(f"expected a number, got {value!r}")
    return value


def _quantity(kind: str, check: Any = _positive) -> Any:
    return Annotated[float, BeforeValidator(partial(check, kind=kind)), Field(json_schema_extra={"unit": kind})]


if TYPE_CHECKING:
    Size: TypeAlias = float
    Bandwidth: TypeAlias = float
    Flops: TypeAlias = float
    Time: TypeAlias = float
    Rate: TypeAlias = float
    Frequency: TypeAlias = float
    Power: TypeAlias = float
    Energy: TypeAlias = float
    Money: TypeAlias = float
    Price: TypeAlias = float
    EnergyPrice: TypeAlias = float
    Fraction: TypeAlias = float
    Count: TypeAlias = int
    Natural: TypeAlias = int
else:
    Size = _quantity("size")
    Bandwidth = _quantity("bandwidth")
    Flops = _quantity("flops")
    Time = _quantity("time", _non_negative)
    Rate = _quantity("rate")
    Frequency = _quantity("frequency")
    Power = _quantity("power", _non_negative)
    Energy = _quantity("energy")
    Money = _quantity("money", _non_negative)
    Price = _quantity("price", _non_negative)
    EnergyPrice = _quantity("energy_price", _non_negative)
    Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
    Natural = Annotated[int, BeforeValidator(_number), Field(ge=0)]
    Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]

UNVERIFIED = "unverified"


class Source(Spec):
    """Where a number was read: a document that was opened, with the date of reading or publication."""

    title: str
    url: str | None = None
    date: str | None = None
    note: str | None = None
