"""Text of a disaggregated layout (`tp4 pp1 dp1 moe_ep4 bs32 workers2`, `2x dep8`) as degrees and instances."""

from __future__ import annotations

import re
from typing import NamedTuple

from perfmodel.validation.kinds import instance
from perfmodel.validation.kinds.instance import Instance
from perfmodel.validation.rows import Refused, Row

_WORD = re.compile(r"([a-z_]+)\s*[=:]?\s*(\d+)")
_TIMES = re.compile(r"(?:^|\s)(\d+)\s*x\s*(?=[a-z(\[])")
_NAMES = {
    "tp": ("tp",), "pp": ("pp",), "dp": ("dp",), "ep": ("ep", "moe_ep"), "workers": ("workers", "worker", "w", "instances"),
    "batch": ("bs", "batch", "batch_size", "b"),
    # Shorthands: tensor- or data-parallel attention with experts divided over the same devices.
    "tep": ("tep",), "dep": ("dep",),
}  # fmt: skip


class Pool(NamedTuple):
    """Instances of one role. `workers` and `batch` are 0 where the text does not say."""

    tp: int
    pp: int
    dp: int
    ep: int
    workers: int
    batch: int

    @property
    def devices(self) -> int:
        """Devices of one instance."""
        return self.tp * self.pp * self.dp


class Pools(NamedTuple):
    """A disaggregated deployment with its numbers of instances, and the clients it serves."""

    prefill: Instance
    decode: Instance
    prefill_workers: int
    decode_workers: int
    clients: float


def parse(text: str) -> Pool:
    """A pool from its text. Raises Refused where no degree can be read.

    >>> parse("tp4 ep4 bs:32 workers=2")
    Pool(tp=4, pp=1, dp=1, ep=4, workers=2, batch=32)
    >>> parse("2 x dep8").dp
    8
    """
    low = text.lower()
    found = {word: int(number) for word, number in _WORD.findall(low)}
    stated = {name: found[word] for name, words in _NAMES.items() for word in words if word in found}
    if not stated.keys() & {"tp", "dp", "pp", "tep", "dep"}:
        raise Refused("layout of a pool is not readable")
    times = _TIMES.search(low)
    tp = stated.get("tp") or stated.get("tep", 1)
    dp = stated.get("dp") or stated.get("dep", 1)
    ep = stated.get("ep") or stated.get("tep") or stated.get("dep", 1)
    workers = stated.get("workers") or (int(times[1]) if times else 0)
    return Pool(tp, stated.get("pp", 1), dp, ep, workers, stated.get("batch", 0))


def of_row(row: Row) -> Pools:
    """Both pools of a row. Raises Refused where the text cannot be read or the devices do not add up."""
    prefill, decode = parse(row.text("prefill_cfg")), parse(row.text("decode_cfg"))
    first = prefill.workers or 1
    second = decode.workers
    if not second:
        # What the prefill pool leaves of the devices.
        left = row.number("n_devices", first * prefill.devices + decode.devices) - first * prefill.devices
        second, rest = divmod(int(left), decode.devices)
        if second < 1 or rest:
            raise Refused("devices of the pools do not add up")
    clients = row.number("batch", float(decode.batch * decode.dp * second))
    if clients < 1:
        raise Refused("concurrency not stated")

    def made(pool: Pool) -> Instance:
        return instance.make(row, tp=pool.tp, pp=pool.pp, dp=pool.dp, ep=pool.ep)

    return Pools(made(prefill), made(decode), first, second, clients)
