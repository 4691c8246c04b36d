"""Stored-tensor shapes against hand arithmetic and published totals, and their use with symbols and arrays."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from perfmodel import catalog
from perfmodel.parameters import (
    block_weights,
    ffn_weights,
    mixer_weights,
    outer_weights,
    parameters_active,
    parameters_total,
)
from perfmodel.spec.model import (
    Attention,
    Block,
    GatedDeltaNet,
    Indexer,
    LatentAttention,
    Lightning,
    Mamba1,
    Mamba2,
    Mlp,
    Model,
    Moe,
)

EXACT = {
    "llama-2-7b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "mistral-7b", "qwen2.5-7b",
    "qwen3-32b", "phi-2", "gpt-j-6b", "gpt-neox-20b", "bloom-176b", "gpt2", "gemma-2-9b", "gemma-3-27b", "falcon-180b",
    "qwen2.5-vl-7b", "llava-1.5-7b",
}  # fmt: skip


def elements(weights):
    return sum(w.elements for w in weights)


def shapes(weights):
    return {w.name: (w.copies, w.rows, w.cols) for w in weights}


@pytest.mark.parametrize("name", catalog.names("models"))
def test_recomputed_total_agrees_with_the_published_one(name):
    model = catalog.load_model(name)
    assert model.published is not None, "every model says what its authors publish"
    total = parameters_total(model)
    if model.published.exact:
        assert total == model.published.total
    else:
        assert total == pytest.approx(model.published.total, rel=model.published.tolerance)


def test_well_known_totals_are_held_exactly():
    """Without this, `exact` could be dropped from a file and the test above would still pass."""
    assert {name for name in EXACT if catalog.load_model(name).published.exact} == EXACT


def test_llama_31_8b_by_hand():
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096  # q and o; k and v of 8 heads of 128: 41,943,040
    mlp = 3 * 4096 * 14336  # gate, up, down: 176,160,768
    layer = attention + mlp + 2 * 4096  # two RMSNorms: 218,112,000
    total = 32 * layer + 2 * 128256 * 4096 + 4096  # embedding, head, final norm
    assert total == 8_030_261_248
    assert parameters_total(catalog.load_model("llama-3.1-8b")) == total


def test_gpt_j_by_hand():
    attention = 4 * 4096 * 4096  # no biases: 67,108,864
    mlp = 2 * 4096 * 16384 + 16384 + 4096  # up, down and their biases: 134,238,208
    layer = attention + mlp + 2 * 4096  # one LayerNorm, weight and bias, for both branches: 201,355,264
    head = 50400 * 4096 + 50400
    total = 28 * layer + 50400 * 4096 + head + 2 * 4096
    assert total == 6_050_882_784
    assert parameters_total(catalog.load_model("gpt-j-6b")) == total


def test_gpt2_ties_the_head_and_learns_positions():
    layer = 4 * 768 * 768 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768  # 7,087,872
    total = 12 * layer + 50257 * 768 + 1024 * 768 + 2 * 768
    assert total == 124_439_808
    model = catalog.load_model("gpt2")
    assert parameters_total(model) == total
    assert "head" not in shapes(outer_weights(model))


def test_mixtral_by_hand_total_and_active():
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    expert = 3 * 4096 * 14336
    model = Model(
        name="m", family="x", hidden=4096, vocab=32000,
        blocks={"moe": Block(mixer=Attention(heads=32, kv_heads=8, head_dim=128),
                             ffn=Moe(experts=8, top_k=2, inter=14336))},
        layers=({"blocks": ("moe",), "repeat": 32},),
    )  # fmt: skip
    others = 32 * (attention + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert parameters_total(model) == others + 32 * 8 * expert == 46_702_792_704
    assert parameters_active(model) == others + 32 * 2 * expert == 12_879_925_248


def test_dense_models_are_wholly_active():
    model = catalog.load_model("llama-2-7b")
    assert parameters_active(model) == parameters_total(model) == 6_738_415_616


def test_latent_attention_shapes_of_deepseek_v3():
    mixer = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    found = shapes(mixer_weights(mixer, 7168))
    assert found["q_a_proj"] == (1, 1536, 7168)
    assert found["q_b_proj"] == (1, 128 * 192, 1536)
    assert found["kv_a_proj"] == (1, 576, 7168)  # 512 of the latent and 64 rotary
    assert found["kv_b_proj"] == (1, 128 * 256, 512)
    assert found["o_proj"] == (1, 7168, 128 * 128)
    # 11,010,048 + 1536 + 37,748,736 + 4,128,768 + 512 + 16,777,216 + 117,440,512
    assert elements(mixer_weights(mixer, 7168)) == 187_107_328


def test_latent_attention_without_query_rank_projects_directly():
    """DeepSeek-V2-Lite: 16 heads of 192 straight from 2048."""
    mixer = LatentAttention(heads=16, q_rank=0, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    found = shapes(mixer_weights(mixer, 2048))
    assert found["q_proj"] == (1, 3072, 2048)
    assert not {"q_a_proj", "q_a_norm", "q_b_proj"} & set(found)


def test_indexer_reads_the_query_latent():
    indexer = Indexer(heads=64, head_dim=128, top_k=2048)
    mixer = LatentAttention(
        heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, indexer=indexer
    )  # fmt: skip
    plain = mixer.model_copy(update={"indexer": None})
    extra = elements(mixer_weights(mixer, 7168)) - elements(mixer_weights(plain, 7168))
    # queries 8192 x 1536, one key 128 x 7168, LayerNorm 2 x 128, head weights 64 x 7168
    assert extra == 12_582_912 + 917_504 + 256 + 458_752


def test_state_space_mixers_by_hand():
    mamba2 = Mamba2(heads=8, head_dim=4, state=16, groups=2)
    # inner 32; channels 32 + 64; in 32 + 96 + 8 rows; conv 4 + bias; dt_bias, A, D; norm; out
    assert elements(mixer_weights(mamba2, 10)) == 136 * 10 + 96 * 5 + 3 * 8 + 32 + 10 * 32
    mamba1 = Mamba1(inner=32, state=16, dt_rank=4, inner_norms=True)
    by_hand = 64 * 10 + 32 * 5 + 36 * 32 + 32 * 4 + 32 + 32 * 16 + 32 + 10 * 32 + (4 + 16 + 16)
    assert elements(mixer_weights(mamba1, 10)) == by_hand
    deltanet = GatedDeltaNet(key_heads=2, value_heads=4, key_dim=8, value_dim=8)
    # q and k 16 each, v and z 32 each; beta and decay 4 each; conv over 64; norm of one head; out
    assert elements(mixer_weights(deltanet, 10)) == 96 * 10 + 8 * 10 + 64 * 4 + 2 * 4 + 8 + 10 * 32
    lightning = Lightning(heads=2, head_dim=8)
    assert elements(mixer_weights(lightning, 10)) == 48 * 10 + 16 * 10 + 16 + 10 * 16


def test_attention_options_add_what_they_say():
    plain = Attention(heads=4, kv_heads=2, head_dim=8)

    def extra(**options):
        return elements(mixer_weights(plain.model_copy(update=options), 16)) - elements(mixer_weights(plain, 16))

    assert extra(qkv_bias=True) == 32 + 16 + 16
    assert extra(out_bias=True) == 16
    assert extra(qk_norm="head") == 8 + 8
    assert extra(qk_norm="full") == 32 + 16
    assert extra(qk_norm="layernorm-head") == 2 * (8 + 8)
    assert extra(output_gate=True) == 32 * 16
    assert extra(sinks=True) == 4
    assert extra(shares_kv=True) == -2 * 16 * 16


def test_moe_options_add_what_they_say():
    plain = Moe(experts=4, top_k=2, inter=8)

    def extra(**options):
        return elements(ffn_weights(plain.model_copy(update=options), 16)) - elements(ffn_weights(plain, 16))

    assert elements(ffn_weights(plain, 16)) == 4 * 16 + 4 * 3 * 8 * 16
    assert extra(router_bias=True) == 4
    assert extra(shared_inter=6) == 3 * 6 * 16
    assert extra(shared_gate=True) == 16
    assert extra(dense_inter=5) == 3 * 5 * 16
    assert extra(expert_bias=True) == 4 * (8 + 8 + 16)
    assert extra(gated=False) == -4 * 8 * 16


def test_norms_of_a_block():
    def norm_elements(**options):
        return elements(block_weights(Block(**options), 16))

    assert norm_elements() == 2 * 16
    assert norm_elements(norm="layer", norms=1) == 2 * 16
    assert norm_elements(norm="none") == 0
    assert norm_elements(norms=4, extra_parameters=7) == 4 * 16 + 7


def test_symbols_go_through_unchanged():
    h, heads, inter = sympy.symbols("h heads inter", positive=True, integer=True)
    mixer = Attention.model_construct(heads=heads, kv_heads=heads, head_dim=h / heads)
    ffn = Mlp.model_construct(inter=inter)
    expression = elements(block_weights(Block.model_construct(mixer=mixer, ffn=ffn), h))
    assert sympy.simplify(expression - (4 * h**2 + 3 * h * inter + 2 * h)) == 0
    assert expression.subs({h: 4096, heads: 32, inter: 11008}) == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096


def test_arrays_of_sizes_give_arrays_of_counts():
    hidden = np.array([2048, 7168])
    mixer = LatentAttention.model_construct(
        heads=np.array([16, 128]), q_rank=np.array([1024, 1536]), kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    counts = elements(mixer_weights(mixer, hidden))
    assert counts.shape == (2,)
    assert counts[1] == 187_107_328  # DeepSeek-V3, as above
