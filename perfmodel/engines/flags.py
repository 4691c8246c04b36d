"""Look options up as an engine's own parser would: aliases, abbreviations, switches and their opposites, versions."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.spec import yaml
from perfmodel.spec.calibration import version_number
from perfmodel.spec.engine_flags import EngineFlags, Flag


class Option(NamedTuple):
    """An option by its documented name; `on` is False where it was spelled as its opposite."""

    name: str
    flag: Flag
    on: bool = True


@lru_cache(maxsize=1)
def _files() -> dict[str, EngineFlags]:
    folder = catalog.root("hardware") / "calibrations" / "engine_flags"
    specs = (yaml.validate(yaml.read(path), EngineFlags) for path in sorted(folder.glob("*.yaml")))
    return {spec.engine: spec for spec in specs}


def documented() -> list[str]:
    """Engines whose options are known."""
    return list(_files())


def flags(engine: str) -> EngineFlags:
    """Options of an engine by any of its spellings. Raises SpecError where nobody wrote them down."""
    key = calibration.known_engine(engine.partition("==")[0])
    if key not in _files():
        raise SpecError(
            f"the options of engine {engine!r} are not documented here{did_you_mean(engine, _files())}; "
            f"known: {', '.join(_files())}"
        )
    return _files()[key]


@lru_cache(maxsize=8)
def _spellings(engine: str) -> dict[str, Option]:
    """Every exact spelling, with its dashes."""
    spec = _files()[engine]
    table: dict[str, Option] = {}
    for name, flag in spec.flags.items():
        dashes = "--" if len(name) > 1 else "-"
        for word in (dashes + name, *flag.aliases):
            table[word] = Option(name, flag)
        for word in flag.negatives:
            table[word] = Option(name, flag, on=False)
        if spec.booleans == "paired" and flag.kind == "bool":
            table[f"--no-{name}"] = Option(name, flag, on=False)
    if spec.booleans == "paired":
        # Today `--disable-x` is the opposite of `--enable-x`, also where an option of that name went before.
        for name, flag in spec.flags.items():
            verb, _, rest = name.partition("-")
            word = {"enable": f"--disable-{rest}", "disable": f"--enable-{rest}"}.get(verb, "")
            if word and flag.kind == "bool" and not flag.until and (word not in table or table[word].flag.until):
                table[word] = Option(name, flag, on=False)
    return table


def find(spec: EngineFlags, word: str) -> Option | None:
    """The option a word of the command line names, or None."""
    table = _spellings(spec.engine)
    if word in table:
        return table[word]
    if word.startswith("--"):
        # vLLM reads both signs; TensorRT-LLM writes underscores only.
        stem = word[2:]
        if spec.underscores or spec.booleans == "paired":
            stem = stem.replace("-", "_") if spec.underscores else stem.replace("_", "-")
        if f"--{stem}" in table:
            return table[f"--{stem}"]
        if spec.abbreviations:
            longer = {(o.name, o.on): o for w, o in table.items() if w.startswith(f"--{stem}") and not gone(spec, o.flag)}
            return next(iter(longer.values())) if len(longer) == 1 else None
    return None


def gone(spec: EngineFlags, flag: Flag, version: str = "") -> str:
    """Why a version does not know an option; empty where it does. Without a version: the newest compared."""
    wanted = version_number(version) if version else None
    if wanted is None:
        return f"gone since some version after {flag.until}" if flag.until else ""
    if flag.since and wanted < (version_number(flag.since) or ()) and wanted <= _before(spec, flag.since):
        return f"unknown before {flag.since}"
    if flag.until and wanted >= _after(spec, flag.until):
        return f"gone since some version after {flag.until}"
    return ""


def default(flag: Flag, version: str = "") -> bool | int | float | str | None:
    """The documented default of a version; without one, of the newest."""
    wanted = version_number(version) if version else None
    until = (v for v in flag.earlier if wanted is not None and wanted <= (version_number(v) or ()))
    last = next(until, None)
    return flag.earlier[last] if last else flag.default


def _before(spec: EngineFlags, version: str) -> tuple[int, ...]:
    """The compared version before one: between the two an option may have come any time."""
    place = spec.compared.index(version)
    return version_number(spec.compared[max(place - 1, 0)]) or ()


def _after(spec: EngineFlags, version: str) -> tuple[int, ...]:
    """The compared version after one."""
    place = spec.compared.index(version) if version in spec.compared else len(spec.compared) - 1
    return version_number(spec.compared[min(place + 1, len(spec.compared) - 1)]) or ()


def suggestion(spec: EngineFlags, word: str) -> str:
    """`` (did you mean '--x'?)`` among the spellings an engine still takes."""
    return did_you_mean(word, [w for w, o in _spellings(spec.engine).items() if not gone(spec, o.flag)])


def nearest(spec: EngineFlags, word: str) -> str | None:
    """The spelling that `suggestion` names."""
    found = re.search(r"'(.+)'", suggestion(spec, word))
    return found.group(1) if found else None


def deciding(spec: EngineFlags, setting: str) -> tuple[str, Flag] | None:
    """The option, with its dashes, that decides a setting today."""
    for name, flag in spec.flags.items():
        if flag.sets == setting and not gone(spec, flag) and not flag.deprecated:
            return f"--{name}", flag
    return None


def known_elsewhere(spec: EngineFlags, word: str) -> list[str]:
    """Titles of other engines that know exactly this word."""
    return [other.title for name, other in _files().items() if name != spec.engine and word in _spellings(name)]
