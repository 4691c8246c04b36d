"""The count formulas as SymPy expressions: printed, differentiated, exported, and compiled to NumPy.

`symbolic_program` lowers a model whose sizes, degrees and widths are symbols; everything else here works on the
expressions it yields. Which operators exist depends only on the structure (flags, kinds of layers, which degrees
are not one, which formats are narrower), so models of one structure share one program and one compiled function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np

from perfmodel import graph, symbolic, symbols
from perfmodel.errors import SpecError
from perfmodel.graph import Program
from perfmodel.ops.moe import distinct_ranks
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.ops.traffic import Op
from perfmodel.schedule import operators
from perfmodel.spec.formats import Format
from perfmodel.spec.model import Model, Moe
from perfmodel.symbols import symbol

Expr = Any
"""A SymPy expression."""

PhaseKind = Literal["prefill", "decode"]
DEGREES = ("tp", "pp", "dp", "ep", "cp")
_ROWS = 32_768  # rows evaluated at once: intermediate arrays stay in the processor's cache


class _Width:
    """Enters expressions as its symbol, yet tells which of two formats is narrower: that decides which casts exist."""

    def __init__(self, name: str, size: float) -> None:
        self.name, self.size = name, size

    def _sympy_(self) -> Expr:
        return symbol(self.name)

    def __rmul__(self, elements: Any) -> Expr:
        return elements * symbol(self.name)

    def __lt__(self, other: _Width) -> bool:
        return self.size < other.size


class _SymbolicFormat(NamedTuple):
    """What operators read of a format."""

    name: str
    bits: float
    group: int
    matrix: str | None
    width: _Width


class Expression(NamedTuple):
    """One count of one operator. quantity: ``flops.<unit>`` or ``bytes.<path>.<tensor>``."""

    position: int
    """Position of the operator in the pass."""
    op: str
    part: str
    kind: str
    quantity: str
    expr: Expr
    times: Expr
    """How often the operator runs in one pass."""


def symbolic_program(model: Model, phase: PhaseKind, formats: Formats, degrees: Iterable[str] = ()) -> Program:
    """Operators of one pass in symbols. `degrees` names the parallel degrees that are not one."""
    chosen = tuple(d for d in DEGREES if d in set(degrees))
    return _symbolic_program(_Structure(model, phase, formats, chosen))


class _Structure:
    """A model, phase and formats that compare equal when their programs are the same in symbols."""

    def __init__(self, model: Model, phase: PhaseKind, formats: Formats, degrees: tuple[str, ...]) -> None:
        self.model, self.phase, self.formats, self.degrees = model, phase, formats, degrees
        blocks = symbolic.symbolic_model(model).blocks
        named = (formats.weight.name, formats.expert.name, formats.act.name, formats.kv.name)
        self.key = (
            phase, degrees, repr(blocks), model.embedding_dim, model.embedding_norm,
            named, formats.unquantized, formats.quantise,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self.key == other.key


@lru_cache(maxsize=128)
def _symbolic_program(s: _Structure) -> Program:
    batch, new, context = symbol("B"), symbol("Q"), symbol("C")
    group = Group(batch, 1, context, decode=True) if s.phase == "decode" else Group(batch, new, context)
    par = Parallelism(**{d: symbol(d) for d in s.degrees})
    return graph.lower(symbolic.symbolic_model(s.model), graph.Phase((group,)), par, symbolic_formats(s.formats))


def symbolic_formats(f: Formats) -> Formats:
    """The same formats with a symbol for every width."""

    def stand_in(fmt: Format, name: str) -> Any:
        return _SymbolicFormat(fmt.name, fmt.bits, fmt.group, fmt.matrix, _Width(name, fmt.width))

    return Formats(
        stand_in(f.weight, "w"), stand_in(f.expert, "w_e"), stand_in(f.act, "a"), stand_in(f.kv, "kv"),
        f.unquantized, f.quantise, symbol("s"),
    )  # fmt: skip


def inputs(model: Model, formats: Formats, par: Parallelism | None = None) -> dict[str, float]:
    """The number of every symbol except B, Q and C: sizes, degrees, widths, and ranks visited per token."""
    par = par or Parallelism()
    values = {name: float(size) for name, size in symbolic.values_of(model).items()}
    values |= {d: float(getattr(par, d)) for d in DEGREES}
    values |= {
        "w": formats.weight.width, "w_e": formats.expert.width, "a": formats.act.width, "kv": formats.kv.width,
        "s": formats.state_width,
    }  # fmt: skip
    visited = {distinct_ranks(b.ffn, par.ep) for b in model.blocks.values() if isinstance(b.ffn, Moe)}
    if len(visited) > 1 and par.ep > 1:
        raise SpecError(f"{model.name} has layers with different numbers of experts: no one R stands for all")
    return values | {"R": max(visited, default=1.0)}


def expressions(program: Program) -> list[Expression]:
    """Every FLOP and byte count of every operator, zero counts left out."""
    found = []
    for index, (op, times, part) in enumerate(operators(program.schedule)):
        counts = {f"flops.{unit}": n for unit, n in op.flops.items()} | _bytes(op)
        found += [
            Expression(index, op.name, part, op.kind, quantity, _exact(n), _exact(times))
            for quantity, n in counts.items()
            if n != 0
        ]
    return found


def _bytes(op: Op) -> dict[str, Expr]:
    moved: dict[str, Expr] = {}
    for t in op.traffic:
        key = f"bytes.{t.path}.{t.tensor}"
        moved[key] = moved.get(key, 0) + t.bytes
    return moved


def _exact(expr: Expr) -> Expr:
    """Decimal constants as fractions and roots: 1.0 prints as 1, and 1.414… x^0.5 as sqrt(2) sqrt(x)."""
    import sympy

    expr = sympy.sympify(expr)
    return expr.xreplace({x: _constant(float(x)) for x in expr.atoms(sympy.Float)})


def _constant(x: float) -> Expr:
    import sympy

    square = round(x * x)
    is_root = x != round(x) and abs(x * x - square) < 1e-12
    return sympy.sqrt(square) if is_root else sympy.Rational(str(x))


def totals(counts: Iterable[Expression]) -> dict[str, Expr]:
    """One expression per quantity over all runs, with ``flops`` (matrix units) and ``bytes`` (device memory)."""
    import sympy

    parts: dict[str, list[Expr]] = {"flops": [], "bytes": []}
    for e in counts:
        parts.setdefault(e.quantity, []).append(e.times * e.expr)
        group, kind = e.quantity.split(".")[:2]
        if (group == "flops" and kind not in ("vector", "exp")) or kind == "hbm":
            parts[group].append(e.times * e.expr)
    return {name: sympy.Add(*terms) for name, terms in parts.items()}


def compile(exprs: Iterable[Expr]) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """NumPy function of a mapping from symbol names to numbers or arrays [rows]; it returns an array [exprs, rows].

    Rows are evaluated in chunks. Raises SpecError for a symbol without a value.
    """
    return _compile(tuple(exprs))


@lru_cache(maxsize=128)
def _compile(exprs: tuple[Expr, ...]) -> Callable[[Mapping[str, Any]], np.ndarray]:
    import sympy

    exprs = tuple(sympy.sympify(e) for e in exprs)
    names = sorted({s.name for e in exprs for s in e.free_symbols})
    by_name = {s.name: s for e in exprs for s in e.free_symbols}
    function = sympy.lambdify([by_name[n] for n in names], list(exprs), modules="numpy", cse=True)
    return partial(_evaluate, function, names, len(exprs))


def _evaluate(function: Any, names: list[str], count: int, values: Mapping[str, Any]) -> np.ndarray:
    missing = [n for n in names if n not in values]
    if missing:
        raise SpecError(f"no value for {', '.join(missing)}")
    arrays = [np.asarray(values[n], float) for n in names]
    rows = np.broadcast_shapes(*(a.shape for a in arrays), (1,))[0]
    result = np.empty((count, rows))
    for start in range(0, rows, _ROWS):
        chunk = slice(start, start + _ROWS)
        # Scalars stay scalars, so that a sweep over B and C does not copy every size of the model along.
        counts = function(*(a[chunk] if a.size == rows > 1 else a.reshape(-1)[0] for a in arrays))
        for row, count_ in zip(result, counts, strict=True):
            row[chunk] = count_
    return result


def elasticity(expr: Expr, name: str) -> Expr:
    """Relative change of a count per relative change of a symbol: d ln f / d ln x = (x / f) df/dx."""
    import sympy

    smooth = _smooth(expr)
    x = next((s for s in smooth.free_symbols if s.name == name), None)
    return sympy.Integer(0) if x is None else x * sympy.diff(smooth, x) / smooth


def crossing(expr: Expr, name: str, values: Mapping[str, float], most: float = 1e7) -> float | None:
    """Smallest value in (0, most] of one symbol at which an expression turns from negative to positive, else None.

    The root of the polynomial where the expression is one in that symbol, else bisection between powers of two.
    """
    import sympy

    x = symbol(name)
    one = _smooth(expr)
    one = one.xreplace({s: sympy.Float(values[s.name]) for s in one.free_symbols if s != x})
    if one.is_polynomial(x):
        found = np.roots([float(c) for c in sympy.Poly(one, x).all_coeffs()])
        slope = sympy.diff(one, x)
        rising = [r.real for r in found if abs(r.imag) < 1e-9 * abs(r) and r.real > 0 and slope.subs(x, r.real) > 0]
        return min((float(r) for r in rising if r <= most), default=None)
    value = sympy.lambdify([x], one, modules="numpy")
    high = 1.0
    while value(high) < 0:
        high *= 2
        if high > most:
            return None
    low = high / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < 0 else (low, middle)
    return high


def is_polynomial(expr: Expr, name: str) -> bool:
    """Whether `crossing` is solved in closed form."""
    return bool(_smooth(expr).is_polynomial(symbol(name)))


def _smooth(expr: Expr) -> Expr:
    """Roundings up replaced by their trend, the ceiling of x by x: their own slope is 0 or infinite."""
    import sympy

    return expr.replace(sympy.ceiling, lambda x: x)


def unindexed(expr: Expr) -> Expr:
    """Drop the layer index of every symbol: for counts of one operator, which belongs to one kind of layer."""
    import sympy

    return sympy.sympify(expr).xreplace({s: symbol(base(s.name)) for s in getattr(expr, "free_symbols", ())})


def base(name: str) -> str:
    """Alphabet entry of a symbol name with or without a layer index."""
    return name if name in symbols.ALPHABET else name.rsplit("_", 1)[0]


_WORDS = {"Max": "max", "Min": "min", "ceiling": "ceil"}


def text(expr: Expr, values: Mapping[str, float] | None = None) -> str:
    """One line of plain text; `values` puts numbers in the place of symbols."""
    shown = str(expr).replace("**", "^").replace("*", "·")
    numbers = {name: _number(v) for name, v in (values or {}).items()}
    return re.sub(r"[A-Za-z_]\w*", lambda m: numbers.get(m[0], _WORDS.get(m[0], m[0])), shown)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def latex(expr: Expr) -> str:
    """LaTeX with the letters of the alphabet."""
    import sympy

    expr = sympy.sympify(expr)
    return str(sympy.latex(expr, symbol_names={s: symbols.latex(s.name) for s in expr.free_symbols}))


def javascript(expr: Expr) -> str:
    """A JavaScript expression over variables named like the symbols."""
    import sympy

    return str(sympy.jscode(sympy.sympify(expr)))
