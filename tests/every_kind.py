"""One setting in which nearly every kind of technique applies, and each kind at parameters that change something."""

from __future__ import annotations

from functools import lru_cache

from perfmodel.estimator import Estimator

# Mixture of experts, grouped queries, ranks of tensor, context and expert parallelism, host memory, drives and a network.
MODEL, NODE, DEGREES = "mixtral-8x7b", "hgx-h100-8", {"tp": 2, "cp": 2, "ep": 2}

CHANGED = {
    "activation-sparsity": "attention=0.4",
    "attention-ffn-split": "latency=1e-5",
    "attention-kernel": "unfused=true,read_loss=0.2,copies=1",
    "attention-layout": "kv_heads=4",
    "batch-padding": "prompt=1.5,output=2",
    "chunked-prefill": "chunk=512",
    "expert-adapters": "adapters=3,replaced=2",
    "expert-placement": "imbalance=1.3,redundant=1",
    "hierarchical-speculation": "draft=tinyllama-1.1b,middle_with=kv-eviction:budget=256,copied=256",
    "in-storage-attention": "drives=2,recent=32",
    "kernel-launch": "elementwise=2,merged=0.2",
    "kv-allocation": "reserve=block,block=64",
    "kv-eviction": "budget=512,sinks=4,scores=true,window=64",
    "kv-low-rank": "key_rank=0.5,value_rank=0.5",
    "kv-offload": "share=0.5,hit=0.2",
    "kv-quantization": "bits=4,group=64,residual=64",
    "kv-rematerialisation": "bits=4,recent=32",
    "kv-selection": "budget=512,sinks=4,recent=64",
    "kv-sharing": "group=2",
    "layer-skip": "share=0.75",
    "lora-adapters": "adapters=10,cold=0.1",
    "moe-offload": "slots=2,accuracy=0.5",
    "nano-batching": "parts=2",
    "near-memory": "place=both,count=16",
    "network-overhead": "link=0.5,link_latency=1e-5",
    "parallel-scheme": "prefill=ring,overlap=true",
    "phase-split": "units=0.5,bandwidth=0.7",
    "power-cap": "clock=0.6",
    "preemption": "rate=0.01,overlap=0.5",
    "prefix-cache": "device=0.2,host=0.3",
    "remote-attention": "share=0.5,bandwidth=5e10,latency=1e-5",
    "secure-transfer": "rate=5e9,peers=staged,host=1.2",
    "session-cache": "turn=100,device=0.5,host=0.5",
    "shared-prefix": "tokens=512,group=4",
    "speculation": "draft=tinyllama-1.1b,length=3",
    "streaming-heads": "share=0.5,recent=256",
    "token-reduction": "tokens=300,after=50,keep=0.5,spare_layers=2,selection=last",
    "tree-search": "width=8,prompt=256,distinct=0.5",
    "weight-offload": "share=0.5",
    "weight-quantization": "bits=4,group=128,fused=false",
}
DENOISING = {"denoising-cache": "skipped=0.3,reused=0.2,estimator=1", "dkv-cache": "refresh=8,answer=64"}

# Parameters at which nothing changes; kinds that are not here put something elsewhere whatever their parameters.
IDENTITY = {
    "activation-sparsity": "", "attention-kernel": "", "attention-layout": "", "batch-padding": "", "chunked-prefill": "",
    "expert-adapters": "adapters=0", "expert-placement": "", "kernel-launch": "", "kv-allocation": "", "kv-eviction": "",
    "kv-low-rank": "", "kv-offload": "share=0", "kv-quantization": "bits=16,unpack=0,pack=0", "kv-selection": "summaries=0",
    "kv-sharing": "", "layer-skip": "", "lora-adapters": "adapters=0", "moe-offload": "slots=64", "nano-batching": "parts=1", "network-overhead": "",
    "parallel-scheme": "", "phase-split": "", "power-cap": "", "preemption": "", "prefix-cache": "",
    "remote-attention": "", "secure-transfer": "", "session-cache": "", "shared-prefix": "", "speculation": "by=lookup,length=0",
    "streaming-heads": "", "token-reduction": "", "tree-search": "", "weight-offload": "share=0",
    "weight-quantization": "bits=16,act_bits=16",
}  # fmt: skip


def text(kind: str, given: str) -> str:
    return f"{kind}:{given}" if given else kind


@lru_cache(maxsize=512)
def built(*texts: str, model: str = MODEL) -> Estimator:
    degrees = {"tp": 2, "cp": 2} if model == "llada-8b" else DEGREES
    return Estimator(model, NODE, techniques=texts, **degrees)
