"""Every command and every snippet of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True) for block in _blocks("sh") for line in block.splitlines() if line.strip()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "perfmodel"], ids=lambda c: " ".join(c[1:4]))
def test_command_runs(command: list[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / Path(a).name) if a.startswith("out/") else a for a in command[1:]]
    run = subprocess.run(
        [sys.executable, "-m", "perfmodel", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_only_known_programs_are_shown() -> None:
    assert {c[0] for c in COMMANDS} == {"make", "perfmodel"}


def test_make_targets_do_what_the_readme_says() -> None:
    for target in (c[1] for c in COMMANDS if c[0] == "make"):
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        wanted = {"demo": "perfmodel plan examples/azure-chat-70b.yaml --out out/demo", "test": "-m pytest"}[target]
        assert wanted in dry


@pytest.mark.filterwarnings("ignore::perfmodel.prices.StalePrice")  # the catalogue's prices age
def test_python_snippets_run() -> None:
    for snippet in _blocks("python"):
        space: dict[str, object] = {}
        exec(snippet, space)
        step = space["step"]
        assert step.shape == (256,)  # type: ignore[attr-defined]
        assert (step > 0).all()  # type: ignore[operator]
        assert space["first"].shape == (3,)  # type: ignore[attr-defined]
        assert space["answer"]["tpot_s"] > 0  # type: ignore[index]


def test_plan_snippet_is_a_valid_plan_file(tmp_path: Path) -> None:
    from perfmodel.spec import yaml
    from perfmodel.spec.plan import PlanFile

    for snippet in _blocks("yaml"):
        assert yaml.validate(yaml.parse(snippet), PlanFile).model == "llama-3.1-70b"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
