"""Papers end to end: what a file says, what it may not say, and that verdicts follow what they rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from paper_files import PLAIN

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.papers.pair import pair
from perfmodel.papers.run import Runner, load, run, score
from perfmodel.papers.setting import resolve
from perfmodel.spec.paper import Paper


def paper(**changes: Any) -> Paper:
    return Paper.model_validate({**PLAIN, **changes})


def written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}, sort_keys=False))
    return str(path)


def test_a_ratio_is_that_of_two_estimators() -> None:
    result = run(paper())[0]
    plain = Estimator("llama-2-7b", "a100-sxm-80gb")
    narrow = Estimator("llama-2-7b", "a100-sxm-80gb", techniques=["kv-quantization:bits=4"])
    # Decode is close to linear in the context, so the mean over the output is its middle.
    expected = plain.decode(16, 2050) / narrow.decode(16, 2050)
    assert result.predicted == pytest.approx(expected, rel=2e-3)
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.predicted < result.high


def test_more_bits_predict_less() -> None:
    def predicted(bits: float) -> float:
        found = run(paper(parameters={**PLAIN["parameters"], "bits": {"value": bits, "from": "abstract"}}))[0].predicted
        assert found is not None
        return found

    assert predicted(2) > predicted(4) > predicted(8) > 1
    assert predicted(16) == pytest.approx(1.0)


def test_a_sweep_over_an_assumed_range_reproduces_nothing() -> None:
    def verdict(origin: str) -> str | None:
        given = {"value": 2000, "from": origin} | ({"reason": "a guess", "range": [1500, 2500]} if origin == "assumed" else {})
        swept = {**PLAIN["claims"][0], "sweep": {"input": [1000, 2000, 4000]}, "reach": "up-to", "claimed": 1.6}
        return run(paper(parameters={**PLAIN["parameters"], "input": given}, claims=[swept]))[0].verdict

    assert verdict("abstract") == "reproduced"
    assert verdict("assumed") == "consistent"


def test_an_assumption_that_decides_makes_a_verdict_consistent() -> None:
    assert run(paper())[0].predicted is not None
    at = run(paper())[0].predicted
    # Claim what the upper end of the range predicts, beyond the tolerance from the lower end.
    claim = {**PLAIN["claims"][0], "claimed": at}
    assert run(paper(claims=[claim]))[0].verdict == "reproduced"
    fixed = {**PLAIN["parameters"], "input": {"value": 2000, "from": "abstract"}}
    measured = {**PLAIN["parameters"], "input": {"value": 2000, "from": "measured"}}
    assert run(paper(parameters=fixed, claims=[claim]))[0].sourced
    assert run(paper(parameters=measured, claims=[claim]))[0].verdict == "derived"
    wide = {**PLAIN["parameters"], "batch": {"value": 16, "range": [8, 16], "from": "assumed", "reason": "a guess"}}
    assert run(paper(parameters=wide, claims=[{**claim, "claimed": at * 1.1}]))[0].verdict == "consistent"


def test_null_models_are_scored_beside_ours() -> None:
    # 16 sequences of 2050 tokens x 512 KiB = 17.2 GB, weights 13.2 GB read: bytes alone say 30.4 / (13.2 + 17.2/4) = 1.74.
    null = Runner(paper())
    from perfmodel.papers.metrics import Bare

    assert null.value("full.tpot / narrow.tpot", {}, Bare) == pytest.approx(1.74, rel=0.02)
    result = run(paper(claims=[{**PLAIN["claims"][0], "claimed": 1.74}]))[0]
    assert result.nulls == (False, True)
    assert run(paper(claims=[{**PLAIN["claims"][0], "claimed": 1.05}]))[0].nulls[0]
    assert score([result]).null_ratio_alone == 1


def test_tokens_that_techniques_find_are_not_computed_under_load_either() -> None:
    found = [{"kind": "prefix-cache", "device": 1.0}, {"kind": "session-cache", "turn": 1, "device": 1.0}]
    for technique in found:
        settings = PLAIN["settings"] | {"found": {"like": "full", "prefix": 0, "techniques": [technique]},
                                        "stated": {"like": "full", "prefix": "=prefix"}}  # fmt: skip
        prefix = {"value": 1999, "unit": "token", "from": "abstract"}
        runner = Runner(paper(settings=settings, parameters=PLAIN["parameters"] | {"prefix": prefix}))
        # All but the last token of 2000: the same as a stated prefix of 1999.
        assert runner.value("found.saturation", {}) == pytest.approx(runner.value("stated.saturation", {}), rel=0.02)
        assert runner.value("found.saturation", {}) > 1.2 * runner.value("full.saturation", {})


def test_mean_first_token_is_that_of_a_queue_with_one_server() -> None:
    """Prompts alone, all alike: M/D/1, S + u S / 2 (1 - u); those that wait together end together, at most a pass later."""
    settings = {"queue": {"model": "=model", "hardware": "=device", "system": "vllm-0.2", "input": "=input", "output": 1, "rate": "=rate"}}
    rate = {"value": 1, "unit": "1/s", "from": "abstract"}
    runner = Runner(paper(settings=settings, parameters=PLAIN["parameters"] | {"rate": rate}, claims=[]))
    alone = runner.value("queue.mean_ttft", {"rate": 1e-4})
    for busy in (0.3, 0.6, 0.8):
        by_hand = alone * (1 + busy / 2 / (1 - busy))
        assert by_hand <= runner.value("queue.mean_ttft", {"rate": busy / alone}) <= by_hand + busy * alone


def test_a_sweep_takes_the_best_for_an_up_to() -> None:
    swept = {**PLAIN["claims"][0], "reach": "up-to", "sweep": {"input": [500, 1000, 3000]}}
    one = run(paper(claims=[{**PLAIN["claims"][0]}], parameters={**PLAIN["parameters"], "input": {"value": 3000, "from": "abstract"}}))[0]
    assert run(paper(claims=[swept]))[0].predicted == pytest.approx(one.predicted)


def test_an_infeasible_setting_is_open_with_its_reason() -> None:
    big = {**PLAIN["parameters"], "model": {"value": "llama-2-70b", "from": "abstract"}, "batch": {"value": 1, "from": "abstract"}}
    settings = {k: {**v, "batch": "max"} if k == "full" else v for k, v in PLAIN["settings"].items()}
    result = run(paper(parameters=big, settings=settings))[0]
    assert result.verdict == "open"
    assert "fits" in result.reason


def test_pair_puts_the_proposal_last() -> None:
    first, second = pair(paper())
    assert (first.name, second.name) == ("full", "narrow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": [{**PLAIN["claims"][0], "predict": "full.tpt / narrow.tpot"}]}, "did you mean 'tpot'"),
        ({"claims": [{**PLAIN["claims"][0], "predict": "ful.tpot"}]}, "did you mean 'full'"),
        ({"claims": [{**PLAIN["claims"][0], "predict": "full.tpot / __import__('os')"}]}, "__import__"),
        ({"claims": [{**PLAIN["claims"][0], "predict": None}]}, "one of"),
        ({"claims": [{**PLAIN["claims"][0], "sweep": {"inpt": [1]}}]}, "no parameter"),
        ({"settings": {"full": {**PLAIN["settings"]["full"], "input": 4000}}}, "bare 4000"),
        ({"settings": {"full": {**PLAIN["settings"]["full"], "model": "llama-2-7b"}}}, "bare 'llama-2-7b'"),
        ({"settings": {"full": {"like": "full"}}, "claims": []}, None),
        ({"parameters": {**PLAIN["parameters"], "input": {"value": 10, "from": "assumed"}}}, "reason"),
        ({"parameters": {**PLAIN["parameters"], "input": {"value": 10, "from": "assumed", "reason": "x"}}}, "fixed"),
        ({"parameters": {**PLAIN["parameters"], "input": {"value": 10, "from": "paper"}}}, "source"),
        ({"parameters": {**PLAIN["parameters"], "input": {"value": 10, "range": [5, 20], "from": "assumed", "reason": "x"}}}, "factor"),
        ({"parameters": {**PLAIN["parameters"], "input": {"value": 10, "range": [5, 10], "from": "abstract"}}}, "assumed"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_error_with_its_place(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    path = written(tmp_path, **change)
    if message is None:
        with pytest.raises(SpecError, match="circle"):
            Runner(load(path)).value("full.tpot", {})
        return
    with pytest.raises(SpecError, match=message) as caught:
        load(path)
    assert caught.value.file == path
    assert caught.value.line


def test_a_setting_adds_to_the_technique_of_its_system() -> None:
    paper = Paper.model_validate({
        "id": "p", "title": "P", "family": "f", "relation": "core", "mechanism": "m",
        "settings": {"a": {"model": "llama-2-7b", "hardware": "a100-sxm-80gb", "system": "hf-flash-2024",
                           "techniques": [{"kind": "kernel-launch", "launches": "graph"}, {"kind": "attention-kernel", "repeated": True}]}},
    })  # fmt: skip
    assert resolve(paper, "a", {}).techniques == (
        {"kind": "kernel-launch", "elementwise": 6, "modules": True, "launches": "graph", "issue": 1.2e-5, "gap": 4e-7},
        {"kind": "attention-kernel", "copies": 1, "copy_rate": 0.5, "repeated": True},
    )
