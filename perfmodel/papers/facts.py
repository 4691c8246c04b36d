"""Facts of a setting: sizes of its model, datasheet rates of its machine, and what its memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

from perfmodel import memory, parameters
from perfmodel.engine_memory.reserve import layer_activations
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.kernels.elsewhere import rates
from perfmodel.kernels.transfer import host_copy_seconds
from perfmodel.machine import Machine, machine
from perfmodel.ops.shard import checkpoint_formats
from perfmodel.papers.setting import Resolved, estimator
from perfmodel.spec.hardware import Host
from perfmodel.spec.model import Attention, LatentAttention


class Facts:
    """What is known of a setting before it runs. Times in s, sizes in byte, rates per device in 1/s; all floats."""

    def __init__(self, setting: Resolved) -> None:
        self.setting = setting

    def _value(self, name: str) -> float:
        return float(self.setting.values[name])

    @cached_property
    def _estimator(self) -> Estimator:
        return estimator(self.setting)

    # Facts.

    @property
    def devices(self) -> float:
        """Devices of the instance."""
        return float(self._estimator.par.devices)

    @property
    def input(self) -> float:
        """Prompt tokens."""
        return self._value("input")

    @property
    def output(self) -> float:
        """Generated tokens."""
        return self._value("output")

    @property
    def working_output(self) -> float:
        """Output tokens of the sequences at work: one of twice the length is at work twice as long, so a mean m of a coefficient
        of variation c becomes m (1 + c^2) in continuous batching."""
        spread = 0.0 if self.setting.static else self._value("output_spread")
        return self.output * (1 + spread**2)

    @property
    def context(self) -> float:
        """Mean tokens of the sequences at work."""
        return self.input + self.working_output / 2

    @property
    def parameters(self) -> float:
        """Stored parameters of the model."""
        return float(parameters.parameters_total(self._estimator.model))

    @property
    def active_parameters(self) -> float:
        """Parameters one token meets."""
        return float(parameters.parameters_active(self._estimator.model))

    @property
    def layers(self) -> float:
        """Layers of the model."""
        return float(self._estimator.model.n_layers)

    @property
    def hidden(self) -> float:
        """Width of the residual stream."""
        return float(self._estimator.model.hidden)

    @property
    def peak(self) -> float:
        """Datasheet matrix rate of one device in the format of its linear layers [FLOP/s]."""
        e = self._estimator
        return float(e.machine.peak(e.formats.compute("dense_ffn")))

    # Facts of the machine alone: a setting without a model has these.

    @cached_property
    def _machine(self) -> Machine:
        return self._estimator.machine if self.setting.model else machine(self.setting.hardware)

    @property
    def bandwidth(self) -> float:
        """Datasheet bandwidth of one device [byte/s]."""
        return float(self._machine.bandwidth)

    @property
    def achieved_bandwidth(self) -> float:
        """Bandwidth long reads reach [byte/s]."""
        return float(self._machine.bandwidth * self._machine.bandwidth_efficiency)

    @property
    def peak_bf16(self) -> float:
        """Datasheet matrix rate at 16 bits [FLOP/s]."""
        return float(self._machine.peak("bf16"))

    @property
    def peak_fp8(self) -> float:
        """Datasheet matrix rate at FP8, of 16 bits where there is none [FLOP/s]."""
        return float(self._machine.peak("fp8"))

    @property
    def peak_int8(self) -> float:
        """Datasheet matrix rate at INT8 [OP/s]."""
        return float(self._machine.peak("int8"))

    @property
    def peak_int4(self) -> float:
        """Datasheet matrix rate at INT4, of INT8 where there is none [OP/s]."""
        return float(self._machine.peak("int4"))

    @property
    def peak_vector(self) -> float:
        """Datasheet FP32 rate of the vector units [FLOP/s]."""
        return float(self._machine.vector)

    @property
    def achieved_vector(self) -> float:
        """FP32 rate that the vector units reach [FLOP/s]."""
        return float(self._machine.vector * self._machine.vector_efficiency)

    @property
    def peak_exp(self) -> float:
        """Special-function results per second."""
        return float(self._machine.exp)

    @property
    def capacity(self) -> float:
        """Memory of one device [byte]."""
        return float(self._machine.capacity)

    @property
    def cache(self) -> float:
        """Last-level cache of one device [byte]."""
        return float(self._machine.cache)

    @property
    def units(self) -> float:
        """Multiprocessors, cores or the like of one device."""
        return float(self._machine.units)

    @property
    def launch(self) -> float:
        """Seconds a kernel takes at least."""
        return float(self._machine.kernel_latency)

    @property
    def link(self) -> float:
        """Datasheet rate between devices of a node, one direction [byte/s]."""
        return float(self._machine.link)

    @property
    def network(self) -> float:
        """Datasheet rate to other nodes per device, one direction [byte/s]."""
        return float(self._machine.network)

    @property
    def host_link(self) -> float:
        """Datasheet rate of the link to the host, one direction [byte/s]."""
        return float(self._machine.host_link)

    @property
    def achieved_host_link(self) -> float:
        """Rate that long copies between a device and the host reach, one direction [byte/s]."""
        return 1e9 / float(host_copy_seconds(self._machine, 1e9))

    @property
    def host_memory(self) -> float:
        """Memory of the node's host [byte]."""
        return float(self._node_host().memory)

    @property
    def host_bandwidth(self) -> float:
        """Memory bandwidth of the node's host [byte/s]."""
        return float(self._node_host().memory_bandwidth)

    @property
    def achieved_host_bandwidth(self) -> float:
        """Rate at which the processors of one device's share of the host read memory in long runs [byte/s]."""
        return float(rates("cpu", self._machine).bandwidth)

    def _node_host(self) -> Host:
        node = self._machine.node
        if node is None or node.host is None:
            raise SpecError(f"the catalogue has no host of {self.setting.hardware}: name a node")
        return node.host

    @property
    def tdp(self) -> float:
        """Board power of one device [W]."""
        return float(self._machine.tdp)

    # Memory.

    @property
    def weights(self) -> float:
        """Weights on one device [byte]."""
        return float(self._estimator.memory(0, 1).weights)

    def _stored(self, sequences: float, tokens: float) -> float:
        e = self._estimator
        return float(memory.cache_bytes(e.model, e.par, e.formats, sequences, tokens, e.engine.block_tokens))

    @property
    def kv_sequence(self) -> float:
        """Keys and values one sequence of `input + output` tokens stores on a device [byte]."""
        return self._stored(1, self.input + self.output)

    @property
    def kv_memory(self) -> float:
        """Keys and values of the batch on a device [byte]."""
        return self._stored(self.batch, self.input + self.output)

    @property
    def kv_token(self) -> float:
        """Cached bytes of one token of the plain model, all layers and devices."""
        return memory.kv_bytes_per_token(self._estimator.model, checkpoint_formats(self._estimator.model))

    @property
    def memory(self) -> float:
        """Everything resident on a device at the end of the batch [byte]."""
        return float(self._estimator.memory(self.batch, self.input + self.output).total)

    @property
    def eager_memory(self) -> float:
        """Peak of a framework that allocates as it goes: weights, and the last step's keys and values or those of the prompts
        beside a layer's intermediates or the logits of every prompt position at 16 and 32 bits [byte]."""
        e, tokens = self._estimator, self.batch * (self.input - self._value("prefix"))
        logits = tokens * e.model.vocab * (e.formats.act.width + 4) / e.par.tp
        pass_ = max(layer_activations(e.model, e.par, e.formats, tokens), logits)
        return float(self.weights + max(self.kv_memory, self._stored(self.batch, self.input) + pass_))

    @property
    def eager_context(self) -> float:
        """Longest prompts, `batch` of them together, that an eager framework prefills whole: beside the weights and the keys and
        values that stay, one layer's at full length, and its intermediates or all positions' logits at 16 and 32 bits."""
        e, many = self._estimator, self.batch
        layer = memory.kv_bytes_per_token(e.model, e.formats) / e.par.tp / self.layers
        token = max(self.prompt_activations + layer, e.model.vocab * (e.formats.act.width + 4) / e.par.tp)
        free = float(e.machine.capacity) - self.weights - float(e.memory(0, 1).other)
        return _longest(lambda tokens: self._stored(many, round(tokens)) + token * many * tokens <= free)

    @property
    def prompt_scores(self) -> float:
        """One layer's scores of all prompts of the batch where attention is not fused [byte]: as the softmax takes them, its
        result at 32 bits and the copy cast back, which modeling_llama.py of Transformers 4.35 has alive together."""
        e = self._estimator
        mixers = [b.mixer for b in e.model.blocks.values()]
        heads = max((m.heads for m in mixers if isinstance(m, (Attention, LatentAttention))), default=0)
        return self.batch * heads / e.par.tp * self.input**2 * (2 * e.formats.act.width + 4)

    @property
    def prompt_activations(self) -> float:
        """A layer's intermediates of a whole prompt that is not cut into chunks, per prompt token [byte]."""
        e = self._estimator
        return layer_activations(e.model, e.par, e.formats, 1.0)

    @property
    def max_batch(self) -> float:
        """Sequences that fit: of their mean length in continuous batching, of their full length in static."""
        static = self.setting.static
        tokens = self.input + self.output if static else self.context
        most = float(self._static_batch(tokens) if static else self._estimator.max_batch(tokens))
        if most < 1:
            raise Infeasible(
                f"no sequence of {tokens:.0f} tokens fits beside the weights of {self.setting.model} on {self.setting.hardware}",
                binding=("memory",),
            )  # fmt: skip
        return most

    def _static_batch(self, tokens: float) -> float:
        """Sequences of a static batch: a layer's intermediates of all prompts that pass together are alive beside the cache, in
        place of those of the step that the engine would set aside (TensorRT-LLM's reference on memory: activations are planned
        for the largest shape)."""
        e = self._estimator
        limits = memory.far_limits(e.model, e.par, e.formats, e.machine, tokens, e.engine.block_tokens) if e.techniques else {}
        free = float(e.kv_free) + float(e.memory(0, 1).activations)
        alive = self.prompt_activations * (self.input - self._value("prefix"))
        if self.setting.batching == "in-turn":
            near = math.floor(max(free - alive, 0.0) / self._stored(1, tokens))
        else:
            near = math.floor(max(free, 0.0) / (self._stored(1, tokens) + alive))
        return min(near, *limits.values()) if limits else near

    @property
    def max_context(self) -> float:
        """Longest context that one sequence can have."""
        e = self._estimator
        free = float(e.kv_free)
        if self._stored(1, 1.0) > free:
            return 0.0
        return _longest(lambda tokens: self._stored(1, round(tokens)) <= free)

    @cached_property
    def batch(self) -> float:
        """Sequences that decode together."""
        asked = self.setting.values["batch"]
        if asked != "max":
            return float(asked)
        largest = self._value("largest")
        return min(self.max_batch, largest) if largest else self.max_batch


def _longest(fits: Callable[[float], bool]) -> float:
    """Most tokens that fit, between one and 2^34, by bisection of the logarithm; one where none does."""
    low, high = 1.0, 2.0**34
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
