"""Sequences that move between instances where memory runs short, and dispatching by free memory."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.serving.replay import Fleet, Pool
from perfmodel.serving.replay.migration import Migration
from perfmodel.serving.requests import Requests


def _fleet(clock, tokens: float, *, moves: bool, replicas: int = 2, routing: str = "round-robin") -> Fleet:
    migration = Migration(period=0.01, threshold=50, halt=0.02) if moves else None
    return Fleet((Pool(clock, tokens, replicas),), routing, migration=migration)


def test_a_sequence_makes_room_for_the_first_in_line(clock):
    """Two of 600 tokens run at the first instance of 1,600, the other stands empty. One of 800 that comes to the first waits for
    either to end; where sequences move, one leaves and it starts at once."""
    requests = Requests(np.array([0.0, 0.0, 0.0, 0.0, 0.5]), np.array([600, 10, 600, 10, 800]), np.array([200, 2, 200, 2, 2]))
    stays, moves = (_fleet(clock, 1600.0, moves=m).run(requests) for m in (False, True))
    assert stays.instance[4] == moves.instance[4] == stays.instance[0] == stays.instance[2]
    alone = clock.step(0, 0.0, [(800, 0)])
    assert stays.ttft[4] > 3 * alone
    assert moves.ttft[4] < 1.7 * alone
    # The moved one goes on elsewhere, without its cache being computed again, and halts once.
    assert sorted(moves.decoder[[0, 2]].tolist()) == [0, 1]
    assert moves.preempted == 0
    moved = next(i for i in (0, 2) if moves.decoder[i] != moves.instance[i])
    assert 0.02 < moves.longest_gap[moved] < 0.02 + 3 * clock.decode(1, 800)


def test_a_busy_fleet_serves_every_token_and_waits_less(clock, poisson):
    requests = poisson(400, 14.0, 3)
    stays, moves = (_fleet(clock, 6000.0, moves=m, replicas=4).run(requests) for m in (False, True))
    assert requests.input.max() + requests.output.max() < 6000
    for found in (stays, moves):
        assert np.all(np.isfinite(found.finish))
        assert found.gaps.tokens.sum() == (requests.output - 1).sum()
    assert np.percentile(moves.ttft, 99) < np.percentile(stays.ttft, 99)


def test_dispatch_by_free_memory_sees_how_long_requests_are(clock):
    """Beside one of 1,000 tokens 600 are free, beside two of 100 tokens 700 for each: the third short one joins those."""
    requests = Requests(np.arange(4) * 1e-3, np.array([1000, 100, 100, 100]), np.full(4, 50))
    by_heads = _fleet(clock, 1600.0, moves=False, routing="least-loaded").run(requests).instance
    by_room = _fleet(clock, 1600.0, moves=False, routing="freest").run(requests).instance
    assert (by_heads == by_heads[0]).sum() == 2
    assert (by_room == by_room[0]).sum() == 1


def test_sequences_move_inside_one_pool(clock):
    pools = (Pool(clock, 1e5, role="prefill"), Pool(clock, 1e5, role="decode"))
    with pytest.raises(SpecError, match="one pool"):
        Fleet(pools, migration=Migration(0.1, 50)).run(Requests(np.zeros(1), np.ones(1, int), np.ones(1, int)))
