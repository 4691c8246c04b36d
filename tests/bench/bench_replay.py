"""How fast replay is, in requests per CPU-second after building the tables. Printed, not asserted.

Run: python -m pytest -s tests/bench/bench_replay.py
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock, kv_tokens
from perfmodel.serving.goodput import highest_rate
from perfmodel.serving.queueing import Instance, Mix
from perfmodel.serving.replay import Affinity, Fleet, Handoff, Pool, Settings
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Columns, Trace

TRACES = Path(__file__).parents[2] / "examples" / "traces"


def azure():
    columns = Columns(input="input_len", output="output_len")
    return read_trace(Trace(file="azure-conv-2023.csv.gz", columns=columns), TRACES)


def at_rate(requests, rate):
    return requests.at(requests.arrival * (len(requests) / requests.arrival[-1] / rate))


def report(name, fleet, requests):
    times = []
    for _ in range(3):
        start = time.process_time()
        outcome = fleet.run(requests)
        times.append(time.process_time() - start)
    use = outcome.usage
    print(
        f"{name:>34}: {len(requests) / min(times):8,.0f} requests per CPU-second; prefilling "
        f"{np.mean(use.prefilling / use.span):4.0%} of the time, KV {use.kv_mean.mean():4.0%}, hits {outcome.hit_rate:4.0%}"
    )


def instance(model, tp, requests):
    e = Estimator(model, "h100-sxm", tp=tp)
    mix = Mix(requests.input, requests.output, np.full(len(requests), 1 / len(requests)))
    clock = StepClock(e, mix.context)
    held = kv_tokens(e, mix.context)
    return clock, held, highest_rate(Instance(clock, "colocated", held), mix)


def test_one_instance_on_the_azure_conversations():
    requests = azure()
    print()
    for model, tp in (("llama-3.1-8b", 1), ("llama-3.1-70b", 4)):
        clock, held, most = instance(model, tp, requests)
        for share in (0.3, 0.7, 0.9):
            report(f"{model} at {share:.0%} of its rate", Fleet((Pool(clock, held),)), at_rate(requests, share * most))


def test_fleets():
    requests = azure()
    clock, held, most = instance("llama-3.1-8b", 1, requests)
    print()
    for routing in ("round-robin", "least-loaded"):
        for replicas in (10, 100):
            fleet = Fleet((Pool(clock, held, replicas),), routing)
            report(f"{replicas} instances, {routing}", fleet, at_rate(requests, 0.7 * most * replicas))
    apart = Fleet((Pool(clock, held, 10, "prefill", handoff=Handoff(3e-6, 1e-4, layers=32)), Pool(clock, held, 5, "decode")))
    report("10 prefill, 5 decode", apart, at_rate(requests, 7 * most))


def test_prefix_cache_on_mooncakes_conversations():
    requests = read_trace(Trace(file="mooncake-conversation.csv.gz"), TRACES)
    clock, held, _ = instance("llama-3.1-8b", 1, requests)
    print()
    for caching in (False, True):
        pool = Pool(clock, held, 8, settings=Settings(prefix_caching=caching))
        report(f"prefix cache {'on' if caching else 'off'}", Fleet((pool,), "prefix-affine", Affinity()), requests)
