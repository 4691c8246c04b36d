"""`trtllm-serve` and its options file for one pool. Names: hardware/calibrations/engine_flags/trtllm.yaml."""

from __future__ import annotations

from typing import Any

from perfmodel.engines.launch import Launch, Pool, kv_name
from perfmodel.errors import SpecError


def launch(pool: Pool) -> Launch:
    """Words of one instance; what the command does not take goes into the options file."""
    p = pool.spec
    if p.dp > 1 and p.tp > 1:
        raise SpecError(
            f"pool {pool.index + 1}: TensorRT-LLM's attention is data-parallel over all ranks or none: "
            f"tp 1 and dp {p.tp * p.dp}, not tp {p.tp} and dp {p.dp}"
        )
    if p.dp > 1 and not pool.mixes:
        raise SpecError(f"pool {pool.index + 1}: dp {p.dp} of a dense model are {p.dp} instances: set replicas")
    words = ["trtllm-serve", pool.checkpoint, "--host", "0.0.0.0", "--tp_size", str(p.tp * p.dp)]
    for degree, name in ((p.pp, "--pp_size"), (p.cp, "--cp_size"), (p.ep, "--ep_size")):
        words += [name, str(degree)] if degree > 1 else []
    words += ["--max_batch_size", str(-(-p.max_batch // p.dp))] if p.max_batch else []
    whole = p.policy == "whole"
    tokens = max(pool.model.max_positions, pool.step_tokens) if whole else pool.step_tokens
    words += ["--max_num_tokens", str(tokens), "--kv_cache_free_gpu_memory_fraction", f"{pool.fraction:g}"]
    words += [] if whole else ["--enable_chunked_prefill"]
    cache: dict[str, Any] = {"enable_block_reuse": pool.deployment.prefix_caching}
    kv = kv_name(pool)
    if kv:
        cache["dtype"] = kv
    options: dict[str, object] = {"kv_cache_config": cache}
    if p.dp > 1:
        options["enable_attention_dp"] = True
    if p.role in ("prefill", "decode"):
        options["cache_transceiver_config"] = {"backend": "DEFAULT"}
        # The manual's context servers run without it.
        options["disable_overlap_scheduler"] = p.role == "prefill"
    words += ["--extra_llm_api_options", f"{pool.name}.yaml"]
    # Ranks on several nodes are started by MPI, not by options of their own.
    return Launch(pool, tuple(words), options=options)
