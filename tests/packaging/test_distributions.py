"""What the wheel and the source distribution hold, and that each way of installing gives a working command."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perfmodel.catalog import KINDS


def files_under(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_puts_one_package_into_site_packages(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"perfmodel"}
    assert len(top) == 2


def test_the_wheel_holds_the_whole_package(wheel: Path, root: Path) -> None:
    inside = {name.removeprefix("perfmodel/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("perfmodel/")}
    assert {name for name in inside if not name.startswith("_catalog/")} == files_under(root / "perfmodel")


@pytest.mark.parametrize("kind", KINDS)
def test_the_wheel_holds_the_data_folders(wheel: Path, root: Path, kind: str) -> None:
    prefix = f"perfmodel/_catalog/{kind}/"
    inside = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix)}
    assert inside == files_under(root / kind)


def test_the_catalogue_has_hardware_and_models(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "perfmodel/_catalog/hardware/nvidia/h100-sxm.yaml" in names
    assert "perfmodel/_catalog/models/meta/llama-3.1-8b.yaml" in names


def test_the_wheel_names_its_command_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {name.split("/", 1)[1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "perfmodel = perfmodel.cli:main" in texts["entry_points.txt"]
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]


def test_the_source_distribution_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = (p for p in tmp_path.iterdir() if p.is_dir())
    for needed in ("tests/conftest.py", "tests/need.py", "examples", "Makefile", "README.md", "LICENSE", "cli.py"):
        assert (unpacked / needed).exists(), needed
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=unpacked, check=True, capture_output=True, timeout=300)
    [again] = (tmp_path / "dist").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


# --- each way of installing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["wheel", "editable", "checkout"])
def command(
    request: pytest.FixtureRequest, root: Path, make_environment: Callable[..., Any]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, as installed from the wheel, in place, or not at all."""
    if request.param == "checkout":
        return partial(make_environment().run, "python", root / "cli.py")
    if request.param == "editable":
        return partial(make_environment("--editable", root).run, "perfmodel")
    return partial(make_environment(request.getfixturevalue("wheel")).run, "perfmodel")


def test_help(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert "plan" in done.stdout


@pytest.mark.parametrize(("kind", "name"), [("hardware", "h100-sxm"), ("models", "llama-3.1-8b"), ("techniques", "kivi-2bit")])
def test_show(command: Callable[..., subprocess.CompletedProcess[str]], kind: str, name: str) -> None:
    done = command(kind, "show", name, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert isinstance(shown, dict)
    assert shown["name"] == name


def test_a_paper_runs(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("papers", "run", "kivi", "--json")
    assert done.returncode == 0, done.stderr
    assert all(claim["predicted"] > 1 for claim in json.loads(done.stdout)["claims"])


def test_bad_input_is_exit_code_two_and_no_traceback(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = command("hardware", "show", "h100-smx", "--json")
    assert done.returncode == 2
    assert "did you mean 'h100-sxm'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_reads_its_own_catalogue(wheel: Path, root: Path, make_environment: Callable[..., Any]) -> None:
    environment = make_environment(wheel)
    program = "from perfmodel import catalog; print(catalog.find('hardware', 'h100-sxm')); print(len(catalog.names('models')))"
    done = environment.run("python", "-c", program)
    assert done.returncode == 0, done.stderr
    path, models = done.stdout.split()
    assert Path(path).is_relative_to(environment.python.parent.parent)
    assert int(models) == len({p.stem for p in (root / "models").rglob("*.yaml")})
