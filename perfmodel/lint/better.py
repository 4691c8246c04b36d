"""The same command without what was found wrong: every finding says what it would change."""

from __future__ import annotations

from collections.abc import Iterable

from perfmodel.engines.command import Command, Given
from perfmodel.engines.flags import deciding, find
from perfmodel.lint.finding import Finding

_ROOM = ("memory_fraction", "tp", "quantization", "cache_bytes", "kv_dtype")
_FOLLOWS = ("context", "total_context", "sequences")


def better(command: Command, findings: Iterable[Finding]) -> Command:
    """The command with the changes of its errors and warnings made; itself where there is nothing to change."""
    given = list(command.given)
    done: set[str] = set()
    changes = [change for f in findings if f.severity != "info" for change in f.fix]
    # More room first: what follows from too little is looked at again when that has changed.
    room = any(name in _ROOM for name, _ in changes)
    for name, value in changes:
        if name not in done and not (room and name in _FOLLOWS):
            done.add(name)
            given = _changed(command, given, name, value)
    # The last of repeated options counts: keep only that.
    last = {g.name: i for i, g in enumerate(given) if g.option is not None}
    given = [g for i, g in enumerate(given) if g.option is None or last[g.name] == i]
    return Command(
        command.spec, command.start, tuple(given), command.loose[:1] if command.spec.positional else (),
        command.environment, command.launcher, command.files,
    )  # fmt: skip


def _changed(command: Command, given: list[Given], name: str, value: str | None) -> list[Given]:
    if name.startswith("-"):
        if value is None:
            return [g for g in given if g.word != name]
        # A misspelt switch takes no value, whatever word followed it.
        option = find(command.spec, value)
        bare = option is not None and option.flag.kind == "bool"
        return [Given(value, None if bare else g.value, option) if g.word == name else g for g in given]
    places = [i for i, g in enumerate(given) if g.option is not None and not g.key and g.option.flag.sets == name]
    if value is None:
        return [g for i, g in enumerate(given) if i not in places]
    if places:
        i = places[-1]
        return [*given[:i], Given(given[i].word, value or None, given[i].option), *given[i + 1 :]]
    found = deciding(command.spec, name)
    if found is None or any(g.option and g.option.flag.kind == "json" and name == "draft_tokens" for g in given):
        return given  # inside a JSON value: the finding says what to write
    word, _ = found
    return [*given, Given(word, value or None, find(command.spec, word))]
