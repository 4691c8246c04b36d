"""From a setting of a paper's file to an estimator and its request: parameters put in, baselines filled in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError, UnknownName, did_you_mean
from perfmodel.estimator import Estimator
from perfmodel.papers.expression import evaluate, names
from perfmodel.spec import yaml
from perfmodel.spec.paper import Paper, Setting, System, Systems
from perfmodel.techniques.registry import kinds, technique

_DEFAULTS: dict[str, Any] = {
    "tp": 1, "pp": 1, "dp": 1, "ep": 1, "cp": 1, "batch": 1, "input": 1024, "output": 128, "prefix": 0, "prompts": 1,
    "largest": 0, "attainment": 0.9, "input_spread": 0.0, "output_spread": 0.0, "rate": 0.0, "ttft": 0.0, "tpot": 0.0,
    "chunk": 0, "steps": 0, "gap": 0.0, "gaps": 0.99, "prefill_share": 0.5, "alone_share": 0.0, "per_token": 0.0, "instances": 1,
    "burst": 1.0, "requests": 1000, "longest": 0, "cache": 0, "tick": 0.0, "message": 0, "overtaken": 0, "fetch": 0.0,
    "migration": 0.0, "spare": 0.0, "draw": 1,
}  # fmt: skip
_DEGREES = ("tp", "pp", "dp", "ep", "cp")
_WHOLE = (*_DEGREES, "input", "output", "prefix", "prompts", "largest", "chunk", "steps", "instances", "requests", "longest",
          "cache", "message", "overtaken", "draw")  # fmt: skip
_OF_A_CLASS = {"share", "input", "output", "input_spread", "output_spread", "prefix"}
_SILENT = "vllm"


@dataclass(frozen=True)
class Resolved:
    """A setting with nothing left open. Two that are equal give equal numbers."""

    model: str
    hardware: str
    engine: str
    values: Mapping[str, Any]
    techniques: tuple[Any, ...]
    batching: str
    policy: str
    formats: Mapping[str, Any]
    roles: Mapping[str, Resolved] = field(default_factory=dict)
    devices: float = 0.0
    """Of a role: devices of its pool; 0: in the proportion that balances the phases."""
    fleet: tuple[tuple[str, float], ...] = ()
    """Devices to choose from, and the price of one [USD/h]."""
    classes: tuple[Mapping[str, float], ...] = ()
    """Kinds of requests that come mixed."""
    routing: str = "least-loaded"

    @property
    def static(self) -> bool:
        """Whether a batch starts and ends together."""
        return self.batching != "continuous"

    @property
    def key(self) -> str:
        """The same text for the same numbers."""
        roles = {name: role.key for name, role in self.roles.items()}
        return json.dumps(
            [self.model, self.hardware, self.engine, dict(self.values), self.techniques, self.batching, self.policy,
             dict(self.formats), roles, self.devices, self.fleet, self.classes, self.routing], sort_keys=True, default=str,
        )  # fmt: skip


@lru_cache(maxsize=1)
def systems() -> dict[str, System]:
    """The dated baselines."""
    return yaml.validate(yaml.read(catalog.root("papers") / "systems.yaml"), Systems).systems


Metric = Callable[[str, str], float]
"""The value of a metric of another setting."""


def _no_metric(setting: str, metric: str) -> float:
    raise SpecError(f"{setting}.{metric} is not known here")


def resolve(paper: Paper, name: str, values: Mapping[str, Any], metric: Metric = _no_metric) -> Resolved:
    """One setting of a paper at values of its parameters. Raises SpecError for what is unknown or missing."""
    if name not in paper.settings:
        raise SpecError(f"{paper.id} has no setting {name!r}{did_you_mean(name, paper.settings)}")
    return _resolve(paper, merged(paper, name), values, name, metric)


def merged(paper: Paper, name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A setting's fields with those of the settings it is like."""
    if name in seen:
        raise SpecError(f"settings are like each other in a circle: {' -> '.join((*seen, name))}")
    setting = paper.settings[name]
    own = {k: v for k, v in setting if k in setting.model_fields_set and k != "like"}
    if setting.like is None:
        return own
    base = merged(paper, setting.like, (*seen, name))
    return _over(base, own)


def compared(paper: Paper) -> list[list[str]]:
    """Settings that each claim and prediction of a paper names, in the file's order."""
    texts = [c.predict for c in paper.claims if c.predict] + [p.predict for p in paper.predictions]
    return [[n for n in paper.settings if n in {path[0] for path in names(text)}] for text in texts]


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A setting's own fields over another's; techniques add up."""
    techniques = (*base.get("techniques", ()), *own.get("techniques", ()))
    return {**base, **own, **({"techniques": techniques} if techniques else {})}


def _resolve(
    paper: Paper, fields: dict[str, Any], values: Mapping[str, Any], name: str, metric: Metric = _no_metric
) -> Resolved:
    def look(path: tuple[str, ...]) -> Any:
        if len(path) == 2 and path[0] in paper.settings:
            return metric(path[0], path[1])
        if len(path) != 1 or path[0] not in values:
            raise SpecError(f"setting {name!r} of {paper.id} uses {'.'.join(path)!r}, which is no parameter"
                            f"{did_you_mean(path[0], values)}")  # fmt: skip
        return values[path[0]]

    def put(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("="):
            return evaluate(value[1:], look)
        if isinstance(value, Mapping):
            return {k: put(v) for k, v in value.items()}
        return value

    given = {k: put(v) for k, v in fields.items() if k not in ("techniques", "roles", "fleet", "classes")}
    fleet = tuple((str(x["device"]), float(x["price"])) for x in (put(t) for t in fields.get("fleet", ())))
    classes = tuple({k: float(v) for k, v in put(t).items()} for t in fields.get("classes", ()))
    for wrong in {k for c in classes for k in c} - _OF_A_CLASS:
        raise SpecError(f"a class of setting {name!r} has an unknown field {wrong!r}{did_you_mean(wrong, _OF_A_CLASS)}")
    if fleet and not given.get("hardware"):
        given["hardware"] = fleet[0][0]
    if not given.get("hardware"):
        raise SpecError(f"setting {name!r} of {paper.id} names no hardware")
    system = systems().get(str(given.get("system", _SILENT)))
    engine = system.engine if system else str(given.get("system", _SILENT))
    numbers: dict[str, Any] = {k: v if given.get(k) is None else given[k] for k, v in _DEFAULTS.items()}
    for key in _WHOLE:
        numbers[key] = round(float(numbers[key]))
    techniques = _joined([put(t) for t in (*(system.techniques if system else ()), *fields.get("techniques", ()))])
    mem = given.get("mem_fraction", system.mem_fraction if system else None)
    formats = {k: given[k] for k in ("weight_dtype", "act_dtype", "kv_dtype") if given.get(k)}
    roles, devices = {}, {}
    for role, own in fields.get("roles", {}).items():
        extra = {k: v for k, v in own.items() if k != "devices"}
        wrong = set(extra) - set(Setting.model_fields)
        if wrong:
            raise SpecError(f"role {role!r} of setting {name!r} has an unknown field {wrong.pop()!r}")
        roles[role] = _resolve(paper, _over({k: v for k, v in fields.items() if k != "roles"}, extra), values, name, metric)
        devices[role] = float(put(own.get("devices", 0.0)))
    return Resolved(
        str(given.get("model", "")), str(given["hardware"]), engine, numbers, techniques,
        str(given.get("batching") or (system.batching if system else "continuous")),
        str(given.get("policy") or (system.policy if system else "chunked")),
        formats | ({"mem_fraction": float(mem)} if mem is not None else {}),
        {role: _with_devices(r, devices[role]) for role, r in roles.items()}, fleet=fleet, classes=classes,
        routing=str(given.get("routing") or "least-loaded"),
    )  # fmt: skip


def _joined(specs: list[Any]) -> tuple[Any, ...]:
    """Techniques as listed; one of a kind that a system has already, and that stands once, adds its parameters to that one."""
    found: list[tuple[str, Any]] = []
    for spec in specs:
        kind = _kind(spec)
        once = kind in kinds() and not kinds()[kind].repeats
        at = next((i for i, (other, _) in enumerate(found) if once and other == kind), None)
        if at is None:
            found.append((kind, spec))
        else:
            given = (technique(t).model_dump(exclude_unset=True) for t in (found[at][1], spec))
            found[at] = (kind, {"kind": kind, **next(given), **next(given)})
    return tuple(spec for _, spec in found)


def _kind(spec: Any) -> str:
    """Of a technique or a preset as a file names it; the name itself where nothing is known by it."""
    name = str(spec.get("kind") or spec.get("preset") or "") if isinstance(spec, Mapping) else str(spec).partition(":")[0]
    if name in kinds():
        return name
    try:
        return catalog.load_preset(name).technique
    except UnknownName:
        return name


def _with_devices(r: Resolved, devices: float) -> Resolved:
    return replace(r, roles={}, devices=devices)


_built: dict[str, Estimator] = {}
_MOST_BUILT = 512


def estimator(r: Resolved) -> Estimator:
    """The estimator of a setting; settings that differ only in their request share one."""
    if not r.model:
        raise SpecError(f"a setting on {r.hardware} names no model, so only facts of the hardware are known")
    key = json.dumps([r.model, r.hardware, r.engine, [r.values[d] for d in _DEGREES], r.techniques, dict(r.formats)],
                     default=str)  # fmt: skip
    if key not in _built:
        if len(_built) >= _MOST_BUILT:
            _built.clear()
        degrees = {d: r.values[d] for d in _DEGREES}
        _built[key] = Estimator(
            r.model, r.hardware, engine=r.engine, techniques=r.techniques, **degrees, **r.formats
        )
    return _built[key]


calibration.on_change(_built.clear)
