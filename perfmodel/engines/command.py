"""Read a server's command line the way a shell and the engine's parser do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from perfmodel.engines.flags import Option, documented, find, flags
from perfmodel.errors import SpecError
from perfmodel.spec.engine_flags import EngineFlags

_SEPARATORS = {"&", "&&", "||", "|", ";", "\n", "(", ")", ";;"}
_IMAGES = {"vllm/vllm-openai": "vllm", "llama.cpp:server": "llama.cpp", "llama.cpp:full": "llama.cpp"}
"""Images whose entry point is the server: their arguments follow the image's name."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_FILE = re.compile(r"/|\.(sh|ya?ml|json|txt)$")
_NOT_SERVERS = {"disaggregated", "disaggregated_mpi_worker", "mm_embedding_serve", "bench", "complete", "chat"}


@dataclass(frozen=True)
class Given:
    """One option as it was given. option None: the engine knows no such word."""

    word: str
    value: str | None
    option: Option | None
    key: str = ""
    """Rest of a dotted name: `method` of `--speculative-config.method`."""

    @property
    def name(self) -> str:
        base = self.option.name if self.option else self.word.lstrip("-")
        return f"{base}.{self.key}" if self.key else base


@dataclass(frozen=True)
class Command:
    """One server's command line."""

    spec: EngineFlags
    start: tuple[str, ...]
    """Words that start the server."""
    given: tuple[Given, ...]
    loose: tuple[str, ...] = ()
    """Words that belong to no option."""
    environment: dict[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    """Words before the start: a container's options, say."""
    files: dict[str, str] = field(default_factory=dict)
    """Files that come with the command (of a manifest's ConfigMap), by path."""

    @property
    def engine(self) -> str:
        return self.spec.engine

    @property
    def text(self) -> str:
        """The command as one line for a shell."""
        words = [*self.start, *self.loose]
        for g in self.given:
            words += [g.word] if g.value is None else [g.word, g.value]
        return " ".join(shlex.quote(w) for w in words)


def split(text: str) -> list[list[str]]:
    """Simple commands of a piece of shell: words without comments, continuations and redirections.

    >>> split("export A=1 # why\\nvllm serve m \\\\\\n  -tp 2 > log 2>&1 &")
    [['export', 'A=1'], ['vllm', 'serve', 'm', '-tp', '2']]
    """
    joined = re.sub(r"\\\r?\n", " ", text)
    # `2>` is a redirection, `-tp 2 >` is a value: only the text still tells.
    lexer = shlex.shlex(re.sub(r"(?<!\S)\d(?=>)", "", joined), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    commands: list[list[str]] = [[]]
    skip = comment = False
    try:
        for word in lexer:
            if word.strip(" \t") == "" or set(word) == {"\n"} or word in _SEPARATORS or set(word) <= {"\n", ";", "&"}:
                if "\n" in word or not comment:
                    commands.append([])
                comment = comment and "\n" not in word
            elif comment or skip:
                skip = False
            elif word.startswith("#"):
                comment = True
            elif set(word) <= set("<>&|"):
                skip = True  # a redirection takes the word that follows
            else:
                commands[-1].append(word)
    except ValueError as error:
        raise SpecError(f"not a shell command: {str(error).lower()}") from None
    return [c for c in commands if c]


def expanded(commands: list[list[str]]) -> Iterator[list[str]]:
    """Commands with the variables that earlier ones set put in; a variable alone may bring several words.

    >>> list(expanded(split("M=a/b; export A='-tp 2'; vllm serve ${M} $A --port ${P:-80} --seed $S")))[-1]
    ['vllm', 'serve', 'a/b', '-tp', '2', '--port', '80', '--seed', '$S']
    """
    known: dict[str, str] = {}
    for words in commands:
        made: list[str] = []
        for word in words:
            text = _VARIABLE.sub(lambda m: known.get(m[1] or m[2], m[0] if m[3] is None else m[3]), word)
            made += text.split() if _VARIABLE.fullmatch(word) else [text]
        said = _environment(made)
        if len(said) == len(made) - (made[:1] == ["export"]):
            known.update(said)
        yield made


def read(text: str) -> list[Command]:
    """Every server command in a piece of shell. Raises SpecError where there is none."""
    found = [c for words in expanded(split(text)) for c in servers(words)]
    if not found:
        starts = ", ".join(repr(" ".join(flags(e).commands[0])) for e in documented())
        words = text.split()
        said = f"{words[0]}: no such file, and" if len(words) == 1 and _FILE.search(words[0]) else "there is"
        raise SpecError(f"{said} no server command in {text.strip()[:60]!r}; one begins with {starts}")
    return found


def servers(words: list[str]) -> Iterator[Command]:
    """The server a simple command starts, if any."""
    for engine in documented():
        spec = flags(engine)
        for start in sorted(spec.commands, key=len, reverse=True):
            at = _find(words, start)
            if at is not None:
                rest = words[at + len(start) :]
                if not (rest and rest[0] in _NOT_SERVERS):
                    yield parse(spec, rest, start, words[:at])
                return
    for i, word in enumerate(words):
        engine_of_image = next((e for image, e in _IMAGES.items() if image in word), None)
        if engine_of_image and "run" in words[:i]:
            spec = flags(engine_of_image)
            yield parse(spec, words[i + 1 :], spec.commands[0], words[:i])
            return


def _find(words: list[str], start: tuple[str, ...]) -> int | None:
    """Where a server starts: `python3.12`, and Python by its full path, are Python."""
    for at in range(len(words) - len(start) + 1):
        names = [PurePath(w).name if "/" in w else w for w in words[at : at + len(start)]]
        names = [re.sub(r"^python[\d.]*$", "python", n) for n in names]
        if names == list(start):
            return at
    return None


def _environment(words: list[str]) -> dict[str, str]:
    pairs = (re.match(r"(?:--env=)?([A-Za-z_]\w*)=(.*)", w, re.DOTALL) for w in words)
    return {m.group(1): m.group(2) for m in pairs if m}


def parse(spec: EngineFlags, words: list[str], start: tuple[str, ...], launcher: list[str]) -> Command:
    """Options and loose words after the start of a command; launcher: the words before it."""
    given: list[Given] = []
    loose: list[str] = []
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if not _is_option(word):
            loose.append(word)
            continue
        if spec.engine == "vllm" and re.fullmatch(r"-O=?\d", word):
            word = f"--optimization-level={word[-1]}"  # its short form joins the digit
        word, equals, value = word.partition("=")
        option, key = _option(spec, word)
        following = _values(spec, option, key, words[i:], bool(equals))
        i += len(following)
        text = value if equals else " ".join(following) if following else None
        given.append(Given(word, text, option, key))
    return Command(spec, start, tuple(given), tuple(loose), _environment(launcher), tuple(launcher))


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not re.fullmatch(r"-[\d.]+(e-?\d+)?", word)


def _option(spec: EngineFlags, word: str) -> tuple[Option | None, str]:
    option = find(spec, word)
    if option is None and "." in word:
        base, _, key = word.partition(".")
        option = find(spec, base)
        return (option, key) if option is not None and option.flag.kind == "json" else (None, "")
    return option, ""


def _values(spec: EngineFlags, option: Option | None, key: str, rest: list[str], equals: bool) -> list[str]:
    """Words after an option that are its value."""
    if equals or (rest and rest[0] == "--"):
        return []
    plain = []
    for word in rest:
        if _is_option(word):
            break
        plain.append(word)
    kind = option.flag.kind if option and not key else "string"
    if kind == "bool":
        return []
    if kind == "optional":
        return plain[:1] if option and plain and plain[0] in option.flag.choices else []
    return plain if kind == "list" else plain[:1]
