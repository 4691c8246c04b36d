"""Optional tools of the tests: each function returns the tool, or skips the caller with the reason.

With PERFMODEL_REQUIRE_ALL=1 a missing tool is a failure, so that a run meant to be complete cannot skip in silence.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from types import ModuleType
from typing import NamedTuple, NoReturn

import pytest


class Chromium(NamedTuple):
    """Paths of the browser and of the driver of the same version."""

    browser: str
    driver: str


def torch() -> ModuleType:
    """PyTorch, any build."""
    return _module("torch", "pip install 'perfmodel[torch]'")


def transformers() -> ModuleType:
    """Hugging Face transformers, told to stay off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return _module("transformers", "pip install 'perfmodel[test]'")


def chromium() -> Chromium:
    """Chromium and chromedriver, from $CHROMIUM and $CHROMEDRIVER or the search path."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not browser or not driver:
        _missing("chromium and chromedriver", "apt-get install chromium chromium-driver")
    return Chromium(browser, driver)


def tool(name: str) -> str:
    """Path of a command of the environment that runs the tests (ruff, mypy, lint-imports)."""
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        _missing(name, "pip install 'perfmodel[dev]'")
    return path


def cbc() -> str:
    """The second integer-programming solver, by its name in perfmodel.planner.solver."""
    from perfmodel.planner import solver

    try:
        solver.cbc()
    except solver.MissingSolver:
        _missing("CBC", "apt-get install coinor-cbc")
    return "cbc"


def _module(name: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        _missing(name, remedy)


def _missing(what: str, remedy: str) -> NoReturn:
    reason = f"{what} is not installed ({remedy})"
    if os.environ.get("PERFMODEL_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
