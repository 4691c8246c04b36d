"""Encode pools in the event simulation, against queues written down from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving.clock import StepClock
from perfmodel.serving.encode import EncodeClock, embedding_seconds, encode_clock
from perfmodel.serving.encode_pool import EncodeInstance
from perfmodel.serving.images import image_tokens
from perfmodel.serving.queueing import Mix
from perfmodel.serving.replay import Fleet, Pool
from perfmodel.serving.replay.deploy import deploy, embeddings
from perfmodel.serving.replay.encoder import Embeddings
from perfmodel.serving.requests import Requests
from perfmodel.spec.deployment import Deployment

IMAGE = (1024, 1024)


@pytest.fixture(scope="module")
def qwen() -> Estimator:
    return Estimator("qwen2.5-vl-7b", "h100-sxm")


def requests_of(arrival: np.ndarray, images: np.ndarray, output: float = 1.0) -> Requests:
    inputs = 200.0 + 1296 * images
    return Requests(arrival, inputs, np.full(arrival.size, output), labels={"images": images})


def fleet(qwen: Estimator, tower: EncodeClock, link: Embeddings, encoders: int = 1) -> Fleet:
    clock = StepClock(qwen, 2000.0)
    return Fleet((Pool(tower, 1e12, encoders, "encode", embeddings=link), Pool(clock, 1e9, 8)))


def test_encoding_is_a_queue_before_the_others(qwen: Estimator) -> None:
    """One image a pass, first come first served; then the link, one request after the other; then prefill."""
    tower = EncodeClock(qwen, float(image_tokens(qwen.model, *IMAGE)[0]), 1)
    link = Embeddings(2e-3, 1e-4)
    rng = np.random.default_rng(5)
    images = rng.integers(0, 4, 800).astype(float)
    arrival = np.cumsum(rng.exponential(images.mean() * tower.seconds(1) / 0.7, 800))
    found = fleet(qwen, tower, link).run(requests_of(arrival, images))
    free = sent = 0.0
    for k in range(800):
        if not images[k]:
            assert found.encoder[k] == -1
            assert np.isnan(found.encoded[k])
            continue
        free = max(free, arrival[k]) + images[k] * tower.seconds(1)
        sent = max(sent, free) + images[k] * link.seconds_per_image
        assert found.encoded[k] == pytest.approx(sent + link.latency, abs=1e-9)
    seen = images > 0
    assert np.all((found.arrival + found.ttft)[seen] > found.encoded[seen])
    # A second instance halves the queue.
    two = fleet(qwen, tower, link, 2).run(requests_of(arrival, images))
    assert np.nanmean(two.encoded - arrival) < 0.8 * np.nanmean(found.encoded - arrival)


def test_a_lone_request_by_hand(qwen: Estimator) -> None:
    tower, clock = encode_clock(qwen, IMAGE), StepClock(qwen, 2000.0)
    one = requests_of(np.array([0.0]), np.array([2.0]), 10.0)
    prefill, steps = clock.step(0, 0.0, [(200.0 + 2 * 1296, 0.0)]), sum(clock.decode(1, 2792.0 + k) for k in range(1, 10))
    link = embeddings(qwen, [qwen], IMAGE)
    apart = fleet(qwen, tower, link).run(one)
    hop = float(embedding_seconds(qwen, qwen, 2 * 1296))
    assert apart.ttft[0] == pytest.approx(tower.seconds(2) + hop + prefill, rel=1e-6)
    together = Fleet((Pool(clock, 1e9, 1, tower=tower),)).run(one)
    assert together.ttft[0] == pytest.approx(tower.seconds(2) + prefill, rel=1e-6)
    for found in (apart, together):
        assert found.tpot[0] * 9 == pytest.approx(steps, rel=1e-6)


def test_encoding_inside_holds_decoding_up(qwen: Estimator) -> None:
    """A second request's images arrive while the first decodes: its longest gap is the step that encodes and prefills."""
    tower, clock = encode_clock(qwen, IMAGE), StepClock(qwen, 2000.0)
    both = requests_of(np.array([0.0, 0.2]), np.array([0.0, 3.0]), 100.0)
    inside = Fleet((Pool(clock, 1e9, 1, tower=tower),)).run(both)
    assert inside.longest_gap[0] > tower.seconds(3)
    apart = Fleet((Pool(tower, 1e12, 1, "encode"), Pool(clock, 1e9, 1))).run(both)
    assert apart.longest_gap[0] == pytest.approx(inside.longest_gap[0] - tower.seconds(3), rel=1e-3)


@pytest.mark.parametrize("most", [1, 6])
def test_the_closed_form_of_an_encode_pool_equals_the_simulation(qwen: Estimator, most: int) -> None:
    """At 70 % of what passes of so many images carry: p50 within 10 %, p95 within 20 %, image-free requests beside."""
    tower = EncodeClock(qwen, float(image_tokens(qwen.model, *IMAGE)[0]), most)
    counts, weight = np.array([0.0, 1.0, 3.0]), np.array([0.3, 0.4, 0.3])
    mix = Mix(200 + 1296 * counts, np.ones(3), weight, images=counts)
    rate = 0.7 / float(weight @ tower.prefill_work(counts, 0.0, 0.0))
    instance = EncodeInstance(tower, 0.5)
    s = instance.state(rate, mix)
    rng = np.random.default_rng(8)
    images = rng.choice(counts, 30_000, p=weight)
    arrival = np.cumsum(rng.exponential(1 / rate, images.size))
    found = fleet(qwen, tower, Embeddings(0.0)).run(requests_of(arrival, images))
    waits = np.where(images > 0, found.encoded - arrival, 0.0)
    assert instance.ttft_quantile(0.5, s, mix) == pytest.approx(np.percentile(waits, 50), rel=0.1)
    assert instance.ttft_quantile(0.95, s, mix) == pytest.approx(np.percentile(waits, 95), rel=0.2)
    # Of a limit it answers for half.
    limit = 2 * float(np.percentile(waits, 95))
    assert instance.ttft_met(limit, s, mix) == pytest.approx(0.95, abs=0.02)


def test_a_deployment_says_who_encodes(qwen: Estimator) -> None:
    r = requests_of(np.linspace(0, 10, 50), np.full(50, 1.0), 5.0)
    colocated = {"hardware": "h100-sxm", "replicas": 2}
    apart = {"model": "qwen2.5-vl-7b", "image": IMAGE, "pools": [{**colocated, "role": "encode"}, colocated]}
    whole = deploy(Deployment.model_validate(apart), r)
    assert whole.fleet.pools[1].tower is None
    assert np.all(whole.fleet.run(r).encoder >= 0)
    apart["pools"][1] = {**colocated, "encodes": True}  # type: ignore[index]
    own = deploy(Deployment.model_validate(apart), r)
    assert own.fleet.pools[1].tower is not None
    assert np.all(own.fleet.run(r).encoder == -1)
    with pytest.raises(SpecError, match="how large images are"):
        deploy(Deployment.model_validate({**apart, "image": None}), r)
    with pytest.raises(SpecError, match="tower beside both phases"):
        replace(own.fleet.pools[1], settings=replace(own.fleet.pools[1].settings, policy="split"))


def test_the_command_replays_images(tmp_path: Path) -> None:
    rows = [f"{k * 0.5},{200 + k},20,{k % 3}" for k in range(40)]
    (tmp_path / "t.csv").write_text("arrival_s,input,output,num_images\n" + "\n".join(rows) + "\n")
    words = ["replay", str(tmp_path / "t.csv"), "--model", "qwen2.5-vl-7b", "--hw", "h100-sxm"]
    run = CliRunner().invoke(main, [*words, "--image", "1024x1024"])
    assert run.exit_code == 0, run.output
    assert "images of 1024 x 1024 pixels" in run.output
    silent = CliRunner().invoke(main, words)
    assert silent.exit_code == 2
    assert "how large" in silent.output
    assert CliRunner().invoke(main, [*words, "--image", "large"]).exit_code == 2
