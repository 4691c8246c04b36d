"""Commands of a deployment to paste into a shell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from perfmodel.engines.launch import PORT, Launch
from perfmodel.engines.write_sglang import BOOTSTRAP
from perfmodel.engines.write_vllm import embedding_port, embeddings
from perfmodel.errors import SpecError
from perfmodel.spec.deployment import Routing

_VISIBLE = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES", "intel": "ZE_AFFINITY_MASK",
            "huawei": "ASCEND_RT_VISIBLE_DEVICES", "google": "TPU_VISIBLE_CHIPS"}  # fmt: skip
_POLICY: dict[Routing, str] = {
    "random": "random", "round-robin": "round_robin", "least-loaded": "power_of_two", "prefix-affine": "cache_aware",
}  # fmt: skip
_NGINX: dict[Routing, str] = {
    "random": "  random;\n", "round-robin": "", "least-loaded": "  least_conn;\n",
    "prefix-affine": "  hash $http_x_session_id consistent;\n",
}  # fmt: skip
"""A router's name of how requests are dealt; both routers share these."""


_PROXY = "examples/disaggregated/disaggregated_encoder/disagg_epd_proxy.py"
"""In vLLM's repository."""


def script(launches: list[Launch]) -> str:
    """What to run on every node, and the router, as a shell script with comments."""
    parts = ["#!/bin/sh", *(_pool(launch) for launch in launches), _router(launches)]
    return "\n\n".join(p for p in parts if p) + "\n"


def instance(launch: Launch, place: int = 0) -> tuple[dict[str, str], list[str]]:
    """Environment and words of the instance that is number `place` on its node."""
    pool = launch.pool
    environment = dict(launch.environment)
    if "VLLM_NIXL_SIDE_CHANNEL_PORT" in environment:
        environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(int(environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]) + place * pool.spec.dp)
    words = [*launch.words, "--port", str(pool.port + place)]
    if place and pool.spec.role != "encode" and "--ec-transfer-config" in words:
        at = words.index("--ec-transfer-config")
        words[at : at + 2] = embeddings(pool, place)
    if place and "--disaggregation-bootstrap-port" in words:
        at = words.index("--disaggregation-bootstrap-port") + 1
        words[at] = str(_bootstrap(launch, place))
    return environment, words


def _bootstrap(launch: Launch, place: int) -> int:
    return BOOTSTRAP + launch.pool.index + 100 * place


def line(environment: dict[str, str], words: list[str]) -> str:
    """One command, an option per line; `$NAME` stays a variable of the shell."""
    quoted = [w if re.fullmatch(r"\$[A-Z_]+(:\d+)?", w) else shlex.quote(w) for w in words]
    groups: list[str] = []
    for word in quoted:
        if word.startswith("--") or not groups:
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    variables = [f"{k}={shlex.quote(v)}" for k, v in environment.items()]
    return " \\\n  ".join([" ".join([*variables, groups[0]]), *groups[1:]])


def _pool(launch: Launch) -> str:
    pool, p = launch.pool, launch.pool.spec
    nodes = -(-p.replicas // pool.per_node) * pool.nodes
    title = (
        f"# {pool.name}: {p.replicas} x {pool.devices} {pool.device.name}; on each of {nodes} x {pool.node.name}, "
        f"{min(pool.per_node, p.replicas)} side by side"
    )
    if pool.nodes > 1:
        title = f"# {pool.name}: {p.replicas} x {pool.nodes} nodes of {pool.node.name} with {pool.node.devices.count} devices"
    lines = [title]
    if launch.options:
        lines.append(f"cat > {pool.name}.yaml <<'END'\n{options_yaml(launch.options)}END")
    if pool.nodes > 1:
        environment, words = instance(launch)
        lines += ["# first node of an instance; LEADER_ADDRESS is its own address, NODE_RANK 0"]
        if pool.flags.engine == "trtllm":
            lines += [f"mpirun -n {pool.devices} --map-by ppr:{pool.node.devices.count}:node trtllm-llmapi-launch \\",
                      "  " + line(environment, words)]  # fmt: skip
            return "\n".join(lines)
        lines.append(line(environment, [*words, *launch.leader]))
        lines += ["# every further node of it, NODE_RANK 1, 2, …", line(environment, [*words, *launch.follower])]
        return "\n".join(lines)
    variable = _VISIBLE.get(pool.device.vendor)
    for place in range(min(pool.per_node, p.replicas)):
        environment, words = instance(launch, place)
        if variable and pool.devices < pool.node.devices.count:
            first = place * pool.devices
            environment = {variable: ",".join(str(first + i) for i in range(pool.devices)), **environment}
        lines.append(line(environment, words) + " &")
    return "\n".join(lines)


def options_yaml(options: dict[str, Any]) -> str:
    """An options file as YAML."""
    import yaml

    return yaml.safe_dump(options, sort_keys=True)


def urls(launch: Launch, stem: str | None = None) -> list[str]:
    """Addresses of a pool's instances; stem: of hosts of that name and a number, one per instance."""
    pool = launch.pool
    if stem is not None:
        return [f"http://{stem}-{r}.{stem}:{PORT}" for r in range(pool.spec.replicas)]
    return pool.urls


def router_words(launches: list[Launch], port: int, selectors: Mapping[str, tuple[str, ...]] | None = None) -> list[str] | None:
    """The router's command, None where one instance needs none, or the engine has no router.

    selectors: a role to the labels its pods are found by, instead of fixed addresses.
    """
    first = launches[0].pool
    spec, deployment = first.flags, first.deployment
    split = [p for p in launches if p.pool.spec.role in ("prefill", "decode")]
    plain = [p for p in launches if p.pool.spec.role == "colocated"]
    if split and plain:
        raise SpecError(
            "one router deals to colocated instances or to prefill and decode ones, not to both: emit them as two plans"
        )
    if spec.engine == "vllm" and any(p.pool.spec.role == "encode" for p in launches):
        if selectors is not None:
            raise SpecError("vLLM's proxy of encode pools takes fixed addresses, so it has no manifest: emit the shell script")
        return _encoder_proxy(launches, split, plain, port)
    if not split and sum(p.pool.spec.replicas for p in plain) == 1:
        return None
    if not spec.router:
        return None
    words = [*spec.router.split(), "--host", "0.0.0.0", "--port", str(port), "--policy", _POLICY[deployment.routing]]
    if split:
        words.append("--vllm-pd-disaggregation" if spec.engine == "vllm" else "--pd-disaggregation")
    if selectors is not None:
        words += ["--service-discovery", "--service-discovery-port", str(PORT)]
        for role, labels in selectors.items():
            words += ["--selector" if role == "colocated" else f"--{role}-selector", *labels]
        return words
    if not split:
        return [*words, "--worker-urls", *(u for p in plain for u in urls(p))]
    for launch in split:
        role = launch.pool.spec.role
        for place, url in enumerate(urls(launch)):
            words += [f"--{role}", url]
            if role == "prefill" and spec.engine == "sglang":
                words.append(str(_bootstrap(launch, place % launch.pool.per_node)))
    return words


def _encoder_proxy(launches: list[Launch], split: list[Launch], plain: list[Launch], port: int) -> list[str]:
    """vLLM's example proxy of encode pools. Where prefill is apart, its instances tell it their `ec_zmq_addrs` themselves."""
    def of(role: str) -> str:
        return ",".join(u for p in launches if p.pool.spec.role == role for u in urls(p))

    words = ["python", _PROXY, "--host", "0.0.0.0", "--port", str(port), "--encode-servers-urls", of("encode")]
    words += ["--prefill-servers-urls", of("prefill") if split else "disable"]
    words += ["--decode-servers-urls", of("decode" if split else "colocated")]
    places = [] if split else [(p.pool, place, url) for p in plain for place, url in enumerate(urls(p))]
    heard = [f"tcp://{u.split('/')[2].partition(':')[0]}:{embedding_port(x, i % x.per_node)}" for x, i, u in places]
    return [*words, "--ec-consumer-zmq-addrs", ",".join(heard)] if heard else words


def disaggregated_config(launches: list[Launch], port: int, hosts: dict[str, str] | None = None) -> dict[str, Any] | None:
    """TensorRT-LLM's file for `trtllm-serve disaggregated`; None where nothing is split."""
    sides = {"prefill": "context_servers", "decode": "generation_servers"}
    split = [p for p in launches if p.pool.spec.role in sides]
    if not split or split[0].pool.flags.engine != "trtllm":
        return None
    config: dict[str, Any] = {"hostname": "0.0.0.0", "port": port, "backend": "pytorch"}
    for launch in split:
        addresses = [u.removeprefix("http://") for u in urls(launch, (hosts or {}).get(launch.pool.name))]
        side = config.setdefault(sides[launch.pool.spec.role], {"num_instances": 0, "urls": []})
        side["num_instances"] += len(addresses)
        side["urls"] += addresses
    return config


def _router(launches: list[Launch]) -> str:
    port = PORT - 1
    config = disaggregated_config(launches, port)
    if config is not None:
        file = f"cat > disaggregated.yaml <<'END'\n{options_yaml(config)}END"
        return f"# router\n{file}\ntrtllm-serve disaggregated -c disaggregated.yaml"
    words = router_words(launches, port)
    if words is not None:
        return "# router; hosts are named after the pools, one per node\n" + line({}, words)
    instances = [u.removeprefix("http://") for launch in launches for u in urls(launch)]
    if len(instances) == 1:
        return ""
    # Neither TensorRT-LLM nor llama.cpp has a router of its own for equal instances.
    servers = "".join(f"  server {u};\n" for u in instances)
    upstream = f"upstream serve {{\n{_NGINX[launches[0].pool.deployment.routing]}{servers}}}"
    proxy = f"server {{ listen {port}; location / {{ proxy_pass http://serve; proxy_buffering off; }} }}"
    where = "# load balancer (nginx); hosts are named after the pools, one per node"
    return f"{where}\ncat > /etc/nginx/conf.d/serve.conf <<'END'\n{upstream}\n{proxy}\nEND"


def document(launches: list[Launch]) -> dict[str, Any]:
    """The same as plain data."""
    rows = []
    for launch in launches:
        environment, words = instance(launch)
        pool = launch.pool
        rows.append({
            "pool": pool.name, "role": pool.spec.role, "engine": pool.flags.engine, "replicas": pool.spec.replicas,
            "hardware": pool.node.name, "devices": pool.devices, "nodes": pool.nodes, "instances_per_node": pool.per_node,
            "command": [*words, *launch.leader], "further_nodes": [*words, *launch.follower] if launch.leader else None,
            "environment": environment, "options": launch.options,
        })  # fmt: skip
    router = router_words(launches, PORT - 1)
    return {
        "documentation": launches[0].pool.flags.documentation, "version": launches[0].pool.flags.version,
        "pools": rows, "router": router, "router_config": disaggregated_config(launches, PORT - 1),
    }  # fmt: skip


def plan_json(launches: list[Launch]) -> str:
    """The same as JSON."""
    return json.dumps(document(launches), indent=2)
