"""Prompt tokens whose keys and values were computed before: found on the device or fetched, whole or repaired."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator

from perfmodel.kernels.elsewhere import Rates
from perfmodel.machine import Machine
from perfmodel.ops.shard import Load
from perfmodel.symbols import Num, ceil, maximum, minimum
from perfmodel.techniques.base import Quality, Request, Technique, finding, knob

_CODEC = "prefix_codec"
_WAYS = 8  # eighths of the found tokens that may be fetched rather than computed


def found_tokens(prompt: Num, share: float, checkpoint: int) -> Num:
    """Tokens of a prompt found in a cache: share x prompt, down to the last checkpoint, the last token always computed.

    A recurrent layer's state stands for one position only, so a prefix is reusable where it was kept (Marconi,
    arXiv:2411.19379).
    """
    wanted = minimum(share * prompt, prompt - 1)
    return -ceil(-wanted / checkpoint) * checkpoint if checkpoint else wanted


class PrefixCache(Technique):
    """A share of every prompt is found: `device` in device memory, `host`, `drive` and `remote` in farther tiers.

    computed = prompt - found (1 - repair); what a farther tier holds is fetched layer by layer beside the pass
    (`ahead`), time per layer max(compute, bytes / rate), `ratio` of its bytes on the way and decoded at `codec` bytes/s
    on arrival (CacheGen, arXiv:2310.07240; `choose` takes the best split between fetching and computing). `repair`: share of
    the found tokens recomputed against the whole prompt, all of them being fetched, because chunks were cached out of
    place (CacheBlend, arXiv:2405.16444; Cache-Craft, arXiv:2502.15734). `answered`: share of requests whose whole answer
    is found (semantic caches). Shares are of the prompt's tokens and follow from traffic and capacity.
    """

    kind: ClassVar[str] = "prefix-cache"
    reference: ClassVar[str] = "arXiv:2405.16444"
    by_layer: ClassVar[bool] = False

    device: float = knob(0.0, "share of the prompt found in device memory", low=0, high=1)
    host: float = knob(0.0, "share found in host memory", low=0, high=1)
    drive: float = knob(0.0, "share found on drives", low=0, high=1)
    remote: float = knob(0.0, "share found over the network", low=0, high=1)
    repair: float = knob(0.0, "share of the found tokens that is computed again", low=0, high=1)
    checkpoint: int = knob(0, "tokens between positions a prefix can be resumed at; 0: any", "token", low=0, high=1_000_000)
    ahead: bool = knob(True, "fetched layer by layer beside the pass; false: every layer waits for its own")
    page: float = knob(0.0, "bytes of one piece fetched; 0: a layer at once", "byte", low=0, high=1e12)
    ratio: float = knob(1.0, "bytes on the way over bytes as cached", low=0.001, high=1)
    codec: float = knob(0.0, "rate of decoding on arrival, in bytes as cached; 0: not counted", "byte/s", low=0, high=1e15)
    choose: bool = knob(False, "fetched or computed, whichever mix is faster")
    lookup: float = knob(0.0, "seconds of the look-up, or of retrieval that nothing hides", "s", low=0, high=100)
    answered: float = knob(0.0, "share of requests answered from a cache of whole answers", low=0, high=1)
    coded: Literal["exact", "lossy"] = knob("exact", "whether what is fetched is what was computed")

    @model_validator(mode="after")
    def _shares(self) -> PrefixCache:
        if self._found > 1 + 1e-9:
            raise ValueError(f"device, host, drive and remote are shares of one prompt and add up to {self._found:g}, not 1")
        return self

    @property
    def _tiers(self) -> dict[str, float]:
        return {"host": self.host, "drive": self.drive, "remote": self.remote}

    @property
    def _found(self) -> float:
        return self.device + sum(self._tiers.values())

    def effects(self) -> Quality:
        return "lossy" if (0 < self.repair < 1 and self._found) or self.coded == "lossy" or self.answered else "exact"

    def clash(self, other: Technique) -> str:
        twice = self._found and other.kind == "session-cache" and finding((other,))
        return super().clash(other) or ("both say which tokens of a prompt are cached; give shares of the whole prompt to one"
                                        if twice else "")  # fmt: skip

    def machine(self, machine: Machine) -> Machine:
        if not self.codec:
            return machine
        return replace(machine, elsewhere=machine.elsewhere | {_CODEC: Rates(self.codec, np.inf)})

    def request(self, request: Request) -> Request:
        answered = 1 - (1 - request.answered) * (1 - self.answered)
        request = replace(request, wait=request.wait + self.lookup, answered=answered)
        if not self._found:
            return request
        ways = [i / _WAYS for i in range(_WAYS, -1, -1)] if self.choose else [1.0]
        first, *others = [self._of(request, way) for way in ways]
        return replace(first, instead=(*request.instead, *others))

    def _of(self, r: Request, fetched: float) -> Request:
        """With that share of what farther tiers hold fetched, the rest computed."""
        far = self._found - self.device
        share = self.device + far * fetched
        found = found_tokens(r.new, share, self.checkpoint)
        loads = tuple(
            Load(found * held * fetched / share, tier, self.ratio, self.page, self.ahead, _CODEC if self.codec else "")
            for tier, held in self._tiers.items() if held * fetched > 0
        )  # fmt: skip
        computed = maximum(r.new - found * (1 - self.repair), 1)
        return replace(r, new=computed, cached=r.cached + r.new - computed, loads=(*r.loads, *loads))
