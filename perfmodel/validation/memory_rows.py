"""Files of what serving engines say they hold per device: one start-up a line, several logged quantities in it."""

from __future__ import annotations

from pathlib import Path

from perfmodel.errors import PerfmodelError
from perfmodel.validation.kinds.memory import QUANTITIES
from perfmodel.validation.memory_lines import read_lines
from perfmodel.validation.rows import Predicted, Refused, header
from perfmodel.validation.score import Scored

_REQUIRED = ("engine", "engine_version", "model", "quant", "gpu", "weights_gib_per_gpu", "kv_tokens")


def is_memory_file(path: str | Path) -> bool:
    """Whether a file has the columns of start-up logs instead of the tidy ones. Raises SpecError for no table."""
    names = header(path)
    return "metric" not in names and all(name in names for name in _REQUIRED)


def score_memory(path: str | Path) -> list[Scored]:
    """Every quantity that a line of such a file logs, with its prediction or the reason there is none.

    Quantities (`metric`): weights, non_torch, activation and graphs in GiB per device; kv_tokens from the settings
    alone; kv_tokens_given_bytes from the logged bytes of the pool. Raises SpecError for a file that is no table.
    """
    found = []
    for line in read_lines(path):
        for metric, quantity in QUANTITIES.items():
            measured = quantity.logged(line)
            if measured is None:
                continue
            outcome: Predicted | Refused
            try:
                if measured <= 0:
                    raise Refused("value is not positive")
                outcome = quantity.predict(line)
            except Refused as reason:
                outcome = reason
            except PerfmodelError as error:
                outcome = Refused(str(error).splitlines()[0])
            found.append(Scored(line.row(metric, measured, quantity.unit), measured, outcome, "memory"))
    return found
