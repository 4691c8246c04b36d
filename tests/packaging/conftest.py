"""What is shipped, built once per session and installed into environments of its own, without any network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Environment(NamedTuple):
    """A virtual environment and an empty folder to run in."""

    python: Path
    cwd: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, away from the checkout."""
        program, *arguments = map(str, command)
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return subprocess.run(
            [str(self.python.parent / program), *arguments],
            cwd=self.cwd, env=variables, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


def quiet(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a build step; its output is shown only if it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def distributions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and source distribution, built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    quiet(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder, cwd=root)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def wheel(distributions: tuple[Path, Path]) -> Path:
    return distributions[0]


@pytest.fixture(scope="session")
def sdist(distributions: tuple[Path, Path]) -> Path:
    return distributions[1]


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Make an environment that sees the installed dependencies, but not the installed perfmodel.

    The dependencies' folder is named in a .pth file: Python then reads the packages in it and not the .pth files in it,
    and an editable install of perfmodel is such a file.
    """

    def make(*requirement: str | Path) -> Environment:
        folder = tmp_path_factory.mktemp("env")
        quiet(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        bin_folder = "Scripts" if os.name == "nt" else "bin"
        python = folder / "venv" / bin_folder / "python"
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "cwd").mkdir()
        if requirement:
            options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
            quiet(sys.executable, "-m", "pip", "--python", python, "install", *options, *requirement)
        return Environment(python, folder / "cwd")

    return make
