"""How many rows of counts a second: the formulas called with arrays, and the same compiled from expressions."""

from __future__ import annotations

import time

import numpy as np

from perfmodel import catalog, graph, vectorize
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.schedule import operators
from perfmodel.spec.formats import get_format

_CHUNK = 32_768


def _best(run, repeats=3):
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _direct(model, formats, par, batch, context):
    """Total FLOPs and bytes, chunk by chunk, from the formulas themselves."""
    out = np.empty((2, batch.size))
    for start in range(0, batch.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        flops, moved = 0.0, 0.0
        for op, times, _ in operators(
            graph.lower(model, graph.decode(batch[rows], context[rows]), par, formats).schedule
        ):
            flops = flops + times * sum(n for unit, n in op.flops.items() if unit not in ("vector", "exp"))
            moved = moved + times * op.bytes()
        out[:, rows] = flops, moved
    return out


def test_direct_against_compiled_counts_of_llama_70b_decode():
    model, par, bf16 = catalog.load_model("llama-3.1-70b"), Parallelism(tp=4), get_format("bf16")
    formats = Formats(bf16, bf16, bf16, bf16)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    counts = vectorize.expressions(vectorize.symbolic_program(model, "decode", formats, ("tp",)))
    totals = vectorize.totals(counts)
    total = vectorize.compile((totals["flops"], totals["bytes"]))
    every = vectorize.compile(c.expr for c in counts)
    print(f"\nbuilding and compiling the expressions: {time.perf_counter() - start:.2f} s")
    for rows in (1, 1_000, _CHUNK, 1_000_000):
        b, c = rng.integers(1, 256, rows).astype(float), rng.integers(1, 100_000, rows).astype(float)
        values = vectorize.inputs(model, formats, par) | {"B": b, "C": c}
        np.testing.assert_allclose(total(values), _direct(model, formats, par, b, c), rtol=1e-12)
        direct = _best(lambda b=b, c=c: _direct(model, formats, par, b, c))
        compiled = _best(lambda v=values: total(v))
        each = _best(lambda v=values: every(v), 1)
        print(
            f"{rows:>9,} rows: direct {rows / direct:12,.0f}/s, compiled totals {rows / compiled:12,.0f}/s "
            f"({direct / compiled:.1f}x), compiled counts of every operator {rows / each:12,.0f}/s ({direct / each:.1f}x)"
        )
