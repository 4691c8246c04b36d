"""`estimate --rate`: the front end in TTFT and capacity, attainment, goodput, gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perfmodel import calibration
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import batching, frontend
from perfmodel.serving.replay.deploy import deploy
from perfmodel.serving.requests import Requests
from perfmodel.spec.deployment import Deployment

SHAPE = {"isl": 1000, "osl": 200}


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator("llama-3.1-8b", "h100-sxm")


def summary(e: Estimator, rate: float | None = None, concurrency: int | None = None, **limits: float) -> dict[str, Any]:
    limits = {"ttft": None, "tpot": None, **limits}
    return batching.serving_summary(e, **SHAPE, rate=rate, concurrency=concurrency, **limits)


def test_a_first_token_passes_the_front_end_once(estimator: Estimator) -> None:
    """Without load: 4 ms + 1.6 us a token of vLLM's rows, which hold tokeniser and API server, and one prefill step."""
    found = summary(estimator, 0.01)
    unloaded = frontend.ttft_overhead(calibration.engine("vllm"), 1000).total
    assert found["front_end"]["ttft_s"] == pytest.approx(unloaded, rel=0.01)
    assert found["ttft_s"]["p50"] == pytest.approx(unloaded + float(estimator.prefill(1, 1000)), rel=0.02)


def test_waiting_for_the_api_process_grows_with_the_rate(estimator: Estimator) -> None:
    found = [summary(estimator, rate)["front_end"] for rate in (2.0, 10.0, 18.0)]
    assert [x["ttft_s"] for x in found] == sorted(x["ttft_s"] for x in found)
    # A request of 200 tokens: 1/500 + 200/8,000 s, and 1.25 us a token to detokenise.
    each = 1 / 500 + 200 / 8000 + 200 * 1.25e-6
    assert [x["utilisation"] for x in found] == pytest.approx([2 * each, 10 * each, 18 * each])


def test_a_busy_front_end_is_infeasible(estimator: Estimator) -> None:
    """The front end carries 1 / 27.25 ms = 36.7 requests/s; short prompts leave the device time for more."""
    with pytest.raises(Infeasible) as refused:
        batching.serving_summary(estimator, 50, 200, rate=40, concurrency=None, ttft=None, tpot=None)
    assert "front end" in str(refused.value)
    nearest = float(str(refused.value.nearest).split()[-1])
    assert 36 < nearest < 1 / 0.02725
    assert batching.serving_summary(estimator, 50, 200, rate=nearest, concurrency=None, ttft=None, tpot=None)
    loop = batching.serving_summary(estimator, 50, 200, rate=None, concurrency=2000, ttft=None, tpot=None)
    assert loop["rate_per_s"] < 1 / 0.02725


def test_capacity_is_where_attainment_crosses_its_target(estimator: Estimator) -> None:
    limits = {"ttft": 0.05, "tpot": 0.012}
    found = summary(estimator, 5, **limits)
    assert found["goodput_per_s"] == pytest.approx(5 * found["attainment"])
    most = found["capacity_per_s"]
    assert summary(estimator, 0.98 * most, **limits)["attainment"] >= 0.95 > summary(estimator, 1.02 * most, **limits)["attainment"]
    for name in ("goodput", "capacity"):
        assert found[f"{name}_per_s_per_device"] == found[f"{name}_per_s"]
    # A limit below the front end's own seconds cannot be met.
    assert summary(estimator, 5, ttft=0.004)["attainment"] == 0


def test_percentiles_are_in_order(estimator: Estimator) -> None:
    found = summary(estimator, 10)
    for name in ("ttft_s", "tpot_s", "itl_s", "longest_gap_s"):
        values = [found[name][p] for p in ("p50", "p90", "p95", "p99")]
        assert values == sorted(values)
        assert np.isfinite(values).all()
    # The longest of 199 gaps is at least the one of every hundredth.
    assert found["longest_gap_s"]["p50"] >= found["itl_s"]["p95"]


def test_memory_fills_as_the_rate_grows() -> None:
    """Answers of 1,000 tokens on a 48 GB device: time full, preemptions and waits rise; swapping one costs its bytes over the link."""
    e = Estimator("llama-3.1-8b", "l40s")
    found = [
        batching.serving_summary(e, 1000, 1000, rate=rate, concurrency=None, ttft=None, tpot=None)["memory"]
        for rate in (1.0, 1.55, 1.65)
    ]
    for name in ("full_share", "preemptions_per_request", "wait_s", "repeated_s", "swapped_s"):
        values = [x[name] for x in found]
        assert values == sorted(values)
        assert values[-1] > 2 * values[0]
    last = found[-1]
    # 131,072 B a token, 63 blocks of 16 tokens, out and back over PCIe 4.0 x16, which copies do not fill.
    link = 2 * 131_072 * 1008 / 32e9
    assert link < last["swapped_s"] / last["preemptions_per_request"] < 1.6 * link
    assert last["repeated_s"] / last["preemptions_per_request"] == pytest.approx(float(e.prefill(1, 1000)), rel=0.3)


@pytest.mark.parametrize(("technique", "seconds"), [("prefix-cache:device=0.5,lookup=2", 2.0), ("prefix-cache:device=0.5", 0.0)])
def test_a_look_up_delays_first_tokens(technique: str, seconds: float) -> None:
    """What hides behind nothing comes on top: a look-up of 2 s makes every quantile 2 s later, and no token slower."""
    plain, found = (summary(Estimator("llama-3.1-8b", "h100-sxm", techniques=[t]), 2) for t in ("prefix-cache:device=0.5", technique))
    assert (found["fetched"] or {"ttft_s": 0.0})["ttft_s"] == pytest.approx(seconds)
    for p in ("p50", "p99"):
        assert found["ttft_s"][p] == pytest.approx(plain["ttft_s"][p] + seconds)
    assert found["tpot_s"] == plain["tpot_s"]


def test_a_drive_delivers_what_it_can() -> None:
    """7,200 tokens of 131,072 B a request: the rate is the drive's over that, and a fetch waits for others as M/D/1 says."""
    e = Estimator("llama-3.1-8b", "h100-sxm", techniques=["prefix-cache:drive=0.9"])

    def loaded(rate: float | None = None, concurrency: int | None = None) -> dict[str, Any]:
        return batching.serving_summary(e, 8000, 50, rate=rate, concurrency=concurrency, ttft=None, tpot=None)

    each = e.fetching(8000)[1]["drive"]
    assert 7200 * 131072 / 14e9 < each < 7200 * 131072 / 5e9  # a PCIe 5 x4 drive reads 14 GB/s at best
    quiet, busy = loaded(0.01), loaded(0.8 / each)
    assert busy["fetched"]["utilisation"] == pytest.approx(0.8)
    assert busy["fetched"]["ttft_s"] - quiet["fetched"]["ttft_s"] == pytest.approx(0.8 * each / (2 * 0.2), rel=0.02)
    with pytest.raises(Infeasible, match="drive cannot deliver") as refused:
        loaded(1.05 / each)
    nearest = float(str(refused.value.nearest).split()[-1])
    assert 0.98 / each < nearest < 1 / each
    assert loaded(nearest)["fetched"]["utilisation"] < 1
    assert loaded(concurrency=200)["rate_per_s"] < 1 / each


@pytest.mark.parametrize(
    ("model", "techniques", "said"),
    [
        ("llama-3.1-8b", ["prefix-cache:lookup=0.1"], "stored answers; leave prefix-cache out"),
        ("llama-3.1-8b", ["prefix-cache:answered=0.2"], "stored answers; leave prefix-cache out"),
        ("llama-3.1-8b", ["prefix-cache:host=0.5"], "stored answers; leave prefix-cache out"),
        ("llada-8b", [], "perfmodel denoise"),
    ],
)
def test_a_replay_leaves_nothing_out(model: str, techniques: list[str], said: str) -> None:
    one = {"model": model, "pools": [{"hardware": "hgx-h100-8", "techniques": techniques}]}
    requests = Requests(np.array([0.0, 1.0]), np.array([500, 500]), np.array([10, 10]))
    with pytest.raises(SpecError, match=said):
        deploy(Deployment.model_validate(one), requests)
