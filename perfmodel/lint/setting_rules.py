"""Settings that exclude, need or empty each other, and numbers that cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.lint.finding import Finding
from perfmodel.lint.server import Server
from perfmodel.spec.formats import get_format

_COUNTS = ("tp", "pp", "dp", "ep", "cp", "sequences", "nodes", "block", "max_loras")
_SLOT = 1024  # tokens: a slot shorter than this cuts ordinary prompts
_PORTS = 65535


def check(s: Server) -> Iterator[Finding]:
    """Findings about single settings and pairs of them."""
    yield from _numbers(s)
    yield from _transfer(s)
    yield from _caches(s)
    yield from _speculation(s)
    yield from _slots(s)
    yield from _container(s)
    yield from _collectives(s)


def _numbers(s: Server) -> Iterator[Finding]:
    for name in _COUNTS:
        value = s.get(name)
        # llama-server's -1 leaves its slots to itself.
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and not (s.name == "llama.cpp" and value == -1):
            word = s.settings.word(name)
            yield Finding("error", "not-positive", f"{word} {value}: at least 1 is needed", word, fix=((name, None),))
    port = s.get("port")
    if isinstance(port, int) and not 0 < port <= _PORTS:
        yield Finding("error", "bad-port", f"port {port} does not exist: 1 to {_PORTS} do", s.settings.word("port"))
    offload = s.get("offload_gb")
    if isinstance(offload, (int, float)) and s.node.host and float(offload) * 2**30 * s.per_node > s.node.host.memory:
        total, have = float(offload) * 2**30 * s.per_node / 1e9, s.node.host.memory / 1e9
        message = f"offloading {offload:g} GiB from each of {s.per_node} devices needs {total:,.0f} of {have:,.0f} GB"
        yield Finding("error", "offload-beyond-host", message, s.settings.word("offload_gb"), (total - have) * 1e9)


def _transfer(s: Server) -> Iterator[Finding]:
    if s.get("connector") and not s.get("role"):
        message = f"connector {s.get('connector')} needs a kv_role (kv_producer, kv_consumer, kv_both), or nothing starts"
        yield Finding("error", "connector-without-role", message, s.settings.word("connector"))
    if s.name == "sglang" and s.get("role") in (None, "null"):
        for name in ("transfer", "transfer_device", "bootstrap"):
            if s.get(name) is not None:
                word = s.settings.word(name)
                message = f"{word} does nothing: --disaggregation-mode is off"
                yield Finding("warning", "transfer-without-mode", message, word, fix=((name, None),))


def _caches(s: Server) -> Iterator[Finding]:
    off = s.get("prefix_caching") is False
    if s.name == "sglang" and off and s.get("host_cache"):
        message = "a hierarchical cache extends the radix cache, which is turned off"
        word = s.settings.word("host_cache")
        yield Finding("error", "host-cache-without-prefix-cache", message, word, fix=(("prefix_caching", None),))
    if s.name == "sglang" and off and s.get("schedule") in ("lpm", "dfs-weight"):
        message = f"policy {s.get('schedule')} orders requests by cached prefixes, and nothing is cached: they run as they come"
        yield Finding("warning", "policy-without-prefix-cache", message, s.settings.word("schedule"), fix=(("schedule", None),))
    if s.get("kv_dtype") == "fp8_e5m2" and get_format(s.stored).matrix == "fp8" and s.name == "vllm":
        message = "fp8_e5m2 is not taken with a checkpoint of 8-bit weights; fp8_e4m3 is"
        yield Finding("error", "e5m2-with-fp8-weights", message, s.settings.word("kv_dtype"), fix=(("kv_dtype", "fp8_e4m3"),))


def _speculation(s: Server) -> Iterator[Finding]:
    config = s.get("speculation")
    told = s.get("draft_tokens") is not None or "mtp" in str(s.get("draft_method"))
    if s.name == "vllm" and isinstance(config, dict) and not told:
        message = "the speculative configuration does not say num_speculative_tokens: the engine refuses to start"
        yield Finding("error", "no-draft-length", message, s.settings.word("speculation"))
    if s.name == "sglang" and s.get("draft_method") is None and (s.get("draft_tokens") or s.get("draft_model")):
        word = s.settings.word("draft_tokens") or s.settings.word("draft_model")
        message = f"{word} does nothing without --speculative-algorithm"
        yield Finding("warning", "drafts-without-algorithm", message, word)


def _slots(s: Server) -> Iterator[Finding]:
    """llama-server deals its context to its slots."""
    if s.name != "llama.cpp":
        return
    slots, longest = s.number("sequences", 1), s.model.max_positions
    total = s.number("total_context", 0)
    if total and slots > 1 and not s.get("unified") and s.context < _SLOT:
        message = f"{total:,} tokens over {slots} slots are {s.context:,} each: longer prompts are cut"
        fix = (("total_context", str(slots * min(longest or 8192, 8192))),)
        yield Finding("warning", "slots-too-short", message, s.settings.word("total_context"), float(s.context), fix)
    if longest and s.context > longest and not s.get("rope"):
        message = f"slots of {s.context:,} tokens exceed the {longest:,} that {s.model.name} was made for"
        fix = (("total_context", str(longest * (slots if not s.get("unified") else 1))),)
        yield Finding("warning", "beyond-model", message, s.settings.word("total_context"), float(s.context - longest), fix)
    if slots > 1 and s.get("continuous") is False:
        message = f"{slots} slots without continuous batching: a request waits until the others are done"
        yield Finding("warning", "slots-without-batching", message, s.settings.word("continuous"), fix=(("continuous", None),))


def _container(s: Server) -> Iterator[Finding]:
    """`docker run` around the command."""
    words = s.command.launcher
    if not any(w.rsplit("/", 1)[-1] in ("docker", "podman") for w in words[:2]) or "run" not in words:
        return
    text = " ".join(words)
    if not any(option in text for option in ("--gpus", "--device", "--runtime")):
        yield Finding("error", "container-without-devices", "the container is given no devices (--gpus all)")
    if s.devices > 1 and not any(option in text for option in ("--ipc", "--shm-size")):
        message = f"{s.devices} devices exchange tensors over /dev/shm, 64 MiB in a container (--ipc=host or --shm-size)"
        yield Finding("error", "no-shared-memory", message)


def _collectives(s: Server) -> Iterator[Finding]:
    if s.get("plain_reduce") and int(s.par.tp) > 1 and s.node.fabric.p2p and s.node.fabric.topology in ("switch", "mesh"):
        word = s.settings.word("plain_reduce")
        message = f"{word}: small all-reduces of decode take the library's ring, though {s.node.fabric.technology} joins all"
        yield Finding("warning", "plain-all-reduce", message, word, fix=(("plain_reduce", None),))
