"""Images that requests carry: how many, how large, and the prompt tokens that a model makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.catalog import load_model
from perfmodel.errors import SpecError
from perfmodel.serving import workload
from perfmodel.serving.requests import Requests, check_positions
from perfmodel.serving.workload import Workload
from perfmodel.spec.model import Model, Vision
from perfmodel.spec.workload import Images
from perfmodel.spec.workload import Workload as WorkloadSpec

LABEL = "images"
"""Label of requests that holds how many images each carries."""


def vision_of(model: Model) -> Vision:
    """The model's vision tower; SpecError where it has none."""
    if model.vision is None:
        raise SpecError(f"{model.name} has no vision tower, so there is nothing to encode")
    return model.vision


def image_tokens(model: Model, height: int, width: int) -> tuple[int, int]:
    """(patches, tokens of the language model) of an image of height x width pixels.

    Sides are cut to whole merged patches, at least one: 336 x 336 at patch 14 and merge 2 is 24 x 24 = 576 patches and
    12 x 12 = 144 tokens. Towers with a fixed number of learned positions see tiles of that size: pass a tile's.
    """
    v = vision_of(model)
    sides = [max(int(side / (v.patch * v.merge)), 1) for side in (height, width)]
    return sides[0] * sides[1] * v.merge**2, sides[0] * sides[1]


def build(
    spec: WorkloadSpec, base: Path, load: float, seed: int, model: str, **options: Any
) -> Workload:
    """`workload.build` of what a model is asked: its prompts hold the images that the spec gives them."""
    made = workload.build(spec, base, load, seed, **options)
    served = load_model(model)
    requests = with_images(made.requests, spec.images, served, seed)
    check_positions(requests, served)
    if spec.images is None:
        return made
    size = (spec.images.height, spec.images.width)
    told = f"{made.described}, {requests.labels[LABEL].mean():.3g} images of {size[0]} x {size[1]} pixels a request"
    return replace(made, requests=requests, described=told, image=size)


def with_images(requests: Requests, images: Images | None, model: Model, seed: int) -> Requests:
    """Requests with their images: the label `images`, and prompts that hold the images' tokens.

    Without `images` the requests as they are. Raises SpecError where nothing says how many images there are, where the model
    cannot see them, or where prompts that are said to hold them are too short.
    """
    if images is None:
        if LABEL in requests.labels and model.vision is not None and requests.labels[LABEL].any():
            raise SpecError(
                "the trace says how many images requests carry: say how large they are, under `images: {height, width}`",
                path="workload",
            )
        return requests
    if requests.blocks is not None:
        raise SpecError("block ids do not say what images prompts hold: leave one of both out", path="workload.images")
    if model.vision is None:
        raise SpecError(f"{model.name} has no vision tower, so it sees no images", path="workload.images")
    counts = _counts(requests, images, seed)
    tokens = image_tokens(model, images.height, images.width)[1]
    held = counts * tokens
    if not images.counted:
        return replace(requests, input=requests.input + held, labels={**requests.labels, LABEL: counts})
    if np.any(held >= requests.input):
        worst = int(np.argmax(held - requests.input))
        raise SpecError(
            f"a prompt of {requests.input[worst]:,.0f} tokens cannot hold {counts[worst]:.0f} images of {tokens:,} tokens "
            f"({images.height} x {images.width} pixels in {model.name}): smaller images, or `counted: false`",
            path="workload.images",
        )
    return replace(requests, labels={**requests.labels, LABEL: counts})


def _counts(requests: Requests, images: Images, seed: int) -> np.ndarray:
    """Images of each request: the trace's, or drawn so that their shares are as said to the request."""
    if images.per_request is None:
        if LABEL not in requests.labels:
            raise SpecError(
                "the trace has no column that counts images: name it under columns.images, or give `per_request`",
                path="workload.images",
            )
        return requests.labels[LABEL]
    many = {images.per_request: 1.0} if isinstance(images.per_request, int) else images.per_request
    counts = np.array(list(many), float)
    edges = np.cumsum(list(many.values())) / sum(many.values())
    place = np.searchsorted(edges, (np.arange(len(requests)) + 0.5) / len(requests))
    return np.random.default_rng(seed).permutation(counts[place])
