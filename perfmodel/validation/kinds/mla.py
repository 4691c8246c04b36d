"""Multi-head latent attention kernels (DeepSeek): prefill and decode, bf16 and fp8 caches.

What the timed operator holds, read off the values:

- TensorRT-LLM: the attention kernel, in prefill with the rotation of queries and the append of latents to the cache;
  with fp8 also a pass that narrows queries (prefill: and keys and values).
- SGLang on Hopper (`flash_attention`): prefill absorbed like decode; an fp8 cache is widened to bf16 before each kernel.
- SGLang on Blackwell (`trtllm_mla`): the same, and prefill assembles queries and keys from their parts.
- vLLM: the layer around the kernel, launched by Python without a captured graph: the up-projection of keys and values
  and the assembly of keys in prefill, the moves of queries into latent space and of outputs out of it in decode. Prefills
  no longer than a kernel's limit run as decode.
- Other sources: the kernel alone.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.machine import Machine
from perfmodel.ops.elementwise import pointwise, rotary, store
from perfmodel.ops.gemm import gemm
from perfmodel.ops.mla import absorbed_core, expanded_core, per_head
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import LatentAttention
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, engine_machine, rates, times, with_law
from perfmodel.validation.kinds.base import seconds_with_spread as spread
from perfmodel.validation.rows import Refused, Row

_BF16 = get_format("bf16")
# New tokens up to which a kernel's prefill runs absorbed, as decode does.
_ABSORBED_UP_TO = (("flash_attn_mla", 512.0), ("flashmla", 128.0), ("flash_attention", np.inf))
_OWN = "flashmla|flash_attn|flash_attention|trtllm_mla|cutlass|aiter"  # kernels made for their device
_WIDENS = "flash_attention"  # reads bf16 latents only
_ASSEMBLES = "trtllm_mla"
_APPENDS = ("trtllm", "sglang")  # prefill is timed with the rotation of queries and the append of latents


@dataclass(frozen=True)
class _Run:
    """One kernel on one machine: what its rows have in common."""

    hardware: str
    engine: str
    model: str
    kernel: str
    kv: str
    decode: bool
    sparse: bool
    absorbed: bool
    metric: str

    @property
    def layer(self) -> bool:
        return self.engine == "vllm"

    def machine(self) -> Machine:
        """The machine, with the family of kernels that the rows name, where they do."""
        m = engine_machine(self.hardware, self.engine)
        if "triton" in self.kernel:
            return with_law(m, latent_portable=1.0)
        return with_law(m, latent_portable=0.0) if re.search(_OWN, self.kernel) else m

    def narrow(self, m: Machine) -> bool:
        """Whether queries, keys and values are multiplied in fp8."""
        widened = self.kernel == _WIDENS or (self.layer and not self.decode)
        return self.kv == "fp8" and m.native("fp8") and not widened


def claims(row: Row) -> bool:
    """Whether a row times latent attention: its operator, kernel or model says MLA."""
    named = " ".join(row.text(c).lower() for c in ("op", "kernel", "model"))
    return row.text("phase") == "attention" and re.search(r"mla(?![a-z])", named) is not None


def _best(row: Row) -> Row:
    """A row of a table of best rates, which states a shape in its note (`b=128,h=128`) or none: large ones then."""
    if row.unit < 1e9 or row.text("batch"):
        return row
    noted = dict(re.findall(r"\b(b|h|s_q)=(\d+)", row.text("note")))
    prefill = not _is_decode(row, row.text("op").lower())
    cells = {
        "batch": noted.get("b", "4" if prefill else "128"), "context_len": "8192",
        "n_heads": noted.get("h", "16" if "memory" in row.text("op") else "128"),
    }  # fmt: skip
    if "s_q" in noted:
        cells["input_len"] = noted["s_q"]
    return Row(row.file, row.line, {**row.cells, **cells})


def _key(row: Row) -> Hashable:
    row = _best(row)
    op, kernel = row.text("op").lower(), row.text("kernel").lower()
    for name in ("batch", "context_len", "n_heads"):
        if row.number(name, 1 if name == "n_heads" else None) <= 0:
            raise Refused(f"{name} is not positive")
    decode = _is_decode(row, op)
    if _new(row, decode) > row.number("context_len"):
        raise Refused("more new tokens than context")
    limit = next((n for name, n in _ABSORBED_UP_TO if name in kernel), 0.0)
    sparse = "sparse" in f"{op} {kernel}"
    kv = get_format(row.text("kv_dtype") or row.text("dtype", "bf16"))
    engine = calibration.known_engine(row.text("engine")) or row.text("engine")
    return _Run(
        row.hardware, engine, row.text("model", "deepseek-v3"), kernel, kv.name, decode, sparse,
        decode or sparse or _new(row, decode) <= limit, f"{row.text('metric')} {row.text('unit')}",
    )  # fmt: skip


def _new(row: Row, decode: bool) -> float:
    """New tokens of a sequence; where not stated one in decode, the whole context in prefill."""
    return row.number("input_len", 1.0 if decode else row.number("context_len"))


def _is_decode(row: Row, op: str) -> bool:
    if re.search("context|prefill|fwd|forward", op):
        return False
    if re.search("generation|decode", op):
        return True
    return row.number("input_len", 1) < row.number("context_len")


def _mixer(run: _Run) -> LatentAttention:
    blocks = catalog.load_model("deepseek-v3.2" if run.sparse else run.model).blocks.values()
    mixer = next((b.mixer for b in blocks if isinstance(b.mixer, LatentAttention)), None)
    if mixer is None:
        raise Refused(f"{run.model} has no latent attention")
    return mixer if run.sparse else mixer.model_copy(update={"indexer": None})


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, _Run)
    m = key.machine()
    a = _mixer(key)
    rows = [_best(r) for r in rows]
    heads = np.array([r.number("n_heads", a.heads) for r in rows])
    batch, context = column(rows, "batch"), column(rows, "context_len")
    new = np.array([_new(r, key.decode) for r in rows])
    group = Group(batch, new, context - new, decode=key.decode)
    core = _core(key, m, a, group, heads)
    ops = _around(key, m, a, group, heads, core)
    kind = "latent_generation" if key.decode else "latent_context"
    seconds, sigma = spread(ops, m, kind)
    if key.layer:
        # The host issues kernels while the device runs earlier ones; narrowing the queries is a fourth part more of them.
        p, calls = m.law["overlap_power"], m.law["latent_eager_steps"] * (1.25 if key.narrow(m) else 1.0)
        seconds = (seconds**p + (calls * m.law["framework_call"]) ** p) ** (1 / p)
    if "time" in key.metric or "latency" in key.metric:
        return times(rows, seconds, sigma)
    work = (
        core.bytes()
        if rows[0].text("unit").endswith("B/s")
        else sum(f for u, f in core.flops.items() if u not in ("vector", "exp"))
    )
    return rates(rows, np.broadcast_to(work, len(rows)).tolist(), seconds, sigma)


def _core(key: _Run, m: Machine, a: LatentAttention, group: Group, heads: np.ndarray) -> Op:
    kv = get_format(key.kv)
    if key.absorbed:
        op = absorbed_core("attention", a, group, heads, _BF16 if key.kernel == _WIDENS else kv, _BF16)
        if key.engine != "trtllm":
            return op
        # Queries are rotated, and narrowed to fp8, in a pass of their own.
        moved = group.tokens * heads * (a.kv_rank + a.rope_dim if key.narrow(m) else a.rope_dim)
        passed = (read("activations", moved, 2), write("activations", moved, 1 if key.narrow(m) else 2))
        return replace(op, traffic=(*op.traffic, *passed))
    return expanded_core("attention", a, group, heads, kv if key.narrow(m) else _BF16, _BF16)


def _around(key: _Run, m: Machine, a: LatentAttention, group: Group, heads: np.ndarray, core: Op) -> list[Op]:
    """The kernel with what is timed along with it."""
    tokens, cached = group.tokens, group.visible(None)
    queries = tokens * heads
    latent, qk = a.kv_rank + a.rope_dim, a.nope_dim + a.rope_dim
    ops: list[Op] = []
    if key.kernel == _WIDENS and key.kv == "fp8":
        width = m.law["latent_widening"]
        ops.append(Op("widen", "elementwise", {}, (read("kv", cached * latent, width),)))
    if not key.decode and not key.absorbed:
        if key.engine in _APPENDS:
            ops.append(rotary("rotate", tokens, heads * a.rope_dim, 2))
            ops.append(store("append", "kv", tokens * latent, 2, get_format(key.kv).width))
        if key.kernel == _ASSEMBLES:
            ops.append(pointwise("assemble", 2 * queries * qk, 2))
        if key.narrow(m):
            together = (qk, qk, a.v_dim) if key.kernel == _ASSEMBLES else (qk, qk + a.v_dim)
            ops += [pointwise("narrow", queries * each, 1, reads=2) for each in together]
    if key.layer and key.absorbed:
        ops.append(per_head("q_absorb", tokens, heads, a.nope_dim, a.kv_rank, 2, _BF16))
        if key.narrow(m):
            ops.append(pointwise("assemble", queries * latent, 2))
        ops.append(per_head("v_up", tokens, heads, a.kv_rank, a.v_dim, 2, _BF16))
    if key.layer and not key.absorbed:
        ops += gemm(
            "kv_b_proj", cached, heads * (a.nope_dim + a.v_dim), a.kv_rank, weight=_BF16, act=_BF16, dtype="bf16"
        )
        ops.append(pointwise("assemble", queries * (qk + a.v_dim), 2))
    return [*ops, core]


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _held_out(row: Row) -> Hashable:
    return row.text("n_heads"), "context" in row.text("op")


MLA = Kind(
    "latent attention",
    claims,
    _predict,
    _held_out,
    (
        "law.latent_efficiency",
        "law.latent_narrow_efficiency",
        "law.latent_widening",
        "engine.vllm.latent_eager_steps",
    ),
)
