"""Units against pint, an independent unit library, and against hand arithmetic."""

from __future__ import annotations

import math

import pint
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import units
from perfmodel.errors import UnitError

PINT = pint.UnitRegistry()
PINT.define("FLOP = [operation]")
PINT.define("USD = [money]")

# What pint calls our base units, in the order of `units.Dimension`: byte, FLOP, second, joule, USD.
BASES = ("byte", "FLOP", "second", "joule", "USD")
PREFIXES = {
    "": "", "k": "kilo", "K": "kilo", "M": "mega", "G": "giga", "T": "tera", "P": "peta", "E": "exa",
    "Ki": "kibi", "Mi": "mebi", "Gi": "gibi", "Ti": "tebi", "Pi": "pebi",
}  # fmt: skip
STEMS = {"B": "byte", "bit": "bit", "FLOP": "FLOP", "OP": "FLOP", "W": "watt", "J": "joule", "Wh": "watt_hour", "Hz": "hertz"}
NAMED = {
    "s": "second", "ms": "millisecond", "us": "microsecond", "µs": "microsecond", "ns": "nanosecond",
    "min": "minute", "h": "hour", "day": "day", "week": "week", "year": "year", "USD": "USD",
}  # fmt: skip


def pint_name(unit: str) -> str:
    """Our spelling of one unit in pint's words."""
    if unit in NAMED:
        return NAMED[unit]
    stem = max((s for s in STEMS if unit.endswith(s)), key=len)
    return PREFIXES[unit.removesuffix(stem)] + STEMS[stem]


def in_base(quantity: pint.Quantity, dimension: units.Dimension) -> float:
    """A pint quantity in our base units; raises if the dimensions differ."""
    base = PINT.Quantity(1.0)
    for name, exponent in zip(BASES, dimension, strict=True):
        base *= PINT.Quantity(1.0, name) ** exponent
    return quantity.to(base.units).magnitude


ATOMS = [unit for unit in units.UNITS if unit not in ("", "%")]


@pytest.mark.parametrize("unit", ATOMS)
def test_every_unit_agrees_with_pint(unit: str) -> None:
    factor, dimension = units.UNITS[unit]
    assert factor == pytest.approx(in_base(PINT.Quantity(1.0, pint_name(unit)), dimension), rel=1e-14)


def test_the_table_has_every_prefix_of_every_stem() -> None:
    decimal = [p for p in PREFIXES if not p.endswith("i")]
    binary = [p for p in PREFIXES if p.endswith("i")]
    expected = {p + s for s in STEMS for p in decimal} | {p + s for s in ("B", "bit") for p in binary}
    assert set(units.UNITS) == expected | set(NAMED) | {"", "%"}


def of_dimension(dimension: units.Dimension) -> list[str]:
    return [u for u in ATOMS if units.UNITS[u][1] == dimension]


@given(
    st.floats(1e-9, 1e9) | st.integers(1, 10**9),
    st.sampled_from([u for u in ATOMS if u != "year"]),
    st.sampled_from(["s", "ms", "us", "min", "h", "day", "week"]),
)
def test_a_rate_is_read_as_pint_reads_it(number: float, unit: str, per: str) -> None:
    dimension = units.UNITS[unit][1]
    wanted = (*dimension[:2], dimension[2] - 1, *dimension[3:])
    kind = next((k for k, (d, _) in units.KINDS.items() if d == wanted), None)
    quantity = PINT.Quantity(float(number), pint_name(unit)) / PINT.Quantity(1.0, pint_name(per))
    if kind is None:
        for other in units.KINDS:
            with pytest.raises(UnitError):
                units.parse(f"{number} {unit}/{per}", other)
    else:
        assert units.parse(f"{number} {unit}/{per}", kind) == pytest.approx(in_base(quantity, wanted), rel=1e-12)


@given(st.sampled_from(sorted(units.KINDS)), st.sampled_from(sorted(units.KINDS)))
def test_another_kind_is_refused(kind: str, other: str) -> None:
    example = units.KINDS[kind][1]
    if units.KINDS[kind][0] == units.KINDS[other][0]:
        assert units.parse(example, other) > 0
    else:
        with pytest.raises(UnitError, match="is not an? |has no unit"):
            units.parse(example, other)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3.35 TB/s", "bandwidth", 3.35e12),
        ("3.35TB/s", "bandwidth", 3.35e12),
        ("  80 GiB ", "size", 80 * 1024**3),
        ("81559 MiB", "size", 81559 * 1024**2),
        ("400 Gbps", "bandwidth", 400e9 / 8),
        ("400 GBps", "bandwidth", 400e9),
        ("400 Gbit/s", "bandwidth", 50e9),
        ("989.4 TFLOPS", "flops", 989.4e12),
        ("1979 TOPS", "flops", 1979e12),
        ("1e3 B", "size", 1000.0),
        ("1_000 B", "size", 1000.0),
        ("1EB", "size", 1e18),
        (".5 s", "time", 0.5),
        ("5. s", "time", 5.0),
        ("-1 ms", "time", -1e-3),
        ("8.5 /s", "rate", 8.5),
        ("8.5/s", "rate", 8.5),
        ("2.2 µs", "time", 2.2e-6),
        ("2.2 μs", "time", 2.2e-6),
        ("85 %", "ratio", 0.85),
        (0.85, "ratio", 0.85),
        (3, "ratio", 3.0),
        ("88.49 USD/h", "price", 88.49 / 3600),
        ("0.12 USD/kWh", "energy_price", 0.12 / 3.6e6),
        ("3 kWh", "energy", 10.8e6),
        ("1 year", "time", 365.25 * 86400),
    ],
)  # fmt: skip
def test_spellings_by_hand(text: object, kind: str, value: float) -> None:
    assert units.parse(text, kind) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("80", "size", "'80' has no unit; a size is written like '80 GB'"),
        (80, "size", "80 has no unit"),
        ("80 GB/s", "size", "'80 GB/s' is not a size"),
        ("80 GB", "bandwidth", "'80 GB' is not a bandwidth"),
        ("700 W", "energy", "'700 W' is not an energy"),
        ("989 TFLOP", "flops", "'989 TFLOP' is not a flops"),
        ("3.35 TBs", "size", "unknown unit 'TBs' in '3.35 TBs'; write it like '80 GB' (did you mean 'TB'?)"),
        ("400 Gb/s", "bandwidth", "(did you mean 'Gbit' or 'GB'?)"),
        ("80 GB/", "size", "unknown unit '' in '80 GB/'"),
        ("2,500 USD", "money", "unknown unit ',500 USD'"),
        ("fast", "bandwidth", "cannot read 'fast' as a bandwidth; write it like '3.35 TB/s'"),
        ("", "size", "cannot read '' as a size"),
        (True, "ratio", "expected a ratio such as '0.85', got True"),
        (None, "size", "expected a size such as '80 GB', got None"),
        (float("nan"), "ratio", "cannot read nan"),
        (float("inf"), "ratio", "cannot read inf"),
        ("1e400 B", "size", "is not a finite size"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: object, kind: str, says: str) -> None:
    with pytest.raises(UnitError) as error:
        units.parse(text, kind)
    assert says in str(error.value)


@given(
    st.sampled_from([k for k in units.KINDS if k != "ratio"]),
    st.floats(min_value=1e-9, max_value=1e21) | st.floats(min_value=-1e21, max_value=-1e-9),
)
def test_what_is_shown_reads_back_within_its_digits(kind: str, value: float) -> None:
    text = units.show(value, kind).replace(",", "")
    assert units.parse(text, kind) == pytest.approx(value, rel=0.005)


@given(st.sampled_from(sorted(units.KINDS)), st.integers(3, 12), st.floats(min_value=1e-9, max_value=1e21))
def test_more_digits_read_back_closer(kind: str, digits: int, value: float) -> None:
    text = units.show(value, kind, digits).replace(",", "")
    assert units.parse(text, kind) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (3.35e12, "bandwidth", "3.35 TB/s"),
        (450e9, "bandwidth", "450 GB/s"),
        (999.4e9, "bandwidth", "999 GB/s"),
        (999.9e9, "bandwidth", "1 TB/s"),
        (989.4e12, "flops", "989 TFLOP/s"),
        (1.979e15, "flops", "1.98 PFLOP/s"),
        (0.0472, "time", "47.2 ms"),
        (90.0, "time", "90 s"),
        (7200.0, "time", "2 h"),
        (2500.0, "money", "2,500 USD"),
        (25432.0, "money", "25,432 USD"),
        (88.0 / 3600, "price", "88 USD/h"),
        (0.12 / 3.6e6, "energy_price", "0.12 USD/kWh"),
        (0.0, "size", "0 B"),
        (-5e9, "size", "-5 GB"),
        (0.85, "ratio", "0.85"),
        (math.inf, "time", "inf"),
    ],
)
def test_shown_as_a_person_would_write_it(value: float, kind: str, text: str) -> None:
    assert units.show(value, kind) == text


def test_every_kind_reads_its_own_example_and_can_be_shown() -> None:
    for kind, (_, example) in units.KINDS.items():
        value = units.parse(example, kind)
        assert units.parse(units.show(value, kind).replace(",", ""), kind) == pytest.approx(value, rel=0.005)
