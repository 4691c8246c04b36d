"""Which two settings of a paper are set side by side, and what the comparison of denoisers says."""

from __future__ import annotations

import copy

import pytest
from click.testing import CliRunner
from paper_files import PLAIN

from perfmodel.cli import main
from perfmodel.denoising import denoise
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.explain.denoised import compare
from perfmodel.papers.pair import pair
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
    with pytest.raises(SpecError, match="a pool for each phase"):
        pair(alone)


@pytest.mark.parametrize("name", ["h2o", "kvquant", "hybrimoe", "apex", "dkv-cache", "cachequant"])
def test_papers_are_explained(name: str) -> None:
    first, second = pair(load(name))
    assert first.setting.model == second.setting.model
    done = CliRunner().invoke(main, ["explain", "--paper", name])
    assert done.exit_code == 0, done.output
    assert "before" in done.output


def test_a_paper_of_pools_says_why_it_is_not() -> None:
    done = CliRunner().invoke(main, ["explain", "--paper", "distserve"])
    assert done.exit_code == 2
    assert "a pool for each phase" in done.output


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
