"""Typed errors: one clear message each, with the place, the reason and a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or an empty string."""
    spelled = {name.casefold(): name for name in known if name}
    near = difflib.get_close_matches(word.casefold(), spelled, n=1, cutoff=0.6)
    return f" (did you mean {spelled[near[0]]!r}?)" if near else ""


class PerfmodelError(Exception):
    """Base of every error a user can cause. `exit_code` is what the CLI returns."""

    exit_code = 2


class UnitError(PerfmodelError, ValueError):
    """A quantity that cannot be read, or one of the wrong kind."""


class SpecError(PerfmodelError):
    """A file or an option says something that cannot be meant. Carries file, line and path where known."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None, path: str = "") -> None:
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        where = f"{path}: " if path else ""
        super().__init__(f"{place}{where}{message}")
        self.file, self.line, self.path = file, line, path


class UnknownName(SpecError):
    """A catalogue name nobody has defined."""


class Infeasible(PerfmodelError):
    """A request physics or the fleet cannot meet: the binding reason and the nearest change that would."""

    exit_code = 3

    def __init__(self, reason: str, *, nearest: str | None = None, binding: tuple[str, ...] = ()) -> None:
        super().__init__(reason + (f"\nNearest feasible change: {nearest}" if nearest else ""))
        self.reason, self.nearest, self.binding = reason, nearest, binding
