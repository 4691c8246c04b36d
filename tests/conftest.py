"""What every test shares: a cache folder of its own, no user settings, and repeatable random examples."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before any test module is collected, because parametrised tests read the catalogue at import.
_CACHE = tempfile.mkdtemp(prefix="perfmodel-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE
os.environ.pop("PERFMODEL_SPECS", None)

# A failure must repeat, and a busy machine must not fail an example for being slow.
hypothesis.settings.register_profile("perfmodel", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("perfmodel")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
