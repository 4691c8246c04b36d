"""Measured copies and local drives, and the arithmetic behind them."""

from __future__ import annotations

import pytest

from perfmodel import calibration
from perfmodel.validation.kinds import copies
from perfmodel.validation.rows import Predicted, Refused, Row

pytestmark = pytest.mark.filterwarnings("ignore")
H100, A100 = "H100-SXM-80GB", "A100-SXM-80GB"


def row(**cells: str | float) -> Row:
    base = {"hardware": H100, "phase": "memcpy", "metric": "bandwidth", "unit": "GB/s", "value": 1}
    return Row("f.csv", 2, {k: str(v) for k, v in (base | cells).items()})


def answer(r: Row) -> Predicted | Refused:
    return next(k for k in (copies.COPY, copies.STORAGE) if k.claims(r)).predict([r])[0]


def value(r: Row) -> float:
    outcome = answer(r)
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


# GB/s of Azure's benchmarking guide (MIT licence).
MEASURED = [
    (A100, "babelstream_copy", 1610), (A100, "babelstream_triad", 1700), (A100, "babelstream_dot", 1750),
    (H100, "babelstream_copy", 2900), (H100, "babelstream_triad", 2970), (H100, "babelstream_dot", 3180),
    (A100, "host_to_device", 26.28), (H100, "host_to_device", 51.0), (H100, "device_to_host", 52.0),
    (A100, "device_to_device_read", 423), (H100, "device_to_device_read", 672),
]  # fmt: skip


@pytest.mark.parametrize(("hardware", "op", "measured"), MEASURED)
def test_measured_copies(hardware: str, op: str, measured: float) -> None:
    assert value(row(hardware=hardware, op=op)) == pytest.approx(measured, rel=0.2)


def test_small_host_copies_are_latency() -> None:
    port = calibration.link_parameters("pcie5-x16")
    latency, share = (port[k].parameter.value for k in ("link_latency", "link_efficiency"))
    # 64 KiB over 63 GB/s x share.
    expected = latency + 65536 / (63e9 * share)
    assert value(row(op="host_to_device", metric="latency", unit="us", msg_bytes=65536)) == pytest.approx(
        expected * 1e6
    )
    assert value(row(op="host_to_device", msg_bytes=65536)) == pytest.approx(65536 / expected / 1e9)


def test_both_directions_count_twice() -> None:
    assert value(row(op="host_to_device_bidirectional")) == pytest.approx(2 * value(row(op="host_to_device")))
    assert value(row(op="device_to_device_read")) == pytest.approx(2 * value(row(op="device_to_device")))


def storage(**cells: str | float) -> Row:
    return row(**({"phase": "storage", "op": "sequential_read_1M"} | cells))


def test_an_array_reads_at_the_sum_of_its_drives() -> None:
    # A node of 8 drives of 6.5 and 3.5 GB/s; the guide measured 55.3 and 33.9 GB/s.
    assert value(storage()) == pytest.approx(8 * 6.5)
    assert value(storage(op="sequential_write_1M")) == pytest.approx(8 * 3.5)
    assert value(storage()) == pytest.approx(55.3, rel=0.1)
    assert value(storage(op="sequential_write_512k")) == pytest.approx(33.9, rel=0.2)


@pytest.mark.parametrize(
    ("hardware", "op", "measured"),
    [(A100, "random_read_1k", 0.40), (A100, "sequential_write_1k", 0.39), (H100, "random_write_1k", 0.37)],
)
def test_small_requests_are_limited_by_the_host(hardware: str, op: str, measured: float) -> None:
    assert value(storage(hardware=hardware, op=op)) == pytest.approx(measured, rel=0.15)


def test_one_drive_by_its_own_name() -> None:
    assert value(storage(hardware="nvme-gen4")) == pytest.approx(6.5)
    # One request of 4 KiB at a time: 80 us + 4096 B / 6.5 GB/s = 80.63 us.
    with calibration.replaced({"law.storage_latency": 80e-6}):
        assert value(storage(hardware="nvme-gen4", op="random_read_4k", metric="latency", unit="us")) == pytest.approx(
            80.63, abs=0.01
        )
        assert value(storage(hardware="nvme-gen4", op="random_read_4k", note="iodepth=1")) == pytest.approx(
            4096 / 80.63e-6 / 1e9, rel=1e-3
        )


def test_random_reads_stop_at_the_operations_of_a_drive() -> None:
    # A SATA drive of 98,000 operations a second: 98e3 x 4096 B = 0.401 GB/s, below its 0.5 GB/s in sequence.
    assert value(storage(hardware="sata-ssd", op="random_read_4k")) == pytest.approx(0.4014, rel=1e-3)


@pytest.mark.parametrize(
    ("r", "reason"),
    [
        (row(op="teleport"), "unknown copy 'teleport'"),
        (storage(op="trim_1M"), "unknown storage operation"),
        (storage(op="sequential_read"), "size of a request not stated"),
        (storage(hardware="A30"), "no local drives"),
        (storage(hardware="cxl-expander"), "cxl-expander"),
        (row(op="host_to_device", hardware="no-such"), "unknown hardware"),
    ],
)
def test_refusals(r: Row, reason: str) -> None:
    outcome = answer(r)
    assert isinstance(outcome, Refused), outcome
    assert reason in str(outcome)
