"""Measured power of devices that serve static batches."""

from __future__ import annotations

import pytest

from perfmodel.cost import device_power, step_shares
from perfmodel.estimator import Estimator
from perfmodel.graph import decode
from perfmodel.validation.kinds.power import POWER
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")


def row(**cells: str | float) -> Row:
    base = {
        "hardware": "A100-SXM-80GB", "model": "llama2-70b", "phase": "e2e", "metric": "avg_power", "unit": "fraction",
        "value": 1, "tp": 4, "batch": 1, "input_len": 512, "output_len": 128, "engine": "vllm(modified)",
    }  # fmt: skip
    return Row("f.csv", 2, {k: str(v) for k, v in (base | cells).items()})


def value(r: Row) -> float:
    assert POWER.claims(r)
    outcome = POWER.predict([r])[0]
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


# Mean power of a run over the board limit, Llama-2-70B on A100, with the decode time it was measured at [s]
# (Splitwise's profiles, MIT licence).
RUNS = [(2, 1, 0.736, 0.05486), (4, 1, 0.599, 0.04499), (8, 1, 0.435, 0.04485), (8, 16, 0.458, 0.05044)]


@pytest.mark.parametrize(("tp", "batch", "measured", "step"), RUNS)
def test_measured_runs(tp: int, batch: int, measured: float, step: float) -> None:
    assert value(row(tp=tp, batch=batch)) == pytest.approx(measured, rel=0.3)
    # Decode alone, at the measured step time: within 15 % (a run holds some prefill, which draws more).
    e = Estimator("llama2-70b", "a100-sxm-80gb", tp=tp)
    watts = device_power(e, *step_shares(e, decode(batch, 576), step))
    assert watts == pytest.approx(measured * 400, rel=0.15)


def test_shares_by_hand() -> None:
    # 34.5 GB of weights a device (69 G parameters in bf16 over 4) in 45 ms: 767 GB/s of 2,039.
    e = Estimator("llama2-70b", "a100-sxm-80gb", tp=4)
    compute, memory = step_shares(e, decode(1, 1), 0.045)
    assert memory == pytest.approx(767 / 2039, rel=0.02)
    # 2 x 34.5 G / 2 = 34.5 GFLOP in 45 ms: 0.77 of 312 TFLOP/s.
    assert compute == pytest.approx(0.77e12 / 312e12, rel=0.05)


def test_prefill_draws_the_limit_and_decode_less() -> None:
    prefill, step = value(row(phase="prefill", input_len=4096, tp=2)), value(row(phase="decode", tp=2))
    assert prefill > 0.95
    assert step < prefill
    assert step < value(row(tp=2)) < prefill


def test_units() -> None:
    share = value(row())
    assert value(row(unit="W")) == pytest.approx(400 * share)
    assert value(row(unit="kW total")) == pytest.approx(4 * 0.4 * share)
    assert value(row(unit="%")) == pytest.approx(100 * share)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"unit": "J"}, "unknown unit 'J'"),
        ({"phase": "gemm"}, "no power of phase"),
        ({"model": ""}, "model not stated"),
        ({"input_len": ""}, "input_len not stated"),
        ({"hardware": "no-such"}, "unknown hardware"),
    ],
)
def test_refusals(cells: dict[str, str | float], reason: str) -> None:
    outcome = POWER.predict([row(**cells)])[0]
    assert isinstance(outcome, Refused)
    assert reason in str(outcome)
