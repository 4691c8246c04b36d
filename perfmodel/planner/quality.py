"""Which formats change a model's answers, and which of those the plan allows."""

from __future__ import annotations

from perfmodel import catalog
from perfmodel.catalog import load_model
from perfmodel.errors import SpecError, UnknownName, did_you_mean
from perfmodel.spec.choices import Choices
from perfmodel.spec.formats import ALIASES, FORMATS, Quality, get_format, quality
from perfmodel.spec.model import Model
from perfmodel.spec.plan import PlanFile
from perfmodel.spec.yaml import Document
from perfmodel.techniques.registry import kinds
from perfmodel.techniques.registry import technique as built

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


def technique(name: str) -> Quality:
    """Quality of a technique at its parameters; a preset is one too."""
    return built(name).effects()


def is_format(name: str) -> bool:
    """Whether `allow` names a number format; what it names else is a technique or a preset."""
    return name.lower() in FORMATS or name.lower() in ALIASES


def allowed_name(name: str) -> None:
    """Raise SpecError, with the nearest spelling, for what is neither a format nor a technique."""
    if is_format(name):
        return
    try:
        built(name)
    except UnknownName:
        known = [*FORMATS, *ALIASES, *kinds(), *catalog.names("techniques")]
        raise SpecError(f"{name!r} is no number format and no technique{did_you_mean(name, known)}") from None


def _sets(choices: Choices) -> list[tuple[str, ...]]:
    return [(t,) if isinstance(t, str) else t for t in choices.techniques]


def _allowed_technique(name: str, allow: tuple[str, ...]) -> bool:
    """A technique may be allowed as it is written, by its preset's name, or by its kind."""
    return bool({name, name.partition(":")[0], built(name).kind} & set(allow))


def check_quality(spec: PlanFile, document: Document) -> None:
    """Raise SpecError for a lossy format that the plan names without allowing it."""
    choices = spec.choices
    allow = {get_format(a).name for a in choices.allow if is_format(a)}
    for i, several in enumerate(_sets(choices)):
        for name in several:
            if technique(name) == "lossy" and not _allowed_technique(name, choices.allow):
                _refuse(f"the technique {name} is lossy", name, document, ("choices", "techniques", i))
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
    """Choices with what may be tried: weight formats listed, else the checkpoint's and those of `allow`; techniques of both."""
    c = spec.choices
    formats = tuple(a for a in c.allow if is_format(a))
    listed = {name for several in _sets(c) for name in several}
    named = {built(n).kind for n in listed} | {n.partition(":")[0] for n in listed} | listed
    more = tuple(a for a in c.allow if not is_format(a) and a not in named)
    weights_tried = c.weight_dtype if c.weight_dtype or not formats else ("checkpoint", *formats)
    return c.model_copy(update={"weight_dtype": weights_tried, "techniques": (*c.techniques, *more)})


def lossy(choices: Choices, model: Model) -> list[str]:
    """Weight formats among the choices that are lossy for a model."""
    return [f for f in choices.weight_dtype if weights(f, model) == "lossy"]
