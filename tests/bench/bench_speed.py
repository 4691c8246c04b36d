"""How fast the estimator, the replay, the planner and the command line are. Printed, not asserted."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from perfmodel.estimator import Estimator
from perfmodel.planner.run import plan
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix
from perfmodel.serving.replay import simulate
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Columns, Trace

ROOT = Path(__file__).parents[2]


def _timed(run, repeats=3):
    """(result, seconds of the fastest run)."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return result, best


def test_evaluations_per_second():
    print()
    rng = np.random.default_rng(0)
    n = 1_000_000
    batch, context = rng.integers(1, 257, n).astype(float), rng.integers(2, 32_768, n).astype(float)
    for model, tp in (("llama-3.1-70b", 8), ("gpt-oss-120b", 4), ("deepseek-r1", 8)):
        e = Estimator(model, "h200-sxm", tp=tp)
        _, seconds = _timed(lambda e=e: e.decode(batch, context), 2)
        _, one = _timed(lambda e=e: [e.decode(16, 1000) for _ in range(20)])
        print(f"{model:>16}: decode {n / seconds:12,.0f} configurations/s; one scalar decode {one / 20 * 1e6:8,.0f} us")
    e = Estimator("llama-3.1-70b", "h200-sxm", tp=8)
    new = rng.integers(1, 8193, n).astype(float)
    _, seconds = _timed(lambda: e.prefill(1, new), 1)
    print(f"{'llama-3.1-70b':>16}: prefill {n / seconds:11,.0f} configurations/s")


def test_replay_requests_per_second():
    trace = Trace(file="examples/traces/azure-conv-2023.csv.gz", columns=Columns(input="input_len", output="output_len"))
    azure = read_trace(trace, ROOT)
    clock, build = _timed(lambda: StepClock(Estimator("llama-3.1-70b", "h100-sxm", tp=4), 1200), 1)
    mix = Mix(azure.input[:400], azure.output[:400], np.full(400, 1 / 400))
    instance = Instance(clock, "colocated", 8e5)
    rate = next(r for r in np.arange(0.25, 50, 0.25) if instance.state(r, mix).utilisation > 0.55)
    arrival = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(azure)))
    _, seconds = _timed(lambda: simulate(clock, 8e5, Requests(arrival, azure.input, azure.output)), 2)
    print(f"\nreplay: {len(azure) / seconds:,.0f} requests/s at {rate:.2f} requests/s offered, tables {build * 1e3:.0f} ms")


def test_demo_plan():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, seconds = _timed(lambda: plan(ROOT / "examples" / "azure-chat-70b.yaml"), 1)
    solver = sum(p.solution.seconds for p in run.plans)
    print(f"\ndemo plan, both loads: {seconds:.1f} s, of which the deciding integer programs {solver:.1f} s")


def test_cold_starts():
    print()
    for words in (["--help"], ["estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--batch", "16", "--isl", "1024", "--osl", "256"]):
        command = [sys.executable, "-m", "perfmodel", *words]
        _, seconds = _timed(lambda c=command: subprocess.run(c, cwd=ROOT, capture_output=True, check=True))
        print(f"perfmodel {words[0]}: {seconds:.2f} s")
