"""Layers that use another layer's keys and values, and values that are read off the keys."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency
from perfmodel.spec.model import Attention, Block, Layers, Model
from perfmodel.symbols import maximum
from perfmodel.techniques.base import Technique, knob
from perfmodel.techniques.matrices import with_rows


class KeysAsValues(Technique):
    """`keys_as_values`: values are computed from the cached keys, so half is stored and read, and no value projection runs.

    The product with the probabilities stays. MFA-KR (arXiv:2412.19255).
    """

    cache_turn: ClassVar[int] = 1
    keys_as_values: bool = knob(False, "values are the keys (re-parameterised): one vector is stored and read for both")

    def clash(self, other: Technique) -> str:
        twice = isinstance(other, KeysAsValues) and self.keys_as_values and other.keys_as_values
        return super().clash(other) or ("values are read off the keys already" if twice else "")

    def cache(self, cache: Cache, site: Site) -> Cache:
        if not self.keys_as_values or site.mixer.kind != "attention":
            return cache
        return cache.each(lambda run: replace(
            run, segments=tuple(replace(s, elements=s.elements / 2) for s in run.segments)
        ))  # fmt: skip

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        a = block.mixer
        if not self.keys_as_values or not isinstance(a, Attention) or a.shares_kv:
            return ops
        values = maximum(a.kv_heads / shard.par.tp, 1) * a.head_dim
        done = []
        for op in ops:
            if op.name == "qkv_proj":
                op = with_rows(op, (op.shape["n"] - values) / op.shape["n"])
            elif op.name == "rope_and_cache":
                op = replace(op, traffic=tuple(
                    replace(t, elements=t.elements / 2) if t.tensor == "kv" else t for t in op.traffic
                ))  # fmt: skip
            done.append(op)
        return done

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        return [r for r in stored if not r.name.endswith((".v_proj", ".v_bias"))] if self.keys_as_values else stored


class KvSharing(KeysAsValues):
    """Of every `group` layers one has keys and values, or a share of all layers has none; these use another layer's.

    Bytes stored and projections = 1 / group, or 1 - share, of the model's; bytes read stay, since every layer attends the
    cache it uses. Cross-layer attention (arXiv:2405.12981: group), KVSharer (arXiv:2410.18517: share).
    """

    kind: ClassVar[str] = "kv-sharing"
    reference: ClassVar[str] = "arXiv:2405.12981"
    excludes: ClassVar[dict[str, str]] = {"kv-sharing": "give one share of layers"}

    group: int = knob(1, "neighbouring layers that share one cache", "layer", low=1, high=1000)
    share: float = knob(0.0, "share of the layers that use another's cache, where no group is given", low=0, high=1)

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.group > 1 or self.share or self.keys_as_values else "exact"

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.effects() == "lossy" and not any(isinstance(b.mixer, Attention) for b in model.blocks.values()):
            raise SpecError(f"kv-sharing: {model.name} has no layers with keys and values of their own")

    def of_model(self, model: Model) -> Model:
        if self.group == 1 and not self.share:
            return model
        blocks, layers, seen = dict(model.blocks), [], dict.fromkeys(model.blocks, 0)
        counts = model.block_counts()
        for name in (name for group in model.layers for _ in range(group.repeat) for name in group.blocks):
            mixer, i = model.blocks[name].mixer, seen[name]
            seen[name] += 1
            if isinstance(mixer, Attention) and not mixer.shares_kv and self._follows(i, counts[name]):
                shared = f"{name}-shared"
                blocks[shared] = model.blocks[name].model_copy(
                    update={"mixer": mixer.model_copy(update={"shares_kv": True})}
                )
                name = shared
            layers.append(name)
        return model.model_copy(update={
            "blocks": blocks, "layers": (Layers(blocks=tuple(layers)),), "published": None,
        })  # fmt: skip

    def _follows(self, i: int, count: int) -> bool:
        """Whether the i-th of `count` layers uses another's cache; the first never does."""
        i, count = i - self.spared_layers(count), count - self.spared_layers(count)
        if i < 0:
            return False
        if self.group > 1:
            return i % self.group > 0
        followers = min(round(self.share * count), count - 1)
        # Spread evenly: the running total of followers grows by one here.
        return (i + 1) * followers // count > i * followers // count and i > 0
