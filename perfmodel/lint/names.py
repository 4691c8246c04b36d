"""Which model of the catalogue a checkpoint's name means, and the format its name promises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath

from perfmodel import catalog
from perfmodel.errors import SpecError, UnknownName
from perfmodel.spec.model import Model

_FORMATS = (
    (r"nvfp4|fp4", "nvfp4"), (r"mxfp4", "mxfp4"), (r"fp8[-_]?block", "fp8_block"), (r"fp8|w8a8[-_]?fp8", "fp8"),
    (r"gptq[-_]?int8|w8a16", "int8"), (r"awq|gptq|w4a16|int4|bnb[-_]?4bit", "int4"), (r"w8a8|int8", "int8"),
    (r"q4_k(_[sml])?|q4_0|iq4_\w+", "q4_k"), (r"q5_k(_[sm])?|q5_0", "q5_k"), (r"q6_k", "q6_k"), (r"q8_0", "q8_0"),
    (r"bf16", "bf16"), (r"f16|fp16", "fp16"),
)  # fmt: skip
_NEUTRAL = r"instruct|chat|base|it|hf|dynamic|gguf|preview|latest|thinking|\d{4}|int\d|ud|xl|\d{5}|of|quantized|marlin"


@dataclass(frozen=True)
class Checkpoint:
    """A model and the format of its weights; `stored` None: as the catalogue's model says."""

    model: Model
    stored: str | None


@lru_cache(maxsize=64)
def checkpoint(name: str) -> Checkpoint | None:
    """The model behind a hub id, a path or a GGUF file; None where the catalogue has none of that name.

    Words such as Instruct do not change the architecture; those such as AWQ or Q4_K_M change the format.
    """
    for candidate in (name, PurePath(name).name):
        found = _load(candidate)
        if found is not None:
            return Checkpoint(found, None)
    base, _, tag = name.partition(":")
    stem = re.sub(r"\.gguf$", "", PurePath(base).name, flags=re.IGNORECASE)
    stored, rest = _format(f"{stem}-{tag}" if tag else stem)
    words = [w for w in re.split(r"[-_]", rest) if w]
    for end in range(len(words), 0, -1):
        tail = words[end:]
        if any(not re.fullmatch(_NEUTRAL, w, re.IGNORECASE) for w in tail):
            break
        for stemmed in ("-".join(words[:end]), re.sub(r"^Meta-", "", "-".join(words[:end]), flags=re.IGNORECASE)):
            found = _load(stemmed) or _load(f"{stemmed}-Instruct")
            if found is not None:
                return Checkpoint(found, stored)
    return None


def _format(stem: str) -> tuple[str | None, str]:
    """Format a name ends in, and the name without it."""
    for pattern, name in _FORMATS:
        match = re.search(rf"[-_.]({pattern})(?=$|[-_.])", stem, re.IGNORECASE)
        if match:
            return name, stem[: match.start()] + "-" + stem[match.end() :]
    return None, stem


def _load(name: str) -> Model | None:
    try:
        return catalog.load_model(name)
    except UnknownName:
        return None
    except SpecError:
        return None  # a local path that is not here
