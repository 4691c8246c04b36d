"""Melange (arXiv:2404.14527): which GPUs serve a distribution of request sizes at least cost, from our own columns.

Its setting: Llama-2-7B, one GPU an instance, on-demand prices of L4, A10G, A100-80GB and H100, a limit on TPOT alone, short chats
(Arena), long documents (PubMed) and four chats to one document. It reports savings over a single type of 9-77 %, 2-33 % and
4-51 %. Lengths are drawn from lognormal and normal laws of about the spread of those sets, so the ranges are what is comparable.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from perfmodel import catalog
from perfmodel.errors import Infeasible
from perfmodel.planner.run import plan

PRICES = {"l4": 0.70, "a10g": 1.01, "a100-sxm-80gb": 3.67, "h100-sxm": 7.516}
"""USD/h of one GPU, as the paper lists them."""
SMALL = {"l4", "a10g"}


@pytest.fixture(scope="module", autouse=True)
def ask(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Any]:
    """Plans over one-GPU nodes: (kind, requests/s, TPOT limit in ms, types) -> (USD/h, nodes by type)."""
    folder = tmp_path_factory.mktemp("melange")
    specs = folder / "specs" / "hardware" / "nodes"
    specs.mkdir(parents=True)
    one = yaml.safe_load((root / "hardware/nodes/rtx-3090-workstation-1.yaml").read_text())
    for device in PRICES:
        changed = {"name": f"one-{device}", "title": f"one {device}", "aliases": [], "devices": {"device": device, "count": 1}}
        (specs / f"one-{device}.yaml").write_text(yaml.safe_dump({**one, **changed}))

    @cache
    def planned(kind: str, rate: float, tpot: float, types: tuple[str, ...] = tuple(PRICES)) -> tuple[float, dict[str, int]]:
        trace = folder / "t.csv"
        arrival = np.cumsum(np.random.default_rng(7).exponential(1 / rate, 1200))
        rows = (f"{a:.4f},{i},{o}" for a, (i, o) in zip(arrival, lengths(kind, 1200), strict=True))
        trace.write_text("arrival_s,input,output\n" + "\n".join(rows) + "\n")
        path = folder / "plan.yaml"
        path.write_text(yaml.safe_dump({
            "model": "llama-2-7b", "choices": {"tp": [1]},
            "workload": {"trace": {"file": "t.csv"}, "rate": "mean", "objectives": {"tpot": {"p95": f"{tpot} ms"}}},
            "fleet": [{"node": f"one-{t}", "price": f"{PRICES[t]} USD/h"} for t in types],
        }))  # fmt: skip
        found = plan(path, explain=False).data
        return found["cost_usd_per_hour"], {x["node"].removeprefix("one-"): x["count"] for x in found["nodes"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_user_roots", [])
        catalog.use_specs(folder / "specs")
        yield planned
    catalog._index.cache_clear()
    catalog.nodes.cache_clear()


def lengths(kind: str, n: int) -> np.ndarray:
    """(input, output) tokens [request, 2]."""
    rng = np.random.default_rng(0)
    chat = np.stack([rng.lognormal(np.log(100), 1.2, n).clip(4, 1900), rng.lognormal(np.log(150), 0.8, n).clip(4, 1000)])
    document = np.stack([rng.normal(2600, 700, n).clip(400, 3700), rng.normal(230, 60, n).clip(20, 400)])
    chats = {"chat": 1.0, "document": 0.0, "mixed": 0.8}[kind]
    return np.where(rng.random(n) < chats, chat, document).round().astype(int).T


def singles(ask: Any, kind: str, rate: float, tpot: float) -> dict[str, float]:
    """USD/h of every type that can serve alone."""
    found = {}
    for t in PRICES:
        try:
            found[t] = ask(kind, rate, tpot, (t,))[0]
        except Infeasible:
            continue
    return found


def spent_on_small(nodes: dict[str, int]) -> float:
    return sum(PRICES[t] * n for t, n in nodes.items() if t in SMALL) / sum(PRICES[t] * n for t, n in nodes.items())


@pytest.mark.parametrize(("kind", "tpot", "most"), [("chat", 120, 0.77), ("mixed", 120, 0.77), ("mixed", 40, 0.85)])
def test_a_mix_of_types_beats_every_single_type(ask: Any, kind: str, tpot: float, most: float) -> None:
    cost, nodes = ask(kind, 16, tpot)
    alone = singles(ask, kind, 16, tpot)
    assert cost == pytest.approx(sum(PRICES[t] * n for t, n in nodes.items()))
    assert len(nodes) >= 2
    # The paper measures the mean TPOT of profiled runs; ours is a p95 of requests, which costs small GPUs more at 40 ms.
    savings = {t: 1 - cost / x for t, x in alone.items()}
    assert min(savings.values()) >= 0.04
    assert max(savings.values()) <= most


def test_a_tight_limit_takes_large_gpus_and_a_loose_one_small_ones_for_small_requests(ask: Any) -> None:
    # By hand: an L4 reads 13.5 GB of weights at 300 GB/s in 45 ms, so 40 ms is beyond it whatever the load.
    with pytest.raises(Infeasible) as caught:
        ask("chat", 4, 40, ("l4",))
    assert caught.value.binding == ("tpot.p95",)
    tight, loose = singles(ask, "chat", 16, 40), singles(ask, "chat", 16, 120)
    assert "l4" not in tight
    assert tight["a10g"] > 1.2 * tight["a100-sxm-80gb"]
    assert loose["a10g"] < loose["a100-sxm-80gb"]
    assert spent_on_small(ask("chat", 4, 120)[1]) == 1
    assert spent_on_small(ask("document", 4, 120)[1]) < 0.5


def test_small_requests_are_cheap_on_small_gpus_and_long_ones_on_large(ask: Any) -> None:
    chats, documents = singles(ask, "chat", 16, 120), singles(ask, "document", 4, 120)
    dearer_chats = chats["a10g"] / chats["a100-sxm-80gb"]
    dearer_documents = documents["a10g"] / documents["a100-sxm-80gb"]
    assert dearer_chats < 1 < dearer_documents


def test_whole_gpus_weigh_most_at_low_rates(ask: Any) -> None:
    # At a tenth of a request a second one small GPU is enough, and an H100 costs 7.516 / 0.70 = 10.7 times as much.
    assert ask("chat", 0.1, 120) == (0.70, {"l4": 1})
    assert 1 - 0.70 / singles(ask, "chat", 0.1, 120)["h100-sxm"] == pytest.approx(1 - 0.70 / 7.516)
