"""What hardware achieves: parameters shared by all devices, by a class, by one device, and by an engine."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from perfmodel.errors import SpecError
from perfmodel.spec.base import Count, Natural, Size, Spec


class Parameter(Spec):
    """One physical number in base SI, its spread (standard deviation of its logarithm), and where it is from."""

    value: float
    sigma: float = Field(ge=0)
    meaning: str = ""
    source: str


class Law(Spec):
    """Parameters shared by every device."""

    kind: Literal["law"]
    parameters: dict[str, Parameter]
    facts: dict[str, Parameter] = {}
    """What kernels and libraries are known to do: not fitted (sigma 0), and not counted with the parameters."""
    residual: dict[str, float]
    """Spread of what the law itself cannot explain, by kind of time, as a standard deviation of the logarithm."""

    @property
    def everything(self) -> dict[str, Parameter]:
        """Parameters and facts."""
        return self.parameters | self.facts


class Classes(Spec):
    """Priors by architecture, memory technology and link technology; `default` serves a class without an entry."""

    kind: Literal["classes"]
    architecture: dict[str, dict[str, Parameter]]
    memory: dict[str, dict[str, Parameter]]
    link: dict[str, dict[str, Parameter]]
    power: dict[str, dict[str, Parameter]]


class LargeDevice(Spec):
    """Defaults of an engine on devices of at least `capacity` bytes, except of some architectures."""

    capacity: Size
    except_architectures: tuple[str, ...] = ()
    tokens: Natural
    sequences: Natural


class MemoryAccount(Spec):
    """How an engine counts device memory from one version on. At most eight numbers, the rest are named behaviours.

    Numbers [byte]: `memory_driver` (what a device reports and no program can allocate), `memory_context` (held outside
    tensors: context, libraries), `memory_parallel` (communication buffers, times log2 tp), `memory_graphs` (captured
    graphs, per layer), `memory_sampler` (per vocabulary entry and sequence), `memory_window_share` (1).
    """

    since: str
    """First version, such as `0.6.5` or `b5434`."""
    line: str = ""
    """Development line where two ran under one version number (`V0`, `V1`)."""
    title: str
    source: str
    budget: Literal["share", "reserve", "free", "context"]
    """share: a fraction of the device holds everything. reserve: a fraction of what was free at start holds weights and
    cache, the rest is a reserve for activations and graphs. free: a fraction of what is free after loading is cache.
    context: the cache is as large as the context asked for."""
    graphs_inside: bool = False
    """Captured graphs are deducted from the budget of the cache."""
    windows: Literal["whole", "groups", "pools", "bounded"] = "whole"
    """Sliding layers in the capacity. whole: as long as any other. groups: whole, in groups of equally many layers that
    pages are dealt to. pools: a pool of their own. bounded: window and one step."""
    profile_tokens: Natural
    """Tokens of the step whose activations are reserved; 0: the longest context."""
    profile_most: Natural = 0
    """Contexts beyond this are cut into steps of `profile_chunk` tokens; 0: never."""
    profile_chunk: Natural = 0
    sequences: Natural
    """Sequences the sampler is reserved for."""
    large: LargeDevice | None = None
    expert_tiles: dict[str, tuple[Natural, Natural]] = {}
    """MXFP4 experts are padded to multiples of (hidden, inter), by device architecture or `default`."""
    latent_copies: bool = False
    """Keeps 16-bit copies of the latent up-projections for absorbed decoding."""
    rope_table: bool = False
    """Keeps cosines and sines of every position."""
    host_embedding: bool = False
    """Token table stays in host memory; a tied head is a copy of its own on the device."""
    request_table: tuple[Natural, Natural, Natural] | None = None
    """Rows of the table of request slots by token: per full context, at least, at most (0: no limit)."""
    parameters: dict[str, Parameter] = Field(max_length=8)


class FrontEnd(Spec):
    """What happens to a request outside the engine's steps, in processes of the host. At most eight numbers.

    `tokenize_rate` [token/s per core], `request_rate` [requests/s] and `stream_rate` [streamed tokens/s] of one API process
    that does nothing else, `detokenize_time` [s per token], `sampler_time` [s per sequence and step].
    """

    processes: Count = 1
    """API processes unless told otherwise."""
    tokenizer_aside: bool = True
    """The tokeniser runs beside the API loop, on a core of its own."""
    detokenizer: Literal["api", "own", "engine"] = "api"
    """Where tokens become text: in the API process, in a process of its own, or in the engine's loop."""
    parameters: dict[str, Parameter] = Field(max_length=8)


class SchedulerDefault(Spec):
    """Limits of a step that an engine chooses by device memory; the last that applies counts."""

    use: Literal["server", "offline"] = "server"
    capacity: Size = 1.0
    """Device memory from which it applies [byte]."""
    except_devices: tuple[str, ...] = ()
    """Prefixes of device names it does not apply to."""
    tp: Count = 1
    """Smallest tensor-parallel degree it applies to."""
    chunk_tokens: Natural
    max_sequences: Natural = 0
    """0: no limit of its own."""
    graph_batch: Natural | None = None
    source: str


class Supports(Spec):
    """What an engine can do, and by which names."""

    chunked_prefill: bool = True
    prefix_caching: Literal["on", "off", "none"]
    """Default, or none."""
    disaggregation: tuple[str, ...] = ()
    """Transports of keys and values between prefill and decode instances; empty: not at all."""
    encoders: tuple[str, ...] = ()
    """Transports of embeddings from encode instances; empty: not at all."""
    encoder_tp: int = 1
    """Devices of an encode instance at most."""
    tp: bool = True
    pp: bool = True
    ep: bool = True
    cp: bool = False
    dp_attention: bool = True
    lora: bool = True
    vendors: tuple[str, ...]
    quantization: dict[str, str]
    """Name of a method to the stored format of weights; `checkpoint`: as the checkpoint stores them."""
    online: tuple[str, ...] = ()
    """Methods that quantise a 16-bit checkpoint while it loads."""
    kv_formats: dict[str, str]
    """Name of a KV format to the number format."""
    block_tokens: tuple[Natural, ...] = ()
    """Block sizes it takes; empty: any."""
    speculation: tuple[str, ...] = ()
    source: str


class Engine(Spec):
    """Host behaviour and memory accounting of one serving engine."""

    title: str
    documentation: str
    aliases: tuple[str, ...] = ()
    """Other spellings in measured rows and logs; a version or a note in brackets after a name is ignored."""
    parameters: dict[str, Parameter]
    chunk_tokens: Natural
    """Default limit of tokens in one step (vLLM: max_num_batched_tokens)."""
    max_sequences: Natural
    """Default limit of sequences in one step."""
    memory_fraction: float = Field(gt=0, le=1)
    """Share of device memory the engine plans with (vLLM: gpu_memory_utilization)."""
    block_tokens: Natural
    """Tokens in one KV block."""
    graph_batch: Natural
    """Largest decode batch replayed from a captured graph; 0: no graphs."""
    defaults: tuple[SchedulerDefault, ...] = ()
    """Step limits by device memory and use; `chunk_tokens` and `max_sequences` where none applies."""
    frontend: FrontEnd | None = None
    supports: Supports | None = None
    memory: tuple[MemoryAccount, ...] = ()
    """Memory accounting by version, oldest first."""
    version: str = ""
    """Version asked for; empty: the newest."""

    def limits(
        self, capacity: float, device: str = "", *, tp: int = 1, use: Literal["server", "offline"] = "server"
    ) -> SchedulerDefault:
        """Step limits the engine chooses by itself on devices of `capacity` bytes; the last that applies.

        Raises SpecError for an engine whose defaults nobody wrote down.
        """
        found = [
            d
            for d in self.defaults
            if d.use == use and capacity >= d.capacity and tp >= d.tp
            and not any(device.startswith(prefix) for prefix in d.except_devices)
        ]  # fmt: skip
        if not found:
            raise SpecError(f"{self.title} has no scheduler defaults for {use} use")
        return found[-1]

    @property
    def account(self) -> MemoryAccount:
        """Memory accounting of this version. Raises SpecError for an engine that only names kernels."""
        if not self.memory:
            raise SpecError(f"{self.title} has no memory account: it runs kernels, and serves no model")
        return account(self.memory, self.version)


def account(accounts: tuple[MemoryAccount, ...], version: str) -> MemoryAccount:
    """The newest account that began no later than a version; of the version's own line where it names one.

    A version without a number means the newest; `0.2x` stands for 0.20 to 0.29. One older than all gets the oldest.
    """
    line = next((a for a in accounts if a.line and a.line.lower() in version.lower().split()), None)
    mine = [a for a in accounts if line is None or a.line == line.line]
    wanted = version_number(version)
    begun = [a for a in mine if wanted is None or version_number(a.since) <= wanted]  # type: ignore[operator]
    return begun[-1] if begun else mine[0]


def version_number(text: str) -> tuple[int, ...] | None:
    """The first number of a version as a tuple; None where there is none.

    >>> version_number("0.6.4.post1 V0"), version_number("b5434"), version_number("0.2x V1"), version_number("V1")
    ((0, 6, 4), (5434,), (0, 25), None)
    >>> version_number("0.6.5.dev2") < version_number("0.6.5")
    True
    """
    text = re.sub(r"\bV\d+\b", "", text)
    found = re.search(r"(?<![A-Za-z\d.])[vb]?(\d+(?:\.\d+x?)*)", text)
    if found is None:
        return None
    # The middle of a range such as 0.2x.
    number = [int(part[:-1] + "5" if part.endswith("x") else part) for part in found.group(1).split(".")]
    # A development build comes before the release it leads to.
    before = number[-1] > 0 and re.match(r"\.?dev", text[found.end() :]) is not None
    return (*number[:-1], number[-1] - 1, 999) if before else tuple(number)


class MemoryAccounts(Spec):
    """Memory accounting of all engines that serve models."""

    kind: Literal["memory"]
    engines: dict[str, tuple[MemoryAccount, ...]]


class Engines(Spec):
    """All engines."""

    kind: Literal["engines"]
    engines: dict[str, Engine]


class DeviceCalibration(Spec):
    """Fitted parameters of one device that replace its class priors."""

    kind: Literal["device"]
    device: str
    stack: str
    date: str
    rows: Natural
    scatter: float = 0.0
    """Standard deviation of ln(predicted/measured) that the fit leaves."""
    parameters: dict[str, Parameter]


class Without(Spec):
    """Values of every fitted parameter when no row of one device takes part in the fit, by full name."""

    kind: Literal["without"]
    device: str
    date: str
    rows: Natural
    parameters: dict[str, float]
