"""From a deployment to the words that start it: one launch per pool, for any engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from perfmodel import calibration, catalog
from perfmodel.engines.flags import flags
from perfmodel.errors import SpecError
from perfmodel.spec.calibration import Engine, Supports
from perfmodel.spec.deployment import Deployment, PoolSpec
from perfmodel.spec.engine_flags import EngineFlags
from perfmodel.spec.formats import get_format
from perfmodel.spec.hardware import Device, Node
from perfmodel.spec.model import LatentAttention, Model, Moe

PORT, PORTS_PER_POOL = 8000, 100


@dataclass(frozen=True)
class Pool:
    """A pool with everything its command depends on."""

    index: int
    spec: PoolSpec
    deployment: Deployment
    model: Model
    checkpoint: str
    """Hub id or path of the weights."""
    engine: Engine
    supports: Supports
    flags: EngineFlags
    node: Node
    device: Device
    encoders: tuple[str, ...] = ()
    """Addresses of the encoder-only instances that serve this pool."""

    @property
    def devices(self) -> int:
        """Devices of one instance."""
        return self.spec.tp * self.spec.pp * self.spec.dp * self.spec.cp

    @property
    def nodes(self) -> int:
        """Nodes of one instance."""
        return math.ceil(self.devices / self.node.devices.count)

    @property
    def per_node(self) -> int:
        """Instances side by side on one node; 1 where an instance takes a node or more."""
        return max(self.node.devices.count // self.devices, 1)

    @property
    def name(self) -> str:
        alone = sum(p.role == self.spec.role for p in self.deployment.pools) == 1
        role = {"colocated": "engine"}.get(self.spec.role, self.spec.role)
        return role if alone else f"{role}-{self.index + 1}"

    @property
    def port(self) -> int:
        """Port of the first instance on a node."""
        return PORT + PORTS_PER_POOL * self.index

    @property
    def urls(self) -> list[str]:
        """Addresses of the instances: hosts are called after the pool, one per node."""
        places = (divmod(r, self.per_node) for r in range(self.spec.replicas))
        return [f"http://{self.name}-{node}:{self.port + place}" for node, place in places]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step: as planned, else what the engine chooses on this device."""
        capacity = self.device.memory.capacity if self.device.memory else 0.0
        return self.spec.chunk or self.engine.limits(capacity, self.device.name, tp=self.spec.tp).chunk_tokens

    @property
    def fraction(self) -> float:
        return self.deployment.mem_fraction or self.engine.memory_fraction

    @property
    def mixes(self) -> bool:
        """Whether data-parallel ranks of an instance work together: experts or a latent cache."""
        return any(isinstance(b.ffn, Moe) or isinstance(b.mixer, LatentAttention) for b in self.model.blocks.values())


@dataclass(frozen=True)
class Launch:
    """Words that start one instance of a pool. `options`: what goes into TensorRT-LLM's options file."""

    pool: Pool
    words: tuple[str, ...]
    follower: tuple[str, ...] = ()
    """Added on every further node of an instance."""
    leader: tuple[str, ...] = ()
    """Added on the first node of an instance of several."""
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


Writer = Callable[[Pool], Launch]


def launches(deployment: Deployment, engine: str | None = None, checkpoint: str | None = None) -> list[Launch]:
    """One launch per pool. Raises SpecError with the reason where the engine cannot run the pool."""
    from perfmodel.engines import write_llama_cpp, write_sglang, write_trtllm, write_vllm

    name = engine or deployment.engine
    writers: dict[str, Writer] = {
        "vllm": write_vllm.launch, "sglang": write_sglang.launch,
        "trtllm": write_trtllm.launch, "llama.cpp": write_llama_cpp.launch,
    }  # fmt: skip
    spec = flags(name)
    pools = [_pool(i, p, deployment, name, spec, checkpoint) for i, p in enumerate(deployment.pools)]
    for pool in pools:
        _refuse(pool)
    handed = {get_format(p.spec.kv_dtype or p.model.kv_dtype or "bf16").name
              for p in pools if p.spec.role in ("prefill", "decode")}  # fmt: skip
    if len(handed) > 1:
        raise SpecError(
            f"prefill and decode pools exchange keys and values as they store them, here {' and '.join(sorted(handed))}: "
            "give them one kv_dtype"
        )
    encoders = tuple(u for p in pools if p.spec.role == "encode" for u in p.urls)
    served = (replace(p, encoders=encoders) if deployment.fed(p.spec) or _language_only(p) else p for p in pools)
    return [writers[spec.engine](pool) for pool in served]


def _language_only(pool: Pool) -> bool:
    """Whether a decode pool stands behind instances that leave their images to encode pools."""
    d = pool.deployment
    encoders = any(p.role == "encode" for p in d.pools)
    return encoders and pool.spec.role == "decode" and all(d.fed(p) for p in d.pools if p.role == "prefill")


def _pool(
    index: int, pool: PoolSpec, deployment: Deployment, engine: str, spec: EngineFlags, checkpoint: str | None
) -> Pool:
    e = calibration.engine(engine)
    if e.supports is None:
        raise SpecError(f"what {e.title} supports is not written down: no command can be made for it")
    if pool.techniques:
        raise SpecError(
            f"no option of {e.title} is written down for {', '.join(pool.techniques)}: emit the pool without `techniques`, and "
            "add the option by hand where a build of the engine has it"
        )
    hardware = catalog.load_hardware(pool.hardware)
    node_name = hardware.name if isinstance(hardware, Node) else catalog.node_of(hardware.name)
    if node_name is None:
        raise SpecError(f"{pool.hardware}: no node of the catalogue holds this device")
    node = catalog.load_node(node_name)
    model = catalog.load_model(deployment.model)
    weights = checkpoint or weights_of(model, pool.weight_dtype, e.supports, e.title)
    device = catalog.load_device(node.devices.device)
    return Pool(index, pool, deployment, model, weights, e, e.supports, spec, node, device)


def hub_id(model: Model) -> str:
    """The model's id on the Hugging Face hub; its catalogue name where none is known."""
    return next((a for a in model.aliases if a.count("/") == 1), model.name)


def weights_of(model: Model, weight_dtype: str | None, supports: Supports, title: str) -> str:
    """The checkpoint to load for a weight format: the model's own, one that is quantised while loading, or another
    of the catalogue. Raises SpecError where there is none."""
    if weight_dtype is None or method_for(model, weight_dtype, supports) is not None:
        return hub_id(model)
    wanted = get_format(weight_dtype)
    for name in catalog.names("models"):
        if name.startswith(f"{model.name}-") and get_format(catalog.load_model(name).dtype).name == wanted.name:
            return hub_id(catalog.load_model(name))
    raise SpecError(
        f"{title} does not quantise {model.name} to {wanted.name} while loading, and the catalogue has no such "
        "checkpoint: give its id with --checkpoint"
    )


def method_for(model: Model, weight_dtype: str | None, supports: Supports) -> str | None:
    """Option value that makes the engine hold weights in a format: "" where the checkpoint has it, None where it cannot."""
    stored = get_format(model.expert_dtype or model.dtype).name
    wanted = get_format(weight_dtype).name if weight_dtype else stored
    if wanted in (stored, get_format(model.dtype).name):
        return ""
    if get_format(model.dtype).width >= 2 and model.expert_dtype is None:
        if get_format(wanted).width >= 2:
            return ""
        return next((m for m in supports.online if supports.quantization[m] == wanted), None)
    return None


def kv_name(pool: Pool) -> str | None:
    """The engine's name of the pool's KV format; None where it is what the engine takes anyway."""
    if pool.spec.kv_dtype is None:
        return None
    wanted = get_format(pool.spec.kv_dtype).name
    plain = pool.model.kv_dtype or ("fp16" if pool.model.dtype == "fp16" else "bf16")
    if wanted == get_format(plain).name:
        return None
    found = next((name for name, f in pool.supports.kv_formats.items() if f == wanted), None)
    if found is None:
        raise SpecError(
            f"{pool.engine.title} stores keys and values as {', '.join(pool.supports.kv_formats)}, not as {wanted}"
        )
    return found


def _refuse(pool: Pool) -> None:
    """What this engine cannot do with this pool, as one error."""
    p, s, title = pool.spec, pool.supports, pool.engine.title
    at = f"pool {pool.index + 1} ({p.role})"
    if pool.device.vendor not in s.vendors:
        raise SpecError(f"{at}: {title} runs on {', '.join(s.vendors)} devices, not on {pool.device.name}")
    for degree, can, what in (
        (p.tp, s.tp, "tensor parallelism"), (p.pp, s.pp, "pipeline parallelism"), (p.ep, s.ep, "expert parallelism"),
        (p.dp, s.dp_attention, "data-parallel ranks in one instance"), (p.cp, s.cp, "context parallelism"),
    ):  # fmt: skip
        if degree > 1 and not can:
            raise SpecError(f"{at}: {title} has no {what}; vllm, sglang and trtllm have")
    if p.ep > 1 and not pool.mixes:
        raise SpecError(f"{at}: ep {p.ep}, but {pool.model.name} has no experts to spread")
    if p.role in ("prefill", "decode") and not s.disaggregation:
        raise SpecError(f"{at}: {title} does not hand keys and values to another instance; vllm, sglang and trtllm do")
    if p.role == "encode" and not s.encoders:
        raise SpecError(f"{at}: no encoder-only server of {title} is documented here; --engine vllm and --engine sglang have one")
    if p.role == "encode" and p.tp > s.encoder_tp:
        raise SpecError(f"{at}: tp {p.tp}, and an encode instance of {title} takes {s.encoder_tp}; set replicas")
    if p.policy in ("static", "layered"):
        raise SpecError(f"{at}: {title} has no {p.policy} batching; its policies are chunked and whole")
    if p.policy == "split" and pool.flags.engine != "sglang":
        raise SpecError(f"{at}: {title} does not split a device between phases; --engine sglang does (--enable-pdmux)")
