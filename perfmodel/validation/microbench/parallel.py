"""Collectives between processes, and files: what is measured outside one process's tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from perfmodel.errors import SpecError

_SIZES = (2**12, 2**16, 2**20, 2**24)
_OPS: dict[str, tuple[str, Callable[[torch.Tensor, int], None]]] = {
    "allreduce": ("all_reduce", lambda x, n: dist.all_reduce(x)),
    "allgather": ("all_gather", lambda x, n: dist.all_gather(list(torch.empty_like(x).chunk(n)), x.chunk(n)[0])),
}


def collectives(backend: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Median seconds of all-reduce and all-gather by size over `ranks` processes; rows in the tidy format.

    backend: gloo (CPU) or nccl (one device a process). Message: per-rank buffer, for all-gather the gathered one.
    """
    meeting, results = folder / "meeting", folder / "collectives.npy"
    # Interpreters of their own: spawned workers would import the caller's main module again.
    command = [sys.executable, "-m", __name__, backend, str(ranks), str(meeting), str(results)]
    running = [subprocess.Popen([*command, str(rank)]) for rank in range(ranks)]
    if any(process.wait() for process in running):
        raise SpecError(f"the collectives over {ranks} processes ({backend}) failed; see the messages above")
    table = np.load(results)
    rows = []
    for (phase, (op, _)), medians in zip(_OPS.items(), table, strict=True):
        for size, (median, spread) in zip(_SIZES, medians, strict=True):
            rows.append({
                "phase": phase, "op": op, "dtype": "fp32", "n_devices": ranks, "msg_bytes": size, "engine": f"{backend}(torch)",
                "metric": "collective_time", "value": median * 1e6, "unit": "us", "spread": spread,
            })  # fmt: skip
    return rows


def _rank(backend: str, ranks: int, meeting: str, results: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    table = np.zeros((len(_OPS), len(_SIZES), 2))
    for i, (_, run) in enumerate(_OPS.values()):
        for j, size in enumerate(_SIZES):
            x = torch.ones(size // 4, device=device)
            taken = []
            for _ in range(12):
                dist.barrier()
                start = time.perf_counter()
                run(x, ranks)
                if backend == "nccl":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
            low, middle, high = np.quantile(taken[3:], (0.25, 0.5, 0.75))
            table[i, j] = middle, (high - low) / middle
    dist.destroy_process_group()
    if rank == 0:
        np.save(results, table)


def files(folder: Path, size: int = 128 * 2**20, block: int = 2**20) -> list[dict[str, Any]]:
    """Sequential write (with fsync) and read of one file in blocks; rows in the tidy format.

    The system is asked to drop the file from its cache before it is read; where it does not, memory is what is measured.
    """
    path = folder / "perfmodel-file-bandwidth"
    data = os.urandom(block)
    rows = []
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as stream:
            for _ in range(size // block):
                stream.write(data)
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rows.append(_file_row("sequential_write_1M", size, time.perf_counter() - start))
        start = time.perf_counter()
        with path.open("rb", buffering=0) as stream:
            while stream.read(block):
                pass
        rows.append(_file_row("sequential_read_1M", size, time.perf_counter() - start))
    finally:
        path.unlink(missing_ok=True)
    return rows


def _file_row(op: str, size: int, seconds: float) -> dict[str, Any]:
    return {
        "phase": "storage", "op": op, "msg_bytes": size, "engine": "file system", "metric": "bandwidth",
        "value": size / seconds / 1e9, "unit": "GB/s", "spread": 0.0,
    }  # fmt: skip


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
