"""Element-wise kernels, and single operators of a model's layer under the names benchmarks give them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import calibration, catalog, graph, schedule
from perfmodel.degrees import check_parallelism
from perfmodel.errors import UnknownName
from perfmodel.formats import choose_formats
from perfmodel.machine import Machine
from perfmodel.ops import elementwise
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Attention, Block, Mlp, Model
from perfmodel.symbols import Num
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, engine_machine, seconds_with_spread, times
from perfmodel.validation.rows import Refused, Row

# What benchmarks call an operator -> our word for it; the first match counts.
_WORDS = (
    ("dequantise", r"dequanti"),
    ("all_reduce", r"all_?reduce"),
    ("scores", r"q_?mul_?k|scores"),
    ("values", r"a_?mul_?v"),
    ("softmax", r"soft_?max"),
    ("norm", r"norm|^ln_?\d?$"),
    ("rope", r"rope|rotary"),
    ("qkv", r"q_?k_?v|attn_pre_proj"),
    ("q", r"^q_proj"),
    ("kv", r"^[kv]_proj"),
    ("o", r"^w?o_proj|out_proj|attn_post_proj"),
    ("gate_up", r"gate_?up|w1_proj|mlp_up_proj"),
    ("up", r"gate_proj|up_proj|fc1"),
    ("down", r"down|w2_proj|fc2"),
    ("lm_head", r"lm_?head"),
    ("embedding", r"embed"),
    ("activation", r"act|gelu|silu|swiglu"),
    ("add", r"add|residual"),
    ("attention", r"^attn$|^attention$|self_attn"),
    ("layer", r"layer|block"),
)
# Names of whole-pass operators (perfmodel.graph) behind our words.
_IN_PASS = {
    "qkv": ("qkv_proj",), "o": ("o_proj",), "gate_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",),
    "lm_head": ("lm_head",), "embedding": ("embedding",), "attention": ("attention",),
    "all_reduce": ("mixer_all_reduce", "ffn_all_reduce"),
}  # fmt: skip


def word(name: str) -> str:
    """Our word for an operator's name. Raises Refused for a name we do not know.

    >>> word("LayerNorm_FFN"), word("attn_rope"), word("Q_K_V"), word("W2_proj"), word("mlp_act")
    ('norm', 'rope', 'qkv', 'down', 'activation')
    """
    found = next((w for w, pattern in _WORDS if re.search(pattern, name.lower())), None)
    if found is None:
        raise Refused(f"unknown operator {name!r}")
    return found


@dataclass(frozen=True)
class _Layer:
    """One layer of a model on one device, and what it is given. `eager`: the kernels of a framework, not fused ones."""

    model: Model
    block: Block
    formats: Formats
    par: Parallelism
    group: Group
    eager: bool

    @property
    def tokens(self) -> Num:
        return self.group.tokens

    @property
    def attention(self) -> Attention:
        if not isinstance(self.block.mixer, Attention):
            raise Refused("the layer's attention is not made of heads with keys and values")
        return self.block.mixer

    @property
    def mlp(self) -> Mlp:
        if not isinstance(self.block.ffn, Mlp):
            raise Refused("the layer has no dense feed-forward network")
        return self.block.ffn

    def ops(self, what: str) -> list[Op]:
        """The operators behind one of our words. Raises Refused for a word that this layer has no operator for."""
        match what:
            case "norm":
                return [self._norm()]
            case "add":
                # A parallel block adds the attention and the feed-forward branch to the residual.
                add = elementwise.pointwise("add", self.tokens * self.model.hidden, self._width, reads=2)
                return [add] * (2 if self.block.parallel else 1)
            case "activation":
                inter = self.mlp.inter / self.par.tp
                return [elementwise.activation("act", self.tokens, inter, self._width, gated=self.mlp.gated)]
            case "rope":
                a = self.attention
                heads = a.heads / self.par.tp + np.maximum(a.kv_heads / self.par.tp, 1)
                return [elementwise.rotary("rope", self.tokens, heads * a.head_dim, self._width)]
            case "softmax":
                queries = self.group.tokens * self.attention.heads / self.par.tp
                return [elementwise.softmax("softmax", queries, self._context, self._width)]
            case "scores" | "values":
                return [self._batched_product(what)]
            case "q" | "kv" | "up":
                return [self._projection(what)]
            case "qkv" if self.eager:
                return [self._projection("q"), self._projection("kv"), self._projection("kv")]
            case "attention" if self.eager:
                return [op for part in ("scores", "softmax", "values") for op in self.ops(part)]
            case _:
                return self._in_pass(what)

    @property
    def _width(self) -> float:
        return self.formats.act.width

    @property
    def _context(self) -> Num:
        return self.group.c + self.group.q

    def _norm(self) -> Op:
        """Fused with the addition before it; in frameworks alone, and reading its row twice."""
        width, fused = self.model.hidden, not self.eager
        return elementwise.norm("norm", self.tokens, width, self._width, residual=fused, passes=2)

    def _projection(self, what: str) -> Op:
        """A projection that serving engines fuse with its neighbours, alone."""
        part = "dense_ffn" if what == "up" else "attention"
        if what == "up":
            n: Num = self.mlp.inter / self.par.tp
        else:
            a = self.attention
            n = a.head_dim * np.maximum((a.heads if what == "q" else a.kv_heads) / self.par.tp, 1)
        stored, dtype = self.formats.stored(part), self.formats.compute(part)
        return gemm(what, self.tokens, n, self.model.hidden, weight=stored, act=self.formats.act, dtype=dtype)[-1]

    def _batched_product(self, what: str) -> Op:
        """Scores q k^T [q x context per head] or their product with the values, one small matrix product per head."""
        a = self.attention
        groups = self.group.n * a.heads / self.par.tp
        n, k = (self._context, a.head_dim) if what == "scores" else (a.head_dim, self._context)
        q, width = self.group.q, self._width
        return Op(
            what, "grouped_gemm", {str(self.formats.act.matrix): 2 * groups * q * n * k},
            (read("kv", groups * n * k, width), read("activations", groups * q * k, width),
             write("activations", groups * q * n, width)),
            {"m": q, "n": n, "k": k, "groups": groups},
        )  # fmt: skip

    def _in_pass(self, what: str) -> list[Op]:
        """Operators of one forward pass by name; `layer`: all of one layer."""
        phase = graph.Phase((self.group,), logits="all")
        program = graph.lower(self.model, phase, self.par, self.formats)
        found = list(schedule.operators(program.schedule))
        layer = next(name for name, block in self.model.blocks.items() if block is self.block)
        if what == "layer":
            return [op for op, _, where in found if where == layer]
        names = _IN_PASS[what]
        chosen = [op for op, _, where in found if op.name in names and where in (layer, "embedding", "head")]
        if not chosen:
            raise Refused(f"the layer has no operator {what!r} of its own")
        return chosen[:1]


def _model(name: str) -> Model | None:
    if not name:
        return None
    try:
        return catalog.load_model(name)
    except UnknownName:
        raise Refused(f"unknown model {name!r}") from None


def _key(row: Row) -> Hashable:
    if not row.text("metric").endswith(("time", "latency")):
        raise Refused(f"{row.text('metric')} of a kernel is not a time")
    what = word(row.text("op") or row.text("metric"))
    model = _model(row.text("model"))
    if model is None and what not in ("norm", "softmax", "activation", "add", "dequantise"):
        raise Refused("model not stated")
    counts = ("num_tokens", "batch") if row.text("phase") in ("prefill", "decode") else ("num_tokens",)
    stated = next((c for c in ("m", *counts) if row.text(c)), "m")
    return (
        row.hardware, row.text("engine"), row.text("dtype", "fp16"), what, model and model.name,
        int(row.number("tp", 1)), row.text("phase"), stated,
    )  # fmt: skip


def _price(key: Any, rows: list[Row]) -> list[Outcome]:
    hardware, engine, dtype, what, name, tp, phase, stated = key
    m = timed(engine_machine(hardware, engine))
    eager = not captures(engine)
    if name is None:
        ops = _plain(what, column(rows, stated), column(rows, "n"), get_format(dtype).width)
    else:
        model = catalog.load_model(name)
        par = Parallelism(tp=tp)
        check_parallelism(model, par)
        blocks = list(model.blocks.values())
        block = next((b for b in blocks if isinstance(b.ffn, Mlp)), blocks[0])
        formats = choose_formats(model, m, dtype)
        layer = _Layer(model, block, formats, par, _group(rows, phase, stated), eager)
        ops = layer.ops(what)
    seconds, sigma = seconds_with_spread(ops, m, "elementwise", host_seconds(m, what, len(ops)))
    return times(rows, seconds, sigma)


def _plain(what: str, rows: Num, width: Num, bytes_: float) -> list[Op]:
    """A kernel over a matrix of `rows` x `width` elements."""
    match what:
        case "norm":
            return [elementwise.norm("norm", rows, width, bytes_, residual=False)]
        case "softmax":
            return [elementwise.softmax("softmax", rows, width, bytes_)]
        case "add":
            return [elementwise.pointwise("add", rows * width, bytes_, reads=2)]
        case "dequantise":  # from one byte an element
            return [elementwise.pointwise("dequantise", rows * width, bytes_, reads=1 / bytes_, flops=2)]
        case _:
            return [elementwise.activation("act", rows, width, bytes_, gated=False)]


def _group(rows: Sequence[Row], phase: str, stated: str) -> Group:
    if stated != "batch":
        return Group(1, column(rows, stated), 0)
    batch = column(rows, "batch")
    if phase == "decode":
        return Group(batch, 1, column(rows, "context_len") - 1, decode=True)
    new = column(rows, "input_len")
    return Group(batch, new, np.array([r.number("context_len", r.number("input_len")) for r in rows]) - new)


def captures(engine: str) -> bool:
    """Whether an engine replays captured graphs of fused kernels; one we do not know is taken to."""
    known = calibration.known_engine(engine)
    return known is None or calibration.engine(known).graph_batch > 0


def timed(m: Machine) -> Machine:
    """The machine with the launch that an engine's timers see, where its entry says so (a profiler sees little)."""
    return replace(m, kernel_latency=m.law["profiled_launch"]) if "profiled_launch" in m.law else m


def host_seconds(m: Machine, what: str, kernels: int) -> float:
    """Seconds that a timer on the host adds to kernels, for engines that are timed so.

    PyTorch's own kernels cost a call each; norms and activations written in Python run through its compiler, whose
    guards cost more.
    """
    if m.device.kind == "cpu":
        return 0.0  # the host runs the kernel itself, and no queue lies between
    call = "compiled_call" if what in ("norm", "activation") else "host_call"
    return float(m.law.get(call, 0.0)) * kernels


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _held_out(row: Row) -> Hashable:
    return row.text("model") or row.text("op"), row.text("n") if not row.text("model") else ""


ELEMENTWISE = Kind(
    "elementwise",
    lambda r: r.text("phase") == "elementwise",
    _predict,
    _held_out,
    ("memory.*.cache_share", "engine.sarathi.row_bytes_per_clock", "engine.sarathi.profiled_launch"),
)
LAYER = Kind("layer", lambda r: r.text("metric") in ("layer_op_time", "layer_time"), _predict, _held_out)
