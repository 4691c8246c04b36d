"""What a command decides, in the words all engines share, with the option that decided each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfmodel.engines.command import Command, Given
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.engine_flags import EngineFlags, Flag

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""vLLM's whole numbers with a letter: lower case decimal, upper case binary."""


@dataclass(frozen=True)
class Problem:
    """An option that cannot be read: its word, and why."""

    word: str
    why: str


@dataclass
class Settings:
    """Values by shared name; `word` tells how the option was spelled."""

    values: dict[str, Any] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a setting, or what holds when nobody set it."""
        return self.values.get(name, default)

    def put(self, name: str, value: Any, word: str) -> None:
        self.values[name], self.words[name] = value, word

    def word(self, name: str) -> str | None:
        """How the option that decided a setting was spelled."""
        return self.words.get(name)


def settings(command: Command) -> Settings:
    """Settings of a command; TensorRT-LLM's options file is read where it can be found, and speaks last."""
    found = Settings()
    spec = command.spec
    if spec.positional and command.loose:
        found.put(spec.positional, command.loose[0], command.loose[0])
    for given in command.given:
        for name, flag, value in _decided(spec, given, found):
            if flag.sets:
                on = value if not flag.negate else not value
                found.put(flag.sets, on, given.word if not name else f"{given.word} {name}")
    path = found.get("options_file")
    if path is not None:
        _read_options(spec, command, str(path), found)
    return found


def _decided(spec: EngineFlags, given: Given, found: Settings) -> Iterator[tuple[str, Flag, Any]]:
    """(nested key, option, value) of one option; nothing and a problem where its value cannot be read."""
    if given.option is None:
        return
    flag = given.option.flag
    if given.key:
        nested = spec.options.get(given.name)
        if nested is not None:
            yield from _value(nested, given.value, True, given, found, given.key)
        return
    for _, _, value in _value(flag, given.value, given.option.on, given, found, ""):
        yield "", flag, value
        if flag.kind == "json" and isinstance(value, dict):
            yield from nested_options(spec, given.option.name, value, found, given.word)


def _value(
    flag: Flag, text: str | None, on: bool, given: Given, found: Settings, key: str
) -> Iterator[tuple[str, Flag, Any]]:
    try:
        yield key, flag, cast(flag, text, on)
    except ValueError as error:
        found.problems.append(Problem(given.word if not key else f"{given.word} ({key})", str(error)))


def nested_options(
    spec: EngineFlags, base: str, data: dict[str, Any], found: Settings, word: str
) -> Iterator[tuple[str, Flag, Any]]:
    """Keys of a JSON value or an options file that are documented; a key nobody knows is a problem."""
    prefix = f"{base}." if base else ""
    known = [k[len(prefix) :] for k in spec.options if k.startswith(prefix)]
    for key, value in data.items():
        flag = spec.options.get(prefix + str(key))
        if flag is None:
            if known and base not in spec.partial:
                found.problems.append(Problem(word, f"unknown key {key!r} of it{did_you_mean(str(key), known)}"))
            continue
        if isinstance(value, dict):
            yield str(key), flag, value
            yield from nested_options(spec, prefix + str(key), value, found, word)
        else:
            yield str(key), flag, value


def cast(flag: Flag, text: str | None, on: bool = True) -> Any:
    """A word as its option reads it. Raises ValueError saying what was expected.

    >>> cast(Flag(kind="int"), "8k"), cast(Flag(kind="bool"), None, on=False)
    (8000, False)
    """
    if flag.kind == "bool":
        if text is not None and text.lower() not in ("true", "false"):
            raise ValueError(f"is a switch and takes no value, got {text!r}")
        return on if text is None else text.lower() == "true"
    if text is None:
        if flag.kind == "optional" or flag.default is True:
            return True
        raise ValueError("its value is missing")
    if flag.kind == "int":
        value = _whole(text)
        if flag.choices and str(value) not in flag.choices:
            raise ValueError(f"{value} is none of {', '.join(flag.choices)}")
        return value
    if flag.kind == "float":
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"expects a number, got {text!r}") from None
    if flag.choices and flag.kind in ("choice", "optional") and text not in flag.choices:
        listed = ", ".join(flag.choices) if len(flag.choices) <= 12 else f"{len(flag.choices)} documented values"
        raise ValueError(f"{text!r} is none of {listed}{did_you_mean(text, flag.choices)}")
    if flag.kind == "json":
        if not text.lstrip().startswith(("{", "[")):
            return text
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    return text


def _whole(text: str) -> int | str:
    if text == "auto":
        return text
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if match is None:
        raise ValueError(f"expects a whole number, got {text!r}")
    value = float(match.group(1)) * _UNITS.get(match.group(2), 1)
    if value != int(value):
        raise ValueError(f"expects a whole number, got {text!r}")
    return int(value)


def _read_options(spec: EngineFlags, command: Command, path: str, found: Settings) -> None:
    text = command.files.get(path) or command.files.get(path.rsplit("/", 1)[-1])
    if text is None and not Path(path).is_file():
        found.put("options_missing", path, path)
        return
    document = yaml.parse(text, path) if text is not None else yaml.read(path)
    if not isinstance(document.data, dict):
        raise SpecError("expected a mapping of options to values", file=path, line=1)
    for _, flag, value in nested_options(spec, "", document.data, found, path):
        if flag.sets:
            found.put(flag.sets, value if not flag.negate else not value, path)
