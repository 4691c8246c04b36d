"""Documented options of a serving engine's command: names, kinds and defaults, and since when or until when they exist."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perfmodel.spec.base import Spec

Kind = Literal["int", "float", "bool", "choice", "optional", "list", "json", "string"]


class Flag(Spec):
    """One option. `optional`: a choice that may be left out; `list`: one or more words."""

    kind: Kind
    default: bool | int | float | str | None = None
    earlier: dict[str, int | float] = {}
    """Other defaults, by the last of the compared versions that had them."""
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other spellings, with their dashes."""
    negatives: tuple[str, ...] = ()
    """Spellings that turn it off, with their dashes."""
    sets: str | None = None
    """The setting all engines share that it decides, such as `tp` or `context`."""
    negate: bool = False
    """It turns that setting off."""
    since: str = ""
    """First of the compared versions that knows it; empty: the oldest."""
    until: str = ""
    """Last of the compared versions that knows it; empty: the newest."""
    deprecated: bool = False
    instead: str = ""


class EngineFlags(Spec):
    """All options of one engine's server."""

    kind: Literal["engine_flags"]
    engine: str
    title: str
    version: str
    """Newest version compared."""
    date: str
    compared: tuple[str, ...] = Field(min_length=1)
    """Versions whose options were compared, oldest first."""
    commands: tuple[tuple[str, ...], ...] = Field(min_length=1)
    """Words that start a server."""
    positional: str | None = None
    """Setting that a word without dashes decides."""
    booleans: Literal["paired", "plain"]
    """paired: `--no-NAME` turns a switch off, and `--disable-x` is the opposite of `--enable-x`."""
    abbreviations: bool
    """An unambiguous beginning of a name stands for it."""
    underscores: bool = False
    """Names are written with underscores."""
    partial: tuple[str, ...] = ()
    """Nested options of which not every key is listed."""
    images: dict[str, str]
    """Container image by the devices' vendor."""
    start_up: float
    """Seconds from loaded weights to the first answer that a probe should allow: compilation and captured graphs. As vLLM itself
    waits (VLLM_ENGINE_READY_TIMEOUT_S)."""
    health: str
    """Path that answers once the server does."""
    router: str = ""
    """Command of the project's own router."""
    router_image: str = ""
    """Empty: the engine's own image holds it."""
    router_flags: tuple[str, ...] = ()
    router_policies: tuple[str, ...] = ()
    documentation: str
    source: str
    flags: dict[str, Flag]
    options: dict[str, Flag] = {}
    """Keys of JSON-valued options or of the options file, nested ones with dots."""
