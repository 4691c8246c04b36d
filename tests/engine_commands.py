"""Commands seeded with mistakes, each with the finding it must raise, and published recipes that must raise none."""

from __future__ import annotations

from typing import NamedTuple


class Bad(NamedTuple):
    text: str
    hardware: str | None
    code: str
    lengths: tuple[int, int] | None = None
    rate: float | None = None
    version: str = ""


LLAMA70 = "meta-llama/Llama-3.1-70B-Instruct"
LLAMA8 = "meta-llama/Llama-3.1-8B-Instruct"
SGLANG = "python -m sglang.launch_server --model-path"


def pod(args: str, *, gpus: int = 4, image: str = "vllm/vllm-openai:v0.11.0", shm: bool = True, probe: str = "", port: int = 8000,
        ready: bool = True) -> str:  # fmt: skip
    """A Deployment around a command line."""
    mounts = "\n        volumeMounts: [{name: shm, mountPath: /dev/shm}]" if shm else ""
    volumes = "\n      volumes: [{name: shm, emptyDir: {medium: Memory, sizeLimit: 16Gi}}]" if shm else ""
    readiness = f"\n        readinessProbe: {{httpGet: {{path: /health, port: {port}}}, periodSeconds: 10}}" if ready else ""
    words = ", ".join(f'"{w}"' for w in args.split())
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: llm}}
spec:
  replicas: 1
  selector: {{matchLabels: {{app: llm}}}}
  template:
    metadata: {{labels: {{app: llm}}}}
    spec:
      nodeSelector: {{nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}}
      containers:
      - name: engine
        image: {image}
        command: [{words}]
        ports: [{{containerPort: {port}}}]
        resources: {{limits: {{nvidia.com/gpu: {gpus}}}}}{readiness}{probe}{mounts}{volumes}
"""


BAD = [
    # spelling
    Bad(f"vllm serve {LLAMA8} --max-modle-len 8192", "hgx-h100-8", "unknown-option"),
    Bad(f"vllm serve {LLAMA8} --mem-fraction-static 0.9", "hgx-h100-8", "other-engines-option"),
    Bad(f"{SGLANG} {LLAMA8} --gpu-memory-utilization 0.9", "hgx-h100-8", "other-engines-option"),
    Bad(f"vllm serve {LLAMA8} --num-scheduler-steps 8", "hgx-h100-8", "gone-option"),
    Bad(f"vllm serve {LLAMA70} --tensor-parallel-size 4 --swap-space 16", "hgx-h100-8", "gone-option"),
    Bad(f"vllm serve {LLAMA8} --enable-prefix-caching --no-enable-prefix-caching", "hgx-h100-8", "contradiction"),
    Bad(f"vllm serve {LLAMA70} -tp 4 --tensor-parallel-size 8", "hgx-h100-8", "repeated-option"),
    Bad(f"vllm serve {LLAMA8} --gpu-memory-utilization ninety", "hgx-h100-8", "bad-value"),
    Bad(f"{SGLANG} {LLAMA8} --kv-cache-dtype fp8", "hgx-h100-8", "bad-value"),
    Bad(f"trtllm-serve {LLAMA8} --tensor-parallel-sise 2", "hgx-h100-8", "unknown-option"),
    Bad(f"vllm serve {LLAMA8} --speculative-config '{{\"method\": \"ngram\", \"num_spec_tokens\": 4}}'", "hgx-h100-8", "unknown-key"),
    # degrees
    Bad(f"vllm serve {LLAMA70} --tensor-parallel-size 6", "hgx-h100-8", "heads-not-divided"),
    Bad(f"vllm serve {LLAMA70} --tensor-parallel-size 16", "hgx-h100-8", "too-many-devices"),
    Bad(f"vllm serve {LLAMA70} --tensor-parallel-size 4 --enable-expert-parallel", "hgx-h100-8", "no-experts"),
    Bad(f"vllm serve {LLAMA70} --tensor-parallel-size 2 --pipeline-parallel-size 4", "hgx-h100-8", "stages-on-one-node"),
    Bad(f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 8 --dp 3 --enable-dp-attention", "hgx-h200-8", "ranks-not-dividing-tp"),
    Bad(f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 8 --enable-dp-attention", "hgx-h200-8", "one-rank"),
    Bad("trtllm-serve Qwen/Qwen3-30B-A3B --tp_size 4 --ep_size 3", "hgx-h100-8", "experts-not-divided"),
    Bad(f"{SGLANG} {LLAMA70} --tp 16 --nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:20000", "hgx-h100-8", "nodes-without-need"),
    # memory
    Bad(f"vllm serve {LLAMA70}", "hgx-h100-8", "weights-do-not-fit"),
    Bad(f"vllm serve {LLAMA8} --max-model-len 262144", "hgx-h100-8", "beyond-model"),
    Bad(f"vllm serve {LLAMA8}", "l4-server-8", "less-than-one-sequence"),
    Bad(f"vllm serve {LLAMA8} --gpu-memory-utilization 0.995", "hgx-h100-8", "fraction-too-high"),
    Bad(f"{SGLANG} {LLAMA8} --mem-fraction-static 0.4", "hgx-h100-8", "fraction-too-low"),
    Bad(f"vllm serve {LLAMA70} -tp 4 --max-model-len 8192 --max-num-seqs 16384 --max-num-batched-tokens 32768", "hgx-h100-8",
        "limit-out-of-reach"),
    Bad(f"vllm serve {LLAMA8} --max-model-len 4096 --max-num-seqs 4", "hgx-h100-8", "limit-too-low"),
    Bad(f"vllm serve {LLAMA8} --cpu-offload-gb 8 --max-model-len 8192", "hgx-h100-8", "offload-without-need"),
    Bad("llama-server -m Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf -c 8192 -np 4 -ngl 10", "rtx-4090-workstation-1", "layers-on-cpu"),
    # formats, steps, features
    Bad("vllm serve Qwen/Qwen2.5-7B-Instruct-AWQ --quantization fp8", "hgx-h100-8", "quantization-conflict"),
    Bad(f"vllm serve {LLAMA8} --quantization awq", "hgx-h100-8", "checkpoint-not-quantised"),
    Bad(f"vllm serve {LLAMA8} --dtype bfloat16 --max-model-len 4096 -tp 2", "t4-server", "dtype-unsupported"),
    Bad(f"vllm serve {LLAMA8} --kv-cache-dtype fp8", "hgx-a100-8", "kv-format-not-native"),
    Bad(f"vllm serve {LLAMA8} --no-enable-chunked-prefill --max-num-batched-tokens 4096 --max-model-len 32768", "hgx-h100-8",
        "step-below-context"),
    Bad(f"vllm serve {LLAMA8} --enforce-eager --cudagraph-capture-sizes 1 2 4 8", "hgx-h100-8", "graphs-off-and-sized"),
    Bad(f"vllm serve {LLAMA8} --speculative-config '{{\"method\": \"eagle3\", \"model\": \"draft\", \"num_speculative_tokens\": 16}}'",
        "hgx-h100-8", "too-many-drafts"),
    Bad(f"vllm serve {LLAMA8} --block-size 24", "hgx-h100-8", "block-unsupported"),
    Bad(f"vllm serve {LLAMA8} --lora-modules sql=/adapters/sql", "hgx-h100-8", "adapters-off"),
    # settings that exclude, need or empty each other
    Bad(f"vllm serve {LLAMA8} --kv-transfer-config '{{\"kv_connector\": \"NixlConnector\"}}'", "hgx-h100-8", "connector-without-role"),
    Bad(f"vllm serve {LLAMA8} --speculative-config '{{\"method\": \"ngram\", \"prompt_lookup_max\": 4}}'", "hgx-h100-8", "no-draft-length"),
    Bad(f"{SGLANG} {LLAMA8} --disable-radix-cache --enable-hierarchical-cache", "hgx-h100-8", "host-cache-without-prefix-cache"),
    Bad(f"{SGLANG} {LLAMA8} --disable-radix-cache --schedule-policy lpm", "hgx-h100-8", "policy-without-prefix-cache"),
    Bad(f"{SGLANG} {LLAMA8} --disaggregation-transfer-backend nixl", "hgx-h100-8", "transfer-without-mode"),
    Bad(f"vllm serve {LLAMA8} --cpu-offload-gb 400 -tp 8", "hgx-h100-8", "offload-beyond-host"),
    Bad(f"vllm serve {LLAMA8} --max-num-seqs 0", "hgx-h100-8", "not-positive"),
    Bad(f"vllm serve {LLAMA8} --enable-lora --max-lora-rank 12", "hgx-h100-8", "bad-value"),
    Bad(f"docker run --gpus all -p 8000:8000 vllm/vllm-openai:latest --model {LLAMA70} --tensor-parallel-size 4", "hgx-h100-8",
        "no-shared-memory"),
    Bad("llama-server -m Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf -c 4096 -np 8", "rtx-4090-workstation-1", "slots-too-short"),
    Bad("llama-server -m Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf -ctk q8_0 -ctv q8_0 -fa off", "rtx-4090-workstation-1",
        "v-cache-without-flash"),
    Bad(f"trtllm-serve {LLAMA8} --max_num_tokens 2048 --max_seq_len 16384", "hgx-h100-8", "step-below-context"),
    # workload
    Bad(f"vllm serve {LLAMA8} --max-model-len 4096", "hgx-h100-8", "workload-too-long", (8000, 500)),
    Bad(f"vllm serve {LLAMA70} -tp 4", "hgx-h100-8", "rate-beyond-capacity", (2000, 500), 80.0),
    # Kubernetes
    Bad(pod(f"vllm serve {LLAMA70} --tensor-parallel-size 4", gpus=2), None, "device-limit"),
    Bad(pod(f"vllm serve {LLAMA70} --tensor-parallel-size 4", shm=False), None, "no-shared-memory"),
    Bad(pod(f"{SGLANG} {LLAMA70} --tp 4", image="lmsysorg/sglang:latest", port=30000), None, "host-unreachable"),
    Bad(pod(f"vllm serve {LLAMA70} --tensor-parallel-size 4 --port 9000"), None, "port-mismatch"),
    Bad(pod(f"vllm serve {LLAMA70} --tensor-parallel-size 4",
            probe="\n        livenessProbe: {httpGet: {path: /health, port: 8000}, periodSeconds: 10}"), None, "probe-too-short"),
]  # fmt: skip


class Good(NamedTuple):
    text: str
    hardware: str | None
    published: str


KUBERNETES = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: mistral-7b}
spec:
  replicas: 1
  selector: {matchLabels: {app: mistral-7b}}
  template:
    metadata: {labels: {app: mistral-7b}}
    spec:
      volumes:
      - name: cache-volume
        persistentVolumeClaim: {claimName: mistral-7b}
      - name: shm
        emptyDir: {medium: Memory, sizeLimit: "2Gi"}
      containers:
      - name: mistral-7b
        image: vllm/vllm-openai:latest
        command: ["/bin/sh", "-c"]
        args: ["vllm serve mistralai/Mistral-7B-Instruct-v0.3 --trust-remote-code --enable-chunked-prefill --max_num_batched_tokens 1024"]
        ports: [{containerPort: 8000}]
        resources: {limits: {nvidia.com/gpu: "1"}}
        volumeMounts: [{mountPath: /root/.cache/huggingface, name: cache-volume}, {name: shm, mountPath: /dev/shm}]
        livenessProbe: {httpGet: {path: /health, port: 8000}, initialDelaySeconds: 60, periodSeconds: 10}
        readinessProbe: {httpGet: {path: /health, port: 8000}, initialDelaySeconds: 60, periodSeconds: 5}
"""

VLLM = "https://docs.vllm.ai/en/latest/"
RECIPES = "https://docs.vllm.ai/projects/recipes/"
SGL = "https://docs.sglang.ai/"
TRT = "https://nvidia.github.io/TensorRT-LLM/"
LCPP = "https://github.com/ggml-org/llama.cpp/"
GOOD = [
    Good("vllm serve Qwen/Qwen2.5-1.5B-Instruct", "l4-server-8", VLLM + "getting_started/quickstart"),
    Good("vllm serve meta-llama/Llama-3.3-70B-Instruct --tensor-parallel-size 4", "hgx-h100-8", VLLM + "serving/parallelism_scaling"),
    Good("vllm serve deepseek-ai/DeepSeek-V3 --tensor-parallel-size 8 --trust-remote-code", "hgx-h200-8", RECIPES + "DeepSeek/DeepSeek-V3"),
    Good("vllm serve deepseek-ai/DeepSeek-R1-0528 --trust-remote-code --tensor-parallel-size 1 --data-parallel-size 8 "
         "--enable-expert-parallel", "hgx-h200-8", VLLM + "serving/expert_parallel_deployment"),
    Good("vllm serve openai/gpt-oss-120b --tensor-parallel-size 2 --async-scheduling", "hgx-h100-8", RECIPES + "OpenAI/GPT-OSS"),
    Good("vllm serve openai/gpt-oss-20b", "hgx-h100-8", RECIPES + "OpenAI/GPT-OSS"),
    Good("vllm serve Qwen/Qwen3-235B-A22B-FP8 --tensor-parallel-size 4 --enable-expert-parallel", "hgx-h200-8", RECIPES + "Qwen"),
    Good("CUDA_VISIBLE_DEVICES=0 UCX_NET_DEVICES=all VLLM_NIXL_SIDE_CHANNEL_PORT=5600 vllm serve Qwen/Qwen3-0.6B --port 8100 "
         "--enforce-eager --kv-transfer-config '{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\"}'", "hgx-h100-8",
         VLLM + "features/nixl_connector_usage"),
    Good("vllm serve facebook/opt-6.7b --host 0.0.0.0 --port 8000 --seed 42 -tp 1 --max-model-len 2048 --gpu-memory-utilization 0.8 "
         "--speculative-config '{\"model\": \"facebook/opt-125m\", \"num_speculative_tokens\": 5}'", "hgx-a100-8",
         VLLM + "features/spec_decode"),
    Good("vllm serve meta-llama/Llama-2-7b-hf --enable-lora --lora-modules sql-lora=/adapters/sql", "hgx-a100-8", VLLM + "features/lora"),
    Good("docker run --runtime nvidia --gpus all -v ~/.cache/huggingface:/root/.cache/huggingface -p 8000:8000 --ipc=host "
         "vllm/vllm-openai:latest --model mistralai/Mistral-7B-v0.1", "hgx-a100-8", VLLM + "deployment/docker"),
    Good(KUBERNETES, "l40s-server-8", VLLM + "deployment/k8s"),
    Good("python -m sglang.launch_server --model-path meta-llama/Meta-Llama-3-8B-Instruct --dp 2 --tp 2", "hgx-h100-8",
         SGL + "advanced_features/server_arguments"),
    Good("python3 -m sglang.launch_server --model deepseek-ai/DeepSeek-V3 --tp 8 --trust-remote-code", "hgx-h200-8",
         SGL + "basic_usage/deepseek_v3"),
    Good("python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 --dp 8 --enable-dp-attention --trust-remote-code",
         "hgx-h200-8", SGL + "basic_usage/deepseek_v3"),
    Good("python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 --speculative-algorithm EAGLE "
         "--speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2 --trust-remote-code --tp 8",
         "hgx-h200-8", SGL + "basic_usage/deepseek_v3"),
    Good("python -m sglang.launch_server --model-path meta-llama/Llama-3.1-8B-Instruct --disaggregation-mode prefill --port 30000 "
         "--disaggregation-ib-device mlx5_roce0", "hgx-h100-8", SGL + "advanced_features/pd_disaggregation"),
    Good("python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-405B-Instruct --tp 16 "
         "--dist-init-addr 172.16.4.52:20000 --nnodes 2 --node-rank 0", "hgx-h100-8", SGL + "references/multi_node_deployment"),
    Good("python3 -m sglang.launch_server --model Qwen/Qwen3-235B-A22B --tp 8", "hgx-h200-8", SGL + "basic_usage/qwen3"),
    Good("vllm serve deepseek-ai/DeepSeek-R1-0528 --tensor-parallel-size 1 --enable-expert-parallel --data-parallel-size 16 "
         "--data-parallel-size-local 8 --data-parallel-address 192.168.1.100 --data-parallel-rpc-port 13345 --api-server-count=8",
         "hgx-h200-8", VLLM + "serving/expert_parallel_deployment"),
    Good("vllm serve meta-llama/Llama-3.1-405B-Instruct --tensor-parallel-size 8 --pipeline-parallel-size 2 "
         "--distributed-executor-backend ray", "hgx-h100-8", VLLM + "serving/parallelism_scaling"),
    Good("python -m sglang.launch_server --model-path meta-llama/Llama-2-7b-chat-hf --speculative-algorithm EAGLE "
         "--speculative-draft-model-path lmsys/sglang-EAGLE-llama2-chat-7B --speculative-num-steps 5 --speculative-eagle-topk 8 "
         "--speculative-num-draft-tokens 64 --mem-fraction 0.7", "hgx-a100-8", SGL + "advanced_features/speculative_decoding"),
    Good("python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-8B-Instruct --quantization fp8 --kv-cache-dtype fp8_e5m2",
         "hgx-h100-8", SGL + "advanced_features/quantization"),
    Good("llama-server -hf bartowski/Meta-Llama-3.1-70B-Instruct-GGUF:Q4_K_M -ngl all -c 16384 --cache-type-k q8_0 --cache-type-v q8_0 "
         "-fa on", "rtx-4090-workstation-4", LCPP + "blob/master/tools/server/README.md"),
    Good("trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0", "hgx-h100-8", TRT + "quick-start-guide.html"),
    Good("trtllm-serve nvidia/Llama-3.3-70B-Instruct-FP8 --host 0.0.0.0 --port 8000 --max_batch_size 1024 --max_num_tokens 2048 "
         "--kv_cache_free_gpu_memory_fraction 0.9 --tp_size 1 --ep_size 1 --trust_remote_code", "hgx-h200-8",
         TRT + "deployment-guide/quick-start-recipe-for-llama3.3-70b-on-trtllm.html"),
    Good("trtllm-serve openai/gpt-oss-120b --host 0.0.0.0 --port 8000 --max_batch_size 720 --max_num_tokens 16384 "
         "--kv_cache_free_gpu_memory_fraction 0.9 --tp_size 8 --ep_size 8 --trust_remote_code", "hgx-b200-8",
         TRT + "deployment-guide/quick-start-recipe-for-gpt-oss-on-trtllm.html"),
    Good("llama-server -hf ggml-org/gpt-oss-20b-GGUF --ctx-size 0 --jinja -ub 2048 -b 2048", "rtx-4090-workstation-1",
         LCPP + "discussions/15396"),
    Good("./llama-server -m models/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf -c 16384 -ngl 99 -np 4 -fa on", "rtx-4090-workstation-1",
         LCPP + "blob/master/tools/server/README.md"),
]  # fmt: skip
