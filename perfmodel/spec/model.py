"""Model architecture: what a forward pass is made of, without weights.

A model is a token embedding, a list of layer groups and a head. Each layer is a block: a token mixer
(attention, latent attention, a state-space or linear-attention mixer, or none) and a feed-forward part
(dense, mixture of experts, or none). Shapes follow Hugging Face's names where one exists.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from perfmodel.errors import SpecError
from perfmodel.spec.base import Count, Natural, Source, Spec


class Attention(Spec):
    """Softmax attention with grouped queries: MHA (kv_heads = heads), GQA, or MQA (kv_heads = 1)."""

    kind: Literal["attention"] = "attention"
    heads: Count
    kv_heads: Count
    head_dim: Count
    q_rank: Natural = 0
    """Rank of a factored query projection (multi-matrix factorisation attention, arXiv:2412.19255); 0: one matrix."""
    window: Count | None = None
    """Sliding window in tokens (or local chunk length); None attends to everything."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full", "layernorm-head"] = "none"
    """head: one RMSNorm of head_dim for q and one for k; full: over all heads; layernorm-head: with bias."""
    output_gate: bool = False
    """A sigmoid gate on the output, computed by doubling the query projection (Qwen3-Next)."""
    sinks: bool = False
    """One learned sink logit per head (gpt-oss)."""
    shares_kv: bool = False
    """Reuses the KV cache of an earlier layer: no K/V projection, no cache of its own."""

    @model_validator(mode="after")
    def _heads(self) -> Attention:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Indexer(Spec):
    """Token selector of sparse latent attention (DeepSeek-V3.2): scores every cached token, keeps the top k."""

    heads: Count
    head_dim: Count
    top_k: Count


class LatentAttention(Spec):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one compressed latent per token is cached."""

    kind: Literal["latent"] = "latent"
    heads: Count
    q_rank: Natural
    """0: queries are projected directly."""
    kv_rank: Count
    nope_dim: Count
    rope_dim: Count
    v_dim: Count
    indexer: Indexer | None = None
    bias: bool = False


class Mamba2(Spec):
    """Selective state space with scalar decay per head (arXiv:2405.21060)."""

    kind: Literal["mamba2"] = "mamba2"
    heads: Count
    head_dim: Count
    state: Count
    groups: Count = 1
    conv: Count = 4
    conv_bias: bool = True
    proj_bias: bool = False
    gated_norm: bool = True
    """RMSNorm over the inner dimension before the output projection."""


class Mamba1(Spec):
    """Selective state space with per-channel dynamics (arXiv:2312.00752), as used in Jamba."""

    kind: Literal["mamba1"] = "mamba1"
    inner: Count
    state: Count
    dt_rank: Count
    conv: Count = 4
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = False
    """RMSNorm on dt, B and C (Jamba)."""


class GatedDeltaNet(Spec):
    """Gated delta rule linear attention (arXiv:2412.06464), as in Qwen3-Next and Qwen3.5."""

    kind: Literal["deltanet"] = "deltanet"
    key_heads: Count
    value_heads: Count
    key_dim: Count
    value_dim: Count
    conv: Count = 4


class Lightning(Spec):
    """Lightning attention: linear attention with fixed decay per head (arXiv:2401.04658), as in MiniMax-01."""

    kind: Literal["lightning"] = "lightning"
    heads: Count
    head_dim: Count


class Convolution(Spec):
    """Convolutions over the latents of an image, one after another: a residual unit, a projection or a change of
    resolution of a U-Net (arXiv:1505.04597, as conditioned in arXiv:2112.10752). The last gives the block's `width`."""

    kind: Literal["convolution"] = "convolution"
    inputs: Count
    """Channels of the input, those joined from the other side of the U included."""
    kernel: Count = 3
    """Edge of the kernel; every convolution after the first maps `width` to `width`."""
    convolutions: Count = 1
    norms: Natural = 0
    """How many of them have a group norm and an activation before them."""
    condition: Natural = 0
    """Width of the condition (embedding of time) that is projected to a vector of `width` for each image."""
    shortcut: bool = False
    """A 1 x 1 convolution carries the input past the others, where inputs and width differ."""
    joins: bool = False
    """The input is put together from two tensors."""
    resample: Literal["none", "down", "up"] = "none"
    """down: a stride of 2 from a map of twice the edge; up: the input is first spread from half the edge."""


Mixer = Annotated[
    Attention | LatentAttention | Mamba2 | Mamba1 | GatedDeltaNet | Lightning | Convolution,
    Field(discriminator="kind"),
]


class CrossAttention(Spec):
    """Attention of every token to a fixed number of tokens of another encoder (the text of a prompt)."""

    heads: Count
    head_dim: Count
    context: Count
    """Width of the other encoder's output."""
    tokens: Count


class Mlp(Spec):
    """Dense feed-forward: gated (up, gate, down) or plain (up, down)."""

    kind: Literal["mlp"] = "mlp"
    inter: Count
    gated: bool = True
    bias: bool = False


class Moe(Spec):
    """Mixture of experts: a router picks `top_k` of `experts`; shared experts see every token."""

    kind: Literal["moe"] = "moe"
    experts: Count
    top_k: Count
    inter: Count
    """Intermediate size of one routed expert."""
    shared_inter: Natural = 0
    """Total intermediate size of the shared experts."""
    shared_gate: bool = False
    """A scalar sigmoid gate on the shared expert (Qwen2-MoE)."""
    dense_inter: Natural = 0
    """A dense MLP beside the experts in the same layer (Arctic, Llama-4 style is `shared_inter`)."""
    gated: bool = True
    expert_bias: bool = False
    router_bias: bool = False
    groups: Count = 1
    """Expert groups for group-limited routing; tokens visit at most `top_groups` of them."""
    top_groups: Count = 1

    @model_validator(mode="after")
    def _top_k(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds experts ({self.experts})")
        if self.top_groups > self.groups or self.experts % self.groups:
            raise ValueError("top_groups must not exceed groups, and groups must divide experts")
        return self


Ffn = Annotated[Mlp | Moe, Field(discriminator="kind")]


class Block(Spec):
    """One kind of layer."""

    mixer: Mixer | None = None
    cross: CrossAttention | None = None
    ffn: Ffn | None = None
    width: Natural = 0
    """Channels of this layer; 0: the model's `hidden`."""
    shrink: Count = 1
    """Edge, in latents of the input, of what one token of this layer stands for (deeper levels of a U-Net: 2, 4, 8)."""
    norms: Natural = 2
    """How many norms of width `hidden` the layer has (Gemma-2: 4; GPT-J: 1, shared by the parallel branches)."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """layer: LayerNorm with weight and bias; none: no parameters."""
    parallel: bool = False
    """Mixer and feed-forward read the same normed input and are added together (GPT-J, Falcon, Phi)."""
    modulation: Natural = 0
    """Vectors of width `hidden` that a projection of each sequence's condition gives the layer (adaLN-Zero of
    diffusion transformers, arXiv:2212.09748: 6, to scale, shift and gate mixer and feed-forward)."""
    extra_parameters: Natural = 0
    """Stored parameters of a layer that cost no matrix work (layer scales, per-layer vectors)."""


class Layers(Spec):
    """`repeat` copies of a sequence of block names."""

    blocks: tuple[str, ...]
    repeat: Count = 1


class Vision(Spec):
    """Vision encoder of a multimodal model: a ViT, a patch merger and a projector."""

    layers: Count
    hidden: Count
    heads: Count
    inter: Count
    gated: bool = False
    patch: Count
    temporal_patch: Count = 1
    channels: Count = 3
    bias: bool = True
    merge: Count = 1
    """Patches merged into one language token along each axis."""
    positions: Natural = 0
    """Learned position embeddings."""
    parameters: Natural
    """Stored parameters of encoder and projector, computed by the importer from the configuration."""


class Published(Spec):
    """What the authors say, kept apart from what we compute."""

    total: Count
    active: Count | None = None
    exact: bool = False
    """True where `total` is the exact number of stored parameters (safetensors total or paper's exact sum)."""
    convention: str = "all stored parameters, tied once"
    source: str
    tolerance: float = 0.02
    """Relative tolerance when not exact: the rounding of the published figure."""


class Model(Spec):
    """A language model (with an optional vision encoder)."""

    name: str
    title: str = ""
    organisation: str = ""
    aliases: tuple[str, ...] = ()
    family: str
    """Hugging Face architecture class or family name."""
    hidden: Count
    vocab: Count
    blocks: dict[str, Block]
    layers: tuple[Layers, ...]
    tied_embeddings: bool = False
    learned_positions: Natural = 0
    """Rows of a learned position embedding table."""
    embedding_norm: bool = False
    """LayerNorm after the embedding (BLOOM)."""
    embedding_dim: Natural = 0
    """0: equal to hidden; else a projection is added (OPT-350m)."""
    final_norm: Literal["rms", "layer", "none"] = "rms"
    head_bias: bool = False
    max_positions: Natural = 0
    """Longest context the model was trained for; 0: unlimited."""
    dtype: str = "bf16"
    """Format the checkpoint stores most weights in."""
    expert_dtype: str | None = None
    """Format of routed experts where it differs (gpt-oss: mxfp4)."""
    kv_dtype: str | None = None
    unquantized: tuple[Literal["embedding", "head", "router", "attention", "shared", "dense_ffn"], ...] = (
        "embedding",
        "head",
        "router",
    )
    """Parts kept at 16 bits when `dtype` is a quantised format."""
    vision: Vision | None = None
    denoises: Literal["image", "text"] | None = None
    """A denoiser computes all tokens of an image or a text again in every step, and produces none after another."""
    token_edge: Natural = 0
    """Edge, in pixels, of what one token of a denoiser of images stands for."""
    mtp_parameters: Natural = 0
    """Multi-token-prediction modules stored beside the model; never in the total."""
    extra_parameters: Natural = 0
    """Other stored parameters that cost no matrix work."""
    published: Published | None = None
    sources: dict[str, Source] = {}
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _blocks_exist(self) -> Model:
        for group in self.layers:
            for name in group.blocks:
                if name not in self.blocks:
                    raise ValueError(f"layers name block {name!r}, which is not under blocks")
        return self

    def require_next_token(self) -> Model:
        """The model itself; raises SpecError for one that does not generate token by token."""
        if self.denoises:
            raise SpecError(
                f"{self.name} generates by denoising, not token by token: `perfmodel denoise --model {self.name} --steps N`"
            )
        return self

    def block_counts(self) -> dict[str, int]:
        """How many layers there are of each block."""
        counts = dict.fromkeys(self.blocks, 0)
        for group in self.layers:
            for name in group.blocks:
                counts[name] += group.repeat
        return {name: n for name, n in counts.items() if n}

    @property
    def n_layers(self) -> int:
        return sum(self.block_counts().values())
