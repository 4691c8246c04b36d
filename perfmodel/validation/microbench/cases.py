"""What is measured: operators of a transformer at shapes that separate rates from latencies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One configuration: its cells in the tidy format, and how to prepare the call that is timed.

    work: bytes of one call where the row is a bandwidth, else 0 and the row is a time.
    """

    cells: dict[str, Any]
    prepare: Callable[[], Callable[[], None]]
    work: float = 0.0
    unit: str = field(default="us")


@dataclass(frozen=True)
class Target:
    """The device under test: `cuda` or `cpu`, the formats it multiplies, and the size of its last-level cache."""

    device: str
    dtypes: tuple[str, ...]
    cache: float
    large: bool
    """Whether shapes of datacentre accelerators are affordable."""


_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cases(t: Target) -> list[Case]:
    """All cases, most informative first, so that a short budget still covers every kind."""
    groups = [list(g) for g in (_copies(t), _products(t), _attention(t), _vector(t), _launches(t))]
    return [c for batch in itertools.zip_longest(*groups) for c in batch if c is not None]


def _rotated(make: Callable[[], torch.Tensor], cache: float) -> Callable[[], torch.Tensor]:
    """Tensors used in turn, together larger than twice the cache: weights come from memory, as in a model."""
    first = make()
    copies = min(64, max(1, int(2 * cache / max(first.numel() * first.element_size(), 1)) + 1))
    ring = itertools.cycle([first, *(make() for _ in range(copies - 1))])
    return lambda: next(ring)


def _products(t: Target) -> Iterator[Case]:
    sizes = (
        [(4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336)]
        if t.large
        else [(1024, 1024), (2048, 2048), (4096, 1024)]
    )
    rows = [1, 16, 64, 256, 1024, 4096] if t.large else [1, 8, 64, 512]
    for dtype in t.dtypes:
        for m, (n, k) in itertools.product(rows, sizes):

            def prepare(m: int = m, n: int = n, k: int = k, dtype: str = dtype) -> Callable[[], None]:
                x = torch.randn(m, k, device=t.device).to(_TORCH[dtype])
                weight = _rotated(lambda: torch.randn(n, k, device=t.device).to(_TORCH[dtype]), t.cache)
                return lambda: _keep(torch.nn.functional.linear(x, weight()))

            yield Case({"phase": "gemm", "op": "linear", "dtype": dtype, "m": m, "n": n, "k": k}, prepare)


def _attention(t: Target) -> Iterator[Case]:
    heads, kv_heads, dim = (32, 8, 128) if t.large else (8, 8, 64)
    prefill = [(1, 512), (1, 2048), (4, 2048), (1, 8192)] if t.large else [(1, 128), (1, 512), (2, 256)]
    decode = [(1, 4096), (16, 4096), (64, 4096), (64, 1024)] if t.large else [(1, 512), (4, 512), (8, 1024)]
    dtype = t.dtypes[0]
    for op, shapes in (("context_attention", prefill), ("generation_attention", decode)):
        for batch, context in shapes:

            def prepare(op: str = op, batch: int = batch, context: int = context) -> Callable[[], None]:
                new = context if op == "context_attention" else 1

                def tensor(h: int, length: int) -> torch.Tensor:
                    return torch.randn(batch, h, length, dim, device=t.device).to(_TORCH[dtype])

                q, k, v = tensor(heads, new), tensor(kv_heads, context), tensor(kv_heads, context)
                grouped = heads != kv_heads
                return lambda: _keep(
                    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=grouped)
                )

            cells = {
                "phase": "attention", "op": op, "dtype": dtype, "kv_dtype": dtype, "batch": batch, "context_len": context,
                "input_len": context, "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": dim,
            }  # fmt: skip
            yield Case(cells, prepare)


def _copies(t: Target) -> Iterator[Case]:
    for size in (1024, 256, 16, 1) if t.large else (128, 32, 4, 1):
        elements = size * _MIB // 4

        def copy(elements: int = elements) -> Callable[[], None]:
            a, b = torch.randn(elements, device=t.device), torch.empty(elements, device=t.device)
            return lambda: _keep(b.copy_(a))

        def triad(elements: int = elements) -> Callable[[], None]:
            a, b, c = (torch.randn(elements, device=t.device) for _ in range(3))
            return lambda: _keep(torch.add(b, c, alpha=3.0, out=a))

        cells = {"phase": "memcpy", "dtype": "fp32", "msg_bytes": elements * 4, "metric": "bandwidth"}
        yield Case({**cells, "op": "copy"}, copy, 2.0 * elements * 4, "GB/s")
        yield Case({**cells, "op": "triad"}, triad, 3.0 * elements * 4, "GB/s")


def _vector(t: Target) -> Iterator[Case]:
    dtype = t.dtypes[0]
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "softmax": lambda x: torch.softmax(x, -1),
        "layernorm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
        "gelu": torch.nn.functional.gelu,
    }
    for (op, function), m in itertools.product(functions.items(), (4096, 256) if t.large else (512, 32)):
        n = 8192 if t.large else 2048

        def prepare(
            function: Callable[[torch.Tensor], torch.Tensor] = function, m: int = m, n: int = n
        ) -> Callable[[], None]:
            x = torch.randn(m, n, device=t.device).to(_TORCH[dtype])
            return lambda: _keep(function(x))

        yield Case({"phase": "elementwise", "op": op, "dtype": dtype, "m": m, "n": n}, prepare)
    n = (64 if t.large else 4) * _MIB

    def dequantise() -> Callable[[], None]:
        q = torch.randint(-127, 127, (n // 1024, 1024), device=t.device, dtype=torch.int8)
        scale = torch.rand(n // 1024, 1, device=t.device)
        return lambda: _keep(q * scale)

    yield Case({"phase": "elementwise", "op": "dequantise", "dtype": "fp32", "m": n // 1024, "n": 1024}, dequantise)


def _launches(t: Target) -> Iterator[Case]:
    def tiny() -> Callable[[], None]:
        a, b = torch.ones(1, device=t.device), torch.ones(1, device=t.device)
        return lambda: _keep(torch.add(a, b, out=a))

    yield Case({"phase": "elementwise", "op": "add", "dtype": "fp32", "m": 1, "n": 1}, tiny)


def transfers() -> Iterator[Case]:
    """Copies between host and device by size, from pinned memory."""
    for size in (256, 16, 1):
        for op in ("host_to_device", "device_to_host"):

            def prepare(size: int = size, op: str = op) -> Callable[[], None]:
                host = torch.empty(size * _MIB, dtype=torch.uint8, pin_memory=True)
                device = torch.empty(size * _MIB, dtype=torch.uint8, device="cuda")
                a, b = (device, host) if op == "host_to_device" else (host, device)
                return lambda: _keep(a.copy_(b, non_blocking=True))

            cells = {"phase": "memcpy", "op": op, "msg_bytes": size * _MIB, "metric": "bandwidth"}
            yield Case(cells, prepare, float(size * _MIB), "GB/s")


def _keep(_: torch.Tensor) -> None:
    """Calls are timed for what they do, not for what they return."""
