"""The alphabet: unambiguous names and letters, and functions that agree on numbers, arrays and symbols."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from perfmodel import symbols
from perfmodel.symbols import ALPHABET, ceil, is_one, latex, log, maximum, minimum, symbol


def test_no_two_symbols_share_a_letter():
    letters = [s.latex for s in ALPHABET.values()]
    assert len(set(letters)) == len(letters)


def test_no_symbol_can_be_taken_for_an_indexed_one():
    for name in ALPHABET:
        stem, _, index = name.rpartition("_")
        assert not (stem in ALPHABET and index.isdigit()), name


def test_ranges_are_not_empty_and_every_entry_says_what_it_is():
    for s in ALPHABET.values():
        assert s.low < s.high
        assert s.meaning
        assert s.unit in ("1", "token", "element", "byte")


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError):
        symbol("no_such_letter")


def test_whole_sizes_drop_their_ceiling_and_fractional_shares_keep_it():
    # Layers and heads are whole numbers; a micro-batch may be 2.5 sequences on average.
    assert ceil(symbol("L")) == symbol("L")
    assert maximum(symbol("kv_heads"), 1) == symbol("kv_heads")
    assert ceil(symbol("B")) != symbol("B")


def test_latex_keeps_the_layer_index_apart_from_the_letter():
    assert latex("kv_heads") == "H_{kv}"
    assert latex("kv_heads_1") == "H_{kv}^{(1)}"
    assert latex("w_e") == "w_e"


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [(ceil, (2.1,), 3), (maximum, (2, 5), 5), (minimum, (2, 5), 2), (log, (1,), 0)],
)
def test_functions_agree_on_numbers_arrays_and_symbols(function, arguments, expected):
    assert function(*arguments) == expected
    assert function(*(np.array([a]) for a in arguments))[0] == expected
    names = [sympy.Symbol(f"x{i}") for i in range(len(arguments))]
    assert function(*names).subs(dict(zip(names, arguments, strict=True))) == expected


def test_only_the_plain_number_one_leaves_operators_out():
    assert is_one(1)
    assert not is_one(2)
    assert not is_one(np.array([1, 1]))
    assert not is_one(symbol("tp"))
    assert not symbols.symbolic(1.0)
