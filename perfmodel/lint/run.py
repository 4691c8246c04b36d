"""From a text to reports: find the commands, build each server, ask every rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perfmodel import catalog
from perfmodel.engines.command import Command, read
from perfmodel.engines.settings import settings
from perfmodel.errors import SpecError
from perfmodel.lint import feature_rules, kubernetes, load_rules, memory_rules, parallel_rules, setting_rules, spelling
from perfmodel.lint.better import better
from perfmodel.lint.finding import Finding, Fit, Report, ordered
from perfmodel.lint.fit import fit
from perfmodel.lint.kubernetes import Pod
from perfmodel.lint.names import checkpoint
from perfmodel.lint.server import Server, server
from perfmodel.spec.hardware import Node


def lint(
    text: str,
    hardware: str | None = None,
    *,
    model: str | None = None,
    version: str = "",
    lengths: tuple[int, int] | None = None,
    rate: float | None = None,
) -> list[Report]:
    """One report per server command in a shell text, a Kubernetes manifest, or a file of either.

    hardware: node or device the commands run on; a manifest's nodeSelector may say it. model: what the checkpoint is,
    where its name does not tell. version: the engine's; the newest otherwise. lengths: (prompt, output) tokens of the
    workload, and rate [requests/s]. Raises SpecError where there is no command, or for unknown names.
    """
    file = "<command>"
    checkpoint.cache_clear()  # the catalogue may have grown since
    if _is_file(text):
        file, text = text, _content(text)
    node = _node(hardware) if hardware else None
    if kubernetes.is_manifest(text):
        found: list[tuple[Command, Pod | None]] = [(p.command, p) for p in kubernetes.pods(text, file)]
    else:
        found = [(c, None) for c in read(text)]
    reports = []
    for command, pod in found:
        here = node or (kubernetes.node_of(pod) if pod else None)
        reports.append(_report(command, pod, here, model, version, lengths, rate))
    return reports


def _is_file(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).is_file()
    except OSError:
        return False  # a command line is too long for a file's name


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the file: {getattr(error, 'strerror', None) or error}", file=path) from None


def _node(name: str) -> Node:
    spec = catalog.load_hardware(name)
    if isinstance(spec, Node):
        return spec
    holder = catalog.node_of(spec.name)
    if holder is None:
        raise SpecError(f"{name}: no node of the catalogue holds this device; name the node")
    return catalog.load_node(holder)


def _report(
    command: Command, pod: Pod | None, node: Node | None, model: str | None, version: str,
    lengths: tuple[int, int] | None, rate: float | None,
) -> Report:  # fmt: skip
    visible = pod.devices * pod.nodes if pod and pod.devices else None

    def examined(c: Command) -> tuple[tuple[Finding, ...], Fit | None, Server | None]:
        return _examine(c, pod, node, model, version, lengths, rate, visible)

    findings, held, s = examined(command)
    improved, after = command, findings
    # A change may uncover the next problem: twice is enough for any pair.
    for _ in range(3):
        changed = better(improved, after)
        if changed.text == improved.text:
            break
        improved, after = changed, examined(changed)[0]
    return Report(
        command.text, command.engine, s.model.name if s else None, node.name if node else None, held, findings,
        improved.text if improved.text != command.text else None,
        {"title": command.spec.title, "version": version or command.spec.version, "documentation": command.spec.documentation},
    )  # fmt: skip


def _examine(
    command: Command, pod: Pod | None, node: Node | None, model: str | None, version: str,
    lengths: tuple[int, int] | None, rate: float | None, visible: int | None,
) -> tuple[tuple[Finding, ...], Fit | None, Server | None]:  # fmt: skip
    findings = list(spelling.check(command, settings(command), version))
    s: Server | None = None
    if node is None:
        message = "no hardware is named, so nothing is computed: --hardware NODE, or a nodeSelector"
        findings.append(Finding("info", "no-hardware", message))
    else:
        found = server(command, node, version=version, model=model, lengths=lengths, visible=visible)
        if isinstance(found, str):
            findings.append(Finding("info", "not-computed", found))
        else:
            s = found
    held = None
    if s is not None:
        findings += parallel_rules.check(s)
        if pod is not None and visible is not None:
            # The container's limit, not the node, says how many devices there are: the manifest's own rule speaks.
            findings = [f for f in findings if f.code != "too-many-devices"]
        try:
            findings += _computed(s, rate)
            held = fit(s)
        except SpecError as error:
            if not any(f.severity == "error" for f in findings):
                findings.append(Finding("error", "impossible-layout", str(error)))
    if pod is not None:
        findings += kubernetes.check(pod, s)
    return ordered(findings), held, s


def _computed(s: Server, rate: float | None) -> Iterator[Finding]:
    """Rules that need the model on the devices. Raises SpecError for degrees that cannot cut it."""
    yield from setting_rules.check(s)
    yield from feature_rules.check(s)
    yield from memory_rules.check(s)
    if s.pool > 0:
        yield from parallel_rules.pipeline(s)
        yield from parallel_rules.across_nodes(s)
        if s.lengths is not None:
            yield from load_rules.check(s, s.lengths, rate)
