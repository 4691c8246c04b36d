"""A batch that starts together and ends together: whole-batch prefill, decode steps, end-to-end time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from perfmodel.estimator import Estimator
from perfmodel.validation.kinds import instance
from perfmodel.validation.kinds.base import Kind, Outcome, batched, column, rates, times
from perfmodel.validation.kinds.instance import Instance
from perfmodel.validation.kinds.spread import spread
from perfmodel.validation.rows import Refused, Row

_TIMES = ("ttft", "tpot", "itl_derived", "e2e_latency", "latency")
_RATES = ("throughput", "output_throughput")


def _key(row: Row) -> Hashable:
    if row.text("metric") not in _TIMES + _RATES:
        raise Refused(f"no law for {row.text('metric')} of a static batch")
    return instance.of_row(row)


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, Instance)
    e = instance.estimator(key)
    batch, prompt = column(rows, "batch"), column(rows, "input_len")
    output = np.array([r.number("output_len", 1) for r in rows])
    law = e.machine.law
    first = law["request_latency"] + law["request_token_latency"] * prompt + prefill(e, batch, prompt)
    step = np.asarray(e.decode(batch, prompt + (output + 1) / 2))
    whole = first + np.maximum(output - 1, 0) * step
    sigma = {kind: np.asarray(spread(key, rows, kind)) for kind in ("static", "tpot")}
    found: list[Outcome] = [Refused("not reached")] * len(rows)
    kinds: dict[str, Callable[[Row], bool]] = {
        "ttft": lambda r: r.text("metric") == "ttft",
        "tpot": lambda r: r.text("metric") in ("tpot", "itl_derived"),
        "e2e": lambda r: r.text("metric") in ("e2e_latency", "latency"),
        "rate": lambda r: r.text("metric") in _RATES,
    }
    seconds = {"ttft": first, "tpot": step, "e2e": whole, "rate": whole}
    for name, wanted in kinds.items():
        places = [i for i, r in enumerate(rows) if wanted(r)]
        mine = [rows[i] for i in places]
        if name == "rate":
            tokens = [batch[i] * counted(rows[i]) for i in places]
            outcomes = rates(mine, tokens, whole[places], sigma["static"])
        else:
            outcomes = times(mine, seconds[name][places], sigma["tpot" if name == "tpot" else "static"])
        for i, outcome in zip(places, outcomes, strict=True):
            found[i] = outcome
    return found


def counted(row: Row) -> float:
    """Tokens of one request that a throughput counts: plain `throughput` means input + output unless a note says not."""
    output = row.number("output_len")
    note = row.text("note").lower()
    only_output = row.text("metric") == "output_throughput" or ("output" in note and "input" not in note)
    return output if only_output else output + row.number("input_len")


def prefill(e: Estimator, batch: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Seconds until every sequence of a batch has its first token: passes of as many whole prompts as a step takes."""
    together = np.clip(np.floor(e.engine.chunk_tokens / prompt), 1, batch)
    passes = np.floor(batch / together)
    rest = batch - passes * together
    seconds = passes * np.asarray(e.prefill(together, prompt))
    return seconds + np.where(rest > 0, np.asarray(e.prefill(np.maximum(rest, 1), prompt)), 0.0)


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


STATIC = Kind(
    "static batch",
    lambda r: r.text("phase") in ("prefill", "decode", "e2e") and bool(r.text("model")),
    _predict,
    # The engine of 2023 was measured with one model only, so degrees are held out with it.
    lambda r: (r.text("model"), r.text("tp")),
    ("engine.vllm-2023.host_base", "engine.vllm-2023.host_per_sequence", "engine.vllm-2023.eager_issue"),
    rows_to_fit=150,
)
