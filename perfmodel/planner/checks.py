"""What the parts of a plan file ask of each other, each mistake with its line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perfmodel import calibration
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.planner.offer import Offer
from perfmodel.planner.quality import allowed_name
from perfmodel.spec.formats import get_format
from perfmodel.spec.plan import PlanFile
from perfmodel.spec.yaml import Document
from perfmodel.techniques.base import beforehand
from perfmodel.techniques.registry import techniques


def check_plan(spec: PlanFile, document: Document) -> None:
    """Raise SpecError where one section needs another that is missing."""

    def refuse(why: str, *path: str | int) -> None:
        raise SpecError(why, file=document.file, line=document.line(path), path=".".join(map(str, path)))

    def known(find: Callable[[Any], object], name: Any, *path: str | int) -> None:
        try:
            find(name)
        except SpecError as error:
            refuse(str(error), *path)

    c = spec.choices
    known(calibration.engine, c.engine, "choices", "engine")
    if c.kv_dtype not in (None, "auto"):
        known(get_format, str(c.kv_dtype), "choices", "kv_dtype")
    for i, name in enumerate(c.weight_dtype):
        if name != "checkpoint":
            known(get_format, name, "choices", "weight_dtype", i)
    for i, name in enumerate(c.allow):
        known(allowed_name, name, "choices", "allow", i)
    for i, several in enumerate(c.techniques):
        given = (several,) if isinstance(several, str) else several
        known(techniques, given, "choices", "techniques", i)
        if kind := beforehand(techniques(given)):
            why = (
                f"a plan finds cached prompt tokens itself (prefix_caching: true), and knows no other look-ups, waits or stored "
                f"answers; leave {kind} out"
            )
            refuse(why, "choices", "techniques", i)
    for i, item in enumerate(spec.fleet):
        if item.region and item.region not in spec.regions:
            hint = did_you_mean(item.region, spec.regions) or f"; regions: {', '.join(spec.regions) or 'none'}"
            refuse(f"region {item.region!r} is not listed under regions{hint}", "fleet", i, "region")
        if "spot" in item.terms and spec.startup is None:
            refuse("spot needs `startup: {provisioning: …, weights: …, engine_init: …}`: a reload", "fleet", i, "terms")
    r = spec.resilience
    if r is not None and "rack" in r.survive and not any(i.rack_nodes for i in spec.fleet):
        refuse("rack needs rack_nodes of the fleet's items: how many nodes fail together", "resilience", "survive")
    if r is not None and r.availability is not None and not any(i.mtbf for i in spec.fleet):
        refuse("availability needs mtbf and mttr of the fleet's items", "resilience", "availability")
    if spec.profile is not None and spec.profile.fleet == "elastic" and spec.startup is None:
        refuse("an elastic fleet needs `startup: {provisioning: …, weights: …, engine_init: …}`: its lag", "profile", "fleet")
    if spec.objective in ("latency", "goodput") and spec.limits.budget is None and spec.limits.devices is None:
        refuse(f"{spec.objective} needs `limits: {{budget: … USD/h}}` or `{{devices: …}}`, or the best is endless", "objective")
    if spec.objective == "goodput" and spec.profile is not None and spec.profile.fleet == "elastic":
        refuse("goodput is sought for one load; leave the profile out or make it fixed", "objective")


def check_power(spec: PlanFile, listed: list[Offer], document: Document) -> None:
    """Power in an objective or a limit needs every device's; carbon needs every region's intensity."""
    carbon = spec.objective == "carbon" or spec.limits.carbon is not None
    electric = any(r.electricity is not None or r.power is not None for r in spec.regions.values())
    for o in listed:
        line = document.line(("fleet", o.item))
        if (carbon or electric or spec.objective == "power" or spec.limits.power is not None) and not o.machine.tdp:
            raise SpecError(
                f"the power of {o.machine.device.name} is not known, so {o.label} cannot be planned by power, carbon or "
                "electricity", file=document.file, line=line, path=f"fleet.{o.item}",
            )  # fmt: skip
        if carbon and o.site.carbon is None:
            where = f"region {o.region!r}" if o.region else "a `region`"
            raise SpecError(
                f"{o.label}: carbon needs {where} with `carbon: … g/kWh`",
                file=document.file, line=line, path=f"fleet.{o.item}",
            )  # fmt: skip
