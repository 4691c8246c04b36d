"""FLOPs, weights and caches of whole models against transformers, to the last one.

The importer and the graph are tested together: our model is read from the reference's own configuration.
"""

from __future__ import annotations

import pytest
import reference_models as reference

from perfmodel import graph
from perfmodel.graph import Phase
from perfmodel.memory import kv_bytes_per_token
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.parameters import parameters_total
from perfmodel.schedule import operators
from perfmodel.spec.formats import get_format

# transformers and PyTorch warn about their own deprecations and about kernels that are not installed.
pytestmark = pytest.mark.filterwarnings("ignore")

BF16 = Formats(*[get_format("bf16")] * 4)
SEQUENCES, NEW, CACHED = 2, 10, 9  # the windows of the small models are 6 tokens, shorter than either


def matrix_flops(kind: str, group: Group, *, causal: bool) -> dict[str, float]:
    """Our FLOPs on matrix units by operator, all layers, logits at every position as the reference computes them."""
    phase = Phase((group,), logits="all", causal=causal)
    program = graph.lower(reference.model(kind), phase, Parallelism(), BF16)
    counts: dict[str, float] = {}
    for op, times, _ in operators(program.schedule):
        counts[op.name] = counts.get(op.name, 0.0) + times * op.flops.get("bf16", 0.0)
    return counts


@pytest.mark.parametrize("kind", reference.SOFTMAX)
def test_prefill_flops_equal_the_reference(kind: str) -> None:
    expected = reference.run(kind, SEQUENCES, NEW, 0).total
    assert sum(matrix_flops(kind, Group(SEQUENCES, NEW, 0), causal=False).values()) == expected


@pytest.mark.parametrize("kind", reference.SOFTMAX)
def test_decode_flops_equal_the_reference(kind: str) -> None:
    """One new token attends all cached ones, or its window of 6: a causal row is the whole rectangle.

    The reference keeps keys and values of latent attention as latents and expands them in every step; so does a group
    that is not marked as decode.
    """
    expected = reference.run(kind, 3, 1, CACHED).total
    assert sum(matrix_flops(kind, Group(3, 1, CACHED), causal=True).values()) == expected


@pytest.mark.parametrize("kind", ["llama", "falcon", "deepseek_v3"])
def test_chunk_on_a_cache_equals_the_reference(kind: str) -> None:
    expected = reference.run(kind, SEQUENCES, NEW, CACHED).total
    assert sum(matrix_flops(kind, Group(SEQUENCES, NEW, CACHED), causal=False).values()) == expected


@pytest.mark.parametrize("kind", reference.RECURRENT)
def test_linear_layers_of_recurrent_models_equal_the_reference(kind: str) -> None:
    """Products with weights are mm and addmm; those between activations (scans, attention) are bmm."""
    flops = reference.run(kind, SEQUENCES, NEW, 0).flops
    ours = matrix_flops(kind, Group(SEQUENCES, NEW, 0), causal=False)
    linear = sum(n for name, n in ours.items() if name not in ("scan", "attention"))
    assert linear == flops["mm"] + flops.get("addmm", 0)


def test_mamba2_scan_against_the_reference_scan() -> None:
    """The reference counts full squares within a chunk of c = 256 and, between k chunks, a product with (k + 1)^2 weights.

    Per token and head, with H = 8 heads of P = 16, N = 16 and as many groups as heads:
    within 2 c (N + P), states 4 P N; ours counts the causal half of the former, c (N + P).
    """
    n, chunks, c, h, p, s = 2, 2, 256, 8, 16, 16
    tokens = n * chunks * c
    between = 2 * (chunks + 1) ** 2 * n * h * p * s
    states = 4 * p * s * tokens * h
    squares = 2 * c * (s + p) * tokens * h
    layers = 2
    flops = reference.run("mamba2", n, chunks * c, 0).flops["bmm"]
    assert flops == layers * (squares + states + between)
    scan = matrix_flops("mamba2", Group(n, chunks * c, 0), causal=True)["scan"]
    assert scan == layers * (squares / 2 + states)


def test_delta_rule_scan_against_the_reference_scan() -> None:
    """The reference's products in chunks of c = 64: K K^T, Q K^T, scores V' (2 c (2 N + P)), and three with the state (6 N P).

    Its triangular solve is not counted by the counter: c^2 multiply-adds over 2 for each of N + P columns, c (N + P) a token.
    """
    n, c, h, p, s = 2, 64, 4, 16, 16
    q = 2 * c
    per_head = n * q * h
    attention = 4 * 8 * 16 * n * q * q  # the one softmax layer: 2 (16 + 16) FLOP for each of 8 heads and q^2 pairs
    squares, states, solve = 2 * c * (2 * s + p) * per_head, 6 * s * p * per_head, c * (s + p) * per_head
    layers = 3
    assert reference.run("qwen3_next", n, q, 0).flops["bmm"] == layers * (squares + states) + attention
    scan = matrix_flops("qwen3_next", Group(n, q, 0), causal=True)["scan"]
    assert scan == layers * (squares / 2 + solve + states)


@pytest.mark.parametrize("kind", reference.CONFIGS)
def test_parameters_equal_the_reference(kind: str) -> None:
    """Checkpoints also store DeepSeek-V3's routing correction, which the reference keeps as a buffer."""
    module = reference.module(kind)
    buffers = [b for name, b in module.named_buffers() if name.endswith("e_score_correction_bias")]
    assert parameters_total(reference.model(kind)) == sum(t.numel() for t in (*module.parameters(), *buffers))


@pytest.mark.parametrize("kind", [k for k in reference.SOFTMAX if not reference.has_experts(k)])
def test_decode_reads_every_linear_weight_once(kind: str) -> None:
    """Weights read in a step are those of the linear layers (the head among them, tied or not) and one table row a token."""
    from need import torch

    nn = torch().nn
    layers = [m for m in reference.module(kind).modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    matrices = sum(m.weight.numel() for m in layers)
    model = reference.model(kind)
    program = graph.lower(model, graph.decode(3, CACHED), Parallelism(), BF16)
    read = sum(
        times * t.elements for op, times, _ in operators(program.schedule) for t in op.traffic if t.tensor == "weights"
    )
    assert read == matrices + 3 * (model.embedding_dim or model.hidden)


@pytest.mark.parametrize(
    "kind", [k for k in reference.SOFTMAX if k not in ("gemma2", "gemma3_text", "gpt_oss", "mistral")]
)
def test_cached_elements_equal_the_reference(kind: str) -> None:
    """Keys and values (or latents) of one sequence of 9 tokens, in elements; bf16 is two bytes each."""
    cache = reference.run(kind, 1, CACHED, 0).cache
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_bytes_per_token(reference.model(kind), BF16) * CACHED / 2 == stored
