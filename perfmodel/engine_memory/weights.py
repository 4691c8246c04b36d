"""Weights as an engine holds them: its padding, copies and tables, what it leaves on the host."""

from __future__ import annotations

import math
from typing import Literal

from perfmodel.engine_memory.instance import Instance
from perfmodel.graph import weight_residency
from perfmodel.ops.shard import Parallelism
from perfmodel.ops.traffic import Residency
from perfmodel.spec.gguf import FileType, file_type
from perfmodel.spec.model import Attention, LatentAttention, Model, Moe

Stage = Literal["fullest", "first", "mean"]


def loaded_weights(i: Instance, stage: Stage = "fullest") -> float:
    """Bytes of weights an engine holds, with its padding, copies and tables.

    stage: of a pipeline, the fullest stage, the first, or the mean of all.
    """
    one = Parallelism(i.par.tp, 1, i.par.dp, i.par.ep, i.par.cp)
    files = file_type(i.formats.weight.name) if i.file else None
    layers: dict[str, float] = dict.fromkeys(i.model.blocks, 0.0)
    outer: dict[str, float] = {}
    counts = i.model.block_counts()
    for record in weight_residency(i.model, one, i.formats):
        if record.tier != "hbm":
            continue
        block, _, tensor = record.name.partition(".")
        if tensor:
            layers[block] += _stored(i, record, tensor, files) / counts[block]
        else:
            outer[block] = _stored_outer(i, record, files)
    for name in counts:
        layers[name] += _latent_copies(i, name)
    if i.account.host_embedding:
        if i.model.tied_embeddings:
            outer["head"] = outer["embedding"]
        outer["embedding"] = 0.0
    if i.account.rope_table:
        outer["rope"] = _rope_table(i.model) * float(i.formats.act.width)
    stages = _stages(i, layers, outer)
    return {"fullest": max(stages), "first": stages[0], "mean": sum(stages) / len(stages)}[stage]


def _stages(i: Instance, layers: dict[str, float], outer: dict[str, float]) -> list[float]:
    """Bytes of every pipeline stage: layers in order, the table on the first, the head on the last.

    A remainder of layers goes to the first stages.
    """
    order = [layers[name] for group in i.model.layers for _ in range(group.repeat) for name in group.blocks]
    n = int(i.par.pp)
    each, left = divmod(len(order), n)
    stages, start = [], 0
    for s in range(n):
        size = each + (s < left)
        stages.append(sum(order[start : start + size]))
        start += size
    late = {"head", "head_bias", "final_norm", "project_out"}
    stages[-1] += sum(b for k, b in outer.items() if k in late)
    stages[0] += sum(b for k, b in outer.items() if k not in late)
    if n > 1 and i.model.tied_embeddings and not i.account.host_embedding:
        stages[-1] += outer["embedding"]
    return stages


def _stored(i: Instance, record: Residency, tensor: str, files: FileType | None) -> float:
    """Bytes of one matrix of all layers of a block."""
    elements = float(record.elements)
    if files is not None and record.width != 2.0:
        return elements * files.bits(tensor.split(".")[-1], record.tensor, _inner(i, record.name)) / 8
    expert = i.formats.expert
    if record.tensor == "experts" and expert.name == "mxfp4" and record.width == expert.width:
        elements *= _expert_padding(i, record.name.split(".")[0])
    return elements * float(record.width)


def _inner(i: Instance, name: str) -> int:
    """Input width of a matrix."""
    block, _, tensor = name.partition(".")
    mixer, ffn = i.model.blocks[block].mixer, i.model.blocks[block].ffn
    if tensor.endswith("down_proj") and ffn is not None:
        return ffn.inter
    if tensor == "o_proj" and isinstance(mixer, Attention):
        return mixer.heads * mixer.head_dim
    return i.model.hidden


def _stored_outer(i: Instance, record: Residency, files: FileType | None) -> float:
    """Bytes of a tensor outside the layers: an encoder is cut over tp and never quantised."""
    if record.name == "vision":
        # llama.cpp loads the encoder from a file of its own.
        return 0.0 if i.account.host_embedding else float(record.elements / i.par.tp * i.formats.act.width)
    if files is not None and record.name in ("embedding", "head"):
        return float(record.elements) * files.bits(record.name, record.name, i.model.hidden) / 8
    return float(record.bytes)


def _expert_padding(i: Instance, block: str) -> float:
    """Padded over exact elements of one rank's experts."""
    tiles = i.account.expert_tiles.get(i.architecture, i.account.expert_tiles.get("default"))
    ffn = i.model.blocks[block].ffn
    if tiles is None or not isinstance(ffn, Moe):
        return 1.0
    shares = (i.model.hidden, ffn.inter / float(i.par.moe_tp))
    return math.prod(math.ceil(size / tile) * tile / size for size, tile in zip(shares, tiles, strict=True))


def _latent_copies(i: Instance, block: str) -> float:
    """16-bit copies of the key and value up-projections of one layer, beside quantised ones."""
    mixer = i.model.blocks[block].mixer
    if not i.account.latent_copies or not isinstance(mixer, LatentAttention):
        return 0.0
    elements = mixer.heads * (mixer.nope_dim + mixer.v_dim) * mixer.kv_rank
    return float(elements / i.par.tp * i.formats.act.width)


def _rope_table(model: Model) -> int:
    """Elements of the tables of cosines and sines: every position, one table per rotary width."""
    widths = set()
    for block in model.blocks.values():
        match block.mixer:
            case Attention() if not model.learned_positions:
                widths.add(block.mixer.head_dim)
            case LatentAttention():
                widths.add(block.mixer.rope_dim)
    return sum(width * model.max_positions for width in widths)
