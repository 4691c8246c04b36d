"""What holds for every kind of technique, alone and in pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from every_kind import CHANGED, DEGREES, DENOISING, IDENTITY, MODEL, NODE, built, text

from perfmodel.denoising import denoise
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, prefill
from perfmodel.kernels import STORED
from perfmodel.kernels.grouped import as_served
from perfmodel.roofline import cost
from perfmodel.schedule import operators
from perfmodel.techniques.base import words
from perfmodel.techniques.registry import kinds

NAMES = list(CHANGED)


def test_every_kind_is_here() -> None:
    assert set(CHANGED) | set(DENOISING) == set(kinds())
    assert set(IDENTITY) <= set(kinds())


def together(*names: str) -> Estimator:
    return built(*(text(n, CHANGED[n]) for n in names))


def tried(*names: str) -> Estimator | str:
    """The estimator, or why there is none."""
    try:
        return together(*names)
    except SpecError as error:
        return str(error)


def numbers(e: Estimator) -> list[float]:
    steps = e.decode(np.array([8.0, 1.0, 64.0]), np.array([2048.0, 100.0, 20_000.0]))
    return [*steps, e.prefill(2, 1024, 100), float(e.memory(8, 2048).kv), float(e.memory(8, 2048).total)]


@pytest.mark.parametrize("one", NAMES)
def test_each_changes_something(one: str) -> None:
    e, plain = together(one), built()
    assert [*numbers(e), e.max_batch(2050)] != pytest.approx([*numbers(plain), plain.max_batch(2050)], rel=1e-6)
    for part in (e.parts(8, 1, 2047, is_decode=True), e.parts(2, 1024, 0, is_decode=False)):
        assert 0 < part.lower <= part.seconds <= part.upper < math.inf


@pytest.mark.parametrize("one", NAMES)
def test_any_two_combine_in_any_order_or_say_why_not(one: str) -> None:
    for other in (n for n in NAMES if n > one):
        e = tried(one, other)
        if isinstance(e, str):
            assert one in e, e
            assert other in e, e
            assert isinstance(tried(other, one), str)
            continue
        found, step = numbers(e), cost(e.lower(decode(8, 2048)).schedule, e.machine)
        assert all(math.isfinite(x) and x > 0 for x in found), (one, other, found)
        assert 0 < step.lower <= step.seconds * (1 + 1e-9), (one, other)
        # Techniques of different places are put in order by the registry.
        if kinds()[one].order == kinds()[other].order:
            assert numbers(together(other, one)) == pytest.approx(found, rel=1e-9), (one, other)


@pytest.mark.parametrize("one", [n for n, k in kinds().items() if not k.repeats])
def test_one_kind_is_given_once(one: str) -> None:
    given = text(one, (CHANGED | DENOISING)[one])
    with pytest.raises(SpecError, match=f"{one} and {one} cannot be combined"):
        built(given, given)


@pytest.mark.parametrize("one", DENOISING)
def test_what_denoisers_keep_combines_with_what_changes_their_passes(one: str) -> None:
    refused: dict[str, str] = {}
    for other in CHANGED:
        try:
            found = denoise(built(text(one, DENOISING[one]), text(other, CHANGED[other]), model="llada-8b"), 4, 256, 16)
        except SpecError as error:
            refused[other] = str(error)
            continue
        assert 0 < found.lower <= found.seconds < math.inf, other
    assert set(refused) >= {"moe-offload", "speculation", "session-cache", "batch-padding"}
    assert all(name in why for name, why in refused.items())
    with pytest.raises(SpecError, match=f"{one} changes the steps of a denoiser"):
        built(text(one, DENOISING[one])).decode(8, 2048)
    with pytest.raises(SpecError, match="prefix-cache changes prompts"):
        denoise(built(text(one, DENOISING[one]), "prefix-cache:device=0.5", model="llada-8b"), 4, 256, 16)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v2-lite"])
@pytest.mark.parametrize("kind", IDENTITY)
def test_identity_parameters_change_nothing(kind: str, model: str) -> None:
    if model == "deepseek-v2-lite" and kind in ("attention-kernel",):
        with pytest.raises(SpecError, match=kind):
            built(text(kind, IDENTITY[kind]), model=model)
        return
    e, plain = built(text(kind, IDENTITY[kind]), model=model), built(model=model)
    contexts = np.array([100.0, 3000.0])
    assert e.decode(8, contexts) == pytest.approx(plain.decode(8, contexts), rel=1e-12)
    assert e.prefill(2, 1024, 100) == pytest.approx(plain.prefill(2, 1024, 100), rel=1e-12)
    assert float(e.memory(8, 2048).total) == pytest.approx(float(plain.memory(8, 2048).total), rel=1e-12)
    assert e.max_batch(2048) == plain.max_batch(2048)
    assert e.parts(8, 1, 2047, is_decode=True).lower == pytest.approx(plain.parts(8, 1, 2047, is_decode=True).lower, rel=1e-12)


@pytest.mark.parametrize("kind", NAMES)
def test_every_knob_at_both_ends_of_its_range(kind: str) -> None:
    """Finite seconds between their bounds, or a refusal that names the kind."""
    tried = 0
    for knob, field in kinds()[kind].model_fields.items():
        ends = [getattr(m, side) for m in field.metadata for side in ("ge", "le") if hasattr(m, side)]
        for value in (*ends, *words(field.annotation)):
            others = [part for part in CHANGED[kind].split(",") if not part.startswith(f"{knob}=")]
            try:
                e = Estimator(MODEL, NODE, techniques=[text(kind, ",".join([*others, f"{knob}={value}"]))], **DEGREES)
                step = cost(e.lower(decode(8, 2048)).schedule, e.machine)
            except (SpecError, Infeasible):
                continue
            assert 0 < step.lower <= step.seconds * (1 + 1e-9) < math.inf, (knob, value)
            tried += 1
    assert tried


# Latents, windows, recurrent layers beside attention, and nothing but recurrent layers.
@pytest.mark.parametrize(("model", "many"), [("deepseek-v2-lite", 30), ("gemma-2-9b", 30), ("jamba-v0.1", 30), ("mamba2-2.7b", 15)])
def test_other_architectures_are_changed_or_say_why_not(model: str, many: int) -> None:
    """From one token to contexts far beyond every budget, prefix and window."""
    batches, contexts = np.array([1.0, 8.0, 64.0, 256.0]), np.array([1.0, 100.0, 3000.0, 20_000.0])
    refused: dict[str, str] = {}
    for kind, given in CHANGED.items():
        try:
            e = Estimator(model, NODE, tp=2, techniques=[text(kind, given)])
        except SpecError as error:
            refused[kind] = str(error)
            continue
        for seconds in (e.decode(batches, contexts), e.prefill(batches[:2], contexts[1:3], np.array([0.0, 700.0]))):
            assert np.all(np.isfinite(seconds)), kind
            assert np.all(seconds > 0), kind
    assert all(kind in why for kind, why in refused.items()), refused
    assert len(CHANGED) - len(refused) >= many


@pytest.mark.parametrize("phase", [decode(8, 2048), prefill(2, 1024)], ids=["decode", "prefill"])
@pytest.mark.parametrize("kind", NAMES)
def test_no_lower_bound_falls_below_the_traffic_that_is_left(kind: str, phase: object) -> None:
    """Stored bytes that operators read, over the data sheet's rates of device memory and of the link to the host.

    Activations may stay in the cache; served text touches fewer experts than even routing.
    """
    e = built(text(kind, CHANGED[kind]))
    schedule = e.lower(phase).schedule  # type: ignore[arg-type]
    lower = float(cost(schedule, e.machine).lower)
    moved = {"hbm": 0.0, "host": 0.0}
    for op, times, _ in operators(schedule):
        served = as_served(op, e.machine) if op.kind == "grouped_gemm" and "experts" in op.shape else op
        for t in served.traffic:
            if (t.path == "hbm" and t.tensor in STORED) or (t.path == "host" and t.direction == "read"):
                moved[t.path] += float(times * t.elements * t.width) * (op.kind != "copy" or t.path == "host")
    assert lower >= moved["hbm"] / e.machine.bandwidth * (1 - 1e-9)
    assert lower >= moved["host"] / max(e.machine.host_link, 1.0) * (1 - 1e-9)
