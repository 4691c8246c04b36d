"""The kinds of serving rows, in the order in which they claim: concurrency, offline, static batch."""

from __future__ import annotations

from perfmodel.validation.kinds.closed_loop import CLOSED_LOOP
from perfmodel.validation.kinds.offline import OFFLINE
from perfmodel.validation.kinds.static import STATIC

__all__ = ["CLOSED_LOOP", "OFFLINE", "STATIC"]
