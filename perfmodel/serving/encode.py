"""Encode, prefill and decode in pools of their own, for models that see images (EPD, arXiv:2501.05460).

The vision tower is a transformer of its own: the patches of an image attend to each other without a mask, `merge` x `merge`
of them become one token of the language model. An encode instance is a queue like a prefill instance (`encode_pool`); its
embeddings cross to the prefill pool, whose first token ends the wait.
"""

from __future__ import annotations

import numpy as np

from perfmodel import roofline
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, lower
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.parameters import block_weights
from perfmodel.schedule import Node, Repeat, Seq
from perfmodel.serving.clock import StepClock
from perfmodel.serving.handoff import network_path
from perfmodel.serving.images import image_tokens, vision_of
from perfmodel.spec.model import Attention, Block, Layers, Mlp, Model, Vision

BOUNDLESS = 1e12
"""Tokens in the cache of an instance that keeps none."""


def tower(v: Vision) -> Model:
    """The tower's layers as a model of their own; embedding and head are those of `tower_program`."""
    attention = Attention(
        heads=v.heads, kv_heads=v.heads, head_dim=v.hidden // v.heads, qkv_bias=v.bias, out_bias=v.bias
    )
    block = Block(mixer=attention, ffn=Mlp(inter=v.inter, gated=v.gated, bias=v.bias), norm="layer")
    return Model(
        name="vision tower", family="vision transformer", hidden=v.hidden, vocab=1, blocks={"layer": block},
        layers=(Layers(blocks=("layer",), repeat=v.layers),),
    )  # fmt: skip


def tower_program(e: Estimator, images: np.ndarray | float, patches: np.ndarray | float) -> Node:
    """Operators of one device for `images` images of `patches` patches each.

    Patches to vectors [k = channels x patch^2 x frames], the layers, then merger and projector: every parameter that is
    left multiplies one row per merged token. Towers are not quantised. Heads that tp does not divide: every rank encodes
    its share of the images with the whole tower (vLLM's --mm-encoder-tp-mode data).
    """
    v, act = vision_of(e.model), e.formats.act
    formats = Formats(act, act, act, act)
    tp = e.par.tp if v.heads % e.par.tp == 0 else 1
    images = np.ceil(images / (e.par.devices / tp))
    model = tower(v)
    layers = lower(model, Phase((Group(images, patches, 0.0),), causal=False), Parallelism(tp=tp), formats).schedule
    assert isinstance(layers, Seq)
    body = tuple(i for i in layers.items if isinstance(i, Repeat) and i.name in model.blocks)
    wide = v.channels * v.patch**2 * v.temporal_patch
    rows, dtype = images * patches, str(act.matrix)
    spent = v.layers * sum(w.elements for w in block_weights(model.blocks["layer"], v.hidden))
    left = max(v.parameters - spent - v.hidden * (wide + v.positions), 0)
    embed = gemm("patch_embed", rows, v.hidden / tp, wide, weight=act, act=act, dtype=dtype)
    project = gemm(
        "merge_and_project", rows / v.merge**2, left / e.model.hidden / tp, e.model.hidden, weight=act, act=act, dtype=dtype
    )
    return Seq((*embed, *body, *project), "vision")


def encode_seconds(e: Estimator, images: np.ndarray | float, patches: np.ndarray | float) -> np.ndarray:
    """Seconds in which one instance encodes `images` images of `patches` patches, arrays alike; host time of a step included."""
    images, patches = np.broadcast_arrays(np.asarray(images, float), np.asarray(patches, float))
    cost = roofline.cost(tower_program(e, images, patches), e.machine)
    launched = cost.launches * e.machine.law["eager_issue"]
    return np.asarray(np.maximum(cost.seconds, launched) + e.host_seconds(1.0))


class EncodeClock(StepClock):
    """Clock of the vision tower: an Instance of it with role `prefill` queues requests by their number of images.

    patches: of one image. Its `Mix.input` counts images; nothing decodes and no cache is kept. most_images: of one pass.
    """

    def __init__(self, estimator: Estimator, patches: float, most_images: int = 64) -> None:
        self.estimator, self.patches = estimator, patches
        self.chunk, self.max_batch = most_images, most_images
        self._images = np.unique(np.geomspace(1, most_images, 24).round())
        self._seconds = encode_seconds(estimator, self._images, patches)
        self._known: dict[int, float] = {}

    def host(self, sequences: float) -> float:
        return 0.0  # part of every pass

    def attention(self, q: float, c: float) -> float:
        return 0.0  # part of every pass

    def decode(self, batch: float, total_context: float) -> float:
        return 0.0

    def seconds(self, images: int) -> float:
        """Seconds of one pass over so many images."""
        if images not in self._known:
            self._known[images] = float(self.prefill_work(np.array([float(images)]), 0.0, 0.0)[0])
        return self._known[images]

    def step(self, batch: int, total_context: float, chunks: list[tuple[float, float]]) -> float:
        """Seconds of one pass over the images of `chunks`."""
        images = sum(q for q, _ in chunks)
        if images == int(images):
            return self.seconds(int(images))
        return float(self.prefill_work(np.array([images]), 0.0, 0.0)[0])

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds to encode so many images; none for a request without."""
        images = inputs - cached
        seconds = np.interp(images, self._images, self._seconds)
        beyond = np.maximum(images / self._images[-1], 1.0)
        return np.where(images > 0, seconds * beyond, 0.0)

    def shares(self, images_per_s: float) -> tuple[float, float]:
        """Mean shares of the peak compute and memory rates that so many images a second demand of one device."""
        peak = roofline.cost(tower_program(self.estimator, 1.0, self.patches), self.estimator.machine).peak
        return float(peak["compute"]) * images_per_s, float(peak["hbm"]) * images_per_s


def encode_clock(e: Estimator, image: tuple[int, int]) -> EncodeClock:
    """Clock of an instance's tower for images of height x width pixels.

    A pass encodes as many images as their tokens fill a step, at least one (vLLM's encoder budget: the larger of
    max_num_batched_tokens and the tokens of one image).
    """
    patches, tokens = image_tokens(e.model, *image)
    return EncodeClock(e, float(patches), max(e.engine.chunk_tokens // tokens, 1))


def tower_bytes(e: Estimator) -> float:
    """Bytes of the tower's weights on one device; heads that tp does not divide leave the whole tower on each."""
    v = vision_of(e.model)
    return v.parameters * e.formats.act.width / (e.par.tp if v.heads % e.par.tp == 0 else 1)


def embedding_seconds(encode: Estimator, prefill: Estimator, tokens: np.ndarray | float) -> np.ndarray:
    """Seconds to send the embeddings of `tokens` image tokens [hidden x activation width each] between the two pools.

    One message over one adapter of the slower side: embeddings are ready together, and every rank needs them all.
    """
    path = network_path(encode.machine, prefill.machine)
    size = np.asarray(tokens, float) * encode.model.hidden * encode.formats.act.width
    return np.asarray(path.latency + size / min(path.send, path.receive))
