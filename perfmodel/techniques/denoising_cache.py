"""What a diffusion model keeps from one denoising step to the next, and does not compute again."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from perfmodel.errors import SpecError
from perfmodel.ops.cached import cache_site
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.ops.traffic import Residency
from perfmodel.spec.model import Convolution, Model
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Denoising, Pass, Technique, knob


class DenoisingCache(Technique):
    """Steps that reuse the last output, and layers whose output is reused in the steps that run.

    Passes that run = first + last + (S - first - last) (1 - skipped) of S steps; a skipped one adds the stored residual
    to its input instead. Every step an estimator passes `estimator` times over the tokens x hidden input that it
    compares. In steps that run, a share `reused` of the layers adds its stored output. Stored: `tensors` of batch x
    tokens x hidden, and one per reused layer. TeaCache (arXiv:2411.19108); speed-up at most 1 / (1 - skipped).
    """

    kind: ClassVar[str] = "denoising-cache"
    reference: ClassVar[str] = "arXiv:2411.19108"

    skipped: float = knob(0.0, "share of the steps between first and last that reuse the output", low=0, high=1)
    first: int = knob(0, "first steps that always run", "step", low=0, high=10_000)
    last: int = knob(0, "last steps that always run", "step", low=0, high=10_000)
    reused: float = knob(0.0, "share of the layers whose output is reused in steps that run", low=0, high=1)
    branch: int = knob(-1, "units at the outside of a U-Net that a skipped step still runs; -1: none, not even the last", low=-1,
                       high=100)  # fmt: skip
    estimator: float = knob(0.0, "tensors of tokens x hidden that an estimator reads each step", low=0, high=100)
    tensors: float = knob(1.0, "tensors of tokens x hidden stored for skipped steps", low=0, high=1000)

    def denoise(
        self, denoising: Denoising, batch: Num, model: Model, formats: Formats, par: Parallelism
    ) -> Denoising:
        if not (self.skipped or self.reused or self.estimator):
            return denoising
        width = formats.act.width
        layers = model.n_layers * self.reused
        passes: list[Pass] = []
        tokens: Num = 0.0
        for p in denoising.passes:
            each = batch * p.new * model.hidden
            tokens = maximum(tokens, p.new)
            estimated = pointwise("estimator", each, width, reads=self.estimator, writes=self.estimator / 2, flops=4)
            watch = (estimated,) if self.estimator else ()
            kept = minimum(p.times, self.first + self.last)
            skipped = (p.times - kept) * self.skipped
            added = pointwise("reused_layers", each * layers, width, reads=2, flops=1)
            again = (replace(added, launches=layers),) if layers else ()
            passes.append(replace(p, times=p.times - skipped, layers=p.layers * (1 - self.reused), ops=(*p.ops, *watch, *again)))
            if self.skipped:
                residual = pointwise("reused_output", each, width, reads=2, flops=1)
                rest = replace(p, only=_outer_units(model, self.branch)) if self.branch >= 0 else replace(p, layers=0.0)
                passes.append(replace(rest, times=skipped, ops=(*watch, residual)))
        held = layers + (self.tensors if self.skipped or self.estimator else 0.0)
        kept_tensors = Residency("state", "denoising-cache", held * batch * tokens * model.hidden, width)
        return Denoising(tuple(passes), (*denoising.stored, kept_tensors))


def _outer_units(model: Model, branch: int) -> tuple[tuple[str, float], ...]:
    """Kinds of layers in the first `branch` units and the last `branch + 1`, each with the share of its layers there.

    A unit goes from one convolution over neighbours to the next; on the way up a change of resolution belongs to the unit
    before it. Raises SpecError where the model has none.
    """
    order = [name for group in model.layers for _ in range(group.repeat) for name in group.blocks]
    mixers = [model.blocks[name].mixer for name in order]
    starts = [i for i, m in enumerate(mixers) if isinstance(m, Convolution) and m.kernel > 1]
    residual = [i for i in starts if getattr(mixers[i], "resample", "") == "none"]
    if not starts:
        raise SpecError(f"branch names units of a U-Net; {model.name} has no convolutions: leave it at -1")
    if branch + 1 >= len(residual) // 2:
        raise SpecError(f"{model.name} has {len(residual)} residual units: branch may be {len(residual) // 2 - 2} at most")
    run = [*order[: starts[branch]], *order[residual[-branch - 1] :]]
    counts = model.block_counts()
    return tuple((name, run.count(name) / counts[name]) for name in dict.fromkeys(run))


class DkvCache(Technique):
    """Keys and values of a bidirectional diffusion language model, kept for tokens that are decided.

    A step computes a = window tokens, or those still masked (answer / 2 on average) and those decided within `delay`
    steps; they attend the L - a cached ones. Every `refresh` steps all L tokens are computed in a share `refreshed` of
    the layers (dKV-Cache, arXiv:2505.15781; refresh from a layer on: arXiv:2510.14973). Work falls from S L to S a +
    (S/refresh) L token passes.
    """

    kind: ClassVar[str] = "dkv-cache"
    reference: ClassVar[str] = "arXiv:2505.15781"

    window: int = knob(0, "tokens computed per step; 0: those still masked", "token", low=0, high=10_000_000)
    answer: int = knob(0, "tokens generated, half of them masked on average; 0: all tokens", "token", low=0, high=10_000_000)
    delay: float = knob(1.0, "steps that a decided token is still computed", "step", low=0, high=1000)
    refresh: int = knob(1, "steps between passes over all tokens; 1: every step, 0: the first only", "step", low=0, high=100_000)
    refreshed: float = knob(1.0, "share of the layers that such a pass computes for all tokens", low=0, high=1)

    def denoise(
        self, denoising: Denoising, batch: Num, model: Model, formats: Formats, par: Parallelism
    ) -> Denoising:
        if self.refresh == 1 and self.refreshed == 1:
            return denoising
        passes: list[Pass] = []
        longest: Num = 0.0
        for p in denoising.passes:
            longest = maximum(longest, p.new + p.cached)
            whole = maximum(p.times / self.refresh, 1) if self.refresh else minimum(p.times, 1)
            active = self._active(p)
            few = replace(p, new=active, cached=p.cached + p.new - active)
            passes.append(replace(p, times=whole, layers=p.layers * self.refreshed))
            if self.refreshed < 1:
                passes.append(replace(few, times=whole, layers=p.layers * (1 - self.refreshed)))
            passes.append(replace(few, times=p.times - whole))
        return Denoising(tuple(passes), (*denoising.stored, *self._stored(batch * longest, model, formats, par)))

    def _active(self, p: Pass) -> Num:
        if self.window:
            return minimum(p.new, self.window)
        answer = minimum(self.answer or p.new, p.new)
        return minimum(p.new, maximum(answer / 2 + self.delay * answer / p.times, 1))

    def _stored(self, tokens: Num, model: Model, formats: Formats, par: Parallelism) -> list[Residency]:
        found = []
        for name, count in model.block_counts().items():
            mixer = model.blocks[name].mixer
            if mixer is not None and mixer.kind in ("attention", "latent"):
                site = cache_site(mixer, name, model.hidden, count, par, formats)
                found.append(Residency("kv", f"{name}.dkv", count * tokens * site.kv_elements / site.cp, site.width))
        return found
