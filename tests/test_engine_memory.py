"""Engine memory accounting against start-up logs in public threads, and against arithmetic written out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel import calibration, catalog
from perfmodel.engine_memory import Instance, activations, cache_pool, cache_tokens, loaded_weights, overhead
from perfmodel.errors import SpecError
from perfmodel.ops.shard import Formats, Parallelism, checkpoint_formats
from perfmodel.spec.calibration import Engine
from perfmodel.spec.formats import Format, get_format
from perfmodel.spec.gguf import FILE_TYPES

GIB = 2.0**30
MIB = 2.0**20


def instance(
    model: str, engine: str, *, tp: int = 1, pp: int = 1, architecture: str = "default", **more: object
) -> Instance:
    spec = catalog.load_model(model)
    account = calibration.engine(engine).account
    found = Instance(spec, Parallelism(tp, pp), checkpoint_formats(spec), account, architecture)
    return replace(found, **more)  # type: ignore[arg-type]


def gguf(model: str, name: str, pp: int = 1) -> Instance:
    wide = get_format("bf16")
    stored = Format(name, 0, 0, 0, None, "")
    return instance(model, "llama.cpp", pp=pp, formats=Formats(stored, stored, wide, wide), file=True)


@pytest.mark.parametrize(
    ("model", "engine", "tp", "architecture", "logged"),
    [
        # GiB per device as logged: vLLM pull 10511, issues 16692, 10702, 33155, 23278, 6408 and a public blog
        ("llama-3-8b", "vllm==0.6.4", 1, "hopper", 14.96),
        ("llama-3-8b", "vllm==0.6.4", 2, "hopper", 7.48),
        ("deepseek-r1", "vllm==0.8.4", 16, "hopper", 40.3174),
        ("llama-3.1-70b", "vllm==0.6.4", 8, "hopper", 16.4605),
        ("gpt-oss-120b", "vllm==0.14.1", 1, "hopper", 64.38),
        ("gpt-oss-120b", "vllm==0.10.1", 1, "hopper", 65.9651),
        ("gpt-oss-20b", "vllm==0.19.0", 1, "ampere", 13.72),
        ("qwen2.5-vl-32b", "vllm==0.7.3", 2, "hopper", 31.28),
        ("qwen2-vl-7b-awq", "vllm==0.6.5", 1, "ada", 6.47),
        ("qwen3.5-27b", "vllm==0.25", 1, "default", 51.1),
        # SGLang #6753, TensorRT-LLM #6294
        ("llama-3-8b", "sglang==0.4.6", 1, "hopper", 14.98),
        ("llama-3.1-8b-fp8", "trtllm==0.20.0", 1, "hopper", 8.46),
    ],
)
def test_loaded_weights_as_logged(model: str, engine: str, tp: int, architecture: str, logged: float) -> None:
    i = instance(model, engine, tp=tp, architecture=architecture)
    assert loaded_weights(i) / GIB == pytest.approx(logged, rel=0.004)


@pytest.mark.parametrize(
    ("model", "file", "buffers"),
    [
        # MiB of the model buffers of all devices: llama.cpp issues 8117, 14075, 9241, 10152, 8490 and 10252
        ("llama-3-70b", "q4_k_m", [20039, 19941]),
        ("llama-3.3-70b", "q6_k", [14058, 13389, 13389, 13541]),
        ("qwen1.5-14b", "q4_k_s", [5005, 2740]),
        ("qwen2.5-32b", "q4_k_m", [6189, 6045, 6275]),
        ("gemma-2-9b", "q4_k_m", [2484, 3004]),
        ("qwen2.5-7b", "f16", [2223, 1778, 1778, 1778, 1778, 1778, 2373]),
    ],
)
def test_gguf_buffers_as_logged(model: str, file: str, buffers: list[int]) -> None:
    """The token table stays on the host; a tied head is a copy; widths of no whole blocks fall back."""
    i = gguf(model, file, pp=len(buffers))
    assert loaded_weights(i, "mean") * len(buffers) / MIB == pytest.approx(sum(buffers), rel=0.002)


def test_file_types_by_hand() -> None:
    """14336 is 56 blocks of 256; 13696 is 53.5, so Q4_K becomes Q5_0 and Q6_K becomes Q8_0."""
    mixed = FILE_TYPES["q4_k_m"]
    assert mixed.bits("gate_proj", "weights", 4096) == 4.5
    assert mixed.bits("down_proj", "weights", 14_336) == (4.5 + 6.5625) / 2
    assert mixed.bits("down_proj", "weights", 13_696) == (5.5 + 8.5) / 2
    assert mixed.bits("head", "head", 4096) == 6.5625


def test_latent_copies_and_rope_table_by_hand() -> None:
    """R1, tp 16: 61 layers x 8 heads x (128 + 128) x 512 x 2 B of projections; 163,840 positions x 64 x 2 B."""
    i = instance("deepseek-r1", "vllm==0.8.4", tp=16)
    plain = replace(i, account=i.account.model_copy(update={"latent_copies": False, "rope_table": False}))
    assert loaded_weights(i) - loaded_weights(plain) == 61 * 8 * 256 * 512 * 2 + 163_840 * 64 * 2


def test_expert_padding_by_hand() -> None:
    """gpt-oss experts are 2880 x 2880: 12 tiles of 256 make 3072, 23 of 128 make 2944, 90 of 32 fit."""
    i = instance("gpt-oss-20b", "vllm==0.14")
    experts = 24 * 32 * 3 * 2880 * 2880 * 4.25 / 8
    plain = replace(i, account=i.account.model_copy(update={"expert_tiles": {}}))
    added = loaded_weights(i) - loaded_weights(plain)
    assert added / experts == pytest.approx(3072 / 2880 * 2944 / 2880 - 1, rel=1e-6)
    hopper = loaded_weights(replace(i, architecture="hopper")) - loaded_weights(plain)
    assert hopper / experts == pytest.approx(3072 / 2880 - 1, rel=1e-6)


def test_stages_of_a_pipeline_share_the_layers() -> None:
    """Llama-3.1-70B on 4 stages: 20 layers each, the table on the first, the head on the last."""
    i = instance("llama-3.1-70b", "trtllm", pp=4)
    table = 128_256 * 8192 * 2
    whole = loaded_weights(replace(i, par=Parallelism()))
    assert loaded_weights(i, "mean") == pytest.approx(whole / 4)
    rope = 131_072 * 128 * 2
    layers = (whole - 2 * table - rope - 8192 * 2) / 4
    assert loaded_weights(i, "first") == pytest.approx(layers + table + rope)
    assert loaded_weights(i, "fullest") == pytest.approx(max(layers + table + rope, layers + table + 8192 * 2))


@pytest.mark.parametrize(
    ("model", "engine", "total", "logged"),
    [
        # activation peak in GiB: vLLM issues 15360, 10702, 15394; llm-d's on an H100
        ("qwen2.5-7b", "vllm==0.7.3", 21.99, 1.43),
        ("llama-3.1-70b", "vllm==0.6.4", 139.72, 1.21),
        ("opt-125m", "vllm==0.7.3", 139.72, 0.49),
        ("llama-3.1-8b", "vllm==0.11", 79.18, 4.76),
        ("gpt-oss-20b", "vllm==0.11", 79.18, 7.38),
        ("qwen3-0.6b", "vllm==0.11", 79.18, 5.56),
    ],
)
def test_the_sampler_is_the_peak(model: str, engine: str, total: float, logged: float) -> None:
    i = instance(
        model, engine, architecture="hopper", total=total * GIB, context=6600 if model == "qwen2.5-7b" else None
    )
    assert activations(i) / GIB == pytest.approx(logged, rel=0.04)


def test_scores_of_a_context_without_flash_attention() -> None:
    """llama.cpp #7450: 2.045 GiB for Mistral-7B and 32,000 tokens, of which 512 x 32,000 x 32 x 4 B are scores."""
    i = replace(gguf("mistral-7b-v0.2", "q8_0"), context=32_000, flash=False)
    assert activations(i) / GIB == pytest.approx(2.045, rel=0.01)
    # With flash attention the logits of the micro-batch are the most: 512 x 152,064 x 4 B (#10152: 307 MiB).
    flash = replace(gguf("qwen2.5-32b", "q8_0"), context=4096)
    assert activations(flash) / MIB == pytest.approx(307, rel=0.05)


def test_vllm_budget_as_logged() -> None:
    """A public log of Llama-3.1-8B on 79.25 GiB: 0.92 of them leave 56.21 GiB for 460,496 tokens."""
    i = instance("llama-3.1-8b", "vllm==0.25", architecture="hopper", total=79.25 * GIB)
    pool = cache_pool(i, 0.92)
    assert pool / GIB == pytest.approx(56.21, rel=0.005)
    assert cache_tokens(i, pool, 16) == pytest.approx(460_496, rel=0.005)


def test_sglang_keeps_a_reserve_beside_weights_and_cache() -> None:
    """SGLang #565: 0.75 of 21.52 GiB free at the start, 3.76 of weights per rank, 405,784 tokens of 32 KiB."""
    i = instance("llama-3-8b", "sglang==0.1.17", tp=4, context=8192)
    i = replace(i, total=21.52 * GIB + overhead(i))
    pool = cache_pool(i, 0.75)
    assert cache_tokens(i, pool, 1) == pytest.approx(405_784, rel=0.005)
    # The drop of free memory that its log prints, 12.82 GiB, also holds tokens / context x 256 rows of 8192 x 4 B.
    assert cache_tokens(i, 12.82 * GIB, 1, table=True) == pytest.approx(405_784, rel=0.005)


def test_tensorrt_llm_takes_a_fraction_of_what_is_free() -> None:
    """Its documentation's example: 70.48 GiB free after loading, 0.9 of it is 63.44, in blocks of 64."""
    i = instance("llama-2-7b", "trtllm==0.13", total=79.1 * GIB)
    assert cache_pool(i, 0.9, weights=79.1 * GIB - 70.48 * GIB - overhead(i)) < 0.9 * 70.48 * GIB
    fp8 = replace(i, formats=replace(i.formats, kv=get_format("fp8")))
    assert cache_tokens(fp8, 63.44 * GIB, 64) == pytest.approx(259_840, rel=1e-3)


def test_pages_are_dealt_to_groups_of_layers() -> None:
    """gpt-oss-120b: 18 full and 18 sliding layers, 2 x 8 x 64 x 2 B a token each: 78,384 in 5.38 GiB (logged)."""
    assert cache_tokens(instance("gpt-oss-120b", "vllm"), 5.38 * GIB, 16) == pytest.approx(78_384, rel=0.001)


def test_blocks_grow_until_a_page_holds_a_state() -> None:
    """Qwen3.6-27B, fp8 cache, tp 2: 48 delta-rule layers make 3 groups beside the 16 attention layers.

    A page holds 24 heads x 128 x 128 x 4 B and 3 x 5120 x 2 B of convolution, so a block is 98 x 16 = 1568 tokens of
    1024 B; 262,144 tokens need 168 blocks and 3 states. Logged: 619,202 tokens in 9.84 GiB.
    """
    i = instance("qwen3.5-27b", "vllm==0.21", tp=2, context=262_144)
    i = replace(i, formats=replace(i.formats, kv=get_format("fp8")))
    pages = int(9.84 * GIB / (16 * 1568 * 1024))
    assert cache_tokens(i, 9.84 * GIB, 16) == pytest.approx(pages / (168 + 3) * 262_144, rel=1e-9)
    assert cache_tokens(i, 9.84 * GIB, 16) == pytest.approx(619_202, rel=0.02)


def test_a_bounded_window_keeps_window_and_step() -> None:
    """gpt-oss-120b, two slots of 131,072: 9216 MiB for 18 full layers, and 90 MiB for 18 sliding ones (Ollama 16480).

    1280 cells a slot: a window of 128 and a step of 1024 in multiples of 256.
    """
    i = instance("gpt-oss-120b", "llama.cpp", sequences=2, context=131_072, step_tokens=1024)
    assert cache_tokens(i, (9216 + 90) * MIB, 1) == 262_144


@pytest.mark.parametrize(
    ("version", "title"),
    [
        ("0.6.3.post1 V0", "V0 up to 0.6.3"), ("0.6.4.post1 V0", "V0 0.6.4"), ("0.6.5.dev2 V0", "V0 0.6.4"),
        ("0.8.1 V0", "V0 from 0.6.5"), ("0.8.1 V1", "V1 0.8"), ("0.7.3", "V0 from 0.6.5"), ("0.8.5", "V1 0.8"),
        ("0.7.1 V1", "V1 0.8"), ("0.2x V1", "V1 from 0.21"), ("V0", "V0 from 0.6.5"), ("", "V1 from 0.21"),
    ],
)  # fmt: skip
def test_account_of_a_version(version: str, title: str) -> None:
    engine = calibration.engine("vllm").model_copy(update={"version": version})
    assert engine.account.title == title


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match="not a version number"):
        calibration.engine("vllm==latest")


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm", "llama.cpp", "pytorch", "sarathi"])
def test_every_account_is_small_and_in_order(name: str) -> None:
    engine: Engine = calibration.engine(name)
    assert engine.memory
    for account in engine.memory:
        assert len(account.parameters) <= 8
        assert all(p.source and p.meaning for p in account.parameters.values())
    assert engine.account == engine.memory[-1]
