"""Bytes: what does not fit, what is wasted, and what the scheduler's limits make of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

from perfmodel.engine_memory import cache_pool, loaded_weights
from perfmodel.lint.finding import Finding, Severity
from perfmodel.lint.fit import throughput
from perfmodel.lint.parallel_rules import gain
from perfmodel.lint.server import Server
from perfmodel.memory import kv_bytes_per_token

_HIGH, _LOW = 0.98, 0.7
"""Shares of device memory above which allocations outside the engine's count run out, and below which much lies idle."""
_SHORT = 256  # tokens of a short chat turn: a limit that the cache cannot reach even then is out of reach
_ROOM = 8  # a limit this many times below what the cache holds at full length wastes most of the device


def check(s: Server) -> Iterator[Finding]:
    """Findings about memory, gravest first."""
    yield from _fraction(s)
    longest = s.model.max_positions
    if s.pool <= 0:
        yield from _weights(s)
        return
    if longest and s.number("context", 0) > longest and s.name != "llama.cpp" and not s.get("config_overrides"):
        severity: Severity = "error" if s.name == "vllm" else "warning"
        message = f"{s.context:,} tokens exceed the {longest:,} that {s.model.name} was made for (no rope scaling is set)"
        word = s.settings.word("context")
        yield Finding(severity, "beyond-model", message, word, float(s.context - longest), (("context", str(longest)),))
    yield from _one_sequence(s)
    yield from _offload(s)
    yield from _sequences(s)


def _gb(x: float) -> str:
    return f"{x / 1e9:.1f} GB"


def _weights(s: Server) -> Iterator[Finding]:
    budget = s.pool + s.weights
    message = (
        f"weights of {_gb(s.weights)} per {s.device.name} exceed the {_gb(budget)} left for them and a cache "
        f"(tp {s.par.tp}, pp {s.par.pp}, {s.fraction:.0%} of {_gb(s.instance.total)})"
    )
    total = s.weights * float(s.par.tp)
    fits = [d for d in (2, 4, 8) if d > s.par.tp and d <= s.node.devices.count and total / d < budget * 0.9]
    narrower = [m for m in s.supports.online if m in ("fp8", "bitsandbytes")]
    change: tuple[tuple[str, str | None], ...] = ()
    if fits:
        message += f"; tp {fits[0]} has room"
        change = (("tp", str(fits[0])),)
    elif narrower and s.stored in ("bf16", "fp16"):
        message += f"; --quantization {narrower[0]} halves them"
    yield Finding("error", "weights-do-not-fit", message, s.settings.word("tp"), -s.pool, change)


def _one_sequence(s: Server) -> Iterator[Finding]:
    most = s.concurrency(s.context) / s.ranks
    if most >= 1:
        return
    held = s.kv_tokens
    asked = s.number("context", 0) or s.number("total_context", 0)
    whose = f"the {s.context:,} asked for" if asked else f"the model's {s.context:,}"
    message = f"the cache holds {held:,} tokens, less than one sequence of {whose}"
    # vLLM refuses to start; the others cut or evict.
    severity: Severity = "error" if s.name == "vllm" else "warning"
    word = s.settings.word("context") or s.settings.word("total_context")
    name = "total_context" if s.name == "llama.cpp" else "context"
    fix = ((name, str(max(held // 1024 * 1024, 1024))),)
    yield Finding(severity, "less-than-one-sequence", message, word, float(s.context - held), fix)


def _fraction(s: Server) -> Iterator[Finding]:
    given = s.get("memory_fraction")
    if not isinstance(given, float):
        return
    word = s.settings.word("memory_fraction")
    if not 0 < given <= 1:
        message = f"{given:g} is no share of memory: it lies between 0 and 1"
        yield Finding("error", "bad-fraction", message, word, fix=(("memory_fraction", None),))
        return
    usable = s.engine.memory_fraction
    if given > _HIGH:
        left = (1 - given) * s.instance.total
        message = (
            f"{given:g} leaves {_gb(left)} of {_gb(s.instance.total)} for what the engine does not count "
            f"(other contexts, fragments, communication); it runs out of memory under load"
        )
        yield Finding("warning", "fraction-too-high", message, word, left, (("memory_fraction", f"{usable:g}"),))
    elif given < _LOW:
        wasted = cache_pool(s.instance, usable, s.weights) - s.pool
        tokens = wasted / max(kv_bytes_per_token(s.model, s.formats) / float(s.par.tp) / float(s.par.pp), 1e-9)
        message = f"{given:g} leaves {_gb(wasted)} per device unused, against the usual {usable:g}: {tokens:,.0f} tokens of cache"
        yield Finding("warning", "fraction-too-low", message, word, wasted, (("memory_fraction", f"{usable:g}"),))


def _offload(s: Server) -> Iterator[Finding]:
    offload = float(s.get("offload_gb") or 0.0) * 2**30
    without = cache_pool(s.instance, s.fraction, loaded_weights(s.instance))
    if offload > 0 and without > 0 and s.concurrency(s.context) > 0:
        needed = float(s.context) * kv_bytes_per_token(s.model, s.formats) / float(s.par.tp) / float(s.par.pp)
        if without > needed:
            pcie = s.node.pcie.bandwidth if s.node.pcie else None
            cost = f"; reading them over PCIe adds {offload / pcie * 1e3:.0f} ms to every step" if pcie else ""
            message = f"weights fit without offloading {_gb(offload)} and leave {_gb(without)} for the cache{cost}"
            number = offload / pcie if pcie else offload
            fix = (("offload_gb", None),)
            yield Finding("warning", "offload-without-need", message, s.settings.word("offload_gb"), number, fix)
    layers = s.on_device
    if layers < 1:
        rest = loaded_weights(s.instance)
        room = cache_pool(s.instance, s.fraction, rest)
        if room > 0:
            message = f"{1 - layers:.0%} of the layers run on the CPU, though all {_gb(rest)} fit on {s.device.name}"
            word = s.settings.word("gpu_layers")
            yield Finding("warning", "layers-on-cpu", message, word, rest * (1 - layers), (("gpu_layers", "all"),))
    host = s.get("host_cache_gb")
    if isinstance(host, (int, float)) and s.node.host and float(host) * 2**30 > s.node.host.memory:
        message = f"a cache of {float(host):g} GiB exceeds the host's {_gb(s.node.host.memory)}"
        yield Finding("error", "host-cache-too-large", message, s.settings.word("host_cache_gb"), float(host) * 2**30)


def _sequences(s: Server) -> Iterator[Finding]:
    given = s.number("sequences", 0)
    if not given or s.name == "llama.cpp":
        return
    limit, word = given * s.ranks, s.settings.word("sequences")
    tokens = sum(s.lengths) if s.lengths else _SHORT
    held = s.concurrency(tokens)
    whose = f"the workload's {tokens:,} tokens" if s.lengths else f"only {tokens} tokens"
    if limit > 1.5 * held:
        message = f"{limit:,} sequences never fit: the cache holds {held:,.0f} of {whose} each"
        fix = (("sequences", str(max(math.floor(held / s.ranks), 1))),)
        yield Finding("warning", "limit-out-of-reach", message, word, limit - held, fix)
    full = s.concurrency(sum(s.lengths) if s.lengths else s.context)
    if full > _ROOM * limit and throughput(s, full) > 2 * throughput(s, limit):
        # No workload limits the batch, so neither does this rule go beyond what the engine would run by itself.
        target = min(full, (s.defaults.max_sequences or s.engine.max_sequences) * s.ranks)
        if target > 2 * limit:
            message = (
                f"{limit:,} sequences at a time leave the cache empty: it holds {full:,.0f} of "
                f"{tokens if s.lengths else s.context:,} tokens each; {gain(s, limit, target)} at {target:,.0f}"
            )
            number = throughput(s, target) - throughput(s, limit)
            fix = (("sequences", str(math.floor(target / s.ranks))),)
            yield Finding("warning", "limit-too-low", message, word, number, fix)
