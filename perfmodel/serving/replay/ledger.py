"""What instances write down while they run: one place per request, and the gaps between tokens."""

from __future__ import annotations

import math
from bisect import bisect_right


class Ledger:
    """Times of every request of a replay, as lists that a simulation fills fast."""

    def __init__(self, arrival: list[float]) -> None:
        n = len(arrival)
        self.arrival = arrival
        """When each request reached its engine."""
        self.first = [math.nan] * n
        self.finish = [math.nan] * n
        self.longest = [0.0] * n
        self.preempted = [0] * n
        self.cached = [0] * n
        self.rejected = [False] * n
        self.instance = [-1] * n
        self.decoder = [-1] * n
        self.encoded = [math.nan] * n
        """When the embeddings of a request's images reached the instance that prefills it."""
        self.encoder = [-1] * n
        self.watched = False
        """Whether anything follows from a request's end, so that instances must report it."""
        self.at: list[float] = []
        self.gap_first: list[float] = []
        self.gap_last: list[float] = []
        self.gap_tokens: list[int] = []

    def gap(self, at: float, first: float, last: float, tokens: int) -> None:
        """`tokens` tokens came after gaps that grow evenly from first to last [s]; the last of them at `at`."""
        self.at.append(at)
        self.gap_first.append(first)
        self.gap_last.append(last)
        self.gap_tokens.append(tokens)


class GapTrace:
    """Gaps between the tokens of one instance's decoding sequences, and the longest since any moment.

    Gaps are numbered by a counter; a sequence remembers the counter when it begins to decode. Only gaps that no later
    one exceeds are kept, so the longest since then is the first kept one with a higher number.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.counter = 0
        self._numbers: list[int] = []
        self._gaps: list[float] = []
        self._pauses: list[tuple[int, int, float]] = []  # (counter, sequences that wait, seconds)

    def pause(self, waiting: int, seconds: float) -> None:
        """A step without decoding: `waiting` sequences get no token. Sequences that join after it did not wait."""
        self.counter += 1
        if waiting:
            self._pauses.append((self.counter, waiting, seconds))

    def steps(self, end: float, k: int, first: float, grow: float, extra: float, sequences: int, late: list[float]) -> None:
        """k decode steps of so many sequences: first + extra, first + grow, first + 2 grow ... seconds, the last ends at `end`.

        late: when those sequences got their last token that did not get it when the running steps began.
        """
        ledger = self.ledger
        last = first + grow * (k - 1)
        if late or self._pauses or extra:
            self._first_step(end - k * first - grow * (k * (k - 1) / 2) + first, first + extra, sequences, late)
            if k > 1:
                ledger.gap(end, first + grow, last, sequences * (k - 1))
        else:
            ledger.gap(end, first, last, sequences * k)
        self.counter += 1
        self._keep(self.counter, last)

    def _first_step(self, at: float, first: float, sequences: int, late: list[float]) -> None:
        """A step that ends at `at`, for sequences that have waited for different times."""
        ledger = self.ledger
        paused = sum(seconds for _, _, seconds in self._pauses)
        before = 0
        for counter, waiting, seconds in self._pauses:
            ledger.gap(at, paused + first, paused + first, waiting - before)
            self._keep(counter, paused + first)
            before = waiting
            paused -= seconds
        self._pauses = []
        ledger.gap(at, first, first, sequences - before - len(late))
        for last in late:
            ledger.gap(at, at - last, at - last, 1)
        self.counter += 1
        self._keep(self.counter, first)

    def _keep(self, number: int, gap: float) -> None:
        numbers, gaps = self._numbers, self._gaps
        while gaps and gaps[-1] <= gap:
            gaps.pop()
            numbers.pop()
        numbers.append(number)
        gaps.append(gap)

    def longest_since(self, counter: int) -> float:
        """Longest gap since the counter stood there [s]; 0 without any."""
        place = bisect_right(self._numbers, counter)
        return self._gaps[place] if place < len(self._gaps) else 0.0
