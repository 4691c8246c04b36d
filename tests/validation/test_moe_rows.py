"""Fused layers of experts as measured: how skewed routing is, which kernel a row names, and how far off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perfmodel.validation.kinds import kind_of, moe
from perfmodel.validation.rows import Predicted, Refused, Row, read
from perfmodel.validation.run import predict_rows
from perfmodel.validation.score import score

pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = Path(__file__).parents[1] / "data" / "measured" / "calibrate" / "aic_moe.csv.gz"


def row(**cells: str | float) -> Row:
    base = {
        "hardware": "H100-SXM-80GB", "phase": "gemm", "op": "fused_moe", "engine": "trtllm", "metric": "kernel_time",
        "unit": "us", "value": 1, "dtype": "bf16", "num_tokens": 128, "hidden": 4096, "inter": 1536, "topk": 8,
        "n_experts": 128, "tp": 1, "ep": 1, "distribution": "balanced", "kernel": "moe_torch_flow_cutlass",
    }  # fmt: skip
    return Row("f.csv", 2, {k: str(v) for k, v in (base | cells).items()})


def value(**cells: str | float) -> float:
    r = row(**cells)
    assert kind_of(r) is moe.MOE
    outcome = moe.MOE.predict([r])[0]
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


def drawn(tokens: int, experts: int, top_k: int, ep: int, exponent: float) -> tuple[float, float]:
    """Means over draws of pairs and touched experts on the busiest rank: popularities drawn, rounded, remainder spread."""
    rng = np.random.default_rng(11)
    pairs, touched = [], []
    for _ in range(300):
        low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
        u, p = rng.random(experts), 1 - exponent
        x = (low**p + u * (high**p - low**p)) ** (1 / p)
        load = np.minimum(np.round(x / x.sum() * tokens * top_k), tokens)
        while (missing := int(tokens * top_k - load.sum())) != 0:
            smallest = np.argsort(load)[: abs(missing)] if missing > 0 else np.argsort(-load)[: abs(missing)]
            load[smallest] += np.sign(missing)
        ranks = load.reshape(ep, -1)
        busiest = ranks[ranks.sum(axis=1).argmax()]
        pairs.append(busiest.sum())
        touched.append(np.count_nonzero(busiest))
    return float(np.mean(pairs)), float(np.mean(touched))


@pytest.mark.parametrize("exponent", [1.01, 1.2])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ep"),
    [(64, 256, 8, 1), (2048, 256, 8, 1), (512, 128, 8, 4), (4096, 128, 8, 16), (1024, 8, 2, 4), (8192, 256, 8, 8)],
)
def test_busiest_rank_of_skewed_routing_by_simulation(
    tokens: int, experts: int, top_k: int, ep: int, exponent: float
) -> None:
    pairs, touched = drawn(tokens, experts, top_k, ep, exponent)
    mine, reached = moe.skewed(tokens, experts, top_k, ep, exponent)
    assert mine == pytest.approx(pairs, rel=0.15)
    assert min(reached, experts / ep) == pytest.approx(touched, rel=0.12)


def test_skew_beyond_equal_loads() -> None:
    """4096 tokens, 8 of 256 experts, 8 ranks: more than an even share of 4096 pairs, fewer than all, at a * = 1.2 more."""
    mild, _ = moe.skewed(4096, 256, 8, 8, 1.01)
    strong, _ = moe.skewed(4096, 256, 8, 8, 1.2)
    assert 4096 < mild < strong < 8 * 4096


def test_touched_weights_bind_a_few_tokens() -> None:
    """Mixtral-like, 64 balanced tokens: all 8 experts, 8 x 3 x 4096 x 14336 x 2 B = 2.82 GB; 0.84 ms at 3.35 TB/s."""
    shape = {"n_experts": 8, "topk": 2, "inter": 14336, "num_tokens": 64}
    assert 841 < value(**shape) < 841 * 1.4
    # 1/tp of every expert.
    assert value(**shape, tp=4) == pytest.approx(value(**shape) / 4, rel=0.25)


def test_expert_parallel_rank_has_its_share() -> None:
    """16,384 balanced tokens over 8 ranks: an eighth of the pairs and of the experts, a little more than 1/8 of the time."""
    whole, part = value(num_tokens=16384), value(num_tokens=16384, ep=8)
    assert whole / 8 < part < whole / 3


def test_kernels_by_name() -> None:
    """Portable kernels are slower where matrix work binds; unnamed ones are the device's own."""
    native = value(num_tokens=16384)
    assert value(num_tokens=16384, kernel="vllm_triton_experts") > 1.5 * native
    assert value(num_tokens=16384, kernel="") == native
    assert value(num_tokens=16384, kernel="", dtype="int4_wo") == value(
        num_tokens=16384, kernel="sglang_marlin_moe", dtype="int4_wo"
    )


def test_choices_of_other_ranks() -> None:
    """SGLang's portable kernel under ep = 8: to 0.5.10 rows multiplied them too, later only kept a row for each."""
    shape: dict[str, str | float] = {
        "engine": "sglang",
        "kernel": "sglang_fused_moe_triton",
        "ep": 8,
        "num_tokens": 16384,
    }
    assert value(**shape, engine_version="0.5.10") > 2 * value(**shape, engine_version="0.5.14")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [({"distribution": "zipf"}, "routing"), ({"dtype": "fp3"}, "format"), ({"hidden": ""}, "hidden not stated"),
     ({"hardware": "no-such-gpu"}, "hardware")],
)  # fmt: skip
def test_refusals(cells: dict[str, str], reason: str) -> None:
    outcome = moe.MOE.predict([row(**cells)])[0]
    assert isinstance(outcome, Refused)
    assert reason in str(outcome)


@pytest.mark.parametrize("hardware", ["A100-SXM-80GB", "H100-SXM-80GB", "B200-SXM-180GB"])
def test_measured_layers(hardware: str) -> None:
    """AIConfigurator's fused layers (Apache-2.0): typical error below a fifth, unbiased, most inside the band."""
    rows = [r for r in read(MEASURED) if r.text("hardware") == hardware and not r.text("flag")]
    found = score(predict_rows(rows))
    assert found.rows == found.predicted > 20
    assert found.median_ape < 0.20
    assert found.mape < 0.26
    assert abs(found.bias) < 0.08
    assert 0.65 < found.coverage < 0.95
