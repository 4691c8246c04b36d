"""Encode instances: passes of a vision tower over the images of waiting requests, and the link that their embeddings leave by."""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel.serving.replay.instance import Instance


@dataclass(frozen=True)
class Embeddings:
    """How an encode instance sends embeddings: one message a request, over a link that its requests share."""

    seconds_per_image: float
    latency: float = 0.0


class Encoder(Instance):
    """An encode instance. Its items are requests whose prompts are numbers of images; none decodes."""

    link_free = 0.0
    """When its link has sent what it has."""

    def _prefilled(self) -> None:
        """Requests whose images are all encoded leave."""
        for item, images in self.chunks:
            item.done += images
            self.prefill_left -= images
            if item.done == item.prompt:
                self.waiting.remove(item)
                self._free(item)
                self.resident -= 1
                self.left.append(item)

    def send(self, images: int, link: Embeddings) -> float:
        """Send the embeddings of a request that has just left; returns when they have arrived."""
        self.link_free = max(self.now, self.link_free) + images * link.seconds_per_image
        return self.link_free + link.latency
