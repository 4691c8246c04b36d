"""Bytes of a cached token and the tokens that fit, where techniques make them depend on the length of a sequence."""

from __future__ import annotations

import numpy as np
import pytest
from cache_by_hand import estimator

from perfmodel import memory
from perfmodel.engine_memory import cache_tokens

COLUMNS = 32 * 2 * 8 * 128  # of Llama-3.1-8B: layers, keys and values, KV heads, elements


def test_a_residual_window_fades_with_the_length() -> None:
    # 128 tokens of 16 bits, the others of 2 + 32/32 = 3 bits: (3968 x 3/8 + 256) / 4096 = 0.42578 bytes a column
    e = estimator("kivi-2bit")
    assert memory.kv_bytes_per_token(e.model, e.formats, 4096) == pytest.approx(COLUMNS * (3968 * 3 / 8 + 256) / 4096)
    assert memory.kv_bytes_per_token(e.model, e.formats, 100) == 2 * COLUMNS
    both = memory.kv_bytes_per_token(e.model, e.formats, np.array([100.0, 4096.0]))
    assert both[0] > 4 * both[1]


def test_a_budget_is_shared_by_a_longer_sequence() -> None:
    e = estimator("kv-eviction:budget=1024")
    assert memory.kv_bytes_per_token(e.model, e.formats, 8192) == pytest.approx(COLUMNS * 2 / 8)


def test_without_techniques_the_length_does_not_matter() -> None:
    e = estimator()
    assert memory.kv_bytes_per_token(e.model, e.formats, 8192) == memory.kv_bytes_per_token(e.model, e.formats) == 2 * COLUMNS


def test_tokens_that_an_engine_says_fit() -> None:
    e, pool = estimator("kivi-2bit"), 10e9
    i = memory.account(e.model, e.par, e.formats, e.machine, e.engine)
    each = COLUMNS * (3968 * 3 / 8 + 256) / 4096
    assert cache_tokens(i, pool, 1, length=4096) == pytest.approx(pool / each, abs=1)
    # the first tokens of a sequence are wide
    assert cache_tokens(i, pool, 1) == pytest.approx(pool / (2 * COLUMNS), abs=1)
    counted = memory.kv_tokens(e.model, e.par, e.formats, e.machine, e.engine, length=4096)
    # as many whole sequences of that length as the memory itself says
    assert counted / 4096 == pytest.approx(e.max_batch(4096), abs=1.5)
