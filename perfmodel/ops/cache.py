"""Cached keys and values as segments: what is stored, what a step reads, how wide, and where.

A cache is a few `Run`s (shares of the KV heads; keys and values together or apart), each an ordered list of segments
from the oldest tokens to the newest. Techniques narrow, drop, move or thin out segments; memory adds up what is stored,
attention what is read. With nothing edited there is one run of one segment.

Hand test: 4096 tokens, eviction to 512, 2 bits with a 16-bit tail of 128: 384 x 0.25 + 128 x 2 = 352 bytes per element
column, in either order of the two edits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from perfmodel.symbols import Num, maximum, minimum

Columns = Literal["kv", "k", "v"]
DEVICE = "hbm"


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence and layer that are stored, read and placed alike."""

    tokens: Num
    """Stored tokens."""
    width: Num
    """Bytes per stored element, scales included."""
    elements: Num = 1.0
    """Stored elements over those of the attention's own keys and values (low rank, shared or merged heads)."""
    read: Num = 1.0
    """Share of the stored tokens that one decode step reads."""
    tier: str = DEVICE
    near: Num = 0.0
    """Share of what is read from a farther tier that a copy on the device serves."""
    held: Num = 0.0
    """Share of the stored tokens that the device has room for as well: copies of hot ones, buffers to fetch into."""
    wire: Num = 1.0
    """Bytes on the way from a farther tier over stored bytes."""
    amplified: Num = 1.0
    """Bytes that attention elsewhere reads over the bytes it wants (pages, scattered rows)."""
    page: Num = 0.0
    """Bytes of one contiguous piece fetched from a farther tier; 0: the layer at once."""
    ahead: bool = True
    """Fetched while the layer before computes; else the step waits."""
    on: str = ""
    """Where attention over it runs; empty: on the device."""
    aside: bool = False
    """Attention elsewhere runs beside the device's work on other requests, not between two of its kernels."""
    unpack: Num = 0.0
    """Vector operations per read element before it can be multiplied."""
    copied: Num = 0.0
    """Bytes per read element that pass device memory once more, as a copy that attention reads."""
    lag: Num = 0.0
    """Bytes per read element that could have streamed in the time by which that copy is slower than a stream."""
    rebuild: Num = 0.0
    """Matrix FLOPs per read token and layer that restore keys or values (all KV heads of the device)."""
    owned: bool = True
    """False: another layer's cache is read; nothing is stored here."""
    sharers: Num = 1.0
    """Sequences that share one stored copy (no more than there are)."""
    together: bool = False
    """A decode step reads the shared copy once for all sharers; else each of them reads it."""
    piece: Num = 0.0
    """Tokens of a copy read together that one work item attends, leaving its partial output in memory; 0: as kernels split."""


@dataclass(frozen=True, slots=True)
class Run:
    """Segments, oldest first, of some of the KV heads."""

    segments: tuple[Segment, ...]
    heads: Num = 1.0
    """Share of the device's KV heads (of the fullest device)."""
    columns: Columns = "kv"
    scored: Num = 1.0
    """Share of a prefill's query-key pairs, dropped tokens left out, that are computed for these heads."""
    work: Num = 1.0
    """Matrix FLOPs per query-key pair over those of the model's own dimensions (absorbed ranks, merged heads)."""


@dataclass(frozen=True, slots=True)
class Scan:
    """Metadata that is stored per cached token and read to choose what attention reads."""

    name: str
    elements: Num
    """Per stored token, over the elements of the attention's own keys and values."""
    width: Num
    flops: Num = 2.0
    """Operations per element read and query."""
    matrix: bool = False
    """They run on the matrix units; else on the vector units."""
    scanned: Num = 1.0
    """Share of the stored metadata that one selection reads."""
    active: Num = 1.0
    """1 where a choice is made, 0 where everything is read anyway."""
    every: Num = 1.0
    """Decode steps that share one selection."""
    heads: Num = 1.0
    tier: str = DEVICE
    launches: Num = 2.0
    pick: Num = 1.0
    """Scores written and compared per element column (the top-k pass), over stored tokens."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of one layer and sequence."""

    runs: tuple[Run, ...]
    scans: tuple[Scan, ...] = ()
    total: Num = 0.0
    """Tokens of the sequence, dropped ones included."""

    @classmethod
    def whole(cls, tokens: Num, width: Num, *, owned: bool = True) -> Cache:
        """Everything at one width on the device."""
        return cls((Run((Segment(tokens, width, owned=owned),)),), total=tokens)

    @property
    def longest(self) -> Num:
        """Stored tokens of the run that keeps most."""
        most: Num = 0.0
        for run in self.runs:
            most = maximum(most, stored_tokens(run))
        return most

    def each(self, edit: Callable[[Run], Run]) -> Cache:
        """Every run edited."""
        return replace(self, runs=tuple(edit(r) for r in self.runs))

    def apart(self) -> Cache:
        """Keys and values in runs of their own."""
        runs: list[Run] = []
        for r in self.runs:
            runs += [replace(r, columns="k"), replace(r, columns="v")] if r.columns == "kv" else [r]
        return replace(self, runs=tuple(runs))

    def only(self, wanted: Callable[[Segment], bool]) -> Cache:
        """The segments that `wanted` accepts."""
        return self.each(lambda run: replace(run, segments=tuple(s for s in run.segments if wanted(s))))

    def divided(self, share: Num) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The runs of `share` of the heads, and those of the others."""
        first = tuple(replace(r, heads=r.heads * share) for r in self.runs)
        rest = tuple(replace(r, heads=r.heads * (1 - share)) for r in self.runs)
        return first, rest

    def with_scan(self, scan: Scan) -> Cache:
        return replace(self, scans=(*self.scans, scan))


def columns_share(columns: Columns) -> float:
    """Share of a token's cached elements that a run holds."""
    return 1.0 if columns == "kv" else 0.5


def split_newest(segments: tuple[Segment, ...], newest: Num) -> tuple[list[Segment], list[Segment]]:
    """Segments of all but the `newest` tokens, and of those."""
    old: list[Segment] = []
    recent: list[Segment] = []
    left = newest
    for s in reversed(segments):
        taken = minimum(s.tokens, left)
        recent.insert(0, replace(s, tokens=taken))
        old.insert(0, replace(s, tokens=s.tokens - taken))
        left = maximum(left - s.tokens, 0)
    return _filled(old), _filled(recent)


def split_oldest(segments: tuple[Segment, ...], oldest: Num) -> tuple[list[Segment], list[Segment]]:
    """Segments of the `oldest` tokens, and of all others."""
    recent, old = split_newest(segments[::-1], oldest)
    return old[::-1], recent[::-1]


def _filled(segments: list[Segment]) -> list[Segment]:
    """Without segments that are empty by plain arithmetic."""
    return [s for s in segments if not (isinstance(s.tokens, (int, float)) and s.tokens <= 0)]


def stored_tokens(run: Run) -> Num:
    return sum((s.tokens for s in run.segments), start=0.0)


def budgeted(run: Run, budget: Num, sinks: Num = 0.0) -> Run:
    """At most `budget` tokens: the first `sinks` and the newest of the others stay."""
    kept, others = split_oldest(run.segments, sinks) if not _zero(sinks) else ([], list(run.segments))
    _, newest = split_newest(tuple(others), maximum(budget - sinks, 0))
    return replace(run, segments=(*kept, *newest))


def _zero(x: Num) -> bool:
    return isinstance(x, (int, float)) and x == 0
