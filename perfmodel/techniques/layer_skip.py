"""Fewer layers: early exit, or a draft that leaves layers out."""

from __future__ import annotations

from typing import ClassVar

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.shard import Parallelism
from perfmodel.spec.model import Layers, Model
from perfmodel.techniques.base import Quality, Technique, knob


class LayerSkip(Technique):
    """The model with `layers` of its L layers (or a `share` of them), spread evenly; embedding and head stay.

    n = max(1, round(share L)) layers, and so their bytes and FLOPs. By itself it changes the answers (early exit); as a
    draft's technique it is self-speculation, which the full model verifies (Draft & Verify, arXiv:2309.08168; LayerSkip,
    arXiv:2404.16710).
    """

    kind: ClassVar[str] = "layer-skip"
    reference: ClassVar[str] = "arXiv:2309.08168"
    by_layer: ClassVar[bool] = False
    # The layers that are left are what other techniques lay out.
    order: ClassVar[float] = -0.5

    share: float = knob(1.0, "share of the layers that run", low=0, high=1)
    layers: int = knob(0, "layers that run; 0: given as a share", "layer", low=0, high=10_000)

    def effects(self) -> Quality:
        return "exact" if self.share == 1 and not self.layers else "lossy"

    def of_model(self, model: Model) -> Model:
        names = [name for group in model.layers for _ in range(group.repeat) for name in group.blocks]
        kept = min(self.layers, len(names)) if self.layers else max(1, round(self.share * len(names)))
        if kept == len(names):
            return model
        chosen = tuple(names[i * len(names) // kept] for i in range(kept))
        return model.model_copy(update={"layers": (Layers(repeat=1, blocks=chosen),), "published": None})

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.layers and self.layers > model.n_layers:
            raise SpecError(f"layer-skip: {model.name} has {model.n_layers} layers, not {self.layers}")
