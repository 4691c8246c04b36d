"""Serving rows: which instance a row means, closed loop against a naive loop, static and offline runs, measured values."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel import graph
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.kernels.grouped import as_served
from perfmodel.schedule import operators
from perfmodel.serving.closed_loop import Shapes, colocated
from perfmodel.validation import client
from perfmodel.validation.kinds import instance, kind_of, pools, predict
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")

H100, B200, A100 = "H100-SXM-80GB", "B200-SXM-180GB", "A100-SXM-80GB"


def row(**cells: object) -> Row:
    known = {
        "hardware": H100, "model": "meta-llama/Llama-3.1-70B", "dtype": "fp8", "phase": "decode", "metric": "tpot",
        "unit": "ms", "value": "1", "engine": "vllm", "input_len": "1024", "output_len": "1024", "batch": "16",
    }  # fmt: skip
    return Row("inline.csv", 1, {k: str(v) for k, v in (known | cells).items()})


def served(**cells: object) -> Row:
    """A row at concurrency: its file has a dp column."""
    return row(**({"dp": 1, "pp": 1, "ep": 1, "tp": 4, "n_devices": 4} | cells))


def value(r: Row) -> float:
    (outcome,) = predict([r])
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


def refusal(r: Row) -> str:
    (outcome,) = predict([r])
    assert isinstance(outcome, Refused), outcome
    return str(outcome)


# --- what a row means ------------------------------------------------------------------------------------------------


def test_kinds() -> None:
    names = [
        kind_of(r).name  # type: ignore[union-attr]
        for r in (served(), row(decode_cfg="tp8"), row(batch="max (offline, inf rate)", phase="e2e"), row(phase="e2e"))
    ]
    assert names == ["closed-loop serving", "closed-loop serving", "offline throughput", "static batch"]


@pytest.mark.parametrize(
    ("model", "dtype", "expected"),
    [
        # (checkpoint, weights where they are not the checkpoint's own, cache)
        ("meta-llama/Llama-3.1-70B", "", ("llama-3.1-70b", None, None)),
        ("meta-llama/Llama-3.1-70B", "fp16", ("llama-3.1-70b", None, None)),
        ("meta-llama/Llama-3.1-70B", "fp4", ("llama-3.1-70b", "nvfp4", "fp8")),
        ("deepseek-ai/DeepSeek-R1", "fp8", ("deepseek-r1", None, "fp8")),
        ("deepseek-ai/DeepSeek-R1", "fp4", ("deepseek-r1-nvfp4", None, "fp8")),
        # Experts in MXFP4, all else in bf16: both labels mean the one published checkpoint.
        ("openai/gpt-oss-120b", "fp4", ("gpt-oss-120b", None, None)),
        ("openai/gpt-oss-120b", "fp8", ("gpt-oss-120b", None, None)),
    ],
)
def test_formats(model: str, dtype: str, expected: tuple[str, str | None, str | None]) -> None:
    assert instance.formats(model, dtype) == expected


def test_layout_without_tp() -> None:
    assert instance.of_row(row(n_devices=8, pp=2)).tp == 4
    assert instance.of_row(row()).tp == 1


def test_stated_cache_format() -> None:
    assert instance.of_row(row(kv_dtype="fp16")).kv == "fp16"
    assert instance.of_row(row(kv_dtype="auto")).kv == "fp8"


def test_engine_spellings() -> None:
    assert instance.of_row(row(engine="vllm(modified)")).engine == "vllm-2023"
    assert instance.of_row(row(engine="tensorrt-llm")).engine == "trtllm"
    assert instance.of_row(row(engine="an engine of tomorrow")).engine == "vllm"


def test_refusals() -> None:
    assert "unknown model" in refusal(served(model="nobody/nothing"))
    assert "unknown hardware" in refusal(served(hardware="abacus"))
    assert "does not divide" in refusal(served(tp=7, n_devices=7))
    assert "batch not stated" in refusal(served(batch=""))
    assert "at concurrency" in refusal(served(metric="busbw"))
    assert "layout of a pool" in refusal(served(prefill_cfg="two boxes", decode_cfg="tp8"))


# --- the closed loop -------------------------------------------------------------------------------------------------


def shapes(prompt: int, output: int, clients: int) -> Shapes:
    return Shapes(np.array([float(prompt)]), np.array([float(output)]), np.array([float(clients)]), 10.0)


def naive_loop(step: np.ndarray, added: float, clients: int, output: int, rounds: int) -> float:
    """Mean seconds per token after the first of clients that all start at once; one engine step per turn.

    Each step takes one waiting prompt along. Clients take one turn more between requests the higher their number, so
    that they drift apart as real ones do.
    """
    ready = [0] * clients  # turn at which the next request arrives
    left = [0] * clients  # tokens to come, 0: waiting
    started, sums, sent = [0.0] * clients, [], [0] * clients
    now, turn = 0.0, 0
    while min(sent) < rounds or any(left):
        waiting = [c for c in range(clients) if not left[c] and sent[c] < rounds and ready[c] <= turn]
        running = [c for c in range(clients) if left[c]]
        if not running and not waiting:
            turn += 1
            continue
        now += step[max(len(running), 1)] + (added if waiting else 0.0)
        turn += 1
        for c in running:
            left[c] -= 1
            if not left[c]:
                sums.append((now - started[c]) / (output - 1))
                ready[c] = turn + c % 7
        if waiting:
            c = waiting[0]
            left[c], started[c], sent[c] = output - 1, now, sent[c] + 1
    return float(np.mean(sums))


@pytest.mark.parametrize(("clients", "output"), [(1, 64), (4, 64), (16, 128), (32, 128)])
def test_tpot_against_a_naive_loop(clients: int, output: int) -> None:
    e = Estimator("llama-3.1-8b", "h100-sxm")
    prompt = 2048
    context = prompt + output / 2
    step = np.concatenate([[0.0], e.decode(np.arange(1.0, clients + 1), context)])
    added = float(e.mixed(clients, context, prompt)) - float(e.decode(clients, context))
    expected = naive_loop(step, added, clients, output, 10)
    loop = colocated(e, shapes(prompt, output, clients))
    assert loop.tpot[0] == pytest.approx(expected, rel=0.08)


def test_a_lone_client_waits_for_nobody() -> None:
    e = Estimator("llama-3.1-8b", "h100-sxm")
    loop = colocated(e, shapes(2048, 128, 1))
    assert loop.tpot[0] == pytest.approx(e.decode(1, 2048 + 129 / 2))


def test_burst_at_the_start() -> None:
    """64 prompts that come at once: on average (64 + 1)/2 prefills until the first token, plus what is no prefill."""
    e = Estimator("llama-3.1-8b", "h100-sxm")
    loop = colocated(e, shapes(4096, 4096, 64))
    prefill = float(e.mixed(64, 6000, 4096)) - float(e.decode(64, 6000))
    assert loop.first[0] == pytest.approx(32.5 * prefill, rel=0.15)
    assert loop.later[0] < loop.first[0] / 2
    assert loop.ttft[0] == pytest.approx(0.1 * loop.first[0] + 0.9 * loop.later[0])


def test_requests_per_client() -> None:
    r = served(metric="ttft", batch=64)
    with client.using(client.Client(requests_per_client=1)):
        burst = value(r)
    with client.using(client.Client(requests_per_client=1000)):
        steady = value(r)
    assert value(r) == pytest.approx(0.1 * burst + 0.9 * steady, rel=0.02)
    with pytest.raises(SpecError, match="at least 1"):
        client.Client(requests_per_client=0.5)


def test_data_parallel_ranks_prefill_side_by_side() -> None:
    """Eight ranks of one device each serve eight times the clients with less interruption per token than one rank would
    give them all, and never less than the step itself."""
    e = Estimator("gpt-oss-120b", "h200-sxm", dp=4, ep=4)
    one = colocated(e, shapes(1024, 256, 4))
    many = colocated(e, shapes(1024, 256, 64))
    assert e.decode(64, 1152) < many.tpot[0]
    assert one.tpot[0] < many.tpot[0]


def test_popular_experts_by_simulation() -> None:
    """Experts that 64 sequences touch when popularity is gamma-distributed, drawn at random, against the closed form."""
    e = Estimator("gpt-oss-120b", "h100-sxm")
    spread = float(e.machine.law["expert_popularity"])
    products = operators(e.lower(graph.decode(64, 1000)).schedule)
    op = next(o for o, _, _ in products if o.name == "experts.gate_up_proj")
    rng = np.random.default_rng(1)
    popularity = rng.gamma(1 / spread, spread, (2000, 128))
    chosen = rng.poisson(popularity * 64 * 4 / 128) > 0
    served = as_served(op, e.machine)
    assert served.shape["groups"] == pytest.approx(chosen.sum(axis=1).mean(), rel=0.02)
    assert served.shape["m"] * served.shape["groups"] == pytest.approx(64 * 4)


# --- pools -----------------------------------------------------------------------------------------------------------


def test_pool_texts() -> None:
    assert pools.parse("tp=4, pp=1, dp=1, moe_tp=1, moe_ep=4, bs=2, workers=3") == pools.Pool(4, 1, 1, 4, 3, 2)
    assert pools.parse("2x dep16") == pools.Pool(1, 1, 16, 16, 2, 0)
    assert pools.parse("TEP8") == pools.Pool(8, 1, 1, 8, 0, 0)


def test_pools_of_a_row() -> None:
    found = pools.of_row(served(prefill_cfg="tp4 workers2", decode_cfg="tp8 bs32", n_devices=24, batch="", dp=""))
    assert (found.prefill.tp, found.prefill_workers, found.decode.tp, found.decode_workers) == (4, 2, 8, 2)
    assert found.clients == 64
    with pytest.raises(Refused, match="add up"):
        pools.of_row(served(prefill_cfg="tp4 workers2", decode_cfg="tp8 bs32", n_devices=20))


def test_a_pool_of_its_own_decodes_without_interruption() -> None:
    """Decode steps of a pool that never prefills: 64 clients on two instances are 32 sequences a step."""
    cells = {"prefill_cfg": "tp4 workers4", "decode_cfg": "tp4 workers2", "n_devices": 24, "batch": 64}
    e = instance.estimator(instance.of_row(served()))
    apart = value(served(**cells))
    assert apart <= e.decode(32, 1024 + 1025 / 2) * 1e3 * (1 + 1e-9)
    assert apart > e.decode(24, 1024 + 1025 / 2) * 1e3
    assert apart < value(served(batch=32))


# --- static batches and offline runs ---------------------------------------------------------------------------------


def test_parts_of_a_static_batch_add_up() -> None:
    """First token of the whole batch, then output - 1 steps; throughput counts the tokens the metric names."""
    base = {"phase": "e2e", "tp": 4, "batch": 8, "output_len": 128, "unit": "s"}
    first, step = value(row(**base, metric="ttft")), value(row(**base, metric="tpot"))
    whole = value(row(**base, metric="e2e_latency"))
    assert whole == pytest.approx(first + 127 * step)
    rate = base | {"unit": "tok/s"}
    assert value(row(**rate, metric="output_throughput")) == pytest.approx(8 * 128 / whole)
    assert value(row(**rate, metric="throughput")) == pytest.approx(8 * (1024 + 128) / whole)
    assert value(row(**rate, metric="throughput", note="output tokens only")) == pytest.approx(8 * 128 / whole)


def test_offline_is_below_an_endless_batch() -> None:
    """H100, Llama-3.1-8B fp16, 128 -> 128: weights alone let no more than sequences in flight / weight time through."""
    r = row(model="Llama-3.1-8B", dtype="fp16", batch="max", input_len=128, output_len=128, metric="output_throughput",
            unit="tok/s", engine="trtllm", phase="e2e")  # fmt: skip
    weights = 16.06e9 / 3.35e12  # seconds to read 8.03e9 parameters of 2 bytes
    flops = 2 * 8.03e9 * 2 / 989e12  # seconds of the prompt's and the output's token
    assert value(r) < min(2048 / weights, 1 / flops)


# --- measured --------------------------------------------------------------------------------------------------------

# Rows of AIConfigurator's silicon samples (NVIDIA, Apache-2.0): milliseconds.
_SERVED = [
    (H100, "meta-llama/Llama-3.1-8B-Instruct", "", "trtllm", 1, 1024, 512, 32, 9.877, None),
    (H100, "meta-llama/Llama-3.1-8B-Instruct", "", "trtllm", 1, 4096, 128, 64, 64.32, 618.4),
    (H100, "Qwen/Qwen3-32B", "", "vllm", 4, 1024, 1024, 16, 11.57, 156.3),
    (H100, "Qwen/Qwen3-32B", "", "vllm", 4, 4096, 512, 64, 34.90, 905.1),
    (H100, "Qwen/Qwen3-32B", "", "sglang", 4, 1024, 512, 64, 15.17, 1142.7),
    (H100, "Qwen/Qwen3-32B", "fp8", "trtllm", 4, 2048, 256, 32, 15.67, 310.4),
]


@pytest.mark.parametrize(
    ("hardware", "model", "dtype", "engine", "tp", "isl", "osl", "clients", "tpot", "ttft"), _SERVED
)
def test_measured_at_concurrency(
    hardware: str, model: str, dtype: str, engine: str, tp: int, isl: int, osl: int, clients: int, tpot: float,
    ttft: float | None,
) -> None:  # fmt: skip
    cells = {"hardware": hardware, "model": model, "dtype": dtype, "engine": engine, "tp": tp, "n_devices": tp,
             "input_len": isl, "output_len": osl, "batch": clients}  # fmt: skip
    assert value(served(**cells)) == pytest.approx(tpot, rel=0.2)
    if ttft is not None:
        assert value(served(**cells, metric="ttft")) == pytest.approx(ttft, rel=0.4)


@pytest.mark.parametrize(
    ("hardware", "tp", "batch", "isl", "metric", "measured"),
    [
        # Splitwise (Patel et al., ISCA 2024; MIT): Llama-2-70B in an eager engine of 2023, launch-bound at tp 8.
        (A100, 8, 1, 512, "tpot", 44.85),
        (H100, 8, 1, 512, "tpot", 29.76),
        (A100, 2, 8, 512, "tpot", 61.69),
        (H100, 2, 1, 2048, "ttft", 310.3),
        (A100, 8, 1, 512, "ttft", 94.31),
    ],
)
def test_measured_static_batches(
    hardware: str, tp: int, batch: int, isl: int, metric: str, measured: float
) -> None:  # fmt: skip
    r = row(hardware=hardware, model="llama2-70b", dtype="fp16", engine="vllm(modified)", tp=tp, batch=batch,
            input_len=isl, output_len=128, metric=metric)  # fmt: skip
    assert value(r) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("hardware", "model", "dtype", "tp", "isl", "osl", "measured"),
    [
        # TensorRT-LLM 0.14 performance overview (NVIDIA, Apache-2.0): output tokens per second.
        (H100, "Llama-3.1-70B", "fp16", 4, 500, 2000, 3781.1),
    ],
)
def test_measured_offline(
    hardware: str, model: str, dtype: str, tp: int, isl: int, osl: int, measured: float
) -> None:  # fmt: skip
    r = row(hardware=hardware, model=model, dtype=dtype, tp=tp, batch="max (offline, inf rate)", input_len=isl,
            output_len=osl, metric="output_throughput", unit="tok/s", engine="trtllm", phase="e2e", kv_dtype=dtype)  # fmt: skip
    assert value(r) == pytest.approx(measured, rel=0.35)
