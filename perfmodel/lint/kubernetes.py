"""Server commands in Kubernetes manifests, and what the manifest itself gets wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from perfmodel import catalog
from perfmodel.engines.command import Command, read, servers
from perfmodel.engines.kubernetes import RESOURCES
from perfmodel.errors import SpecError, UnitError
from perfmodel.lint.finding import Finding, Severity
from perfmodel.lint.server import Server
from perfmodel.spec.hardware import Device, Network, Node
from perfmodel.units import parse

_SLOW = "ethernet-10g"
"""A checkpoint that comes over this link must still be loaded before a probe gives up."""
_SHM = 1 << 30  # bytes; the 64 MiB a container gets by default are too small for collectives over shared memory


@dataclass(frozen=True)
class Pod:
    """A container with a server command, and what surrounds it."""

    where: str
    command: Command
    container: dict[str, Any]
    spec: dict[str, Any]
    devices: int | None
    """Devices the container is limited to."""
    nodes: int = 1
    """Pods of one instance."""
    files: dict[str, str] = field(default_factory=dict)


def is_manifest(text: str) -> bool:
    """Whether a text reads like Kubernetes objects."""
    return bool(re.search(r"^\s*apiVersion:", text, re.MULTILINE) and re.search(r"^\s*kind:", text, re.MULTILINE))


@contextlib.contextmanager
def _malformed(where: str) -> Iterator[None]:
    """Values of a kind no such object has become one error: manifests are other people's, and have no schema here."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(f"an object of the manifest is not what Kubernetes takes: {error}", file=where) from None


def pods(text: str, file: str = "<manifest>") -> list[Pod]:
    """Every container that starts a server. Raises SpecError for text that is not YAML, or without a server."""
    import yaml

    try:
        documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "not valid YAML"
        raise SpecError(f"not valid YAML: {reason}", file=file, line=mark.line + 1 if mark else None) from None
    objects = [o for d in documents for o in (d.get("items") or [d]) if isinstance(o, dict)]
    maps = {str(o["metadata"]["name"]): o["data"] for o in objects
            if o.get("kind") == "ConfigMap" and isinstance(o.get("data"), dict)
            and isinstance(o.get("metadata"), dict) and "name" in o["metadata"]}  # fmt: skip
    with _malformed(file):
        found = [pod for o in objects for pod in _of_object(o, maps)]
    if not found:
        raise SpecError("no container of the manifest starts a server of a known engine", file=file)
    return found


def _of_object(o: dict[str, Any], maps: dict[str, dict[str, str]]) -> Iterator[Pod]:
    name = f"{o.get('kind')}/{(o.get('metadata') or {}).get('name', '?')}"
    spec = o.get("spec") or {}
    group = spec.get("leaderWorkerTemplate") or {}
    if group:
        leader = group.get("leaderTemplate") or group.get("workerTemplate") or {}
        yield from _of_pod(name, leader.get("spec") or {}, maps, int(group.get("size", 1)))
    elif o.get("kind") == "Pod":
        yield from _of_pod(name, spec, maps, 1)
    elif isinstance(spec.get("template"), dict):
        yield from _of_pod(name, spec["template"].get("spec") or {}, maps, 1)


def _of_pod(name: str, spec: dict[str, Any], maps: dict[str, dict[str, str]], nodes: int) -> Iterator[Pod]:
    for container in spec.get("containers") or []:
        for command in _commands(container):
            files = _files(container, spec, maps)
            environment = {str(e["name"]): str(e.get("value", "")) for e in container.get("env") or [] if "name" in e}
            whole = dataclasses.replace(command, environment=command.environment | environment, files=files)
            yield Pod(f"{name} ({container.get('name', '?')})", whole, container, spec, _devices(container), nodes)


def _commands(container: dict[str, Any]) -> list[Command]:
    entry = [str(w) for w in container.get("command") or []]
    words = entry + [str(w) for w in container.get("args") or []]
    if len(words) >= 3 and re.search(r"(^|/)(ba)?sh$", words[0]):
        script = next((w for w in words[1:] if not w.startswith("-")), "")
        try:
            return read(script)
        except SpecError:
            return []
    # An image whose entry point is the server has only arguments.
    return list(servers(words if entry else ["run", str(container.get("image", "")), *words]))


def _files(container: dict[str, Any], spec: dict[str, Any], maps: dict[str, dict[str, str]]) -> dict[str, str]:
    volumes = {v.get("name"): (v.get("configMap") or {}).get("name") for v in spec.get("volumes") or []}
    found = {}
    for mount in container.get("volumeMounts") or []:
        for key, text in maps.get(volumes.get(mount.get("name")) or "", {}).items():
            found[f"{str(mount.get('mountPath', '')).rstrip('/')}/{key}"] = str(text)
    return found


def _devices(container: dict[str, Any]) -> int | None:
    limits = (container.get("resources") or {}).get("limits") or {}
    counts = [int(v) for k, v in limits.items() if (k in RESOURCES.values() or k.endswith("/gpu")) and str(v).isdigit()]
    return sum(counts) if counts else None


def node_of(pod: Pod) -> Node | None:
    """The node a manifest's selectors name: an instance type of a price list, or a GPU product."""
    with _malformed(pod.where):
        selector = {str(k): str(v) for k, v in (pod.spec.get("nodeSelector") or {}).items()}
    for key, value in selector.items():
        if key.endswith("instance-type"):
            item = next((i for p in catalog.load_prices() for i in p.items if i.instance == value), None)
            if item is not None:
                hardware = catalog.load_hardware(item.node)
                return hardware if isinstance(hardware, Node) else _node_with(hardware)
        if key.endswith(("gpu.product", "accelerator", "gpu-product")):
            return _product(value)
    return None


def _node_with(device: object) -> Node | None:
    name = catalog.node_of(device.name) if isinstance(device, Device) else None
    return catalog.load_node(name) if name else None


def _product(text: str) -> Node | None:
    """`NVIDIA-H100-80GB-HBM3` is the node with the device whose name its words spell."""
    words = set(re.split(r"[-_\s]+", text.lower()))
    form = {"hbm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "hbm3e": "sxm"}
    words |= {form[w] for w in words & set(form)}
    best: tuple[int, int, Node] | None = None
    for node in catalog.nodes():
        parts = set(node.devices.device.split("-"))
        chip = node.devices.device.split("-")[0]
        if chip in words and (best is None or (len(parts & words), -len(parts - words)) > best[:2]):
            best = (len(parts & words), -len(parts - words), node)
    return catalog.load_node(catalog.node_of(best[2].devices.device) or best[2].name) if best else None


def check(pod: Pod, s: Server | None) -> list[Finding]:
    """Findings about the manifest around a command. Raises SpecError where a value is of no kind Kubernetes takes."""
    with _malformed(pod.where):
        return list(_check(pod, s))


def _check(pod: Pod, s: Server | None) -> Iterator[Finding]:
    needed = -(-s.devices // pod.nodes) if s else None
    if pod.devices is None:
        yield Finding("error", "no-device-limit", "the container is limited to no devices: it will see none")
    elif needed is not None and pod.devices != needed:
        verb = "fewer than" if pod.devices < needed else "more than"
        severity: Severity = "error" if pod.devices < needed else "warning"
        message = f"the container gets {pod.devices} devices, {verb} the {needed} the command uses"
        yield Finding(severity, "device-limit", message, number=float(abs(pod.devices - needed)))
    asked = (pod.container.get("resources") or {}).get("requests") or {}
    limits = (pod.container.get("resources") or {}).get("limits") or {}
    for name in RESOURCES.values():
        if name in asked and str(asked[name]) != str(limits.get(name)):
            message = f"{name}: {asked[name]} requested and {limits.get(name)} as the limit; devices must be equal in both"
            yield Finding("error", "device-request", message)
    if needed is not None and needed > 1:
        yield from _shared_memory(pod)
    yield from _reachable(pod)
    yield from _probes(pod, s)


def _shared_memory(pod: Pod) -> Iterator[Finding]:
    mounts = {str(m.get("mountPath", "")).rstrip("/"): m.get("name") for m in pod.container.get("volumeMounts") or []}
    if "/dev/shm" not in mounts:
        if not pod.spec.get("hostIPC"):
            message = "no volume at /dev/shm: several processes of one server exchange tensors there, and 64 MiB is the default"
            yield Finding("error", "no-shared-memory", message)
        return
    volume: dict[str, Any] = next((v for v in pod.spec.get("volumes") or [] if v.get("name") == mounts["/dev/shm"]), {})
    limit = (volume.get("emptyDir") or {}).get("sizeLimit")
    if limit is None:
        return
    try:
        size = parse(re.sub(r"^([\d.]+)\s*([KMGT]i?)$", r"\1 \2B", str(limit)), "size")
    except UnitError:
        yield Finding("error", "shared-memory-size", f"sizeLimit {limit!r} is no size")
        return
    if size < _SHM:
        message = f"/dev/shm of {limit} is small for collectives between processes"
        yield Finding("warning", "shared-memory-small", message, number=size)


def _reachable(pod: Pod) -> Iterator[Finding]:
    spec = pod.command.spec
    host = next((g for g in pod.command.given if g.option and g.option.flag.sets == "host"), None)
    default = next((str(f.default) for f in spec.flags.values() if f.sets == "host" and f.default), None)
    address = host.value if host else default
    if address in ("localhost", "127.0.0.1"):
        message = f"the server listens on {address}, which nothing outside the pod reaches; give --host 0.0.0.0"
        word = host.word if host else None
        yield Finding("error", "host-unreachable", message, word, fix=(("host", "0.0.0.0"),))
    port = next((g.value for g in pod.command.given if g.option and g.option.flag.sets == "port"), None)
    port = port or next((str(f.default) for f in spec.flags.values() if f.sets == "port"), None)
    names = {str(p.get("name")): str(p.get("containerPort")) for p in pod.container.get("ports") or []}
    listed = set(names.values())
    if port and listed and port not in listed:
        message = f"the server listens on port {port}, the container declares {', '.join(sorted(listed))}"
        yield Finding("error", "port-mismatch", message)
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = str(((pod.container.get(kind) or {}).get("httpGet") or {}).get("port", port))
        if port and names.get(asked, asked) != port:
            yield Finding("error", "probe-port", f"{kind} asks port {asked}, the server listens on {port}")


def _probes(pod: Pod, s: Server | None) -> Iterator[Finding]:
    container = pod.container
    if not container.get("readinessProbe"):
        message = "no readinessProbe: requests are sent to the pod while the weights still load"
        yield Finding("warning", "no-readiness-probe", message)
    probe = container.get("startupProbe") or container.get("livenessProbe")
    if not probe or s is None:
        return
    kind = "startupProbe" if container.get("startupProbe") else "livenessProbe"
    patience = float(probe.get("initialDelaySeconds", 0))
    patience += float(probe.get("failureThreshold", 3)) * float(probe.get("periodSeconds", 10))
    link = catalog.load_hardware(_SLOW)
    assert isinstance(link, Network)
    load = s.weights * s.devices / s.replicas / link.bandwidth
    if patience < load:
        message = (
            f"{kind} restarts the pod after {patience:.0f} s; the {s.weights * s.devices / s.replicas / 1e9:.0f} GB of weights "
            f"take {load:.0f} s over 10 Gbit/s, and compilation comes on top: it never gets ready"
        )
        yield Finding("error", "probe-too-short", message, number=load - patience)
