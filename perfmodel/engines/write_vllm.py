"""`vllm serve` for one pool. Option names: hardware/calibrations/engine_flags/vllm.yaml."""

from __future__ import annotations

import json

from perfmodel.engines.launch import PORT, Launch, Pool, kv_name, method_for
from perfmodel.errors import SpecError

_SIDE_CHANNEL = 5600  # NixlConnector's example port, https://docs.vllm.ai/en/stable/features/nixl_connector_usage/
_EMBEDDINGS = 14579  # documented default of ec_port


def launch(pool: Pool) -> Launch:
    """Words of one instance; data-parallel ranks are part of it and share its port."""
    p = pool.spec
    words = ["vllm", "serve", pool.checkpoint, "--host", "0.0.0.0", "--tensor-parallel-size", str(p.tp)]
    for degree, name in (
        (p.pp, "--pipeline-parallel-size"),
        (p.dp, "--data-parallel-size"),
        (p.cp, "--prefill-context-parallel-size"),
    ):
        words += [name, str(degree)] if degree > 1 else []
    if p.ep > 1:
        if p.ep != p.tp * p.dp * p.cp:
            raise SpecError(
                f"pool {pool.index + 1}: vLLM spreads experts over all tp x dp x cp = {p.tp * p.dp * p.cp} devices "
                f"or over none, not over ep {p.ep}"
            )
        words.append("--enable-expert-parallel")
    method = method_for(pool.model, p.weight_dtype, pool.supports)
    words += ["--quantization", method] if method else []
    kv = kv_name(pool)
    words += ["--kv-cache-dtype", kv] if kv else []
    words += _scheduler(pool)
    words += ["--gpu-memory-utilization", f"{pool.fraction:g}"]
    words.append("--enable-prefix-caching" if pool.deployment.prefix_caching else "--no-enable-prefix-caching")
    environment: dict[str, str] = {}
    if p.role in ("prefill", "decode"):
        role = "kv_producer" if p.role == "prefill" else "kv_consumer"
        words += ["--kv-transfer-config", json.dumps({"kv_connector": pool.supports.disaggregation[0], "kv_role": role})]
        environment = {"UCX_NET_DEVICES": "all", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_SIDE_CHANNEL + pool.port - 8000)}
    if p.role == "encode":
        words += ["--mm-encoder-only", "--enable-request-id-headers", *embeddings(pool)]
    elif pool.encoders and p.role != "decode":
        words += ["--enable-mm-embeds", "--enable-request-id-headers", *embeddings(pool)]
    several: tuple[str, ...] = ()
    if pool.nodes > 1:
        several = ("--nnodes", str(pool.nodes), "--master-addr", "$LEADER_ADDRESS", "--node-rank", "$NODE_RANK")
    return Launch(pool, tuple(words), (*several, "--headless") if several else (), several, environment)


def embeddings(pool: Pool, place: int = 0) -> list[str]:
    """How embeddings of images leave an encode instance, or come to the instance number `place` on its node.

    https://docs.vllm.ai/en/latest/features/mooncake_ec_connector_usage/: each rank of a consumer listens on a port of its own.
    """
    config: dict[str, object] = {"ec_connector": pool.supports.encoders[0], "ec_role": "ec_producer"}
    if pool.spec.role != "encode":
        config |= {"ec_role": "ec_consumer", "ec_ip": "0.0.0.0", "ec_port": embedding_port(pool, place)}
    return ["--ec-transfer-config", json.dumps({**config, "ec_connector_extra_config": {"mooncake_protocol": "rdma"}})]


def embedding_port(pool: Pool, place: int) -> int:
    """First port on which the instance number `place` on its node hears of embeddings."""
    return _EMBEDDINGS + pool.port - PORT + place * pool.spec.tp * pool.spec.dp


def _scheduler(pool: Pool) -> list[str]:
    p = pool.spec
    # The limit counts sequences of one data-parallel rank.
    words = ["--max-num-seqs", str(-(-p.max_batch // p.dp))] if p.max_batch else []
    if p.policy == "whole":
        # Whole prompts must fit into one step, or the engine refuses to start.
        longest = pool.model.max_positions or pool.step_tokens
        tokens = str(max(longest, pool.step_tokens))
        return [*words, "--no-enable-chunked-prefill", "--max-model-len", str(longest), "--max-num-batched-tokens", tokens]
    return [*words, "--max-num-batched-tokens", str(pool.step_tokens)]
