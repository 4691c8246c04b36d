"""Run the command line in this process, as a shell would: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from perfmodel import catalog
from perfmodel.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as strict JSON: no NaN, no Infinity, nothing beside the document."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`cli("estimate", "--model", …)` with arguments of any type."""
    # --specs is meant to last for a process; here it must not outlive the test.
    monkeypatch.setattr(catalog, "_user_roots", [])
    catalog._index.cache_clear()
    catalog.nodes.cache_clear()

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    yield run
    catalog._index.cache_clear()
    catalog.nodes.cache_clear()
