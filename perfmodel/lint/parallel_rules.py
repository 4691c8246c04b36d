"""Degrees: what cuts the model, what the node has, and what another cut would give."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.lint.finding import Finding
from perfmodel.lint.fit import throughput
from perfmodel.lint.server import Server
from perfmodel.spec.model import Attention


def check(s: Server) -> Iterator[Finding]:
    """Findings about degrees; the first that makes the layout impossible is an error."""
    yield from _devices(s)
    yield from _heads(s)
    yield from _experts(s)
    yield from _attention_ranks(s)


def _devices(s: Server) -> Iterator[Finding]:
    over_nodes = s.name == "vllm" and str(s.get("executor")) == "ray"
    if s.devices > s.available:
        word = s.settings.word("tp") or s.settings.word("pp") or s.settings.word("dp")
        message = (
            f"{s.devices} devices are asked for (tp {s.par.tp} x pp {s.par.pp} x dp {s.ranks} x cp {s.par.cp}), "
            f"and {s.available} x {s.device.name} are there"
        )
        if s.devices > s.node.devices.count and not s.get("nodes"):
            message += f"; {s.node.name} has {s.node.devices.count} a node, and the command does not say it runs on several"
        yield Finding("info" if over_nodes else "error", "too-many-devices", message, word, float(s.devices - s.available))
    tp = int(s.par.tp)
    if s.par.pp == 1 and s.name != "llama.cpp" and tp * int(s.par.cp) > s.node.devices.count:
        message = (
            f"tp {tp} crosses nodes of {s.node.devices.count}: every layer's all-reduce goes over the network; "
            f"pipeline stages per node (tp {s.node.devices.count}, pp {-(-tp // s.node.devices.count)}) send far less"
        )
        yield Finding("info", "tp-across-nodes", message, s.settings.word("tp"))


def _heads(s: Server) -> Iterator[Finding]:
    tp = int(s.par.tp)
    for name, block in s.model.blocks.items():
        heads = getattr(block.mixer, "heads", None) or getattr(block.mixer, "value_heads", None)
        if s.name != "llama.cpp" and heads and heads % tp:
            good = [d for d in range(1, s.node.devices.count + 1) if heads % d == 0]
            word = s.settings.word("tp")
            message = f"tp {tp} does not divide the {heads} heads of {s.model.name} ({name} layers); {good} do"
            yield Finding("error", "heads-not-divided", message, word, fix=(("tp", str(_nearest(good, tp))),))
            return
    if s.par.pp > s.model.n_layers:
        message = f"pp {s.par.pp} exceeds the {s.model.n_layers} layers of {s.model.name}"
        yield Finding("error", "too-many-stages", message, s.settings.word("pp"))


def _nearest(values: list[int], wanted: int) -> int:
    return min(values, key=lambda v: (abs(v - wanted), -v))


def _experts(s: Server) -> Iterator[Finding]:
    word = s.settings.word("expert_parallel") or s.settings.word("ep")
    asked = s.get("expert_parallel") or s.number("ep", 1) > 1
    name = "expert_parallel" if s.get("expert_parallel") else "ep"
    if asked and not s.experts:
        message = f"{s.model.name} has no experts: expert parallelism does nothing"
        yield Finding("error", "no-experts", message, word, fix=((name, None),))
    elif asked and s.experts % int(s.par.ep):
        message = f"ep {s.par.ep} does not divide the {s.experts} experts of {s.model.name}"
        yield Finding("error", "experts-not-divided", message, word)
    elif asked and (int(s.par.tp) * int(s.par.dp) * int(s.par.cp)) % int(s.par.ep):
        group = int(s.par.tp) * int(s.par.dp) * int(s.par.cp)
        message = f"ep {s.par.ep} must divide the {group} devices of a stage"
        yield Finding("error", "ep-beyond-devices", message, word)
    elif s.get("expert_parallel") and s.par.ep == 1:
        message = "expert parallelism over one device does nothing"
        yield Finding("warning", "ep-of-one", message, word, fix=((name, None),))
    if s.get("eplb") and not asked:
        message = "expert load balancing needs expert parallelism, which is off"
        yield Finding("error", "eplb-without-ep", message, s.settings.word("eplb"), fix=(("eplb", None),))
    backend = s.get("all2all")
    if backend not in (None, "none", "naive", "allgather_reducescatter") and not s.experts:
        message = f"all-to-all backend {backend} serves experts, and {s.model.name} has none"
        yield Finding("warning", "all2all-without-experts", message, s.settings.word("all2all"), fix=(("all2all", None),))


def _attention_ranks(s: Server) -> Iterator[Finding]:
    """Data-parallel attention of SGLang and TensorRT-LLM."""
    if s.name == "sglang" and (s.get("dp_attention") or s.number("attention_dp", 1) > 1):
        ranks = max(s.number("attention_dp", 1), s.number("dp", 1) if s.get("dp_attention") else 1)
        tp, word = s.number("tp", 1), s.settings.word("dp_attention") or s.settings.word("attention_dp")
        if tp % ranks:
            message = f"attention ranks divide tp: {ranks} ranks do not divide tp {tp}"
            yield Finding("error", "ranks-not-dividing-tp", message, word)
        elif ranks == 1:
            message = "data-parallel attention over one rank does nothing; give --dp-size"
            yield Finding("warning", "one-rank", message, word)
    if s.name == "trtllm" and s.get("dp_attention") and s.number("tp", 1) == 1:
        message = "attention data parallelism over one device does nothing"
        yield Finding("warning", "one-rank", message, s.settings.word("dp_attention"))
    latent = not any(isinstance(b.mixer, Attention) for b in s.model.blocks.values())
    if s.par.dp > 1 and s.name in ("sglang", "trtllm") and not latent and not s.experts:
        message = f"{s.model.name} is dense with heads to cut: data-parallel attention only copies its weights"
        yield Finding("warning", "ranks-of-dense-model", message, s.settings.word("dp_attention"))


def pipeline(s: Server) -> Iterator[Finding]:
    """Stages inside one node, where cutting every layer is faster: both steps from the estimator."""
    p = s.par
    if p.pp == 1 or s.name == "llama.cpp" or s.devices > s.node.devices.count or not s.node.fabric.p2p:
        return
    wider = int(p.tp) * int(p.pp)
    try:
        other = Estimator(
            s.model, s.node, tp=wider, dp=p.dp, ep=p.ep, cp=p.cp, engine=s.engine_name,
            weight_dtype=s.weight_dtype, kv_dtype=s.kv_dtype,
        )  # fmt: skip
    except SpecError:
        return  # the heads cannot be cut that often
    batch = max(min(s.concurrency(s.context / 2), s.sequences), 1.0)
    seen = max(s.context // 2, 1)
    now, then = float(s.estimator.decode(batch, seen)), float(other.decode(batch, seen))
    if then < now / 1.1:
        message = (
            f"pp {p.pp} on one node of {s.node.fabric.technology}: a decode step of {batch:.0f} sequences takes "
            f"{now * 1e3:.1f} ms; tp {wider} without stages takes {then * 1e3:.1f} ms on the same devices"
        )
        fix = (("tp", str(wider)), ("pp", None))
        yield Finding("warning", "stages-on-one-node", message, s.settings.word("pp"), now - then, fix=fix)


def across_nodes(s: Server) -> Iterator[Finding]:
    """Tensor parallelism over the network for a model that one node holds: both steps from the estimator."""
    p, inside = s.par, s.node.devices.count
    if s.name == "llama.cpp" or p.pp > 1 or int(p.tp) <= inside:
        return
    try:
        other = Estimator(
            s.model, s.node, tp=inside, dp=p.dp, ep=min(int(p.ep), inside), engine=s.engine_name,
            weight_dtype=s.weight_dtype, kv_dtype=s.kv_dtype, mem_fraction=min(s.fraction, 1.0),
        )  # fmt: skip
    except SpecError:
        return
    if other.max_batch(s.context) < 1:
        return
    now, then = (float(e.decode(1, max(s.context // 2, 1))) for e in (s.estimator, other))
    message = (
        f"tp {p.tp} crosses nodes, and one node of {inside} holds {s.model.name} with room for {other.max_batch(s.context)} "
        f"sequences of {s.context:,} tokens; a decode step takes {now * 1e3:.1f} ms across, {then * 1e3:.1f} ms inside"
    )
    fix = (("tp", str(inside)), ("nodes", None), ("node_rank", None), ("init_address", None))
    yield Finding("warning", "nodes-without-need", message, s.settings.word("tp"), now - then, fix)


def gain(s: Server, before: float, after: float) -> str:
    """`1,200 to 2,300 tokens/s` for two batch sizes."""
    return f"{throughput(s, before):,.0f} to {throughput(s, after):,.0f} decoded tokens/s"
