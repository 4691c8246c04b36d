"""Physical units: parsed once at the door, formatted once at the exit, base SI floats in between.

Base units are byte, FLOP, second, joule (watt = joule/second) and USD. Rates use decimal prefixes
(``3.35 TB/s``); binary prefixes are for capacities that say so (``80 GiB``).

>>> parse("3.35 TB/s", "bandwidth")
3350000000000.0
>>> parse("400 Gbit/s", "bandwidth")
50000000000.0
>>> parse("2.2 us", "time")
2.2e-06
>>> show(3.35e12, "bandwidth")
'3.35 TB/s'
"""

from __future__ import annotations

import math
import re

from perfmodel.errors import UnitError, did_you_mean

# Exponents over (byte, FLOP, second, joule, USD).
Dimension = tuple[int, int, int, int, int]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}

_BYTE: Dimension = (1, 0, 0, 0, 0)
_FLOP: Dimension = (0, 1, 0, 0, 0)
_SECOND: Dimension = (0, 0, 1, 0, 0)
_JOULE: Dimension = (0, 0, 0, 1, 0)
_WATT: Dimension = (0, 0, -1, 1, 0)
_DOLLAR: Dimension = (0, 0, 0, 0, 1)
_PER_SECOND: Dimension = (0, 0, -1, 0, 0)
_ONE: Dimension = (0, 0, 0, 0, 0)


def _table() -> dict[str, tuple[float, Dimension]]:
    table: dict[str, tuple[float, Dimension]] = {"": (1.0, _ONE), "%": (0.01, _ONE)}
    for prefix, factor in {**_DECIMAL, **_BINARY}.items():
        table[prefix + "B"] = (factor, _BYTE)
        table[prefix + "bit"] = (factor / 8, _BYTE)
    for prefix, factor in _DECIMAL.items():
        table[prefix + "FLOP"] = (factor, _FLOP)
        table[prefix + "OP"] = (factor, _FLOP)
        table[prefix + "W"] = (factor, _WATT)
        table[prefix + "J"] = (factor, _JOULE)
        table[prefix + "Wh"] = (factor * 3600, _JOULE)
        table[prefix + "Hz"] = (factor, _PER_SECOND)
    for name, seconds in {
        "s": 1.0,
        "ms": 1e-3,
        "us": 1e-6,
        "µs": 1e-6,
        "ns": 1e-9,
        "min": 60.0,
        "h": 3600.0,
        "day": 86400.0,
        "week": 604800.0,
        "year": 31557600.0,
    }.items():
        table[name] = (seconds, _SECOND)
    table["USD"] = (1.0, _DOLLAR)
    return table


UNITS: dict[str, tuple[float, Dimension]] = _table()

# Marketing spellings of a rate.
_SPELLINGS = {"FLOPS": "FLOP/s", "FLOPs": "FLOP", "OPS": "OP/s", "Bps": "B/s", "bps": "bit/s"}

KINDS: dict[str, tuple[Dimension, str]] = {
    "size": (_BYTE, "80 GB"),
    "bandwidth": ((1, 0, -1, 0, 0), "3.35 TB/s"),
    "flops": ((0, 1, -1, 0, 0), "989 TFLOP/s"),
    "time": (_SECOND, "50 ms"),
    "rate": (_PER_SECOND, "8.5 /s"),
    "frequency": (_PER_SECOND, "1.98 GHz"),
    "power": (_WATT, "700 W"),
    "energy": (_JOULE, "3 kWh"),
    "money": (_DOLLAR, "25000 USD"),
    "price": ((0, 0, -1, 0, 1), "88 USD/h"),
    "energy_price": ((0, 0, 0, -1, 1), "0.12 USD/kWh"),
    "ratio": (_ONE, "0.85"),
}

_QUANTITY = re.compile(r"^\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*$")


def _factor(unit: str) -> tuple[float, Dimension]:
    """Scale and dimension of a unit text such as ``TB/s``; raises KeyError with the unknown atom."""
    for spelling, standard in _SPELLINGS.items():
        if unit.endswith(spelling) and unit[: -len(spelling)] in {**_DECIMAL, **_BINARY}:
            unit = unit[: -len(spelling)] + standard
            break
    scale, dimension = 1.0, list(_ONE)
    for position, atom in enumerate(unit.split("/")):
        atom = atom.strip().replace("μ", "µ")  # Greek mu is read as the micro sign
        if atom not in UNITS or (position > 0 and not atom):
            raise KeyError(atom)
        factor, exponents = UNITS[atom]
        sign = 1 if position == 0 else -1
        scale *= factor**sign
        dimension = [d + sign * e for d, e in zip(dimension, exponents, strict=True)]
    return scale, (dimension[0], dimension[1], dimension[2], dimension[3], dimension[4])


def _hint(atom: str) -> str:
    """The nearest unit. ``Gb`` may mean either of two, a factor of eight apart, so both are named."""
    if atom.endswith("b") and atom[:-1] + "bit" in UNITS:
        return f" (did you mean {atom[:-1] + 'bit'!r} or {atom[:-1] + 'B'!r}?)"
    return did_you_mean(atom, UNITS)


def parse(text: object, kind: str) -> float:
    """Read a quantity of the given kind and return it in base SI.

    Raises UnitError for an unknown unit, a unit of another kind, or a bare number where a unit is due.
    """
    wanted, example = KINDS[kind]
    a_kind = f"{'an' if kind[0] in 'aeio' else 'a'} {kind}".replace("_", " ")
    if isinstance(text, bool) or text is None:
        raise UnitError(f"expected {a_kind} such as '{example}', got {text!r}")
    match = _QUANTITY.match(str(text))
    if match is None:
        raise UnitError(f"cannot read {text!r} as {a_kind}; write it like '{example}'")
    number, unit = float(match.group(1).replace("_", "")), match.group(2)
    try:
        scale, dimension = _factor(unit)
    except KeyError as unknown:
        hint = _hint(str(unknown.args[0]))
        raise UnitError(f"unknown unit {unknown.args[0]!r} in {text!r}; write it like '{example}'{hint}") from None
    if dimension != wanted:
        if unit == "":
            raise UnitError(f"{text!r} has no unit; {a_kind} is written like '{example}'")
        raise UnitError(f"{text!r} is not {a_kind}; write it like '{example}'")
    value = number * scale
    if not math.isfinite(value):
        raise UnitError(f"{text!r} is not a finite {kind}")
    return value


_SHOWN = {
    "size": [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")],
    "bandwidth": [(1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")],
    "flops": [(1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1.0, "FLOP/s")],
    "time": [(86400.0, "day"), (3600.0, "h"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")],
    "rate": [(1.0, "/s")],
    "frequency": [(1e9, "GHz"), (1e6, "MHz"), (1.0, "Hz")],
    "power": [(1e6, "MW"), (1e3, "kW"), (1.0, "W")],
    "energy": [(3.6e9, "MWh"), (3.6e6, "kWh"), (1.0, "J")],
    "money": [(1.0, "USD")],
    "price": [(1 / 3600, "USD/h")],
    "energy_price": [(1 / 3.6e6, "USD/kWh")],
    "ratio": [(1.0, "")],
}


def show(value: float, kind: str, digits: int = 3) -> str:
    """Format a base-SI value with the largest unit that keeps the number at or above one."""
    if value is None or not math.isfinite(value):
        return str(value)
    scales = _SHOWN[kind]
    shown = abs(float(f"{value:.{digits - 1}e}"))  # 999.9 GB/s rounds to 1 TB/s, not to 1,000 GB/s
    factor, unit = next((pair for pair in scales if shown >= pair[0] * (1 - 1e-12)), scales[-1])
    number = value / factor
    # Keep integers whole: 2,500 USD must not read 2.5e+03.
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(number))) if number else 0))
    text = f"{number:,.{decimals}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {unit}".strip()
