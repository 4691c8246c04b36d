"""Write the pages that the code prints: nomenclature.md, equations.md and hardware-schema.md.

python docs/generate.py            write them beside this file
python docs/generate.py --check    write nothing; exit 1 and name the pages that are out of date
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from perfmodel import vectorize
from perfmodel.ops.shard import Formats
from perfmodel.schedule import operators
from perfmodel.spec import hardware
from perfmodel.spec.formats import ALIASES, FORMATS, get_format
from perfmodel.spec.model import (
    Attention,
    Block,
    GatedDeltaNet,
    Indexer,
    LatentAttention,
    Layers,
    Lightning,
    Mamba1,
    Mamba2,
    Mlp,
    Model,
    Moe,
)
from perfmodel.symbols import ALPHABET
from perfmodel.units import KINDS, UNITS

HERE = Path(__file__).resolve().parent
_NOTE = "<!-- Printed by docs/generate.py from the code; edit the code and run it again. -->"


def pages() -> dict[str, str]:
    """File name to text."""
    return {
        "nomenclature.md": "\n".join(_nomenclature()) + "\n",
        "equations.md": "\n".join(_equations()) + "\n",
        "hardware-schema.md": "\n".join(_schema()) + "\n",
    }


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


_NOMENCLATURE = """\
The letters of [equations.md](equations.md) and of `perfmodel explain`, the units that files and options accept, and the
number formats.

## Symbols

Every count formula is written in these. In models with several kinds of layers the kind's number follows, as in
`heads_0`.
"""

_UNITS = """
## Quantities and units

A quantity is written as text with its unit (`3.35 TB/s`). Inside, everything is base SI: byte, FLOP, second, joule,
watt, USD. Prefixes k, M, G, T, P, E are decimal; Ki, Mi, Gi, Ti, Pi are binary and go with B and bit alone.
"""

_FORMATS = """
## Number formats

Bytes per element include the scales. Without an arithmetic of their own, weights are expanded on the vector units and
multiplied in the format of the activations.
"""


def _nomenclature() -> Iterator[str]:
    yield from ["# Nomenclature", "", _NOTE, ""]
    yield _NOMENCLATURE
    yield from _table(
        ["name", "letter", "meaning", "unit", "range"],
        [[f"`{s.name}`", f"${s.latex}$", s.meaning, s.unit, f"{s.low:g} to {s.high:g}"] for s in ALPHABET.values()],
    )
    yield _UNITS
    yield from _table(["kind", "example"], [[k.replace("_", " "), f"`{shown}`"] for k, (_, shown) in KINDS.items()])
    plain = [u for u in UNITS if u and (len(u) == 1 or u[0] not in "kKMGTPE")]
    yield "\nUnits, each with its prefixes and joined by `/`: " + ", ".join(f"`{u}`" for u in plain) + "."
    yield _FORMATS
    rows = []
    for f in FORMATS.values():
        also = ", ".join(f"`{a}`" for a, name in ALIASES.items() if name == f.name)
        rows.append([f"`{f.name}`", f"{f.width:.10g}", f.matrix or "", f.description, also])
    yield from _table(["name", "byte per element", "multiplied in", "what it is", "also called"], rows)


_DENSE = Attention(heads=32, kv_heads=8, head_dim=128)
_LATENT = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
_EXPERTS = Moe(experts=256, top_k=8, inter=2048, shared_inter=2048)


class Section(NamedTuple):
    """One table of equations: a layer in a phase, with the degrees that are not one."""

    title: str
    words: str
    block: Block
    phase: vectorize.PhaseKind
    degrees: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Beginnings of the names of the operators to print; empty: all."""


_DELTA = GatedDeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128)
_MAMBA2 = Mamba2(heads=128, head_dim=64, state=128, groups=8)
_SPARSE = _LATENT.model_copy(update={"indexer": Indexer(heads=64, head_dim=128, top_k=2048)})

_SECTIONS = [
    Section(
        "Attention with grouped queries",
        "Decode is $Q = 1$. Queries, keys and values are cut over $t_p$; key-value heads are copied where $t_p$ "
        "exceeds them.",
        Block(mixer=_DENSE), "prefill", ("tp",),
    ),
    Section(
        "Sliding window",
        "Only query-key pairs inside the window $W$ are computed, and only its union is read. The projections are "
        "those above.",
        Block(mixer=_DENSE.model_copy(update={"window": 4096})), "prefill", ("tp",), ("attention",),
    ),
    Section(
        "Context parallelism, prefill",
        "New tokens are divided, and keys and values passed around a ring.",
        Block(mixer=_DENSE), "prefill", ("cp",), ("attention", "ring"),
    ),
    Section(
        "Context parallelism, decode",
        "The cached context is divided, and partial outputs with their softmax statistics are gathered.",
        Block(mixer=_DENSE), "decode", ("cp",), ("attention", "cp"),
    ),
    Section(
        "Latent attention, expanded",
        "Prefill rebuilds keys and values of all visible tokens from the latent.",
        Block(mixer=_LATENT), "prefill", ("tp",),
    ),
    Section(
        "Latent attention, absorbed",
        "Decode multiplies the up-projections into queries and outputs and attends to the latent itself.",
        Block(mixer=_LATENT), "decode", ("tp",),
    ),
    Section(
        "Latent attention with a token selector",
        "The indexer scores every cached token and attention sees the best 2048 of them. The indexer's sizes stand as "
        "numbers: 64 heads of 128, as in DeepSeek-V3.2.",
        Block(mixer=_SPARSE), "decode", (), ("indexer", "attention"),
    ),
    Section("Dense feed-forward", "", Block(ffn=Mlp(inter=14336)), "prefill", ("tp",)),
    Section(
        "Mixture of experts",
        "All devices hold a slice of every expert. With tokens routed evenly, $E (1 - (1 - k/E)^{B Q})$ experts are "
        "touched.",
        Block(ffn=_EXPERTS), "prefill", ("tp",),
    ),
    Section(
        "Mixture of experts over expert-parallel ranks",
        "The busiest rank gets $\\sqrt{2 \\mu \\ln e_p}$ token-expert pairs more than the mean $\\mu$; $R$ is the "
        "expected number of ranks a token visits.",
        Block(ffn=_EXPERTS), "prefill", ("dp", "ep"),
    ),
    Section("Mamba-2, chunked", "Prefill in chunks of 256 tokens.", Block(mixer=_MAMBA2), "prefill", ("tp",)),
    Section(
        "Mamba-2, one token", "Decode updates the state on the vector units.", Block(mixer=_MAMBA2), "decode", ("tp",),
        ("scan",),
    ),
    Section(
        "Mamba-1",
        "The state is updated on the vector units in prefill too.",
        Block(mixer=Mamba1(inner=8192, state=16, dt_rank=256)), "prefill",
    ),
    Section(
        "Gated delta rule, chunked",
        "Prefill in chunks of 64 tokens, with a triangular solve in each.",
        Block(mixer=_DELTA), "prefill", ("tp",),
    ),
    Section("Gated delta rule, one token", "", Block(mixer=_DELTA), "decode", ("tp",), ("scan",)),
    Section(
        "Lightning attention",
        "Prefill in chunks of 256 tokens.",
        Block(mixer=Lightning(heads=64, head_dim=128)), "prefill",
    ),
]  # fmt: skip

_EQUATIONS = """\
FLOPs and bytes of every operator, as the estimator evaluates them: the tables are printed from the functions in
`perfmodel/ops`. Letters are explained in [nomenclature.md](nomenclature.md). Counts are for one run of an operator on
one device. A multiply-add is 2 FLOP. Rows named by a number format are matrix units; `vector` are the SIMD units and
`exp` special-function results; byte rows are device memory unless they say *sent*, which is what each device puts on
its link. Attention is exact and causal: step $i$ of $Q$ sees $C + i$ tokens.

Sources: *2mnk* is a multiply and an add for each element of an m x k by k x n matrix product; *Thakur 2005* is Thakur,
Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005. Rows without a source count
the elements that an operator reads and writes.

## Embedding and head

Only the last position of each sequence goes through the head.
"""


def _equations() -> Iterator[str]:
    yield from ["# Equations", "", _NOTE, ""]
    yield _EQUATIONS
    yield from _operators(Section("", "", Block(), "prefill", ("tp",)), outer=True)
    for section in _SECTIONS:
        yield from ["", f"## {section.title}", ""]
        yield from [section.words, ""] if section.words else []
        yield from _operators(section, outer=False)


def _operators(section: Section, *, outer: bool) -> Iterator[str]:
    model = Model(
        name="reference", family="reference", hidden=4096, vocab=128256,
        blocks={"layer": section.block.model_copy(update={"norms": 0})},
        layers=(Layers(blocks=("layer",), repeat=32),),
    )  # fmt: skip
    bf16 = get_format("bf16")
    program = vectorize.symbolic_program(model, section.phase, Formats(bf16, bf16, bf16, bf16), section.degrees)
    references = [op.reference for op, _, _ in operators(program.schedule)]
    rows = [
        [f"`{e.op}`", _quantity(e.quantity), f"${vectorize.latex(e.expr)}$", _linked(references[e.position])]
        for e in vectorize.expressions(program)
        if (e.part != "layer") == outer and e.op.startswith(section.only or "")
    ]
    yield from _table(["operator", "count", "formula", "source"], rows)


def _quantity(quantity: str) -> str:
    group, *rest = quantity.split(".")
    if group == "flops":
        return f"{rest[0]} [{'op' if rest[0] in ('vector', 'exp') else 'FLOP'}]"
    return "sent [byte]" if rest[0] == "fabric" else f"{rest[1]} [byte]"


def _linked(reference: str) -> str:
    number = reference.removeprefix("arXiv:")
    return f"[{reference}](https://arxiv.org/abs/{number})" if number != reference else reference


_SCHEMA = """\
One YAML file under `hardware/` is one device, node, link technology or price list. Unknown keys are errors. Quantities
are text with a unit ([nomenclature.md](nomenclature.md)). Every `source` is a key of `sources`, or `unverified`. A
worked example is in [add-a-device.md](add-a-device.md).
"""


def _schema() -> Iterator[str]:
    yield from ["# Hardware files", "", _NOTE, ""]
    yield _SCHEMA
    docs = _field_docs()
    for name, title in (("Device", "A device"), ("Node", "A node"), ("Network", "A link technology"),
                        ("PriceList", "A price list")):  # fmt: skip
        schema = getattr(hardware, name).model_json_schema()
        yield from ["", f"## {title}", ""]
        yield from _record(name, schema, docs)
        for inner, definition in schema.get("$defs", {}).items():
            if inner == "Source" and name != "Device":
                continue
            yield from ["", f"### {title.removeprefix('A ').capitalize()}: {inner}", ""]
            yield from _record(inner, definition, docs)


def _record(name: str, schema: dict[str, Any], docs: dict[tuple[str, str], str]) -> Iterator[str]:
    words = (schema.get("description") or "").split("\n\n")[0].replace("\n", " ")
    yield from [words, ""] if words else []
    required = set(schema.get("required", ()))
    rows = []
    for field, value in schema["properties"].items():
        owner = next((n for n in (name, *_bases(name)) if (n, field) in docs), name)
        need = "yes" if field in required else _default(value)
        rows.append([f"`{field}`", _type(value), need, docs.get((owner, field), "")])
    yield from _table(["field", "value", "required", "meaning"], rows)


def _bases(name: str) -> list[str]:
    return [c.__name__ for c in getattr(hardware, name, object).__mro__]


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "no" if default in (None, [], {}, "") else f"no: {default}"


def _type(value: dict[str, Any]) -> str:
    """What may be written there."""
    if "unit" in value:
        return f"{value['unit'].replace('_', ' ')}, `{KINDS[value['unit']][1]}`"
    if "$ref" in value:
        return value["$ref"].rsplit("/", 1)[1]
    if "anyOf" in value:
        return " or ".join(_type(v) for v in value["anyOf"] if v.get("type") != "null")
    if "enum" in value:
        return ", ".join(f"`{x}`" for x in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object":
        inner = value["additionalProperties"]
        return f"mapping to {_type(inner)}" if isinstance(inner, dict) else "mapping"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[value["type"]]


def _field_docs() -> dict[tuple[str, str], str]:
    """The text under each field of the specs: what `help()` cannot see, but the source has."""
    found = {}
    tree = ast.parse(inspect.getsource(hardware))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for before, after in zip(cls.body, cls.body[1:], strict=False):
            named = isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if named and text:
                found[cls.name, before.target.id] = " ".join(str(after.value.value).split())
    return found


def main() -> int:
    """Write the pages, or compare them."""
    stale = [n for n, text in pages().items() if not (HERE / n).is_file() or (HERE / n).read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        sys.stderr.writelines(f"docs/{name} is out of date: run python docs/generate.py\n" for name in stale)
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_text(pages()[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
