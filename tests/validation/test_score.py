"""Every figure of a score, by hand on three rows, and what must change when the input does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from perfmodel.validation.rows import Predicted, Refused, Row
from perfmodel.validation.score import Scored, by, score


def scored(measured: float, outcome: Predicted | Refused, **cells: str) -> Scored:
    return Scored(Row("f.csv", 2, {"unit": "us", "hardware": "x", **cells}), measured, outcome, "gemm")


@pytest.fixture
def three() -> list[Scored]:
    # Ratios 1.1, 0.5, 2.0: signed errors 0.1, -0.5, 1.0.
    return [
        scored(10.0, Predicted(11.0, 9.0, 12.0)),
        scored(100.0, Predicted(50.0, 40.0, 60.0)),
        scored(20.0, Predicted(40.0, 15.0, 50.0)),
    ]


def test_errors_by_hand(three: list[Scored]) -> None:
    s = score(three)
    assert (s.rows, s.predicted, s.refused) == (3, 3, {})
    assert s.mape == pytest.approx((0.1 + 0.5 + 1.0) / 3)
    assert s.median_ape == pytest.approx(0.5)
    assert s.p90_ape == pytest.approx(0.5 + 0.8 * 0.5)  # linear between the second and third of three
    assert s.bias == pytest.approx(0.1)
    assert s.mean_abs_log == pytest.approx((math.log(1.1) + math.log(2) + math.log(2)) / 3)
    assert s.time_weighted_ape == pytest.approx((10 * 0.1 + 100 * 0.5 + 20 * 1.0) / 130)
    # Measured order 10 < 20 < 100, predicted 11 < 40 < 50: the same ranks.
    assert s.spearman == pytest.approx(1.0)
    assert s.coverage == pytest.approx(2 / 3)
    assert s.width == pytest.approx(20 / 50)  # the middle one of 3/11, 20/50 and 35/40


def test_a_refusal_counts_as_an_error_of_one(three: list[Scored]) -> None:
    s = score([*three, scored(30.0, Refused("unknown hardware"))])
    assert s.refused == {"unknown hardware": 1}
    assert s.predicted == 3
    assert s.mape == pytest.approx((0.1 + 0.5 + 1.0 + 1.0) / 4)
    # What was predicted is as biased and as covered as before.
    assert s.bias == score(three).bias
    assert s.coverage == score(three).coverage


def test_ties_share_a_rank() -> None:
    rows = [scored(m, Predicted(p, p, p)) for m, p in ((1.0, 5.0), (2.0, 5.0), (3.0, 5.0))]
    assert math.isnan(score(rows).spearman)  # constant predictions rank nothing
    rows[2] = scored(3.0, Predicted(6.0, 6.0, 6.0))
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: correlation 1.5 / (sqrt(1.5) sqrt(2)).
    assert score(rows).spearman == pytest.approx(1.5 / math.sqrt(3.0))


def test_rates_have_no_time_to_weigh(three: list[Scored]) -> None:
    rates = [replace(s, row=replace(s.row, cells={**s.row.cells, "unit": "GB/s"})) for s in three]
    assert math.isnan(score(rates).time_weighted_ape)
    mixed = score([*rates, three[0]])
    assert mixed.time_weighted_ape == pytest.approx(0.1)


def test_groups_by_any_column(three: list[Scored]) -> None:
    other = scored(10.0, Predicted(10.0, 9.0, 11.0), hardware="y")
    groups = by([*three, other], ["hardware", "kind"])
    assert [(k["hardware"], k["kind"], s.rows) for k, s in groups] == [("x", "gemm", 3), ("y", "gemm", 1)]
    assert groups[1][1].mape == 0


def test_pinball_by_hand() -> None:
    # p10 9: measured 10 above it costs 0.1 x 1; p90 12: measured below costs 0.1 x 2; mean over both, relative to 10.
    assert score([scored(10.0, Predicted(11.0, 9.0, 12.0))]).pinball == pytest.approx((0.1 * 1 + 0.1 * 2) / 10 / 2)
