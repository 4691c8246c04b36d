"""The program around the verbs: start-up, help, version, warnings, pipes and interrupts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import perfmodel
from perfmodel.cli import main

VERBS = (
    "estimate", "denoise", "explain", "plan", "replay", "report", "emit", "lint", "place", "validate", "calibrate", "ingest", "measure-next",
    "trace", "techniques", "papers", "models", "hardware",
)  # fmt: skip
HEAVY = ("numpy", "sympy", "pulp", "highspy", "plotly", "jinja2", "pydantic", "yaml", "rich", "torch")
PROGRAM = "from perfmodel.cli import main; main()"


def shell(*arguments: str, code: str = PROGRAM, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_help_imports_nothing_heavy() -> None:
    """Start-up time is what is imported, so the imports are tested and not the clock of a busy machine."""
    code = f"""
import sys
from perfmodel.cli import main
try:
    main(["--help"])
except SystemExit as error:
    assert not error.code
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
assert not heavy, heavy
"""
    done = shell(code=code)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_an_estimate_imports_neither_solver_nor_pages() -> None:
    code = """
import sys
from perfmodel.cli import main
try:
    main(["estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--json"])
except SystemExit as error:
    assert not error.code
heavy = sorted({"sympy", "pulp", "highspy", "plotly", "jinja2", "torch", "scipy", "pandas"} & set(sys.modules))
assert not heavy, heavy
"""
    done = shell(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_verb(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 0
    assert outcome.err == ""
    assert all(f"\n  {verb} " in outcome.out for verb in VERBS)
    assert set(main.list_commands(None)) == set(VERBS)


@pytest.mark.parametrize(
    "verb",
    [
        ("estimate",),
        ("explain",),
        ("plan",),
        ("techniques", "list"),
        ("techniques", "show"),
        ("papers", "list"),
        ("papers", "show"),
        ("papers", "run"),
        ("models", "list"),
        ("models", "show"),
        ("hardware", "list"),
        ("hardware", "show"),
    ],
)
def test_every_verb_has_help_and_json(cli: Callable[..., Any], verb: tuple[str, ...]) -> None:
    outcome = cli(*verb, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: perfmodel {' '.join(verb)} ")
    assert "--json" in outcome.out
    assert "--specs" in outcome.out


def test_explain_takes_the_options_of_estimate() -> None:
    estimate, explain = (main.get_command(None, verb) for verb in ("estimate", "explain"))
    more = {"--paper"}
    assert {o for p in estimate.params for o in p.opts} | more == {o for p in explain.params for o in p.opts}


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"perfmodel {perfmodel.__version__}\n"


def test_the_door_of_the_checkout(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "models", "show", "nonsense"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown model 'nonsense'")


def test_stdout_that_is_closed_early() -> None:
    """`perfmodel hardware list | head -1` must end without a traceback."""
    reader = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "hardware", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert "Traceback" not in reader.stderr.read()
    reader.stderr.close()
    assert reader.wait(timeout=60) in (0, 1)


def test_a_file_that_cannot_be_written(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.html")

    monkeypatch.setattr("perfmodel.estimates.estimate", full)
    outcome = cli("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: out/report.html: {os.strerror(errno.ENOSPC)}\n"


def test_an_interrupt_ends_quietly(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perfmodel.estimates.estimate", interrupted)
    outcome = cli("estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_our_warnings_are_one_line_each(cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "hardware" / "prices"
    folder.mkdir(parents=True)
    (folder / "old.yaml").write_text(
        "kind: prices\nprovider: attic\nregion: here\ndate: '2020-01-01'\nsources: {}\n"
        "items:\n  - {instance: old box, node: hgx-h100-8, term: on-demand, price: 0.8 USD/h, source: unverified}\n",
        encoding="utf-8",
    )
    arguments = ("--specs", tmp_path, "estimate", "--model", "llama-3.1-8b", "--hw", "h100-sxm", "--json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as `python -W error` would; shown all the same
        outcome = cli(*arguments)
    assert outcome.code == 0
    assert outcome.json["usd_per_hour"] == pytest.approx(0.1)
    lines = outcome.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: price of old box (attic) is ")
    assert "perfmodel" not in lines[0]
