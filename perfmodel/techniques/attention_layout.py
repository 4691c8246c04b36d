"""Another layout of attention in the same model: heads, their dimension, the factors of the queries."""

from __future__ import annotations

from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.spec.model import Attention, Block, LatentAttention, Model
from perfmodel.techniques.base import knob
from perfmodel.techniques.kv_sharing import KeysAsValues


class AttentionLayout(KeysAsValues):
    """Every attention layer gets these heads; what is not given stays. Projections and cache follow from the model.

    KV elements per token and layer = 2 kv_heads head_dim (1 with `keys_as_values`), or kv_rank + rope_dim for a latent.
    Conversion to grouped queries (arXiv:2305.13245), compressed KV heads (arXiv:2406.07056), multi-matrix factorisation
    attention (arXiv:2412.19255: one KV head, `q_rank`), multi-head latent attention (MHA2MLA, arXiv:2502.14837: `kv_rank`).
    """

    kind: ClassVar[str] = "attention-layout"
    reference: ClassVar[str] = "arXiv:2412.19255"
    excludes: ClassVar[dict[str, str]] = {"attention-layout": "a layer has one layout"}

    heads: int = knob(0, "query heads; 0: as they are", "head", low=0, high=4096)
    kv_heads: int = knob(0, "KV heads; 0: as they are", "head", low=0, high=4096)
    kv_heads_over: int = knob(1, "KV heads before over KV heads after, where they are not given", low=1, high=4096)
    head_dim: int = knob(0, "elements of a head; 0: as they are", "element", low=0, high=65536)
    q_rank: int = knob(0, "rank of a factored query projection; 0: as it is", "element", low=0, high=65536)
    kv_rank: int = knob(0, "rank of a cached latent instead of KV heads; 0: none", "element", low=0, high=65536)
    rope_dim: int = knob(64, "rotated elements cached beside a latent", "element", low=0, high=4096)

    def effects(self) -> Literal["exact", "lossy"]:
        given = (self.heads, self.kv_heads, self.head_dim, self.q_rank, self.kv_rank, self.kv_heads_over > 1)
        return "lossy" if any(given) or self.keys_as_values else "exact"

    def of_model(self, model: Model) -> Model:
        """Raises SpecError for heads that cannot be grouped."""
        if self.effects() == "exact":
            return model
        if self.spare_layers:
            raise SpecError("attention-layout: all layers get the layout; leave spare_layers out")
        if not any(isinstance(b.mixer, Attention) for b in model.blocks.values()):
            raise SpecError(f"attention-layout: {model.name} has no softmax attention over KV heads to lay out anew")
        blocks = {name: self._laid_out(block, model.name) for name, block in model.blocks.items()}
        return model.model_copy(update={"blocks": blocks, "published": None})

    def _laid_out(self, block: Block, model: str) -> Block:
        a = block.mixer
        if not isinstance(a, Attention):
            return block
        heads, dim = self.heads or a.heads, self.head_dim or a.head_dim
        kv_heads = self.kv_heads or a.kv_heads // self.kv_heads_over
        if kv_heads < 1 or a.kv_heads % self.kv_heads_over or heads % kv_heads:
            raise SpecError(
                f"attention-layout: {heads} query heads of {model} cannot share {a.kv_heads // self.kv_heads_over or 'no'} "
                f"KV heads evenly; kv_heads must divide {heads}"
            )
        if not self.kv_rank:
            new = a.model_copy(update={"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "q_rank": self.q_rank or a.q_rank})
            return block.model_copy(update={"mixer": new})
        if self.rope_dim >= dim or self.keys_as_values:
            raise SpecError(
                f"attention-layout: a latent of {model} serves as keys and values already, and of the {dim} elements of a "
                f"head fewer than all are rotated; use rope_dim below {dim} without keys_as_values"
            )
        latent = LatentAttention(
            heads=heads, q_rank=self.q_rank, kv_rank=self.kv_rank, nope_dim=dim - self.rope_dim,
            rope_dim=max(self.rope_dim, 1), v_dim=dim,
        )  # fmt: skip
        return block.model_copy(update={"mixer": latent})
