"""Many papers at once, on all processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from perfmodel.papers.run import Result, run
from perfmodel.spec.paper import Paper

_FEW = 8
"""Papers that another process must have to be worth its start."""


def run_several(papers: Sequence[Paper], processes: int | None = None) -> list[list[Result]]:
    """Results of each paper, in their order. processes: as many as there are processors, where not given.

    Papers share nothing, so they run side by side; processes are forked, with whatever calibration is in use, and where a
    system cannot fork there is one.
    """
    workers = min(processes or len(os.sched_getaffinity(0)), len(papers) // _FEW) if _can_fork() else 1
    if workers < 2:
        return [run(p) for p in papers]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(run, papers))


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods() and hasattr(os, "sched_getaffinity")
