"""The alphabet of the cost model, and the few functions its formulas need beyond arithmetic.

Count formulas are written once, in plain arithmetic. Called with numbers they give numbers, with NumPy arrays
they give arrays, and with the symbols below they give SymPy expressions to print, differentiate and solve.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Num = Any
"""A float, a NumPy array or a SymPy expression."""


class Symbol(NamedTuple):
    """One letter of the alphabet."""

    name: str
    latex: str
    meaning: str
    unit: str
    low: float
    high: float


_ALPHABET = (
    Symbol("B", "B", "sequences in one forward pass", "1", 1, 1e6),
    Symbol("Q", "Q", "new tokens per sequence in one forward pass", "token", 1, 1e7),
    Symbol("C", "C", "cached context tokens per sequence", "token", 0, 1e8),
    Symbol("tp", "t_p", "tensor-parallel degree", "1", 1, 1024),
    Symbol("pp", "p_p", "pipeline-parallel degree", "1", 1, 1024),
    Symbol("dp", "d_p", "data-parallel degree inside one instance", "1", 1, 1024),
    Symbol("ep", "e_p", "expert-parallel degree", "1", 1, 1024),
    Symbol("cp", "c_p", "context-parallel degree", "1", 1, 1024),
    Symbol("h", "h", "hidden size", "element", 1, 1e6),
    Symbol("V", "V", "vocabulary size", "token", 1, 1e7),
    Symbol("w", "w", "bytes per weight element, scales included", "byte", 0.1, 8),
    Symbol("w_e", "w_e", "bytes per routed-expert weight element", "byte", 0.1, 8),
    Symbol("a", "a", "bytes per activation element", "byte", 0.5, 8),
    Symbol("kv", "\\kappa", "bytes per key or value element in the cache", "byte", 0.1, 8),
    Symbol("s", "s", "bytes per element of recurrent state", "byte", 1, 8),
    Symbol("L", "L", "layers of a kind", "1", 1, 1e4),
    Symbol("heads", "H", "query heads", "1", 1, 1e4),
    Symbol("kv_heads", "H_{kv}", "key-value heads", "1", 1, 1e4),
    Symbol("head_dim", "d", "head dimension", "element", 1, 1e4),
    Symbol("window", "W", "sliding attention window", "token", 1, 1e8),
    Symbol("inter", "f", "intermediate size of the feed-forward part", "element", 1, 1e7),
    Symbol("experts", "E", "routed experts", "1", 1, 1e5),
    Symbol("R", "R", "expected distinct expert-parallel ranks a token visits", "1", 1, 1e4),
    Symbol("top_k", "k", "experts chosen per token", "1", 1, 1e3),
    Symbol("shared_inter", "f_s", "intermediate size of the shared experts together", "element", 0, 1e7),
    Symbol("dense_inter", "f_d", "intermediate size of a dense branch beside the experts", "element", 0, 1e7),
    Symbol("q_rank", "r_q", "rank of the query compression", "element", 0, 1e5),
    Symbol("kv_rank", "r_{kv}", "rank of the cached latent", "element", 1, 1e5),
    Symbol("nope_dim", "d_n", "head dimension without positional rotation", "element", 1, 1e4),
    Symbol("rope_dim", "d_r", "head dimension with positional rotation", "element", 1, 1e4),
    Symbol("v_dim", "d_v", "value head dimension", "element", 1, 1e4),
    Symbol("state", "N", "state size of a recurrent mixer", "element", 1, 1e5),
    Symbol("groups", "G", "groups sharing B and C in a state-space mixer", "1", 1, 1e3),
    Symbol("conv", "k_c", "width of the short convolution", "token", 1, 64),
    Symbol("inner", "d_i", "inner size of a Mamba-1 mixer", "element", 1, 1e6),
    Symbol("dt_rank", "r_{dt}", "rank of the time-step projection", "element", 1, 1e5),
    Symbol("key_heads", "H_k", "key heads of a delta-rule mixer", "1", 1, 1e4),
    Symbol("value_heads", "H_v", "value heads of a delta-rule mixer", "1", 1, 1e4),
    Symbol("key_dim", "d_{\\Delta k}", "key dimension of a delta-rule mixer", "element", 1, 1e4),
    Symbol("value_dim", "d_{\\Delta v}", "value dimension of a delta-rule mixer", "element", 1, 1e4),
)  # fmt: skip

ALPHABET: dict[str, Symbol] = {s.name: s for s in _ALPHABET}


# Shares of a batch and expectations need not be whole; sizes and degrees are, which lets SymPy drop their ceilings.
_FRACTIONAL = {"B", "Q", "C", "R"}


@lru_cache(maxsize=1024)
def symbol(name: str, index: str = "") -> Any:
    """The SymPy symbol of an alphabet entry, with an optional index for one kind of layer."""
    import sympy

    whole = ALPHABET[name].unit != "byte" and name not in _FRACTIONAL
    return sympy.Symbol(f"{name}_{index}" if index else name, positive=True, integer=whole or None)


def latex(name: str) -> str:
    """LaTeX of a symbol name with or without a layer index."""
    base = name if name in ALPHABET else name.rsplit("_", 1)[0]
    index = name[len(base) + 1 :]
    text = ALPHABET[base].latex if base in ALPHABET else name
    return f"{text}^{{({index})}}" if index else text


def symbolic(x: Num) -> bool:
    """Whether a number is a SymPy expression (without importing SymPy)."""
    return hasattr(x, "free_symbols")


def ceil(x: Num) -> Num:
    """Smallest whole number not below x."""
    if symbolic(x):
        import sympy

        return sympy.ceiling(x)
    return np.ceil(x)


def floor(x: Num) -> Num:
    """Largest whole number not above x."""
    if symbolic(x):
        import sympy

        return sympy.floor(x)
    return np.floor(x)


def maximum(x: Num, y: Num) -> Num:
    """Elementwise larger value."""
    if symbolic(x) or symbolic(y):
        import sympy

        return sympy.Max(x, y)
    return np.maximum(x, y)


def minimum(x: Num, y: Num) -> Num:
    """Elementwise smaller value."""
    if symbolic(x) or symbolic(y):
        import sympy

        return sympy.Min(x, y)
    return np.minimum(x, y)


def log(x: Num) -> Num:
    """Natural logarithm."""
    if symbolic(x):
        import sympy

        return sympy.log(x)
    return np.log(x)


def is_one(x: Num) -> bool:
    """Whether a degree is the plain number one, so that its operators can be left out."""
    return not symbolic(x) and not isinstance(x, np.ndarray) and x == 1
