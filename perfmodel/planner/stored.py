"""A plan read back from its JSON: what runs is evaluated anew, what the solver said is taken as stored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from perfmodel.errors import SpecError
from perfmodel.planner import describe
from perfmodel.planner.case import Case, bucket_mix, serving_instance
from perfmodel.planner.columns import column_at
from perfmodel.planner.evaluated import Evaluated, Run, Running, Served
from perfmodel.planner.layout import Built, Layout, build
from perfmodel.planner.offer import Offer, offers
from perfmodel.planner.page import METRICS
from perfmodel.planner.pools import Pool, pool_of
from perfmodel.planner.quality import allowed
from perfmodel.planner.reuse import Reuse
from perfmodel.planner.verify import replay
from perfmodel.serving import images
from perfmodel.serving import workload as workloads
from perfmodel.spec import yaml
from perfmodel.spec.deployment import Deployment, PoolSpec
from perfmodel.spec.plan import PlanFile, ServiceSpec

_SAME = 0.02
"""Relative difference up to which a percentile counts as the stored one."""
_NOTE = (
    "Read from {file}: what to buy, the proof, alternatives and what-ifs are as stored; closed forms, replay and charts are "
    "computed anew."
)


class OtherPlan(UserWarning):
    """A stored plan's percentiles are not those that this version and calibration give."""


class _Pool(BaseModel):
    """What a stored pool says beside its deployment."""

    hardware: str
    offer: str
    requests_per_s_by_bucket: tuple[float, ...]
    highest_rate_per_replica: float
    limited_by: str


class _Workload(BaseModel):
    load: float


class _Check(BaseModel):
    metric: str
    percentile: str
    promised_s: float | None
    replayed_s: float | None


class _Service(BaseModel):
    workload: _Workload
    pools: tuple[_Pool, ...]
    percentiles: tuple[_Check, ...]
    deployment: Deployment


class _Nodes(BaseModel):
    node: str
    region: str
    term: str
    count: int


class _Plan(_Service):
    nodes: tuple[_Nodes, ...]
    services: tuple[_Service, ...] = ()


class _Request(BaseModel):
    file: str
    folder: str
    content: dict[str, Any]


class _File(BaseModel):
    """What is evaluated anew of a plan.json; the rest is only shown."""

    request: _Request
    plans: tuple[_Plan, ...] = Field(min_length=1)


class _Stored(dict[str, Any]):
    """An object of the file; a key that is not there is an error of the file."""

    def __missing__(self, key: str) -> Any:
        raise SpecError(f"the plan has no {key!r}: it was written by another version, or changed; run `perfmodel plan` again")


def read(path: str | Path, traces: Sequence[str] = ()) -> Run:
    """Evaluate the plans of a plan.json. traces: instead of the files that the services' workloads name, in their order.

    Raises SpecError for a file that is no plan or whose trace is not found; warns where the percentiles are not those stored.
    """
    document = yaml.read(path)
    if not isinstance(document.data, dict) or not isinstance(document.data.get("request"), dict):
        raise SpecError(
            "not the plan.json of `perfmodel plan`: it has no `request`; a deployment alone can be replayed, not reported",
            file=document.file, line=1,
        )  # fmt: skip
    try:
        found = yaml.validate(document, _File)
        content = document.part("request", "content")
        folder = Path(path).parent / found.request.folder
        spec = yaml.validate(_with_traces(content, yaml.validate(content, PlanFile), folder, traces), PlanFile)
        listed = offers(spec.fleet, spec.objective, document.file, {}, spec.regions, priced=spec.limits.budget is not None)
        built: dict[str, dict[Layout, Built]] = {}
        shown = _stored(document.data["plans"])
        plans = [_plan(spec, folder, x, data, listed, built) for x, data in zip(found.plans, shown, strict=True)]
    except SpecError as error:
        # What the trace or the catalogue says has a file of its own.
        raise error if error.file else SpecError(str(error), file=document.file) from None
    return Run(spec, found.request.file, plans, dict(content.data), note=_NOTE.format(file=Path(path).name))


def _stored(x: Any) -> Any:
    if isinstance(x, dict):
        return _Stored({k: _stored(v) for k, v in x.items()})
    return [_stored(v) for v in x] if isinstance(x, list) else x


def _with_traces(content: yaml.Document, spec: PlanFile, folder: Path, traces: Sequence[str]) -> yaml.Document:
    """The request with every file's place known."""
    named = [s for s in spec.served if s.workload.lengths is None]
    if traces and len(traces) != len(named):
        raise SpecError(f"--trace is given {len(traces)} times, and {len(named)} of the plan's workloads read a file")
    every = iter(traces or [_file(s) for s in named])
    changed = content.data | ({"services": [dict(s) for s in content.data["services"]]} if spec.services else {})
    for i, served in enumerate(spec.served):
        if served.workload.lengths is not None:
            continue
        holder = changed["services"][i] if spec.services else changed
        file = next(every)
        place = Path(file) if traces else folder / file
        if not place.exists():
            raise SpecError(f"the plan was made for {file}, which is not in {folder}; say where it is with --trace FILE")
        workload, where = holder["workload"], str(place.absolute())
        trace = {"trace": workload["trace"] | {"file": where}} if "trace" in workload else {"fitted": where}
        holder["workload"] = workload | trace
    return yaml.Document(changed, content.file, content.lines)


def _file(served: ServiceSpec) -> str:
    w = served.workload
    return w.trace.file if w.trace is not None else str(w.fitted)


def _plan(
    spec: PlanFile, folder: Path, said: _Plan, data: dict[str, Any], listed: list[Offer], built: dict[str, dict[Layout, Built]]
) -> Evaluated:
    parts = said.services or (said,)
    if len(parts) != len(spec.served):
        raise SpecError(f"the plan has {len(parts)} services, its request {len(spec.served)}")
    peak = [
        _running(spec, served, folder, part, listed, built.setdefault(served.name, {}))
        for served, part in zip(spec.served, parts, strict=True)
    ]
    now = [describe.service(c) for c in peak]
    for part, new in zip(parts, now, strict=True):
        _compare(part.percentiles, new)
    data.update({k: now[0][k] for k in ("percentiles", "workload", "attainment") if k in now[0]})
    data["pools"] = [x for s in now for x in s["pools"]]
    for old, new in zip(data.get("services", ()), now, strict=False):
        old.update(new)
    return Evaluated(listed, peak, [_bought(o, said.nodes) for o in listed], data)


def _bought(offer: Offer, nodes: tuple[_Nodes, ...]) -> int:
    """Nodes of an offer, over all its terms."""
    mine = [n for n in nodes if (n.node, n.region, n.term == "spot") == (offer.node.name, offer.region, offer.spot)]
    return sum(n.count for n in mine)


def _running(
    spec: PlanFile, served: ServiceSpec, folder: Path, said: _Service, listed: list[Offer], built: dict[Layout, Built]
) -> Running:
    """A service's pools at their stored rates, replayed."""
    choices = allowed(spec)
    workload = images.build(served.workload, folder, said.workload.load, spec.seed, served.model)
    groups = workloads.buckets(workload, choices.buckets, choices.seen)
    service = Served(served.name, served.model, workload, groups, served.workload.objectives, choices, listed, built)
    for layout in service.layouts:
        if layout not in built:
            built[layout] = build(served.model, _offer(layout.node, listed), layout, choices, workload)
    reuse = Reuse(workload, groups, choices.dealt) if choices.prefix_caching else None
    deployed = said.deployment.pools
    if len(said.pools) != len(deployed):
        raise SpecError(f"the plan lists {len(said.pools)} pools and deploys {len(deployed)}")
    pools = [_pool(x, stored, service, reuse) for x, stored in zip(deployed, said.pools, strict=True)]
    return Running(service, pools, replay(pools, workload, groups, spec.seed, choices))


def _offer(label: str, listed: list[Offer]) -> Offer:
    found = next((o for o in listed if o.label == label), None)
    if found is None:
        raise SpecError(f"the plan uses {label}, which its request does not offer")
    return found


def _pool(x: PoolSpec, said: _Pool, service: Served, reuse: Reuse | None) -> Pool:
    layout = Layout(
        said.hardware, x.role, x.tp, x.pp, x.weight_dtype or "checkpoint", x.ep, x.dp, x.cp, x.policy, x.chunk,
        x.prefill_share if x.policy == "split" else 0.0, x.encode_share, x.techniques,
    )  # fmt: skip
    offer, groups = _offer(said.offer, service.offers), service.buckets
    rates = np.array(said.requests_per_s_by_bucket)
    if rates.size != len(groups) or not rates.any():
        raise SpecError(f"the plan was made for {rates.size} ranges of lengths, its trace gives {len(groups)}: another trace?")
    if layout not in service.built:
        service.built[layout] = build(service.model, offer, layout, service.choices, service.workload)
    built = service.built[layout]
    if isinstance(built, str):
        raise SpecError(f"{layout.label} {built}")
    served = tuple(int(k) for k in np.flatnonzero(rates))
    instance = serving_instance(built, layout, bucket_mix(groups, tuple(range(len(groups)))), service.workload.image)
    case = Case(instance, built[0], groups, served, service.workload, service.objectives, reuse, service.choices.dealt)
    each = float(rates.sum()) / x.replicas
    if not (s := instance.state(each, case.mix(each))).feasible:
        raise SpecError(f"{layout.label} cannot last at its {each:.4g} requests/s an instance ({s.reason}): another trace?")
    column = column_at(layout, offer, case, each, said.limited_by)
    column = replace(column, state=replace(column.state, rate=said.highest_rate_per_replica))
    return pool_of(column, x.replicas, rates, groups)


def _compare(before: tuple[_Check, ...], new: dict[str, Any]) -> None:
    """Warn of the percentile that differs most from the stored one."""
    now = {(c["metric"], c["percentile"]): c for c in new["percentiles"]}
    worst, told = _SAME, ""
    for c in before:
        again = now.get((c.metric, c.percentile), {})
        for old, key, how in ((c.promised_s, "promised_s", "in closed form"), (c.replayed_s, "replayed_s", "replayed")):
            found = again.get(key)
            # A queue without end has no number in JSON.
            change = math.inf if (old is None) != (found is None or math.isinf(found)) else 0.0
            if old and found and math.isfinite(found):
                change = abs(found - old) / old
            if change > worst:
                name, values = f"{METRICS.get(c.metric, c.metric)} {c.percentile}", [_shown(x) for x in (found, old)]
                worst, told = change, f"{name} {how} is {values[0]} here and {values[1]} in the plan"
    if told:
        warnings.warn(f"{told}: it was made by another version, calibration or trace", OtherPlan, 2)


def _shown(x: float | None) -> str:
    return "none" if x is None else f"{x * 1e3:,.4g} ms"
