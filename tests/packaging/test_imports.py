"""Importing the package and asking for help stay cheap: the heavy libraries are loaded by those who need them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"highspy", "jinja2", "pandas", "plotly", "pulp", "scipy", "sympy", "torch", "transformers"}


def loaded_by(program: str, root: Path) -> set[str]:
    """Top-level modules in sys.modules after a program has run in a fresh interpreter."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + report], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy(root: Path) -> None:
    loaded = loaded_by("import perfmodel", root)
    assert "perfmodel" in loaded
    assert not loaded & (HEAVY | {"numpy", "pydantic"})


def test_help_loads_nothing_heavy(root: Path) -> None:
    program = "from perfmodel.cli import main\ntry: main(['--help'])\nexcept SystemExit as done: assert not done.code"
    loaded = loaded_by(program, root)
    assert "perfmodel" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("library", ["sympy", "plotly"])
def test_the_probe_would_notice(root: Path, library: str) -> None:
    assert library in loaded_by(f"import {library}", root) & HEAVY


def test_an_unknown_verb_is_an_attribute_error() -> None:
    import perfmodel

    with pytest.raises(AttributeError, match="has no attribute 'estimat'"):
        perfmodel.estimat  # noqa: B018


def test_the_version_is_the_one_of_the_project_file(root: Path) -> None:
    import tomllib

    import perfmodel

    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == perfmodel.__version__
