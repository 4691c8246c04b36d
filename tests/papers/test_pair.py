"""Which two settings of a paper are set side by side, and what the comparison of denoisers says."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner
from paper_files import PLAIN

from perfmodel.cli import main
from perfmodel.denoising import denoise
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.explain.denoised import compare
from perfmodel.papers.pair import pair
from perfmodel.papers.pooled import Pooled, pooled
from perfmodel.papers.run import load
from perfmodel.spec.paper import Paper


def paper(settings: dict[str, object], predict: str) -> Paper:
    data = copy.deepcopy(PLAIN)
    data["settings"] = data["settings"] | settings
    data["claims"][0]["predict"] = predict
    return Paper.model_validate(data)


def names(p: Paper) -> tuple[str, str]:
    first, second = pair(p)
    return first.name, second.name


def test_of_three_settings_the_one_with_more_techniques_stands_beside_the_one_without() -> None:
    longer = {"like": "full", "input": "=input + output"}
    assert names(paper({"longer": longer}, "longer.tpot * full.tpot / narrow.tpot")) == ("full", "narrow")


def test_where_claims_name_one_setting_the_file_is_searched() -> None:
    assert names(paper({}, "narrow.tpot")) == ("full", "narrow")


def test_pools_are_not_set_side_by_side() -> None:
    pools = {"like": "full", "roles": {"prefill": {"devices": 1}, "decode": {"devices": 1}}}
    data = paper({"pools": pools}, "full.tpot / pools.goodput")
    assert names(data) == ("full", "narrow")
    alone = data.model_copy(update={"settings": {k: v for k, v in data.settings.items() if k != "narrow"}})
    with pytest.raises(SpecError, match="no two settings"):
        pair(alone)


@pytest.mark.parametrize("name", ["h2o", "kvquant", "hybrimoe", "apex", "dkv-cache", "cachequant"])
def test_papers_are_explained(name: str) -> None:
    first, second = pair(load(name))
    assert first.setting.model == second.setting.model
    done = CliRunner().invoke(main, ["explain", "--paper", name])
    assert done.exit_code == 0, done.output
    assert "before" in done.output


def two_layouts(prefill: int, decode: int) -> Paper:
    """One pool of two devices against pools of `prefill` and `decode` devices, with two devices an instance."""
    base = {"like": "full", "input": "=input", "output": "=output"}
    roles = {"prefill": {"devices": "=first"}, "decode": {"devices": "=second"}}
    data = copy.deepcopy(PLAIN)
    counts = {"first": prefill, "second": decode}
    data["parameters"] |= {k: {"value": v, "unit": "device", "from": "paper", "source": "section 1"} for k, v in counts.items()}
    data["settings"] = {"full": data["settings"]["full"], "one": base, "apart": base | {"roles": roles}}
    data["claims"][0]["predict"] = "one.saturation / apart.goodput"
    return Paper.model_validate(data)


def served(p: Paper) -> Pooled:
    found = pooled(p)
    assert found is not None
    return found


def test_pools_share_the_load_of_their_devices() -> None:
    """At x requests/s a device of four, an instance of the three that prefill sees 4 x / 3: busy for that many prompts' seconds."""
    found = served(two_layouts(3, 1))
    prefill, decode = found.after.parts
    each = found.loads[1]
    e = prefill.pool.instance.clock.estimator
    assert (prefill.share, decode.share) == pytest.approx((4 / 3, 4.0))
    alone = float(e.prefill(1, found.input))
    assert prefill.data(each)["prompts_share"] == pytest.approx(4 / 3 * each * alone, rel=0.1)
    # Little's law: sequences that decode = rate x output x step.
    s = decode.pool.state(4 * each)
    assert decode.data(each)["decoding"] == pytest.approx(4 * each * (found.output - 1) * s.step, rel=0.05)
    assert prefill.tpot(each) is None
    assert decode.ttft(each) is None
    more = served(two_layouts(1, 3))
    assert more.after.parts[0].data(each)["prompts_share"] > prefill.data(each)["prompts_share"]
    assert more.after.parts[1].tpot(each) < decode.tpot(each)  # type: ignore[operator]


def test_break_even_is_where_the_times_cross() -> None:
    """A pool for each phase has the shorter TTFT at little load, where prompts meet no decoding, until its prefill saturates."""
    found = served(two_layouts(1, 3))
    at = found.breakeven("ttft")["at"]
    below, above = (found.before.time("ttft", x) - found.after.time("ttft", x) for x in (0.9 * at, 1.1 * at))
    assert below > 0 > above


@pytest.mark.parametrize("name", ["distserve", "mooncake", "accellm", "sarathi-serve"])
def test_a_paper_of_pools_is_explained_under_load(name: str) -> None:
    done = CliRunner().invoke(main, ["explain", "--paper", name])
    assert done.exit_code == 0, done.output
    assert "requests/s a device" in done.output
    data = json.loads(CliRunner().invoke(main, ["explain", "--paper", name, "--json"]).output)
    assert len(data["settings"]) == 2
    assert all(x["saturation_per_device"] > data["loads_per_device"][-1] for x in data["settings"].values())


def test_steps_that_are_skipped_free_every_resource_alike() -> None:
    # By hand: of 50 steps the first and the last run, and of the 48 between a quarter: 14 in all, 0.28 of the work.
    # What lies outside the layers runs in every step: a thousandth more.
    plain = Estimator("dit-xl-2", "a100-sxm-80gb")
    cached = Estimator("dit-xl-2", "a100-sxm-80gb", techniques=["denoising-cache:skipped=0.75,first=1,last=1"])
    found = compare(plain, cached, 2, 1024, 50)
    old, new = found.before.busy["compute"], found.after.busy["compute"]
    assert new / old == pytest.approx(14 / 50, rel=3e-3)
    assert found.before.seconds == denoise(plain, 2, 1024, 50).seconds
    assert max(found.before.busy.values()) <= found.before.seconds * (1 + 1e-9)
    assert found.breakeven["batch"]["at"] is None
    assert found.after.cached_bytes > found.before.cached_bytes == 0
