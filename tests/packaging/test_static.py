"""The static checks of `make lint`, and rules of the house that no tool knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import need
import pytest

MACHINE_PATH = re.compile(r"(?<![\w.)\]}*])/(?:root|home/\w+|Users/\w+|work|opt|mnt)/\w")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b")
TEXT = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".html", ".css", ".js", ".cfg", ".txt", ".csv"}


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    """The files of the repository: tracked, or about to be."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := root / name).is_file()]


@pytest.mark.parametrize("command", ["ruff check .", "lint-imports --no-cache", "mypy"])
def test_static_check(root: Path, command: str) -> None:
    name, *arguments = command.split()
    done = subprocess.run(
        [need.tool(name), *arguments], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def hits(files: list[Path], root: Path, pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in (p for p in files if p.suffix in TEXT):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()[:120]}")
    return found


def test_no_file_names_a_path_of_somebodys_machine(files: list[Path], root: Path) -> None:
    assert hits(files, root, MACHINE_PATH) == []


def test_the_pattern_tells_paths_from_addresses() -> None:
    folder = "/".join(("", "home", "ann", "perfmodel"))
    assert MACHINE_PATH.search(f"cd {folder}")
    assert MACHINE_PATH.search(f'"{folder}"')
    assert not MACHINE_PATH.search(f"https://example.org{folder}")


def test_nothing_is_left_unfinished_in_the_package(files: list[Path], root: Path) -> None:
    assert hits([p for p in files if root / "perfmodel" in p.parents], root, UNFINISHED) == []


def test_no_file_is_big(files: list[Path], root: Path) -> None:
    assert [str(p.relative_to(root)) for p in files if p.stat().st_size > 2_000_000] == []


def test_modules_stay_short(files: list[Path], root: Path) -> None:
    modules = [p for p in files if p.suffix == ".py" and root / "tests" not in p.parents]
    lengths = {str(p.relative_to(root)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
