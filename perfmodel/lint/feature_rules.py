"""Formats, steps and features: what the checkpoint, the device and the other options allow."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel import graph, roofline
from perfmodel.engines.flags import flags
from perfmodel.errors import did_you_mean
from perfmodel.lint.finding import Finding, Severity
from perfmodel.lint.server import Server
from perfmodel.spec.formats import get_format

_DRAFTS = 8  # drafted tokens beyond which no published acceptance pays for the longer verification
_ACCEPTED = 0.8  # share of drafted tokens that good draft heads get accepted (EAGLE-3, arXiv:2503.01840, fig. 2)
_SLOW_CHUNK = 0.7  # share of the default chunk's prefill rate below which a smaller chunk is a waste


def check(s: Server) -> Iterator[Finding]:
    """Findings about formats, steps and features."""
    yield from _quantization(s)
    yield from _device_formats(s)
    yield from _steps(s)
    yield from _graphs(s)
    yield from _speculation(s)
    yield from _adapters(s)
    yield from _places(s)


def _quantization(s: Server) -> Iterator[Finding]:
    method, word = s.get("quantization"), s.settings.word("quantization")
    wanted = s.supports.quantization.get(str(method))
    if method is None or wanted in (None, "checkpoint"):
        return
    stored = get_format(s.stored)
    if stored.width >= 2:
        if method not in s.supports.online:
            message = f"{method} reads weights that were quantised before; the checkpoint of {s.model.name} holds {stored.name}"
            fix = (("quantization", None),)
            yield Finding("error", "checkpoint-not-quantised", message, word, fix=fix)
    elif get_format(str(wanted)).bits != stored.bits:
        message = f"--quantization {method} ({wanted}) contradicts the checkpoint, which is quantised to {stored.name}"
        yield Finding("error", "quantization-conflict", message, word, fix=(("quantization", None),))


def _device_formats(s: Server) -> Iterator[Finding]:
    """Formats against what the device's matrix units multiply."""
    matrix = set(s.device.compute.matrix) if s.device.compute else set()
    dtype, word = str(s.get("dtype")), s.settings.word("dtype")
    if dtype == "bfloat16" and "bf16" not in matrix and s.device.vendor == "nvidia":
        message = f"{s.device.name} ({s.device.architecture}) does not multiply bfloat16; use float16"
        yield Finding("error", "dtype-unsupported", message, word, fix=(("dtype", "float16"),))
    if dtype in ("float", "float32"):
        message = f"float32 doubles the bytes of weights and cache: {s.weights / 1e9:.1f} GB of weights per device"
        yield Finding("warning", "dtype-wide", message, word, s.weights / 2, (("dtype", "auto"),))
    wanted = s.supports.quantization.get(str(s.get("quantization")))
    if wanted in ("nvfp4",) and "fp4" not in matrix:
        message = f"{s.device.name} has no FP4 units: {s.get('quantization')} only saves bytes, arithmetic stays at 16 bits"
        yield Finding("warning", "format-not-native", message, s.settings.word("quantization"))
    if wanted in ("fp8", "fp8_block") and "fp8" not in matrix:
        message = f"{s.device.name} ({s.device.architecture}) has no FP8 units: weights shrink, arithmetic stays at 16 bits"
        yield Finding("warning", "format-not-native", message, s.settings.word("quantization"))
    asked, word = s.get("kv_dtype"), s.settings.word("kv_dtype")
    known = {*s.supports.kv_formats, *(c for f in flags(s.name).flags.values() if f.sets == "kv_dtype" for c in f.choices)}
    if asked is not None and str(asked) not in known:
        hint = did_you_mean(str(asked), known) or f"; there are {', '.join(sorted(known))}"
        yield Finding("error", "unknown-kv-format", f"no cache format is called {asked}{hint}", word, fix=(("kv_dtype", None),))
    kv = s.supports.kv_formats.get(str(asked))
    if kv == "fp8" and "fp8" not in matrix and s.device.vendor == "nvidia":
        message = (
            f"{s.device.name} ({s.device.architecture}) has no FP8 units: attention kernels expand or refuse an 8-bit cache, "
            "so it saves bytes at best and never time"
        )
        yield Finding("warning", "kv-format-not-native", message, s.settings.word("kv_dtype"), fix=(("kv_dtype", None),))
    if kv == "nvfp4" and "fp4" not in matrix:
        message = f"{s.device.name} has no FP4 units for a 4-bit cache"
        yield Finding("error", "kv-format-unsupported", message, s.settings.word("kv_dtype"), fix=(("kv_dtype", None),))
    values = str(s.get("kv_dtype_v", "f16"))
    if s.name == "llama.cpp" and values not in ("f32", "f16", "bf16") and s.get("flash") == "off":
        message = f"a V cache of {values} needs flash attention, which is off: the server refuses it"
        yield Finding("error", "v-cache-without-flash", message, s.settings.word("flash"), fix=(("flash", "on"),))


def _steps(s: Server) -> Iterator[Finding]:
    tokens, word = s.number("step_tokens", 0), s.settings.word("step_tokens")
    block, blocks = s.number("block", 0), s.supports.block_tokens
    if block and blocks and block not in blocks:
        near = min(blocks, key=lambda b: abs(b - block))
        message = f"blocks of {block} tokens are not supported; {', '.join(map(str, blocks))} are"
        yield Finding("error", "block-unsupported", message, s.settings.word("block"), fix=(("block", str(near)),))
    chunked = s.get("chunked_prefill", s.name != "trtllm")
    unlimited = s.name == "trtllm" and not s.number("context", 0)
    if not chunked and tokens and tokens < s.context and not unlimited:
        message = f"with chunked prefill off a step of {tokens:,} tokens cannot take a prompt of up to {s.context:,}"
        fix = (("step_tokens", str(s.context)),)
        yield Finding("error", "step-below-context", message, word, float(s.context - tokens), fix)
        return
    if s.name == "llama.cpp":
        logical = s.number("batch_tokens", 2048)
        if tokens > logical:
            message = f"--ubatch-size {tokens} exceeds --batch-size {logical}, which limits it"
            yield Finding("warning", "ubatch-above-batch", message, word, float(tokens - logical))
        return
    sequences = s.number("sequences", 0)
    if tokens and sequences > tokens:
        message = f"a step of {tokens:,} tokens cannot hold one token of each of {sequences:,} sequences"
        fix = (("step_tokens", str(max(s.defaults.chunk_tokens, sequences))),)
        below: Severity = "warning" if s.name == "trtllm" else "error"
        yield Finding(below, "step-below-sequences", message, word, float(sequences - tokens), fix)
        return
    usual = s.defaults.chunk_tokens
    if chunked and tokens and tokens < usual and s.pool > 0:
        rate, full = (n / float(s.estimator.prefill(1, n)) for n in (tokens, usual))
        if rate < _SLOW_CHUNK * full:
            message = (
                f"steps of {tokens:,} tokens prefill {rate:,.0f} tokens/s, the default of {usual:,} does {full:,.0f}: "
                f"{1 - rate / full:.0%} of the compute is lost"
            )
            yield Finding("warning", "step-too-small", message, word, full - rate, (("step_tokens", str(usual)),))


def _graphs(s: Server) -> Iterator[Finding]:
    if not s.get("eager"):
        return
    word = s.settings.word("eager")
    if s.get("graph_sizes") is not None or s.get("compilation") is not None:
        other = s.settings.word("graph_sizes") or s.settings.word("compilation")
        message = f"{word} turns captured graphs off, so {other} does nothing"
        yield Finding("warning", "graphs-off-and-sized", message, other, fix=(("eager", None),))
    law = s.estimator.machine.law
    launches = roofline.cost(s.estimator.lower(graph.decode(1, s.context // 2)).schedule, s.estimator.machine).launches
    issue, step = float(launches) * law["eager_issue"], float(s.estimator.decode(1, max(s.context // 2, 1)))
    message = (
        f"{word}: without captured graphs the host issues {float(launches):.0f} operators a step, {issue * 1e3:.1f} ms against "
        f"{step * 1e3:.1f} ms for the whole step of one sequence with graphs"
    )
    # Hand-over between instances is often tried out without graphs first.
    severity: Severity = "warning" if issue > step and not s.get("role") else "info"
    yield Finding(severity, "eager", message, word, max(issue - step, 0.0), (("eager", None),))


def _speculation(s: Server) -> Iterator[Finding]:
    drafted = s.get("draft_tokens")
    word = s.settings.word("draft_tokens") or s.settings.word("speculation")
    method = str(s.get("draft_method") or "").lower()
    lookup = "ngram" in method or "suffix" in method
    if isinstance(drafted, int) and drafted > _DRAFTS and not lookup and not s.number("draft_topk", 1) > 1:
        kept = (1 - _ACCEPTED ** (drafted + 1)) / (1 - _ACCEPTED)
        few = (1 - _ACCEPTED**5) / (1 - _ACCEPTED)
        message = (
            f"{drafted} drafted tokens: at an acceptance of {_ACCEPTED:.0%} a step yields {kept:.1f} tokens, 4 drafted ones "
            f"yield {few:.1f}; the rest is drafted and verified for nothing"
        )
        yield Finding("warning", "too-many-drafts", message, word, drafted + 1 - kept, (("draft_tokens", "4"),))
    if isinstance(drafted, int) and drafted < 1:
        yield Finding("error", "no-drafts", f"{drafted} drafted tokens: speculation needs at least one", word)
    needs = method in ("eagle", "eagle3", "draft_model", "standalone", "medusa", "draft-simple", "draft-eagle3")
    if needs and not s.get("draft_model") and not s.model.mtp_parameters:
        message = f"speculation by {method} needs a draft model, and none is given"
        yield Finding("error", "no-draft-model", message, s.settings.word("draft_method"))
    steps, given = s.number("draft_steps", 0), s.number("draft_tokens", 0)
    if s.name == "sglang" and steps and given and s.number("draft_topk", 1) == 1 and given != steps + 1:
        message = f"with top-k 1 a chain of {steps} steps drafts {steps + 1} tokens, not {given}"
        fix = (("draft_tokens", str(steps + 1)),)
        yield Finding("warning", "drafts-and-steps", message, word, fix=fix)


def _adapters(s: Server) -> Iterator[Finding]:
    if s.name == "llama.cpp":
        return
    on = s.get("lora")
    for name in ("lora_modules", "max_loras", "max_lora_rank"):
        if s.get(name) is not None and not on and not (s.name == "sglang" and s.get("lora_modules")):
            word = s.settings.word(name)
            severity: Severity = "error" if name == "lora_modules" else "warning"
            message = f"{word} does nothing without adapters enabled (--enable-lora)"
            yield Finding(severity, "adapters-off", message, word, fix=(("lora", ""),))
            return


def _places(s: Server) -> Iterator[Finding]:
    nodes, rank = s.number("nodes", 1), s.get("node_rank")
    if isinstance(rank, int) and rank >= nodes:
        message = f"node rank {rank} of {nodes} nodes: ranks run from 0 to {nodes - 1}"
        yield Finding("error", "node-rank", message, s.settings.word("node_rank"))
    if nodes > 1 and s.devices <= s.per_node:
        message = f"{nodes} nodes for {s.devices} devices, which one node of {s.per_node} has"
        fix = (("nodes", None), ("node_rank", None), ("init_address", None))
        yield Finding("warning", "nodes-without-need", message, s.settings.word("nodes"), float(nodes - 1), fix)
    swap = s.get("swap_gb")
    # Versions that still take the option; of the newest it is gone, which is said once.
    if isinstance(swap, (int, float)) and swap and s.version:
        message = f"swap space of {swap:g} GiB a device does nothing: the V1 scheduler recomputes what it preempts"
        word = s.settings.word("swap_gb")
        yield Finding("warning", "swap-unused", message, word, float(swap) * 2**30, (("swap_gb", None),))
