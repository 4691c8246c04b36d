"""`llama-server` for one pool. Option names: hardware/calibrations/engine_flags/llama.cpp.yaml."""

from __future__ import annotations

from perfmodel.engines.launch import Launch, Pool, kv_name
from perfmodel.errors import SpecError


def launch(pool: Pool) -> Launch:
    """Words of one instance: layers are dealt to the devices, rows of each layer with tp."""
    p = pool.spec
    if p.tp > 1 and p.pp > 1:
        raise SpecError(f"pool {pool.index + 1}: llama.cpp splits by layer or by row, not both: tp {p.tp} and pp {p.pp}")
    if pool.nodes > 1:
        raise SpecError(f"pool {pool.index + 1}: llama-server runs on one node; this instance needs {pool.nodes}")
    slots = p.max_batch or pool.engine.max_sequences
    words = ["llama-server", "--hf-repo", pool.checkpoint, "--host", "0.0.0.0", "--n-gpu-layers", "all"]
    words += ["--split-mode", "row" if p.tp > 1 else "layer" if p.pp > 1 else "none"]
    words += ["--parallel", str(slots), "--ubatch-size", str(pool.step_tokens)]
    kv = kv_name(pool)
    words += ["--cache-type-k", kv, "--cache-type-v", kv] if kv else []
    words.append("--cache-prompt" if pool.deployment.prefix_caching else "--no-cache-prompt")
    return Launch(pool, tuple(words))
