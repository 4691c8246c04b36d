"""Which formats change a model's answers, and which of those the plan allows."""

from __future__ import annotations

from perfmodel.catalog import load_model
from perfmodel.errors import SpecError
from perfmodel.spec.choices import Choices
from perfmodel.spec.formats import Quality, get_format, quality
from perfmodel.spec.model import Model
from perfmodel.spec.plan import PlanFile
from perfmodel.spec.yaml import Document

_RANK: tuple[Quality, ...] = ("exact", "checkpoint", "lossy")


def weights(name: str, model: Model) -> Quality:
    """Quality of weights in a format: the worst over the checkpoint's own formats of dense and expert weights."""
    if name == "checkpoint":
        return "checkpoint"
    stored = {model.dtype, model.expert_dtype or model.dtype}
    return max((quality(name, s) for s in stored), key=_RANK.index)


def cache(name: str, model: Model) -> Quality:
    """Quality of a KV cache in a format: against what the checkpoint states, else against 16 bits."""
    own = model.kv_dtype or ("fp16" if model.dtype == "fp16" else "bf16")
    return quality(name, own)


def check_quality(spec: PlanFile, document: Document) -> None:
    """Raise SpecError for a lossy format that the plan names without allowing it."""
    choices = spec.choices
    allow = {get_format(a).name for a in choices.allow}
    for service in spec.served:
        model = load_model(service.model)
        for i, name in enumerate(choices.weight_dtype):
            if name != "checkpoint" and weights(name, model) == "lossy" and get_format(name).name not in allow:
                _refuse(f"{name} weights are lossy: {model.name} is stored in {model.dtype}", name, document,
                        ("choices", "weight_dtype", i))  # fmt: skip
        kv = choices.kv_dtype
        if kv not in (None, "auto") and cache(kv, model) == "lossy" and get_format(kv).name not in allow:
            _refuse(f"a KV cache in {kv} is lossy for {model.name}", kv, document, ("choices", "kv_dtype"))


def _refuse(why: str, name: str, document: Document, path: tuple[str | int, ...]) -> None:
    raise SpecError(
        f"{why}; add `allow: [{name}]` under choices to let the planner use it",
        file=document.file, line=document.line(path), path=".".join(map(str, path)),
    )  # fmt: skip


def allowed(spec: PlanFile) -> Choices:
    """Choices with the weight formats that may be tried: those listed, else the checkpoint's and what `allow` adds."""
    c = spec.choices
    if c.weight_dtype or not c.allow:
        return c
    return c.model_copy(update={"weight_dtype": ("checkpoint", *c.allow)})


def lossy(choices: Choices, model: Model) -> list[str]:
    """Weight formats among the choices that are lossy for a model."""
    return [f for f in choices.weight_dtype if weights(f, model) == "lossy"]
