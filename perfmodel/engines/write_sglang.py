"""`python -m sglang.launch_server` for one pool. Option names: hardware/calibrations/engine_flags/sglang.yaml."""

from __future__ import annotations

from perfmodel.engines.launch import Launch, Pool, kv_name, method_for

_RENDEZVOUS = 20000  # dist-init port of the multi-node examples, https://docs.sglang.ai/references/multi_node_deployment/
BOOTSTRAP = 8998  # documented default of --disaggregation-bootstrap-port


def launch(pool: Pool) -> Launch:
    """Words of one instance. SGLang's tp counts every device of a stage; attention ranks divide it."""
    p = pool.spec
    inside = p.dp if pool.mixes else 1
    words = ["python", "-m", "sglang.launch_server", "--model-path", pool.checkpoint, "--host", "0.0.0.0"]
    words += ["--tp-size", str(p.tp * inside * p.cp)]
    words += ["--pp-size", str(p.pp)] if p.pp > 1 else []
    if p.dp > 1:
        words += ["--attn-dp-size" if pool.mixes else "--dp-size", str(p.dp)]
    words += ["--attn-cp-size", str(p.cp)] if p.cp > 1 else []
    words += ["--ep-size", str(p.ep)] if p.ep > 1 else []
    method = method_for(pool.model, p.weight_dtype, pool.supports)
    words += ["--quantization", method] if method else []
    kv = kv_name(pool)
    words += ["--kv-cache-dtype", kv] if kv else []
    words += ["--max-running-requests", str(p.max_batch)] if p.max_batch else []
    words += ["--chunked-prefill-size", str(pool.step_tokens if p.policy == "chunked" else -1)]
    words += ["--enable-mixed-chunk"] if p.policy == "chunked" and p.role == "colocated" else []
    # Prefill and decode on one device at a time, each on its own compute units.
    words += ["--enable-pdmux", "--disable-overlap-schedule"] if p.policy == "split" else []
    words += ["--mem-fraction-static", f"{pool.fraction:g}"]
    words += [] if pool.deployment.prefix_caching else ["--disable-radix-cache"]
    if p.role in ("prefill", "decode"):
        words += ["--disaggregation-mode", p.role, "--disaggregation-transfer-backend", "nixl"]
        words += ["--disaggregation-bootstrap-port", str(BOOTSTRAP + pool.index)] if p.role == "prefill" else []
    if p.role == "encode":
        words.append("--encoder-only")
    elif pool.encoders:
        words += ["--language-only", "--encoder-urls", *pool.encoders]
    several: tuple[str, ...] = ()
    if pool.nodes > 1:
        address = f"$LEADER_ADDRESS:{_RENDEZVOUS}"
        several = ("--nnodes", str(pool.nodes), "--dist-init-addr", address, "--node-rank", "$NODE_RANK")
    return Launch(pool, tuple(words), several, several)
