"""What a diffusion model keeps from one denoising step to the next, and does not compute again."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from perfmodel.ops.cached import cache_site
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.shard import Formats, Parallelism
from perfmodel.ops.traffic import Residency
from perfmodel.spec.model import Model
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
                passes.append(replace(p, times=skipped, layers=0.0, ops=(*watch, residual)))
        held = layers + (self.tensors if self.skipped or self.estimator else 0.0)
        kept_tensors = Residency("state", "denoising-cache", held * batch * tokens * model.hidden, width)
        return Denoising(tuple(passes), (*denoising.stored, kept_tensors))


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
