"""CUDA devices: events for a clock, and a buffer twice the cache to flush it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from perfmodel.validation.microbench.cases import Target
from perfmodel.validation.microbench.harness import Stopwatch


def target() -> Target:
    """The current device."""
    p = torch.cuda.get_device_properties(0)
    dtypes = ("bf16", "fp16") if torch.cuda.is_bf16_supported() else ("fp16",)
    return Target("cuda", dtypes, float(getattr(p, "L2_cache_size", 64 * 2**20)), large=True)


def stopwatch() -> Stopwatch:
    """Seconds by events on the current stream; caches are flushed before every sample."""
    scratch = torch.empty(int(2 * target().cache), dtype=torch.uint8, device="cuda")

    def elapsed(call: Callable[[], None], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Work that is already queued hides the host's launches behind the device.
        torch.cuda._sleep(1_000_000)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return Stopwatch(wait=torch.cuda.synchronize, flush=lambda: scratch.zero_() and None, elapsed=elapsed)
