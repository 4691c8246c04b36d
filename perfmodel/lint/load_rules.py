"""The command against a workload: lengths it takes, and a rate it carries."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.lint.finding import Finding
from perfmodel.lint.server import Server
from perfmodel.serving import frontend


def check(s: Server, lengths: tuple[int, int], rate: float | None) -> Iterator[Finding]:
    """Findings about requests of `lengths` (prompt, output) tokens at `rate` requests/s."""
    prompt, output = lengths
    if prompt + output > s.context:
        message = f"requests of {prompt + output:,} tokens exceed the longest sequence of {s.context:,}"
        name = "total_context" if s.name == "llama.cpp" else "context"
        fix = ((name, str(prompt + output)),)
        yield Finding("error", "workload-too-long", message, s.settings.word(name), float(prompt + output - s.context), fix)
        return
    if rate is None:
        return
    held = max(min(s.concurrency(prompt + output), s.sequences * s.ranks) / s.replicas, 1.0)
    step = float(s.estimator.decode(held, prompt + output / 2))
    each = float(s.estimator.prefill(1, prompt)) + output * step / held
    highest = s.replicas / each
    if rate > highest:
        message = f"{rate:g} requests/s exceed the {highest:.2f} this command carries ({held:.0f} sequences at a time)"
        yield Finding("error", "rate-beyond-capacity", message, number=rate - highest)
    if s.engine.frontend is None:
        return
    processes = s.number("api_processes", 0) or None
    most = frontend.rate_bound(s.engine, prompt, output, processes=processes)
    if rate > most:
        enough = frontend.processes_for(s.engine, rate, prompt, output)
        message = f"{rate:g} requests/s exceed the {most:.0f} the API processes carry; {enough} would"
        yield Finding("warning", "front-end-beyond-capacity", message, number=rate - most)
