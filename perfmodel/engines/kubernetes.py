"""Kubernetes manifests of a deployment: a Deployment per pool, a LeaderWorkerSet where an instance takes several nodes."""

from __future__ import annotations

import math
import re
from typing import Any

from perfmodel import catalog
from perfmodel.engines.launch import PORT, Launch, Pool
from perfmodel.engines.shell import disaggregated_config, instance, options_yaml, router_words
from perfmodel.errors import SpecError
from perfmodel.parameters import parameters_total
from perfmodel.spec.formats import get_format
from perfmodel.spec.hardware import Network

RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu", "intel": "gpu.intel.com/xe", "google": "google.com/tpu",
             "huawei": "huawei.com/Ascend910"}  # fmt: skip
"""Name under which a vendor's device plugin offers its devices."""
_DOWNLOAD = "ethernet-10g"
"""Slowest link a checkpoint is allowed to come over before a start-up probe gives up."""
_PERIOD = 10  # seconds between two probes


def manifests(launches: list[Launch], name: str = "serve") -> list[dict[str, Any]]:
    """Objects to apply, in order: files, workloads, services, the router."""
    objects: list[dict[str, Any]] = []
    for launch in launches:
        full = f"{name}-{launch.pool.name}"
        if launch.options:
            objects.append(_config_map(full, {f"{launch.pool.name}.yaml": options_yaml(launch.options)}))
        objects.append(_several(launch, full, name) if launch.pool.nodes > 1 else _single(launch, full, name))
        objects.append(_service(full, headless=_numbered(launch)))
    return objects + _router(launches, name)


def text(launches: list[Launch], name: str = "serve") -> str:
    """The manifests as one YAML stream."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Without anchors: every object stands for itself."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(manifests(launches, name), Dumper=Plain, sort_keys=False)


_PART = "app.kubernetes.io/part-of"
_ROLE = "perfmodel/role"


def _labels(full: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": full}


def _numbered(launch: Launch) -> bool:
    """TensorRT-LLM's router wants one fixed address per instance."""
    return launch.pool.flags.engine == "trtllm" and launch.pool.spec.role != "colocated"


def _template(launch: Launch, full: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    labels = {**_labels(full), _PART: name, _ROLE: launch.pool.spec.role}
    metadata: dict[str, Any] = {"labels": labels}
    if "--disaggregation-bootstrap-port" in launch.words:
        port = launch.words[launch.words.index("--disaggregation-bootstrap-port") + 1]
        metadata["annotations"] = {"sglang.ai/bootstrap-port": port}
    return {"metadata": metadata, "spec": spec}


def _meta(full: str) -> dict[str, Any]:
    return {"name": full, "labels": _labels(full)}


def _config_map(full: str, files: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(full), "data": files}


def _service(full: str, *, headless: bool = False) -> dict[str, Any]:
    spec: dict[str, Any] = {"selector": _labels(full), "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]}
    if headless:
        spec["clusterIP"] = "None"
    return {"apiVersion": "v1", "kind": "Service", "metadata": _meta(full), "spec": spec}


def _single(launch: Launch, full: str, name: str) -> dict[str, Any]:
    environment, words = instance(launch)
    template = _template(launch, full, name, _pod(launch, full, environment, words))
    spec = {"replicas": launch.pool.spec.replicas, "selector": {"matchLabels": _labels(full)}, "template": template}
    if _numbered(launch):
        spec |= {"serviceName": full, "podManagementPolicy": "Parallel"}
    kind = "StatefulSet" if _numbered(launch) else "Deployment"
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": _meta(full), "spec": spec}


def _several(launch: Launch, full: str, name: str) -> dict[str, Any]:
    """One group of pods per instance; LeaderWorkerSet gives each pod its leader's address and its place."""
    if not launch.leader:
        raise SpecError(
            f"pool {launch.pool.index + 1}: {launch.pool.engine.title} starts the nodes of one instance over MPI, which a "
            "LeaderWorkerSet does not do; --format shell has the command, or an instance within a node"
        )
    environment, words = instance(launch)
    known = {"$LEADER_ADDRESS": "$(LWS_LEADER_ADDRESS)", "$NODE_RANK": "$(LWS_WORKER_INDEX)"}

    def filled(extra: tuple[str, ...]) -> list[str]:
        result = []
        for word in (*words, *extra):
            for variable, value in known.items():
                word = word.replace(variable, value)
            result.append(word)
        return result

    leader = _pod(launch, full, environment, filled(launch.leader))
    worker = _pod(launch, full, environment, filled(launch.follower), serves=False)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": _meta(full),
        "spec": {"replicas": launch.pool.spec.replicas, "leaderWorkerTemplate": {
            "size": launch.pool.nodes, "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": _template(launch, full, name, leader),
            "workerTemplate": {"spec": worker}}},
    }  # fmt: skip


def _pod(
    launch: Launch, full: str, environment: dict[str, str], words: list[str], *, serves: bool = True
) -> dict[str, Any]:
    pool = launch.pool
    vendor = pool.device.vendor
    if vendor not in RESOURCES or vendor not in pool.flags.images:
        raise SpecError(f"pool {pool.index + 1}: no image or device plugin of {pool.flags.title} is known for {vendor} devices")
    words = [w for w in words if w not in pool.encoders]
    if "--encoder-urls" in words:
        at = words.index("--encoder-urls") + 1
        words[at:at] = _encoders(launch, full)
    words[words.index("--port") + 1] = str(PORT)  # a pod has an address of its own
    count = min(pool.devices, pool.node.devices.count)
    variables: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in environment.items()]
    if "VLLM_NIXL_SIDE_CHANNEL_PORT" in environment:
        address = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        variables.append({"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", **address})
    secret = {"secretKeyRef": {"name": "hugging-face", "key": "token", "optional": True}}
    variables.append({"name": "HF_TOKEN", "valueFrom": secret})
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "cache", "mountPath": "/root/.cache"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}, {"name": "cache", "emptyDir": {}}]
    if launch.options:
        file = f"{pool.name}.yaml"
        words[words.index(file)] = f"/etc/engine/{file}"
        mounts.append({"name": "options", "mountPath": "/etc/engine"})
        volumes.append({"name": "options", "configMap": {"name": full}})
    container: dict[str, Any] = {
        "name": "engine", "image": pool.flags.images[vendor], "command": words, "env": variables,
        "resources": {"limits": {RESOURCES[vendor]: count}}, "volumeMounts": mounts,
    }  # fmt: skip
    if serves:
        probe = {"httpGet": {"path": pool.flags.health, "port": PORT}, "periodSeconds": _PERIOD}
        container["ports"] = [{"name": "http", "containerPort": PORT}]
        container["startupProbe"] = {**probe, "failureThreshold": math.ceil(start_seconds(launch) / _PERIOD)}
        container["readinessProbe"] = probe
        container["livenessProbe"] = {**probe, "failureThreshold": 6}
    return {"containers": [container], "volumes": volumes}


def _encoders(launch: Launch, full: str) -> list[str]:
    """Addresses of the encoders' Services; a Service deals to the instances of its pool."""
    stem = full.removesuffix(launch.pool.name)
    hosts = dict.fromkeys(re.sub(r"-\d+:\d+$", "", u.removeprefix("http://")) for u in launch.pool.encoders)
    return [f"http://{stem}{host}:{PORT}" for host in hosts]


def start_seconds(launch: Launch) -> float:
    """Longest start a probe should allow: the checkpoint over a slow link, then compilation and graphs."""
    pool = launch.pool
    link = catalog.load_hardware(_DOWNLOAD)
    assert isinstance(link, Network)
    stored = parameters_total(pool.model) * get_format(pool.spec.weight_dtype or pool.model.dtype).width
    return float(stored) / link.bandwidth + pool.flags.start_up


def _router(launches: list[Launch], name: str) -> list[dict[str, Any]]:
    full, first = f"{name}-router", launches[0].pool
    config = disaggregated_config(launches, PORT, {x.pool.name: f"{name}-{x.pool.name}" for x in launches})
    roles = {x.pool.spec.role for x in launches}
    if config is not None:
        words = ["trtllm-serve", "disaggregated", "-c", "/etc/engine/disaggregated.yaml"]
        objects = [_config_map(full, {"disaggregated.yaml": options_yaml(config)})]
        return [*objects, *_router_workload(full, first, words, {"configMap": {"name": full}})]
    selectors = {str(r): (f"{_PART}={name}", f"{_ROLE}={r}") for r in sorted(roles - {"encode"}, reverse=True)}
    found = router_words(launches, PORT, selectors)
    if found is None:
        return []  # one instance, or equal ones: a Service deals connections by itself
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _meta(full)}
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": _meta(full), "rules": rules}
    binding = {
        "apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": _meta(full),
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": full},
        "subjects": [{"kind": "ServiceAccount", "name": full}],
    }  # fmt: skip
    return [account, role, binding, *_router_workload(full, first, found, None)]


def _router_workload(
    full: str, first: Pool, words: list[str], options: dict[str, Any] | None
) -> list[dict[str, Any]]:
    image = first.flags.router_image or first.flags.images[first.device.vendor]
    container: dict[str, Any] = {
        "name": "router", "image": image, "command": words, "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": _PERIOD},
    }  # fmt: skip
    spec: dict[str, Any] = {"containers": [container]}
    if options is None:
        spec["serviceAccountName"] = full
    else:
        container["volumeMounts"] = [{"name": "options", "mountPath": "/etc/engine"}]
        spec["volumes"] = [{"name": "options", **options}]
    template = {"metadata": {"labels": _labels(full)}, "spec": spec}
    workload = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _meta(full),
                "spec": {"replicas": 1, "selector": {"matchLabels": _labels(full)}, "template": template}}  # fmt: skip
    return [workload, _service(full)]
