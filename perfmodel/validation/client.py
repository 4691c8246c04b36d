"""What a benchmark's load generator does: the part of a serving row that its columns do not state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from perfmodel.errors import SpecError


@dataclass(frozen=True)
class Client:
    """Clients in a closed loop: all start at once, each sends its next request when its last one ends.

    Lengths are those of the row, no prefix is shared, and reported values are means over all requests, the start
    included: with fewer requests per client the burst at the start weighs more in TTFT, and TPOT falls.
    """

    requests_per_client: float = 10.0

    def __post_init__(self) -> None:
        if not self.requests_per_client >= 1:
            raise SpecError(f"requests per client must be at least 1, got {self.requests_per_client}")


_assumed = Client()


def assumed() -> Client:
    """The client that rows are predicted for."""
    return _assumed


@contextlib.contextmanager
def using(client: Client) -> Iterator[None]:
    """Predict rows for another client for a while: how sensitive are they to what was not stated?"""
    global _assumed
    before, _assumed = _assumed, client
    try:
        yield
    finally:
        _assumed = before
