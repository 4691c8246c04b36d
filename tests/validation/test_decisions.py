"""Choices by prediction: regrets, broken limits and rankings worked out by hand."""

from __future__ import annotations

import math

import pytest

from perfmodel.errors import SpecError
from perfmodel.validation.decisions import decide
from perfmodel.validation.rows import Predicted, Refused, Row
from perfmodel.validation.score import Scored


def candidate(
    tp: int, clients: int, measured: float, predicted: float, *, spread: float = 1.5, metric: str = "tpot", flag: str = "",
    hardware: str = "h100-sxm",
) -> Scored:  # fmt: skip
    cells = {
        "hardware": hardware, "model": "m", "dtype": "fp8", "input_len": "1024", "output_len": "1024", "engine": "vllm",
        "n_devices": str(tp), "tp": str(tp), "batch": str(clients), "metric": metric, "unit": "ms", "flag": flag,
        "value": str(measured),
    }  # fmt: skip
    outcome = Predicted(predicted, predicted / spread, predicted * spread)
    return Scored(Row("inline.csv", 1, cells), measured, outcome, "closed-loop serving")


# Throughput per device is clients / ms / devices: 0.8, 1.28 on one device; 0.5, 0.8, 1.143 on two.
PERFECT = [
    candidate(1, 8, 10, 10), candidate(1, 16, 12.5, 12.5),
    candidate(2, 8, 8, 8), candidate(2, 16, 10.5, 10.5), candidate(2, 32, 14, 14),
]  # fmt: skip


def test_perfect_predictions_lose_nothing() -> None:
    d = decide(PERFECT)
    assert (d.groups, d.decisions) == (1, 3)
    assert (d.regret_mean, d.limits_broken, d.top_two) == (0, 0, 1)
    assert d.spearman == pytest.approx(1)
    assert math.isnan(d.device_regret_mean)
    assert d.as_dict()["device_regret_mean"] is None


def test_regret_by_hand() -> None:
    """Limits at 30, 50, 70 % of 8, 10, 10.5, 12.5, 14: 10.1, 10.5, 12.1 ms. The best within them: 8 clients on one device
    (0.8), then the same (16 on two devices give 0.762) twice. A prediction of 13 ms for it leaves 8 on two devices at
    the first limit (regret 1 - 0.5/0.8 = 0.375) and 16 on two at the others (1 - 0.762/0.8 = 0.0476)."""
    rows = [candidate(1, 8, 10, 13), *PERFECT[1:]]
    d = decide(rows)
    assert d.regret_mean == pytest.approx((0.375 + 2 * (1 - 16 / 10.5 / 2 / 0.8)) / 3)
    assert d.limits_broken == 0
    assert d.top_two == 0  # the layout of one device is not among those that seem to meet the limit


def test_broken_limits() -> None:
    """16 clients on one device seem to take 9 ms: picked at every limit (10.1, 10.5, 12.1), and 12.5 ms break all of them."""
    rows = [PERFECT[0], candidate(1, 16, 12.5, 9), *PERFECT[2:]]
    d = decide(rows)
    assert (d.limits_broken, d.regret_mean) == (1, 0)


def test_confidence_asks_for_room() -> None:
    """With a p90 of 1.5 times the expected value, 16 clients that seem to take 9 ms are no longer picked at 10.1 ms."""
    rows = [PERFECT[0], candidate(1, 16, 12.5, 9), *PERFECT[2:]]
    assert decide(rows, 0.9).limits_broken == 0
    # p75 lies 0.6745 / 1.2816 of the way: 9 x 1.5^0.526 = 11.14 ms, within the last limit only.
    assert decide(rows, 0.75).limits_broken == pytest.approx(1 / 3)


def test_devices_compete() -> None:
    """Another device that is measured twice as fast and predicted twice as slow is never chosen: regret at each limit."""
    other = [candidate(1, c, m, 4 * m, hardware="b200-sxm") for c, m in ((8, 5), (16, 6.25), (32, 9), (64, 15))]
    d = decide(PERFECT + other)
    assert d.device_decisions == 3
    # Limits 8.3, 10, 11.9 of nine: picks 0.5, 0.8, 0.8; the best are 16/6.25 = 2.56 at 8.3 and 32/9 = 3.556 at the others.
    assert d.device_regret_mean == pytest.approx(1 - (0.5 / 2.56 + 2 * 0.8 / (32 / 9)) / 3)


def test_rows_that_are_no_candidates() -> None:
    ttft = candidate(1, 8, 99, 1, metric="ttft")
    refused = Scored(candidate(1, 4, 1, 1).row, 1, Refused("unknown"), "closed-loop serving")
    assert decide([*PERFECT, ttft, refused]).as_dict() == decide(PERFECT).as_dict()
    fake = candidate(1, 512, 5, 500)  # 512 clients of which most waited outside, as the flag of its TTFT says
    flagged = candidate(1, 512, 9999, 9999, metric="ttft", flag="queueing_dominated_ttft")
    assert decide([*PERFECT, fake]).regret_mean > 0.9
    assert decide([*PERFECT, fake, flagged]).regret_mean == 0


def test_repeated_measurements_are_averaged() -> None:
    twice = [candidate(1, 8, 8, 10), candidate(1, 8, 12, 10), *PERFECT[1:]]
    assert decide(twice).regret_mean == 0


def test_bad_input() -> None:
    with pytest.raises(SpecError, match="nothing to decide"):
        decide(PERFECT[:2])
    with pytest.raises(SpecError, match="confidence"):
        decide(PERFECT, 1.0)
