"""Words of a command against the engine's documented options: unknown, gone, of another engine, repeated, contradicting."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.engines.command import Command, Given
from perfmodel.engines.flags import gone, known_elsewhere, nearest, suggestion
from perfmodel.engines.settings import Settings
from perfmodel.lint.finding import Finding


def check(command: Command, found: Settings, version: str = "") -> Iterator[Finding]:
    """Everything that can be said without a model or hardware."""
    for given in command.given:
        yield from _one(command, given, version)
    yield from _repeated(command)
    for problem in found.problems:
        code = "unknown-key" if problem.why.startswith("unknown key") else "bad-value"
        yield Finding("error", code, f"{problem.word}: {problem.why}", problem.word)
    extra = command.loose[1:] if command.spec.positional else command.loose
    for word in extra:
        yield Finding("error", "stray-word", f"{word!r} belongs to no option of {command.spec.title}", word)
    if found.get("model") is None:
        yield Finding("error", "no-model", "the command names no model")
    if found.get("options_missing"):
        path = found.get("options_missing")
        yield Finding("info", "options-not-read", f"{path} is not here: what it sets is not checked", str(path))


def _one(command: Command, given: Given, version: str) -> Iterator[Finding]:
    spec, word = command.spec, given.word
    if given.option is None:
        others = known_elsewhere(spec, word)
        if others:
            message = f"{word} is an option of {', '.join(others)}; {spec.title} has none of that name"
            near = suggestion(spec, word)
            yield Finding("error", "other-engines-option", message + near, word, fix=((word, None),))
        else:
            message = f"{spec.title} {spec.version} has no option {word}{suggestion(spec, word)}"
            yield Finding("error", "unknown-option", message, word, fix=((word, nearest(spec, word)),))
        return
    flag = given.option.flag
    instead = f"; use {flag.instead}" if flag.instead else ""
    why = gone(spec, flag, version)
    if why:
        yield Finding("error", "gone-option", f"{word}: {why} of {spec.title}{instead}", word, fix=((word, None),))
    elif flag.deprecated:
        yield Finding("info", "deprecated-option", f"{word} is deprecated{instead}", word)


def _repeated(command: Command) -> Iterator[Finding]:
    seen: dict[str, Given] = {}
    for given in command.given:
        before = seen.get(given.name)
        seen[given.name] = given
        if before is None or given.option is None:
            continue
        if before.option is not None and before.option.on != given.option.on:
            message = f"{before.word} and {given.word} contradict each other; the last one counts"
            yield Finding("warning", "contradiction", message, given.word)
        elif given.value != before.value:
            message = f"{given.word} is given twice: {before.value} is overruled by {given.value}"
            yield Finding("warning", "repeated-option", message, given.word)
        else:
            yield Finding("info", "repeated-option", f"{given.word} is given twice with the same value", given.word)
