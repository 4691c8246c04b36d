"""Read YAML strictly: YAML 1.2 scalars, no duplicate keys, and the line of every value kept for errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from perfmodel.errors import SpecError, did_you_mean

T = TypeVar("T", bound=BaseModel)
Key = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# YAML 1.2 core schema. PyYAML's own resolver reads 989e12 as text, 'on' as true and 12:30 as 750.
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_QUOTED = re.compile(r"'([^']*)'")
_BOUNDS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le"), "greater_than": ("above", "gt"),
           "less_than": ("below", "lt")}  # fmt: skip
_KINDS = {"int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number", "string_type": "text",
          "bool_type": "true or false", "bool_parsing": "true or false", "tuple_type": "a list", "list_type": "a list",
          "dict_type": "a mapping", "model_type": "a mapping", "finite_number": "a finite number"}  # fmt: skip
_SPECIAL = {".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass(frozen=True)
class Document:
    """Plain data plus the line (1-based) on which each path starts."""

    data: Any
    file: str
    lines: dict[Key, int] = field(default_factory=dict)

    def line(self, path: Key) -> int | None:
        """Line of the longest known prefix of a path."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def part(self, *path: str | int) -> Document:
        """What stands at a path, with its lines. Raises SpecError where nothing does."""
        data = self.data
        for i, key in enumerate(path):
            inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
            if not inside:
                raise SpecError(f"there is no {key!r} here", file=self.file, line=self.line(path[:i]))
            data = data[key]
        lines = {k[len(path) :]: line for k, line in self.lines.items() if k[: len(path)] == path}
        return Document(data, self.file, lines)


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


def _build(node: yaml.Node, path: Key, lines: dict[Key, int], file: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if node.tag.startswith("!") and node.tag != "!":
        raise SpecError(f"tags such as {node.tag!r} are not read", file=file, line=node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), lines, file) for i, child in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError("a key must be a single word or number", file=file, line=line)
        key = _scalar(key_node)
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            key = str(key_node.value)
        if key in result:
            raise SpecError(f"duplicate key {key!r}", file=file, line=line)
        lines[(*path, key)] = line
        result[key] = _build(value_node, (*path, key), lines, file)
    return result


def parse(text: str, file: str = "<text>") -> Document:
    """Parse one YAML document. Raises SpecError with file and line for malformed text."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        kind = "JSON" if file.endswith(".json") else "YAML"
        raise SpecError(f"not valid {kind}: {reason}", file=file, line=mark.line + 1 if mark else None) from None
    if node is None:
        raise SpecError("the file is empty", file=file)
    lines: dict[Key, int] = {}
    try:
        return Document(_build(node, (), lines, file), file, lines)
    except RecursionError:
        raise SpecError("nested too deeply, or an anchor that contains itself", file=file) from None


def read(path: str | Path) -> Document:
    """Parse a YAML file. Raises SpecError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the file: {_reason(error)}", file=str(path)) from None
    return parse(text, str(path))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def validate(document: Document, model: type[T]) -> T:
    """Build a spec from a document; every problem becomes one SpecError naming file, line and path."""
    if not isinstance(document.data, dict):
        raise SpecError("expected a mapping of keys to values", file=document.file, line=1)
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise _first_problem(error, document, model) from None


def _first_problem(error: ValidationError, document: Document, model: type[BaseModel]) -> SpecError:
    problems = error.errors(include_url=False)
    # A misspelt key is both missing and unknown; the unknown one knows its line and the nearest spelling.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    located: Key = tuple(problem["loc"])
    # Union members add tags that are not keys of the file: keep only what exists there, plus the last key.
    path: Key = ()
    for part in located:
        if (*path, part) in document.lines:
            path = (*path, part)
    name = ".".join(str(p) for p in (path if problem["type"] != "missing" else (*path, located[-1])))
    line = document.line(path)
    kind = problem["type"]
    if kind == "extra_forbidden":
        fields = _fields_at(model, located[:-1])
        hint = did_you_mean(str(located[-1]), fields) or (f"; known keys: {', '.join(fields)}" if fields else "")
        return SpecError(f"unknown key {located[-1]!r}{hint}", file=document.file, line=line)
    if kind == "missing":
        return SpecError(f"missing key {name!r}", file=document.file, line=line)
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "too_short":
        message = f"must list at least {problem['ctx']['min_length']}, got {problem['ctx']['actual_length']}"
    elif kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        message = f"must be {word} {problem['ctx'][key]:g}, got {problem['input']!r}"
    elif kind in _KINDS:
        message = f"must be {_KINDS[kind]}, got {problem['input']!r}"
    if kind == "union_tag_invalid":
        tag, expected = str(problem["ctx"]["tag"]), str(problem["ctx"]["expected_tags"])
        message = f"{tag!r} is not one of {expected}{did_you_mean(tag, re.findall(_QUOTED, expected))}"
    if kind == "literal_error":
        expected = str(problem.get("ctx", {}).get("expected", ""))
        hint = did_you_mean(str(problem["input"]), re.findall(_QUOTED, expected))
        message = f"{problem['input']!r} is not one of {expected}{hint}"
    return SpecError(message, file=document.file, line=line, path=name)


def _fields_at(model: type[BaseModel], path: Key) -> list[str]:
    """Field names of the (nested) record a path leads to; empty where it leads to a plain value.

    A part that names no field is a key of a mapping, an index, or the tag (``kind``) that picks a union member.
    """
    records = [model]
    for part in path:
        fields = [r.model_fields[str(part)] for r in records if part in r.model_fields]
        tagged = [r for r in records if "kind" in r.model_fields and r.model_fields["kind"].default == part]
        records = [m for f in fields for m in _records_in(f.annotation)] if fields else tagged or records
    return sorted({name for record in records for name in record.model_fields})


def _records_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for argument in get_args(annotation) for record in _records_in(argument)]
