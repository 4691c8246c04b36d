"""Encode pools in plans: against brute force, against the replay, and with the images gone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import highspy
import numpy as np
import pytest
import yaml
from plan_files import L40S

from perfmodel.errors import SpecError
from perfmodel.planner import stored
from perfmodel.planner.cells import ask as question_of
from perfmodel.planner.columns import Column
from perfmodel.planner.optimum import optimise
from perfmodel.planner.program import Question
from perfmodel.planner.run import PlanRun, plan
from perfmodel.serving.images import image_tokens
from perfmodel.serving.replay.deploy import deploy
from perfmodel.spec.deployment import Deployment

GOALS = {"ttft": {"p95": "2 s"}, "tpot": {"p95": "40 ms"}}
IMAGES = {"height": 1024, "width": 1024, "per_request": {0: 0.3, 1: 0.4, 3: 0.3}}
EPD = ["colocated", "encode"]


def vision(
    folder: Path, roles: list[str], images: dict[str, Any] | None = IMAGES, rate: str = "20 /s",
    goals: dict[str, Any] = GOALS, **choices: Any,
) -> PlanRun:  # fmt: skip
    workload = {"lengths": {"input": 300, "output": 150}, "rate": rate, "objectives": goals, "images": images}
    spec = {"model": "qwen2.5-vl-7b", "fleet": L40S, "workload": {k: v for k, v in workload.items() if v is not None},
            "choices": {"tp": [1], "buckets": 2, "roles": roles, **choices}}  # fmt: skip
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return plan(path, explain=False)


@pytest.fixture(scope="module")
def epd(tmp_path_factory: pytest.TempPathFactory) -> PlanRun:
    return vision(tmp_path_factory.mktemp("epd"), EPD)


def pools_of(run: PlanRun, role: str) -> list[Any]:
    return [p for p in run.plans[0].pools if p.column.layout.role == role]


def test_a_prompt_holds_its_images(epd: PlanRun) -> None:
    """1,024 pixels at patch 14, merged 2 x 2, are 36 tokens a side: 1,296 an image, 1.3 images a request."""
    r = epd.plans[0].workload.requests
    assert image_tokens(epd.plans[0].pools[0].column.estimator.model, 1024, 1024)[1] == 1296
    assert set(r.input) == {300.0, 300.0 + 1296, 300.0 + 3 * 1296}
    assert r.labels["images"].mean() == pytest.approx(1.3, abs=0.01)


def test_towers_apart_save_what_their_pauses_cost(epd: PlanRun, tmp_path: Path) -> None:
    """Encoding three images holds decoding up for longer than many tokens may take; apart it does not."""
    together = vision(tmp_path, ["colocated"])
    assert epd.data["devices_busy"] < together.data["devices_busy"]
    assert pools_of(epd, "encode")
    loose = {"ttft": GOALS["ttft"], "tpot": {"p95": "400 ms"}}
    without = vision(tmp_path, ["colocated"], goals=loose).data["devices_busy"]
    gain = together.data["devices_busy"] / epd.data["devices_busy"]
    assert without / vision(tmp_path, EPD, goals=loose).data["devices_busy"] < gain


def test_what_is_encoded_is_prefilled(epd: PlanRun) -> None:
    fed = [p for p in epd.plans[0].pools if p.column.layout.fed]
    for share in {p.column.layout.encode_share for p in fed}:
        sides = [
            sum((p.rates for p in some if p.column.layout.encode_share == share), np.zeros(2))
            for some in (fed, pools_of(epd, "encode"))
        ]  # fmt: skip
        assert sides[0] == pytest.approx(sides[1], rel=1e-6)


def test_the_replay_keeps_the_promises(epd: PlanRun) -> None:
    assert epd.data["rounds"][-1]["missed"] == []
    for c in epd.data["percentiles"]:
        if c["limit_s"] is not None:
            assert c["worst_s"] <= c["limit_s"]
        if c["percentile"] == "p95":
            # Closed form and simulation agree as elsewhere, the sum of two queues included.
            assert c["replayed_s"] == pytest.approx(c["promised_s"], rel=0.35)
    whole = epd.plans[0].replayed[0].whole
    through = whole.encoder >= 0
    seen = epd.plans[0].workload.requests.labels["images"] > 0
    assert through.sum() > 0.9 * seen.sum()
    assert not np.any(through & ~seen)
    assert np.all(whole.encoded[through] > whole.arrival[through])


def test_without_images_nothing_encodes(tmp_path: Path) -> None:
    plain = vision(tmp_path, ["colocated"], images=None)
    for images in ({**IMAGES, "per_request": 0}, None):
        run = vision(tmp_path, EPD, images=images)
        assert {p.column.layout.encode_share for p in run.plans[0].pools} == {0.0}
        assert run.data["objective_value"] == plain.data["objective_value"]
        assert any("no images" in r["reason"] for r in run.data["rejected"])


def test_fewer_images_take_fewer_encoders(epd: PlanRun, tmp_path: Path) -> None:
    few = vision(tmp_path, EPD, images={**IMAGES, "per_request": {0: 0.85, 1: 0.1, 3: 0.05}})
    spent = [sum(p.replicas * p.state.utilisation for p in pools_of(run, "encode")) for run in (epd, few)]
    assert spent[1] < 0.5 * spent[0]
    assert few.data["devices_busy"] < epd.data["devices_busy"]


def test_three_roles_share_the_wait(tmp_path: Path) -> None:
    run = vision(tmp_path, ["prefill", "decode", "encode"], rate="8 /s")
    assert run.data["rounds"][-1]["missed"] == []
    roles = {c.layout.role for c in run.plans[0].columns}
    assert roles == {"prefill", "decode", "encode"}


def test_an_engine_without_encoders_has_no_such_columns(tmp_path: Path) -> None:
    run = vision(tmp_path, EPD, engine="trtllm")
    assert {p.column.layout.role for p in run.plans[0].pools} == {"colocated"}
    assert any("TensorRT-LLM does not have" in r["reason"] for r in run.data["rejected"])


def test_a_stored_plan_is_the_same_plan(epd: PlanRun, tmp_path: Path) -> None:
    import json

    file = tmp_path / "plan.json"
    file.write_text(json.dumps(epd.data))
    again = stored.read(file)  # warns, and warnings are errors, where its percentiles differ
    assert [p.column.layout for p in again.plans[0].pools] == [p.column.layout for p in epd.plans[0].pools]
    # As a deployment it serves the same requests about as well, its routers drawing anew.
    d = Deployment.model_validate(epd.data["deployment"])
    requests = epd.plans[0].workload.requests
    deployed = deploy(d, requests)
    outcome = deployed.fleet.run(requests, seed=3, front=deployed.front(requests))
    whole = epd.plans[0].replayed[0].whole
    assert (outcome.encoder >= 0).sum() == pytest.approx((whole.encoder >= 0).sum(), rel=0.05)
    assert outcome.percentile("ttft", 0.5) == pytest.approx(whole.percentile("ttft", 0.5), rel=0.1)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot hold"):
        vision(tmp_path, EPD, images={**IMAGES, "counted": True})
    with pytest.raises(SpecError, match="add colocated, or prefill"):
        vision(tmp_path, ["encode"])
    with pytest.raises(SpecError, match="positive shares"):
        vision(tmp_path, EPD, images={**IMAGES, "per_request": {1: -1.0}})
    run = vision(tmp_path, EPD, goals={**GOALS, "e2e": {"p95": "20 s"}})
    assert any("instead of end to end" in r["reason"] for r in run.data["rejected"])


# -- brute force ---------------------------------------------------------------------------------------------------


def serves(columns: list[Column], counts: tuple[int, ...], rates: list[float]) -> bool:
    """Whether some split of the load fits these instances: every request is prefilled once, and its images are encoded first."""
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    names = [(c, k) for c, column in enumerate(columns) for k in column.buckets if counts[c]]
    for _ in names:
        h.addVar(0, highspy.kHighsInf)

    def row(low: float, high: float, terms: list[tuple[int, float]]) -> None:
        h.addRow(low, high, len(terms), [i for i, _ in terms], [v for _, v in terms])

    for k, rate in enumerate(rates):
        row(rate, rate, [(i, 1.0) for i, (c, b) in enumerate(names) if b == k and columns[c].layout.role == "colocated"])
        both = [(i, -1.0 if columns[c].layout.role == "encode" else 1.0) for i, (c, b) in enumerate(names)
                if b == k and columns[c].layout.encode_share]  # fmt: skip
        row(0.0, 0.0, both)
    for c, column in enumerate(columns):
        link = column.offer.machine.network * column.offer.machine.network_efficiency
        needs = [(column.prefill_s, column.state.utilisation)]
        if column.layout.role == "colocated":
            needs += [(column.decode_s, column.state.batch), (column.kv_token_s, column.kv_limit)]
        if column.embedded_bytes is not None:
            needs.append((column.embedded_bytes, link))
        for demand, room in needs:
            terms = [(i, float(demand[b]) / room) for i, (owner, b) in enumerate(names) if owner == c]
            row(-highspy.kHighsInf, counts[c] * (1 + 1e-9), terms)
    h.run()
    return bool(h.getModelStatus() == highspy.HighsModelStatus.kOptimal)


def test_brute_force_finds_no_smaller_fleet(epd: PlanRun) -> None:
    question = question_of(epd.plans[0].fleet)
    every = [e.column for e in question.entries]
    rates = [0.35 * r for r in question.demands[0].rates]

    def widest(role: str, share: float) -> Column:
        return max((c for c in every if (c.layout.role, c.layout.encode_share) == (role, share)), key=lambda c: len(c.buckets))

    columns = [widest("colocated", 0.0), widest("encode", 0.5), widest("colocated", 0.5)]
    best = optimise(Question.single(columns, list(question.offers), rates, "devices"))
    least = min(sum(n) for n in itertools.product(range(8), range(3), range(6)) if sum(n) <= 9 and serves(columns, n, rates))
    values = best.solution.values
    chosen = tuple(round(values[f"n_{i}"]) for i in range(3))
    assert best.solution.ok
    assert serves(columns, chosen, rates)
    # Nodes have four devices each.
    assert best.solution.objective == 4 * -(-least // 4)
