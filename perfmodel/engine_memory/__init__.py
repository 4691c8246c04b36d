"""What a serving engine loads, reserves and calls cache: its own accounting, version by version.

The bytes of a model are physics (`graph`); which of them an engine keeps twice, pads, leaves on the host or deducts
before it sizes the cache is its own doing, named in `memory.yaml` (`MemoryAccount`). All bytes are per device.
"""

from perfmodel.engine_memory.cache import cache_pool, cache_tokens
from perfmodel.engine_memory.instance import Instance, visible
from perfmodel.engine_memory.reserve import activations, graphs, has_encoder, overhead
from perfmodel.engine_memory.weights import loaded_weights

__all__ = [
    "Instance",
    "activations",
    "cache_pool",
    "cache_tokens",
    "graphs",
    "has_encoder",
    "loaded_weights",
    "overhead",
    "visible",
]
