"""Print the tables of docs/modes.md: python docs/modes.py"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np

from perfmodel import graph
from perfmodel.estimator import Estimator
from perfmodel.serving.handoff import handoff
from perfmodel.serving.layered import expert_bytes, layer_groups, layered_program
from perfmodel.serving.modes import policy_clock, stall

PROMPT, BATCH, CONTEXT, CHUNK = 8192.0, 16, 4000.0, 512
MODELS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("qwen3-30b-a3b", "h100-sxm", {}),
    ("deepseek-v3", "h200-sxm", {"tp": 8, "ep": 8}),
    ("gpt-oss-120b", "h100-sxm", {"tp": 2}),
    ("mixtral-8x7b", "h100-sxm", {"tp": 2}),
    ("llama-3.1-8b", "h100-sxm", {}),
)


def policies() -> Iterator[str]:
    """A prompt beside a decode batch: TTFT, longest step, expert bytes per prompt token and device."""
    yield "| model, device | policy | TTFT [ms] | longest gap [ms] | expert MB per prompt token |"
    yield "|---|---|---:|---:|---:|"
    for model, hardware, options in MODELS:
        e = Estimator(model, hardware, **options)  # type: ignore[arg-type]
        room = CHUNK - BATCH
        steps = math.ceil(PROMPT / room)
        chunks = [graph.mixed(BATCH, CONTEXT - 1, min(room, PROMPT - i * room), i * room) for i in range(steps)]
        read = {
            "chunked": sum(expert_bytes(e.lower(c)) for c in chunks),
            "layered": sum(
                expert_bytes(layered_program(e, BATCH, CONTEXT, PROMPT, g)) for g in layer_groups(e.model.n_layers, steps)
            ),
            "whole": expert_bytes(e.lower(graph.prefill(1, PROMPT))),
        }
        for policy, total in read.items():
            clock = policy_clock(e, CONTEXT, policy, chunk=0 if policy == "whole" else CHUNK, longest=PROMPT)
            prompt, context = np.array([PROMPT]), BATCH * CONTEXT
            step = clock.decode(BATCH, context)
            first = clock.prefill_work(prompt, BATCH, context)[0] + (0 if policy == "whole" else steps * step)
            gap = step + stall(clock, prompt, BATCH, context)[0]
            place = f"{model}, {e.par.devices} x {hardware}"
            yield f"| {place} | {policy} | {first * 1e3:,.0f} | {gap * 1e3:,.1f} | {total / PROMPT / 1e6:,.1f} |"


def handoffs() -> Iterator[str]:
    """Hand-off of prompts of 8,000 tokens between pools of H100 nodes."""
    yield "\n| prefill -> decode | tokens of a message | message | busiest link [ms] | exposed [ms] | after prefill [ms] |"
    yield "|---|---:|---:|---:|---:|---:|"
    tokens = np.array([8000.0])
    for p, d, block in ((8, 8, 16), (8, 8, 128), (8, 4, 16), (4, 8, 16), (4, 4, 16)):
        a, b = (Estimator("llama-3.1-70b", "h100-sxm", tp=tp) for tp in (p, d))
        seconds = np.asarray(a.prefill(1, tokens))
        one, after = (handoff(a, b, tokens, seconds, block_tokens=block, overlapped=x) for x in (True, False))
        yield (
            f"| tp {p} -> tp {d} | {block} | {one.message_bytes / 1024:,.0f} KiB | {one.link_s[0] * 1e3:,.1f} "
            f"| {one.exposed_s[0] * 1e3:,.1f} | {after.exposed_s[0] * 1e3:,.1f} |"
        )


if __name__ == "__main__":
    sys.stdout.write("\n".join([*policies(), *handoffs()]) + "\n")
