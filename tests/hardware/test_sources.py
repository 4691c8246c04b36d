"""How many numbers nobody has verified: tallied, never rising, and paid for with a wider band."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel import catalog
from perfmodel.machine import from_device
from perfmodel.spec.base import UNVERIFIED
from perfmodel.spec.hardware import Device, Node

# Cited sections and numbers without an opened source. Lower these when you verify some; a new file may not raise them.
# Representative builds (vendor generic) are nobody's product: there is nothing to verify, and they say so.
UNVERIFIED_AT_MOST = {"Device": 248, "Node": 116, "Network": 19}


def _tally() -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for name in catalog.names("hardware"):
        spec = catalog.load_hardware(name)
        if isinstance(spec, Node) and spec.vendor == "generic":
            continue
        keys = list(spec.source_keys().values())
        kind = type(spec).__name__
        cited, open_ = counts.get(kind, (0, 0))
        counts[kind] = (cited + len(keys), open_ + keys.count(UNVERIFIED))
    return counts


def test_unverified_numbers_do_not_grow() -> None:
    tally = _tally()
    for kind, most in UNVERIFIED_AT_MOST.items():
        cited, open_ = tally[kind]
        assert open_ <= most, f"{open_} of {cited} citations of {kind} files are unverified, at most {most} may be"
    assert sum(cited for cited, _ in tally.values()) > 900


@pytest.mark.parametrize("section", ["compute", "memory"])
def test_an_unverified_section_widens_the_band(section: str) -> None:
    device = catalog.load_device("h100-sxm")
    assert device.source_keys()[section] != UNVERIFIED
    doubtful = device.model_copy(update={section: getattr(device, section).model_copy(update={"source": UNVERIFIED})})
    assert isinstance(doubtful, Device)
    parameter = {"compute": "matrix_efficiency", "memory": "bandwidth_efficiency"}[section]
    before, after = from_device(device, None).sigma[parameter], from_device(doubtful, None).sigma[parameter]
    assert after > before


def test_every_uncertain_parameter_moves_the_perturbed_machine() -> None:
    m = from_device(catalog.load_device("l40s"), None)
    rows = m.perturbed()
    for i, name in enumerate(m.sigma, start=1):
        value = np.asarray(getattr(rows, name, rows.law.get(name)))
        assert value[i] / value[0] == pytest.approx(np.exp(m.sigma[name]))
