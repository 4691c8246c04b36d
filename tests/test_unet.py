"""U-Nets against published totals, instrumented PyTorch modules and times that others measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from every_kind import CHANGED, text

from perfmodel import catalog
from perfmodel.denoising import denoise
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.generations import generations
from perfmodel.graph import Phase, lower, weight_residency
from perfmodel.ops.shard import Group, Parallelism, checkpoint_formats
from perfmodel.ops.traffic import Op
from perfmodel.parameters import block_weights, parameters_total
from perfmodel.schedule import operators
from perfmodel.spec.model import Model

ROOT = Path(__file__).parents[1]
NAMES = ("stable-diffusion-1.5", "stable-diffusion-2.1", "stable-diffusion-xl")

# Seconds of Stable Diffusion 2.1, 50 steps, guidance, on an RTX A5000, plain and with DeepCache at (interval, branch) of
# (3, 0), (5, 0), (5, 1), by (edge in pixels, images): Hugging Face, documentation of Diffusers, page DeepCache (Apache-2.0).
A5000 = {
    (512, 8): (15.96, 6.88, 5.03, 7.27), (512, 4): (8.39, 3.60, 2.62, 3.75), (512, 1): (2.61, 1.12, 0.81, 1.11),
    (768, 8): (43.58, 18.99, 13.96, 21.27), (768, 4): (22.24, 9.67, 7.10, 10.74), (768, 1): (6.33, 2.72, 1.97, 2.98),
    (1024, 8): (101.95, 45.57, 33.72, 53.00), (1024, 4): (49.25, 21.86, 16.19, 25.78), (1024, 1): (13.83, 6.07, 4.43, 7.15),
}  # fmt: skip
# Seconds of one image in 50 steps end to end on an A100 80GB SXM with TensorRT 9: github.com/fal-ai/stable-diffusion-benchmarks.
TENSORRT = {("stable-diffusion-1.5", 4096): 0.819, ("stable-diffusion-xl", 16384): 4.102}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(name: str) -> None:
    model = catalog.load_model(name)
    assert model.published is not None
    assert model.published.exact
    assert parameters_total(model) == model.published.total


def _ops(name: str, images: int, tokens: int, par: Parallelism | None = None) -> list[tuple[Op, float, str]]:
    model = catalog.load_model(name)
    phase = Phase((Group(images, tokens, 0),), logits="all", causal=False)
    program = lower(model, phase, par or Parallelism(), checkpoint_formats(model))
    return [(op, float(times), where) for op, times, where in operators(program.schedule)]


def _matrix_flops(found: list[tuple[Op, float, str]]) -> float:
    return sum(times * float(f) for op, times, _ in found for u, f in op.flops.items() if u not in ("vector", "exp"))


def test_layers_cost_what_torch_counts() -> None:
    """One residual unit with its shortcut, one change of resolution each way, and one transformer layer, run in PyTorch."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    functional, nn = torch.nn.functional, torch.nn
    images, edge = 2, 16
    x, time, text = torch.randn(images, 320, edge, edge), torch.randn(images, 1280), torch.randn(images, 77, 768)
    first, second, short = nn.Conv2d(320, 640, 3, padding=1), nn.Conv2d(640, 640, 3, padding=1), nn.Conv2d(320, 640, 1)
    emb, down, up = nn.Linear(1280, 640), nn.Conv2d(640, 640, 3, 2, 1), nn.Conv2d(640, 640, 3, padding=1)

    def counted(run: object) -> float:
        with FlopCounterMode(display=False) as counter:
            run()  # type: ignore[operator]
        return float(counter.get_total_flops())

    def residual() -> None:
        h = first(functional.silu(x)) + emb(time)[:, :, None, None]
        second(functional.silu(h)) + short(x)

    wide = torch.randn(images, 640, edge, edge)
    # Tokens of the model are latents: a layer at shrink 2 sees a quarter of them.
    found = _ops("stable-diffusion-1.5", images, (2 * edge) ** 2)

    def ours(block: str) -> float:
        return _matrix_flops([x for x in found if x[2] == block]) / catalog.load_model("stable-diffusion-1.5").block_counts()[block]

    assert ours("res-320-640-x2") == counted(residual)
    assert ours("up-640-x1") == counted(lambda: up(functional.interpolate(wide, scale_factor=2.0)))
    assert ours("down-640-x4") == counted(lambda: down(wide))

    tokens = torch.randn(images, edge * edge, 640)
    line, key, value, inward, outward = (nn.Linear(a, b) for a, b in ((640, 640), (768, 640), (768, 640), (640, 5120), (2560, 640)))

    def attend(q: object, k: object, v: object) -> object:
        shaped = (t.reshape(images, -1, 8, 80).transpose(1, 2) for t in (q, k, v))  # type: ignore[attr-defined]
        q, k, v = shaped
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v  # type: ignore[attr-defined]

    def transformer() -> None:
        attend(line(tokens), line(tokens), line(tokens))
        line(tokens)
        attend(line(tokens), key(text), value(text))
        line(tokens)
        gate, h = inward(tokens).chunk(2, -1)
        outward(functional.gelu(gate) * h)

    assert ours("transformer-640-x2") == counted(transformer)


def test_bytes_of_a_convolution() -> None:
    """3 x 3 windows of the same input are formed on chip: 1024 positions of 640 channels are read once, in 2 bytes."""
    op = next(op for op, _, where in _ops("stable-diffusion-1.5", 1, 4096) if where == "res-640-640-x2" and op.name == "conv_0")
    assert op.bytes("hbm", "weights") == 640 * 640 * 9 * 2
    assert [t.bytes for t in op.traffic if t.tensor == "activations"] == [1024 * 640 * 2, 1024 * 640 * 2]  # read, written


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_share_the_work(tp: int) -> None:
    """Each of tp ranks holds 1/tp of every matrix, and does 1/tp of the convolutions' and projections' products."""
    model = catalog.load_model("stable-diffusion-1.5")
    kinds = ("conv_0", "conv_1", "shortcut", "qkv_proj", "cross_o_proj")
    whole, cut = (
        sum(t * float(f) for op, t, _ in _ops(model.name, 2, 4096, Parallelism(tp)) if op.name in kinds for f in op.flops.values())
        for tp in (1, tp)
    )
    assert cut == pytest.approx(whole / tp)
    names = [f"{b}.{w.name}" for b, block in model.blocks.items() for w in block_weights(block, model.hidden) if w.matrix]
    one, some = (
        {r.name: float(r.elements) for r in weight_residency(model, Parallelism(n), checkpoint_formats(model))} for n in (1, tp)
    )
    assert all(some[name] == pytest.approx(one[name] / tp) for name in names)


@pytest.mark.parametrize("shape", list(A5000))
@pytest.mark.parametrize(("column", "interval", "branch"), [(1, 3, 0), (2, 5, 0), (3, 5, 1)])
def test_deepcache_gains_what_was_measured(shape: tuple[int, int], column: int, interval: int, branch: int) -> None:
    """Nothing is fitted: shares of the work outside the skip branch; what runs beside the U-Net makes measured gains smaller."""
    edge, images = shape
    whole = -(-50 // interval)
    cache = f"denoising-cache:skipped={1 - whole / 50},branch={branch}"
    plain, cached = (
        float(denoise(Estimator("stable-diffusion-2.1", "rtx-a5000", techniques=t), images, (edge // 8) ** 2, 50, guidance=2).seconds)
        for t in (["hf-eager-2023"], ["hf-eager-2023", cache])
    )
    measured = A5000[shape][0] / A5000[shape][column]
    assert plain / cached == pytest.approx(measured, rel=0.13)


@pytest.mark.parametrize("shape", list(A5000))
def test_eager_times_stay_under_the_measured_ones(shape: tuple[int, int]) -> None:
    """PyTorch's convolutions of one kernel, its layout changes and the decoder of the latents make it slower, not faster."""
    edge, images = shape
    found = denoise(Estimator("stable-diffusion-2.1", "rtx-a5000", techniques=["hf-eager-2023"]), images, (edge // 8) ** 2, 50, guidance=2)
    assert found.lower < A5000[shape][0]
    assert 0.6 < found.seconds / A5000[shape][0] < 1


@pytest.mark.parametrize("case", list(TENSORRT))
def test_fused_engine_on_an_a100(case: tuple[str, int]) -> None:
    name, tokens = case
    found = denoise(Estimator(name, "a100-sxm-80gb"), 1, tokens, 50, guidance=2)
    assert found.lower < TENSORRT[case]
    assert 0.7 < found.seconds / TENSORRT[case] < 1.05


def test_a_branch_runs_the_outermost_units_only() -> None:
    e = Estimator("stable-diffusion-1.5", "a100-sxm-80gb", techniques=["denoising-cache:skipped=0.8,branch=1"])
    partial = denoise(e, 2, 4096, 50).passes[1]
    # Down: one of two residual units at 320 channels and its transformer. Up: the last two, which join 640 and 640 channels.
    assert dict(partial.only) == {
        "res-320-320-x1": 1 / 2, "project-320-x1": 3 / 5, "transformer-320-x1": 3 / 5, "res-640-320-x1-join": 1.0,
    }  # fmt: skip
    gains = [
        float(denoise(Estimator("stable-diffusion-1.5", "a100-sxm-80gb", techniques=[f"denoising-cache:skipped=0.8,branch={b}"]), 2, 4096, 50).seconds)
        for b in (-1, 0, 1, 4)
    ]
    assert gains == sorted(gains)
    with pytest.raises(SpecError, match="22 residual units"):
        denoise(Estimator("stable-diffusion-1.5", "a100-sxm-80gb", techniques=["denoising-cache:skipped=0.8,branch=11"]), 1, 4096, 50)
    with pytest.raises(SpecError, match="no convolutions"):
        denoise(Estimator("dit-xl-2", "a100-sxm-80gb", techniques=["denoising-cache:skipped=0.8,branch=0"]), 1, 256, 50)


def test_generations_by_hand() -> None:
    found = generations("stable-diffusion-xl", "a100-sxm-80gb", batch=2, pixels=(1024, 768), steps=30, guidance=2, price=8 / 3600)
    e = Estimator("stable-diffusion-xl", "a100-sxm-80gb")
    # 128 x 96 latents, four conditions in all; a node of eight devices at 8 USD/h is 1 USD/h a device.
    assert found["seconds"] == denoise(e, 4, 128 * 96, 30).seconds
    assert found["usd_per_thousand"] == pytest.approx(found["seconds"] / 2 * 1000 / 3600)
    assert found["lower"] <= found["interval"][0] < found["seconds"] < found["interval"][1]
    assert found["memory"]["weights"] == 2 * parameters_total(catalog.load_model("stable-diffusion-xl"))


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("stable-diffusion-xl", {"pixels": (1000, 1024)}, "multiples of 32"),
        ("stable-diffusion-xl", {}, "either --size"),
        ("stable-diffusion-xl", {"pixels": (512, 512), "tokens": 4096}, "either --size"),
        ("llada-8b", {"pixels": (512, 512)}, "makes text"),
        ("llada-8b", {"tokens": 5000}, "4096 positions"),
        ("llama-3-8b", {"tokens": 100}, "perfmodel estimate"),
        ("dit-xl-2", {"tokens": 256, "steps": 0}, "--steps"),
        ("dit-xl-2", {"tokens": 256, "pp": 2}, "--pp 1"),
    ],
)
def test_bad_requests_say_what_to_give(model: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        generations(model, "a100-sxm-80gb", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "dit-xl-2", "llada-8b"])
def test_denoisers_are_not_decoded(name: str) -> None:
    model: Model = catalog.load_model(name)
    with pytest.raises(SpecError, match="perfmodel denoise"):
        model.require_next_token()
    assert catalog.load_model("llama-3-8b").require_next_token().name == "llama-3-8b"


def test_the_worked_example_of_the_documentation() -> None:
    text = " ".join((ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8").split())
    model = catalog.load_model("stable-diffusion-1.5")
    count = sum(w.elements for w in block_weights(model.blocks["res-320-640-x2"], model.hidden))
    assert count == 9 * 320 * 640 + 640 + 9 * 640 * 640 + 640 + 320 * 640 + 640 + 1280 * 640 + 640 + 2 * (320 + 640)
    assert f"{count:,} in all" in text


def test_every_technique_changes_a_u_net_or_says_why_not() -> None:
    refused: dict[str, str] = {}
    for kind, given in CHANGED.items():
        try:
            found = denoise(Estimator("stable-diffusion-xl", "hgx-a100-8", techniques=[text(kind, given)]), 2, 4096, 20)
        except SpecError as error:
            refused[kind] = str(error)
            continue
        assert 0 < found.lower <= found.seconds < math.inf, kind
    assert all(kind in why for kind, why in refused.items())
    assert set(refused).isdisjoint({"weight-quantization", "layer-skip", "token-reduction", "power-cap"})
