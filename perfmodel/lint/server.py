"""A command as a server on hardware: degrees, formats, limits and defaults, whoever decided them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from perfmodel import calibration, catalog, memory
from perfmodel.engine_memory import Instance, activations, cache_pool, cache_tokens, graphs, loaded_weights, overhead
from perfmodel.engines.command import Command
from perfmodel.engines.flags import default, flags
from perfmodel.engines.settings import Settings, settings
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.lint.names import Checkpoint, checkpoint
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.spec.calibration import Engine, SchedulerDefault, Supports
from perfmodel.spec.formats import get_format
from perfmodel.spec.hardware import Device, Node
from perfmodel.spec.model import LatentAttention, Model, Moe


@dataclass
class Server:
    """One server process group. `lengths`: (prompt, output) tokens of the workload, where known."""

    command: Command
    settings: Settings
    engine: Engine
    checkpoint: Checkpoint
    node: Node
    version: str = ""
    lengths: tuple[int, int] | None = None
    visible_devices: int | None = None
    """Devices a container or CUDA_VISIBLE_DEVICES leaves; None: the whole node."""
    notes: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.settings.get(name, default)

    def number(self, name: str, default: int) -> int:
        """A whole-number setting; words such as `auto` and negative numbers mean the default."""
        value = self.settings.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default

    @property
    def name(self) -> str:
        """The engine's short name."""
        return self.command.engine

    @property
    def model(self) -> Model:
        return self.checkpoint.model

    @cached_property
    def device(self) -> Device:
        return catalog.load_device(self.node.devices.device)

    @property
    def supports(self) -> Supports:
        assert self.engine.supports is not None
        return self.engine.supports

    @cached_property
    def experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        return max((b.ffn.experts for b in self.model.blocks.values() if isinstance(b.ffn, Moe)), default=0)

    @cached_property
    def mixes(self) -> bool:
        """Whether data-parallel ranks work together on one model."""
        latent = any(isinstance(b.mixer, LatentAttention) for b in self.model.blocks.values())
        return bool(self.experts) or latent

    @cached_property
    def per_node(self) -> int:
        """Devices of a node the command sees."""
        return min(self.visible_devices or self.node.devices.count, self.node.devices.count)

    @cached_property
    def available(self) -> int:
        """Devices the command may use over all its nodes; vLLM's data-parallel ranks may be dealt to several."""
        ranks = self.number("dp", 1) // self.number("dp_local", self.number("dp", 1))
        return self.per_node * max(self.number("nodes", 1), ranks, 1)

    @cached_property
    def layout(self) -> tuple[Parallelism, int]:
        """(degrees of one instance, independent replicas inside the command)."""
        tp, pp, cp = self.number("tp", 1), self.number("pp", 1), self.number("cp", 1)
        if self.name == "llama.cpp":
            return self._llama_layout(), 1
        dp, replicas = 1, 1
        if self.name == "sglang":
            attention = self.number("attention_dp", 1)
            if self.get("dp_attention"):
                attention = max(attention, self.number("dp", 1))
            else:
                replicas = self.number("dp", 1)
            inside = attention * cp
            if tp % inside == 0:
                tp, dp = tp // inside, attention
        elif self.name == "trtllm" and self.get("dp_attention"):
            tp, dp = 1, tp
        elif self.mixes:
            dp = self.number("dp", 1)
        else:
            replicas = self.number("dp", 1)
        ep = self.number("ep", 1)
        if self.get("expert_parallel") and self.experts:
            ep = tp * dp * cp
        if not self.experts:
            ep = 1
        return Parallelism(tp, pp, dp, ep, cp), replicas

    def _llama_layout(self) -> Parallelism:
        if self.get("split") == "none":
            return Parallelism()
        devices = self.per_node
        if self.get("device"):
            devices = len(str(self.get("device")).split(","))
        if self.get("split") in ("row", "tensor"):
            return Parallelism(devices)
        return Parallelism(1, min(devices, self.model.n_layers))

    @property
    def par(self) -> Parallelism:
        return self.layout[0]

    @property
    def replicas(self) -> int:
        return self.layout[1]

    @property
    def devices(self) -> int:
        return int(self.par.devices) * self.replicas

    @property
    def ranks(self) -> int:
        """Schedulers with a cache of their own."""
        return int(self.par.dp) * self.replicas

    # Formats -------------------------------------------------------------------------------------------------------

    @property
    def stored(self) -> str:
        """Format the checkpoint holds most weights in."""
        return self.checkpoint.stored or self.model.expert_dtype or self.model.dtype

    @cached_property
    def weight_dtype(self) -> str | None:
        """Format of the weights in memory where it is not the catalogue model's own."""
        method = self.get("quantization")
        wanted = self.supports.quantization.get(str(method)) if method else None
        if wanted not in (None, "checkpoint") and (get_format(self.stored).width >= 2 and method in self.supports.online):
            return wanted
        if self.checkpoint.stored:
            return self.checkpoint.stored
        plain = {"float": "fp32", "float32": "fp32"}.get(str(self.get("dtype")))
        return plain if plain and get_format(self.stored).width >= 2 else None

    @cached_property
    def kv_dtype(self) -> str | None:
        """Format of keys and values; None: the engine's default for this model."""
        wanted = self.supports.kv_formats.get(str(self.get("kv_dtype", "auto")))
        return None if wanted in (None, "checkpoint") else wanted

    # Limits --------------------------------------------------------------------------------------------------------

    @cached_property
    def defaults(self) -> SchedulerDefault:
        assert self.device.memory is not None
        return self.engine.limits(self.device.memory.capacity, self.device.name, tp=self.number("tp", 1))

    @cached_property
    def step_tokens(self) -> int:
        return self.number("step_tokens", self.defaults.chunk_tokens)

    @cached_property
    def context(self) -> int:
        """Longest sequence it takes [token]."""
        own = self.model.max_positions or 8192
        if self.name != "llama.cpp":
            return self.number("context", own)
        total = self.number("total_context", own)
        # Slots share one buffer where their number is left to the server; else each gets its part.
        apart = self.number("sequences", 0) and not self.get("unified")
        return total // self.number("sequences", 1) if apart else total

    @cached_property
    def fraction(self) -> float:
        """The command's; the engine's own where it says none or no share (`memory_rules` reports that)."""
        given = self.get("memory_fraction")
        if isinstance(given, float) and 0 < given <= 1:
            return given
        spec = flags(self.name)
        documented = next((default(f, self.version) for f in spec.flags.values() if f.sets == "memory_fraction"), None)
        return documented if isinstance(documented, float) else self.engine.memory_fraction

    @property
    def sequences(self) -> int:
        """Sequences one scheduler runs at once."""
        given = self.number("sequences", 0) or self.defaults.max_sequences
        if given:
            return given
        table = self.engine.account.request_table
        if table is None:
            return self.engine.max_sequences
        factor, least, most = table
        wanted = max(int(self.kv_tokens / self.context * factor), least)
        return min(wanted, most) if most else wanted

    # Memory --------------------------------------------------------------------------------------------------------

    @cached_property
    def estimator(self) -> Estimator:
        """Times of one instance. Raises SpecError for degrees that cannot cut the model."""
        p = self.par
        return Estimator(
            self.model, self.node, tp=p.tp, pp=p.pp, dp=p.dp, ep=p.ep, cp=p.cp, engine=self.engine_name,
            weight_dtype=self.weight_dtype, kv_dtype=self.kv_dtype, mem_fraction=min(self.fraction, 1.0),
        )  # fmt: skip

    @property
    def engine_name(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name

    @property
    def formats(self) -> Formats:
        return self.estimator.formats

    @cached_property
    def instance(self) -> Instance:
        e = self.estimator
        i = memory.account(self.model, self.par, e.formats, e.machine, self.engine)
        captured = i.graphs and not self.get("eager")
        return dataclasses.replace(
            i, context=self.context, step_tokens=self.step_tokens, graphs=captured,
            sequences=self.number("sequences", 0) or None, file=self.name == "llama.cpp" and self.checkpoint.stored is not None,
        )  # fmt: skip

    @cached_property
    def on_device(self) -> float:
        """Share of the layers whose weights and cache stay on the device (llama.cpp)."""
        layers = self.get("gpu_layers")
        if self.name != "llama.cpp" or layers is None or not str(layers).lstrip("-").isdigit() or int(layers) < 0:
            return 1.0
        return min(int(layers) / (self.model.n_layers + 1), 1.0)

    @cached_property
    def weights(self) -> float:
        """Bytes of weights on the fullest device, those offloaded to the host not counted."""
        offload = float(self.get("offload_gb") or 0.0) * 2**30
        return max(loaded_weights(self.instance) * self.on_device - offload, 0.0)

    @cached_property
    def pool(self) -> float:
        """Bytes left for keys, values and states; negative: does not fit."""
        given = self.get("cache_bytes")
        if isinstance(given, int) and given > 0:
            return float(given)
        return cache_pool(self.instance, self.fraction, self.weights)

    @cached_property
    def kv_tokens(self) -> int:
        """Tokens of cache the engine reports, per rank."""
        # With every layer on the CPU nothing of the cache is on the device either.
        fits = int(cache_tokens(self._unset, max(self.pool, 0.0) / (self.on_device or 1.0), self.block))
        given = self.get("cache_tokens") or (self.number("cache_blocks", 0) * self.block or None)
        return min(fits, int(given)) if given else fits

    @property
    def _unset(self) -> Instance:
        return dataclasses.replace(self.instance, sequences=None) if self.name != "llama.cpp" else self.instance

    @property
    def block(self) -> int:
        return self.number("block", self.engine.block_tokens)

    def concurrency(self, tokens: float) -> float:
        """Sequences of `tokens` that fit, all ranks together (mean, not whole)."""
        one = memory.cache_bytes(self.model, self.par, self.formats, self.par.dp, tokens, self.block)
        share = min(1.0, self.kv_tokens * self._token_bytes / self.pool) if self.pool > 0 and self._token_bytes else 1.0
        return max(self.pool, 0.0) / (self.on_device or 1.0) * share / float(one) * self.ranks if float(one) > 0 else float("inf")

    @cached_property
    def _token_bytes(self) -> float:
        """Bytes of one cached token where the cache was limited by hand; 0 otherwise."""
        if not (self.get("cache_tokens") or self.get("cache_blocks")):
            return 0.0
        return float(memory.cache_bytes(self.model, self.par, self.formats, self.par.dp, 1.0))

    @cached_property
    def reserved(self) -> tuple[float, float, float]:
        """(activations, outside tensors, graphs) [byte]."""
        return activations(self.instance), overhead(self.instance), graphs(self.instance)


def server(
    command: Command, node: Node, *, version: str = "", model: str | None = None,
    lengths: tuple[int, int] | None = None, visible: int | None = None,
) -> Server | str:  # fmt: skip
    """The server of a command, or the reason why nothing can be computed for it."""
    found = settings(command)
    named = model or found.get("model") or found.get("file")
    if named is None:
        return "the command names no model"
    known = checkpoint(str(named))
    if known is None and model:
        raise SpecError(f"--model {model}: not in the catalogue; `perfmodel models list` shows all")
    if known is None:
        return f"{named} is not in the catalogue; --model NAME says what it is"
    name = f"{command.engine}=={version}" if version else command.engine
    seen = visible
    if seen is None:
        listed = next((v for k, v in command.environment.items() if k.endswith("VISIBLE_DEVICES")), None)
        seen = len([d for d in listed.split(",") if d.strip()]) if listed else None
    return Server(command, found, calibration.engine(name), known, node, version, lengths, seen)
