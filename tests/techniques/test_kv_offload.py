"""KV offload: bytes on the link by hand, conservation over tiers, and what a knob must do."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import cache_residency, decode, prefill
from perfmodel.kernels.elsewhere import rates
from perfmodel.ops.shard import Parallelism
from perfmodel.schedule import operators

MODEL, DEVICE = "llama-3.1-8b", "h100-sxm"
# Llama-3.1-8B: 32 layers x 2 x 8 KV heads x 128 x 2 B = 131,072 B per token.
TOKEN = 131_072


@lru_cache(maxsize=64)
def built(*techniques: str, model: str = MODEL, device: str = DEVICE) -> Estimator:
    return Estimator(model, device, techniques=techniques)


def moved(e: Estimator, phase, path: str = "host", direction: str = "read", tensor: str = "kv") -> float:
    """Bytes of one tensor on a path in one pass."""
    return float(sum(
        t.bytes * times for op, times, _ in operators(e.lower(phase).schedule) for t in op.traffic
        if t.path == path and t.direction == direction and t.tensor == tensor
    ))


def stored(e: Estimator, tokens: float, *, copies: bool = False) -> dict[str, float]:
    found: dict[str, float] = {}
    for r in cache_residency(e.model, Parallelism(), e.formats, 1, tokens):
        if copies == r.name.endswith(".copy"):
            found[r.tier] = found.get(r.tier, 0.0) + float(r.elements)
    return found


def test_a_step_fetches_every_cached_byte_once():
    # 8 sequences of 4,096 tokens (4,095 cached and the new one): 8 x 4,096 x 131,072 B = 4.295 GB over 63 GB/s = 68.2 ms.
    e = built("kv-offload")
    assert moved(e, decode(8, 4095)) == pytest.approx(8 * 4096 * TOKEN, rel=1e-9)
    assert e.parts(8, 1, 4095, is_decode=True).lower == pytest.approx(8 * 4096 * TOKEN / 63e9, rel=1e-6)
    assert e.decode(8, 4096) > 8 * 4096 * TOKEN / 63e9


def test_new_keys_and_values_go_out():
    # A step adds one token per sequence, a prefill all of its tokens: 8 x 131,072 B and 2,048 x 131,072 B.
    e = built("kv-offload")
    assert moved(e, decode(8, 4095), direction="write") == pytest.approx(8 * TOKEN, rel=1e-6)
    assert moved(e, prefill(1, 2048), direction="write") == pytest.approx(2048 * TOKEN, rel=1e-6)
    half = built("kv-offload:duplex=false")
    assert half.prefill(4, 4096) > e.prefill(4, 4096)


def test_headinfer_holds_two_head_buffers():
    # arXiv:2502.12574: Llama-3-8B, 1M tokens: 128 GB of KV in 16 bits becomes 1 GB on the device. Two buffers of one of
    # 8 KV heads in one of 32 layers: 2 / 256 of 1,048,576 x 131,072 B = 137.4 GB -> 1.074 GB.
    e = built("kv-offload:head_group=1")
    one = sum(2 * x for x in stored(e, 2**20, copies=True).values())
    assert one == pytest.approx(2 * 2**20 * TOKEN / 256, rel=1e-9)
    assert one == pytest.approx(1e9, rel=0.1)
    assert stored(e, 2**20) == {"host": pytest.approx(2**20 * TOKEN / 2)}


def test_attention_on_the_cpu_moves_queries_not_keys():
    # q: 32 heads x 128 x 2 B = 8,192 B out; partial outputs with two statistics: 32 x 130 x 2 B = 8,320 B back; 32 layers.
    e = built("kv-offload:on=cpu")
    assert moved(e, decode(8, 4095)) == 0
    assert moved(e, decode(8, 4095), direction="write", tensor="activations") == pytest.approx(8 * 8192 * 32)
    assert moved(e, decode(8, 4095), tensor="activations") == pytest.approx(8 * 8320 * 32)
    # DGX H100: two sockets with 307.2 GB/s each over 8 devices = 76.8 GB/s a device at best.
    host = e.machine.node.host.memory_bandwidth / e.machine.node.devices.count
    assert e.decode(8, 4096) > 8 * 4096 * TOKEN / host
    # Nothing is cached before the first prompt, so nothing is asked.
    assert moved(e, prefill(1, 512), direction="write", tensor="activations") == 0


def test_requests_on_the_cpu_beside_the_device():
    # Half of the requests: half of the queries travel, and the slower side sets the time of the layer.
    e, plain = built("kv-offload:on=cpu,beside=true,by=requests,share=0.5"), built()
    assert moved(e, decode(8, 4095), direction="write", tensor="activations") == pytest.approx(4 * 8192 * 32)
    inline = built("kv-offload:on=cpu,by=requests,share=0.5")
    assert inline.decode(8, 4096) > e.decode(8, 4096)
    few = built("kv-offload:on=cpu,beside=true,by=requests,share=0.01")
    assert few.decode(64, 4096) <= plain.decode(64, 4096) * 1.01


def test_recompute_fetches_the_inputs():
    # MHA of Llama-2-7B: inputs are 4,096 elements beside 8,192 of keys and values; all recomputed halves the bytes.
    e = built("kv-offload:recompute=1", model="llama-2-7b")
    base = built("kv-offload", model="llama-2-7b")
    assert moved(e, decode(4, 1023)) == pytest.approx(moved(base, decode(4, 1023)) / 2)
    flops = [sum(f * n for op, n, _ in operators(x.lower(decode(4, 1023)).schedule) for u, f in op.flops.items() if u == "bf16"
                 or u == "fp16") for x in (e, base)]
    # 2 x 4,096 x 8,192 FLOPs per token and layer.
    assert flops[0] - flops[1] == pytest.approx(4 * 1024 * 32 * 2 * 4096 * 8192, rel=1e-9)


def test_three_tiers_with_summaries():
    # Half of the tokens on the drive; a summary of one key per 64 tokens is read from there in every step.
    e = built("kv-offload:far_share=0.5,chunk=64,summary=0.5")
    assert moved(e, decode(1, 8191)) == pytest.approx(4096 * TOKEN, rel=1e-6)
    assert moved(e, decode(1, 8191), path="drive") == pytest.approx(4096 * TOKEN + 4096 / 64 * TOKEN / 2, rel=1e-3)
    tiers = stored(e, 8192)
    assert tiers["host"] == pytest.approx(4096 * TOKEN / 2)


def test_codes_on_the_device():
    # 2-bit copies of keys: 32 layers x 1,024 elements x 0.25 B = 8,192 B per token, read once a step.
    plain, e = built("kv-offload"), built("kv-offload:codes=2")
    extra = moved(e, decode(1, 4095), path="hbm") - moved(plain, decode(1, 4095), path="hbm")
    assert extra == pytest.approx(4096 * 8192, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1), recent=st.integers(0, 512), sinks=st.integers(0, 64), by=st.sampled_from(["tokens", "requests"]))
def test_elements_are_conserved(share, recent, sinks, by):
    e = Estimator(MODEL, DEVICE, techniques=[f"kv-offload:share={share},recent={recent},sinks={sinks},by={by}"])
    assert sum(stored(e, 4096).values()) == pytest.approx(4096 * TOKEN / 2, rel=1e-9)


@pytest.mark.parametrize("text", ["kv-offload:share=0", "kv-offload:share=0,codes=0"])
def test_nothing_outside_changes_nothing(text):
    e, plain = built(text), built()
    b, c = np.array([1.0, 8, 64]), np.array([128.0, 4096, 32768])
    assert e.decode(b, c) == pytest.approx(plain.decode(b, c))
    assert e.prefill(2, 1024) == pytest.approx(plain.prefill(2, 1024))
    assert e.max_batch(4096) == plain.max_batch(4096)


@pytest.mark.parametrize(("better", "worse"), [
    ("hit=0.8", "hit=0.2"), ("share=0.3", "share=0.9"), ("wire=0.5", "wire=1"), ("page=1e6", "page=4e3"), ("ahead=1", "ahead=0.2"),
    ("recent=2048", "recent=0"), ("on=cpu,gather=1", "on=cpu,gather=0.3"), ("tier=host", "tier=drive"),
])  # fmt: skip
def test_knobs_move_the_right_way(better, worse):
    assert built(f"kv-offload:{better}").decode(8, 4096) < built(f"kv-offload:{worse}").decode(8, 4096)


def test_the_tier_limits_the_batch():
    # The share of one of eight devices in the host memory of the node.
    e = built("kv-offload")
    room = e.machine.node.host.memory / e.machine.node.devices.count
    assert e.max_batch(8192) <= room / (8192 * TOKEN)
    assert e.max_batch(8192) > built().max_batch(8192)


def test_commutes_with_narrow_keys():
    # Bits and place are different records: 2-bit keys cross the link as 2 bits in either order.
    a, b = built("kv-offload:share=0.5", "kv-quantization:bits=4"), built("kv-quantization:bits=4", "kv-offload:share=0.5")
    assert a.decode(8, 4096) == pytest.approx(b.decode(8, 4096))
    assert a.max_batch(4096) == b.max_batch(4096)


def test_bad_tiers_say_what_there_is():
    with pytest.raises(SpecError, match="host, drive"):
        built("kv-offload:tier=tape")
    with pytest.raises(SpecError, match="caches no keys"):
        Estimator("mamba2-2.7b", DEVICE, techniques=["kv-offload"])


def test_scattered_rows_are_packed_at_the_rate_of_host_memory() -> None:
    # Three bytes of traffic for each byte fetched, on the eighth of the host that one of eight GPUs has.
    plain, packed = (built(f"kv-offload:ahead=0{more}", model="opt-13b", device="dgx-1-v100-8") for more in ("", ",packed=3"))
    size = 8 * 512 * 2 * 40 * 5120 * 2
    host = rates("cpu", plain.machine)
    assert packed.decode(8, 513) - plain.decode(8, 513) == pytest.approx(3 * size / host.bandwidth + 40 * host.latency, rel=0.01)
