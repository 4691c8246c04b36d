"""From a serving row to the instance it was measured on: model, hardware, layout, number formats, engine."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from perfmodel import calibration, catalog
from perfmodel.errors import UnknownName
from perfmodel.estimator import Estimator
from perfmodel.spec.calibration import version_number
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import Model
from perfmodel.validation.rows import Refused, Row

_DEFAULT_ENGINE = "vllm"  # an engine nobody calibrated is taken for the most common one


class Instance(NamedTuple):
    """Everything an Estimator needs, hashable."""

    model: str
    hardware: str
    engine: str
    tp: int
    pp: int
    dp: int
    ep: int
    weight: str | None
    kv: str | None


@lru_cache(maxsize=512)
def estimator(i: Instance) -> Estimator:
    """The estimator of an instance, built once for a set of parameters."""
    return Estimator(
        i.model, i.hardware, tp=i.tp, pp=i.pp, dp=i.dp, ep=i.ep, engine=i.engine, weight_dtype=i.weight, kv_dtype=i.kv
    )


calibration.on_change(estimator.cache_clear)


def of_row(row: Row) -> Instance:
    """The instance of a row. Raises Refused where the row does not say enough."""
    degrees = {k: _degree(row, k, 1) for k in ("pp", "dp", "ep")}
    devices = _degree(row, "n_devices", degrees["pp"] * degrees["dp"] * _degree(row, "tp", 1))
    # Without a tp column the devices that pipeline and data parallelism leave cut every layer.
    tp = _degree(row, "tp", max(devices // (degrees["pp"] * degrees["dp"]), 1))
    return make(row, tp=tp, **degrees)


def make(row: Row, *, tp: int, pp: int, dp: int, ep: int) -> Instance:
    """The instance of a row with a layout found elsewhere."""
    engine = engine_of(row)
    model, weight, cache = formats(row.text("model"), row.text("dtype").lower())
    stated = row.text("kv_dtype").lower()
    kv = get_format(stated).name if stated and stated != "auto" else cache
    return Instance(model, row.hardware, engine, tp, pp, dp, ep, weight, kv)


def engine_of(row: Row) -> str:
    """The row's engine: an entry for the version's generation (alias `trtllm==0`) where there is one.

    Else the engine, with its version where that counts memory unlike the newest (`vllm==0.6.2`).
    """
    name = calibration.known_engine(row.text("engine")) or _DEFAULT_ENGINE
    version = row.text("engine_version")
    number = version_number(version)
    if number is None:
        return name
    generations = (calibration.known_engine(f"{name}=={'.'.join(map(str, number[:n]))}") for n in (2, 1))
    generation = next((g for g in generations if g), None)
    if generation:
        return generation
    dated = f"{name}=={version}"
    return name if calibration.engine(dated).account == calibration.engine(name).account else dated


@lru_cache(maxsize=512)
def _known(name: str) -> Model | None:
    try:
        return catalog.load_model(name) if name else None
    except UnknownName:
        return None


@lru_cache(maxsize=512)
def formats(name: str, label: str) -> tuple[str, str | None, str | None]:
    """(checkpoint, weight format, cache format) behind a row's model and dtype; None: the checkpoint's own.

    A label as wide as the checkpoint's narrowest weights, or wider than already quantised ones, names the checkpoint
    itself (its activations may be wider); else a catalogue variant of that format, else the format for all weights.
    Benchmarks of quantised weights quantise the cache as well. Raises Refused for a model the catalogue does not know.
    """
    model = _known(name)
    if model is None:
        raise Refused(f"unknown model {name!r}" if name else "model not stated")
    weight = None
    own = min(get_format(f).bits for f in (model.dtype, model.expert_dtype) if f)
    if label not in ("", "auto", "mixed"):
        wanted = get_format(label)
        if wanted.bits != own and not wanted.bits > own < 16:
            variants = {f"{model.name}-{wanted.name}", f"{model.name}-{label}"} & set(catalog.names("models"))
            model, weight = (catalog.load_model(min(variants)), None) if variants else (model, wanted.name)
    quantised = get_format(weight or model.dtype).bits <= 8
    return model.name, weight, "fp8" if quantised and not model.kv_dtype else None


def _degree(row: Row, name: str, default: int) -> int:
    value = row.number(name, default)
    if value < 1 or value != int(value):
        raise Refused(f"{name} is not a whole number")
    return int(value)
