"""The oracle's own oracles: gguf's dequantizers, plain loops, and Hugging Face's models of the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.compute.reference.blocks.attention import attention, pair_turns, rotated
from mer.compute.reference.blocks.feed_forward import silu
from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.blocks.router import route
from mer.compute.reference.model import ReferenceModel
from mer.compute.reference.products import dequantize, matmul_quantized, quantize_int8, quantize_q8_0, quantize_q8_k
from mer.embedded import embedded_model_path
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from mer.model.operators import Groups, Rope, RopeStyle, Routing, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import OVER_CHOSEN
from tests._lib.quantize import HALVES, decode, encode
from tests._lib.specs import with_attention, with_rope, with_router
from tests._lib.tiny_models import TinyModel, Type, tiny_model

TYPES = sorted(MATRIX_TYPES)
OVER_ALL = Routing(scoring=Scoring.SOFTMAX)


def random_blocks(kind: GGMLType, n_blocks: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return random blocks whose scales are of any magnitude, but all weights finite."""
    raw = np.random.default_rng(seed).integers(0, 256, (n_blocks, kind.block_bytes), np.uint8)
    for at in HALVES.get(Type(int(kind)), ()):
        raw[:, at + 1] &= 0xBF  # clears the highest exponent bit
    if kind is GGMLType.MXFP4:
        raw[:, 0] = raw[:, 0].clip(0, 250)
    return raw


def relative_error(got: npt.NDArray[np.float64], want: npt.NDArray[np.float64]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def some_tokens(model: TinyModel, n_tokens: int = 12) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, model.shape.vocab_size, n_tokens)]


# --- weights and activations ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_dequantize_equals_gguf_to_the_bit(kind: GGMLType) -> None:
    raw = random_blocks(kind, 3 * 4096, seed=1)
    want = decode(raw.reshape(3, -1), Type(int(kind)))
    got = dequantize(kind, raw.tobytes(), want.shape)
    assert got.dtype == np.float32
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@given(
    hnp.arrays(np.float32, (2, 256), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    st.sampled_from([(quantize_q8_0, 32), (quantize_q8_k, 256)]),
)
def test_int8_activations_are_within_half_a_step(x: npt.NDArray[np.float32], how: Any) -> None:
    quantize, block = how
    q, scales = quantize(x)
    assert q.dtype == np.int8
    assert scales.dtype == np.float32
    assert scales.shape == (2, 256 // block)
    blocks = x.reshape(2, -1, block).astype(np.float64)
    peak = np.abs(blocks).max(-1)
    assert np.array_equal(scales, peak.astype(np.float32) / np.float32(127))
    back = q.reshape(blocks.shape) * scales[..., None].astype(np.float64)
    normal = scales > 2.0**-120  # below, float32 itself has too few bits
    error = np.abs(back - blocks).max(-1)
    assert (error[normal] <= 0.5001 * scales[normal]).all()
    assert (np.abs(q.reshape(blocks.shape)).max(-1)[normal] == 127).all()
    assert (q.reshape(blocks.shape)[peak == 0] == 0).all()


@pytest.mark.parametrize("x", [np.full(32, np.nan), np.full(32, np.inf), np.zeros(31)])
def test_activations_that_have_no_int8_form_are_refused(x: npt.NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        quantize_q8_0(x)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_integer_matmul_equals_the_product_of_what_the_integers_stand_for(kind: GGMLType) -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(5, 512)).astype(np.float32)
    x = rng.normal(size=(3, 512)).astype(np.float32)
    raw = encode(weights, Type(int(kind)))
    block = kind.block_size
    rounded = x.astype(np.float64)
    if kind.block_size > 1:
        q, scales = quantize_int8(x, block)
        rounded = q.astype(np.float64) * np.repeat(scales, block, axis=1)
    want = rounded @ dequantize(kind, raw.tobytes(), (5, 512)).astype(np.float64).T
    got = matmul_quantized(kind, raw.tobytes(), x)
    assert got.shape == (3, 5)
    assert relative_error(got, want) < 1e-6  # what float32 rounds off single weights
    coarse = {"IQ1": 0.8, "IQ2": 0.8, "IQ3": 0.4, "Q2_": 0.5}.get(kind.name[:3], 0.2)
    assert relative_error(got, x.astype(np.float64) @ weights.astype(np.float64).T) < coarse


def test_integer_matmul_of_one_block_by_hand() -> None:
    weights = np.arange(-8, 24).clip(-8, 7).astype(np.float32) / np.float32(4)  # Q4_0 has these exactly: scale 1/4
    x = np.arange(32, dtype=np.float32)
    raw = encode(weights[None], Type.Q4_0).tobytes()
    scale = float(np.float32(31) / np.float32(127))
    q = [round(float(np.float32(value) / np.float32(scale))) for value in x]
    want = 0.25 * scale * sum(int(w * 4) * value for w, value in zip(weights, q, strict=True))
    assert matmul_quantized(GGMLType.Q4_0, raw, x[None])[0, 0] == pytest.approx(want, rel=1e-15)


# --- parts of a layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(("dim", "scale"), [(8, 1.0), (6, 0.25)])
def test_rope_rotates_each_pair_by_its_angle(style: RopeStyle, dim: int, scale: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 8))
    got = rotated(x, [0, 5, 11], pair_turns(Rope(dim, 500.0, scale, style)), style)
    for t, position in enumerate((0, 5, 11)):
        for head in range(2):
            for i in range(dim // 2):
                a, b = (2 * i, 2 * i + 1) if style is RopeStyle.INTERLEAVED else (i, i + dim // 2)
                angle = position * scale / 500.0 ** (2 * i / dim)
                left, right = x[t, head, a], x[t, head, b]
                assert got[t, head, a] == pytest.approx(left * math.cos(angle) - right * math.sin(angle), abs=1e-12)
                assert got[t, head, b] == pytest.approx(left * math.sin(angle) + right * math.cos(angle), abs=1e-12)
            assert np.array_equal(got[t, head, dim:], x[t, head, dim:])


def test_attention_equals_plain_loops() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 6, 4)), rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 4))
    got = attention(q, k, v)
    for t in range(3):
        for head in range(6):
            seen = 5 - 3 + t + 1
            powers = [math.exp(float(q[t, head] @ k[s, head // 3]) / 2) for s in range(seen)]
            want = sum(p * v[s, head // 3] for s, p in enumerate(powers)) / sum(powers)
            assert np.allclose(got[t, head], want, rtol=1e-12)


@given(hnp.arrays(np.float64, (4, 7), elements=st.floats(-30, 30)), st.integers(1, 7))
def test_routing_shares_out_one_or_what_the_chosen_have_of_it(logits: npt.NDArray[np.float64], top_k: int) -> None:
    ids, weights = route(logits, top_k, OVER_CHOSEN)
    other_ids, other_weights = route(logits, top_k, OVER_ALL)
    assert np.array_equal(ids, other_ids)
    powers_of_all = np.exp(logits)
    assert np.allclose(
        other_weights * powers_of_all.sum(-1, keepdims=True), np.take_along_axis(powers_of_all, ids, axis=1)
    )
    assert np.allclose(weights, other_weights / other_weights.sum(-1, keepdims=True), rtol=1e-9)
    assert np.allclose(weights.sum(-1), 1)
    for row, chosen, shares in zip(logits, ids, weights, strict=True):
        assert list(chosen) == sorted(range(7), key=lambda e: (-row[e], e))[:top_k]
        powers = [math.exp(row[e]) for e in chosen]
        assert np.allclose(shares, np.array(powers) / sum(powers), rtol=1e-9)


@given(hnp.arrays(np.float64, (3, 12), elements=st.sampled_from([-7.0, -1.0, 0.5, 2.0])), st.integers(1, 5))
def test_a_bias_and_groups_choose_and_the_scores_alone_weigh(logits: npt.NDArray[np.float64], top_k: int) -> None:
    """One expert after the other, of the groups that are left."""
    bias = np.array([0.5, -1, 0, 0.25, 0, 3, -0.5, 0, 0, 0.125, 1, 0])
    routing = Routing(scoring=Scoring.SIGMOID, groups=Groups(count=4, used=2), normalize=True, scale=2.5)
    ids, weights = route(logits, top_k, routing, bias)
    for row, chosen, got in zip(logits, ids, weights, strict=True):
        scores = [1 / (1 + math.exp(-x)) for x in row]
        ranks = [float(np.float32(score + b)) for score, b in zip(scores, bias, strict=True)]
        of_group = [float(np.float32(sum(sorted(ranks[3 * g : 3 * g + 3])[1:]))) for g in range(4)]
        best = sorted(range(4), key=lambda g: (-of_group[g], g))[:2]
        want = sorted((e for e in range(12) if e // 3 in best), key=lambda e: (-ranks[e], e))[:top_k]
        assert list(chosen) == want
        assert got == pytest.approx([2.5 * scores[e] / sum(scores[e] for e in want) for e in want])


def test_norm_and_silu_by_hand() -> None:
    assert rms_norm(np.array([[3.0, 4.0]]), [1.0, 2.0], 0.0) == pytest.approx(np.array([[3, 8]]) / math.sqrt(12.5))
    assert silu(np.array([-1000.0, 0.0, 1.0, 1000.0])) == pytest.approx([0, 0, 1 / (1 + math.exp(-1)), 1000])


# --- the whole model --------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {},
    {"arch": "llama", "n_heads": 6, "n_kv_heads": 3, "n_experts": 9, "top_k": 4, "tied": True, "rope_base": 1e6},
    {"arch": "llama", "n_layers": 3, "d_model": 48, "d_ff": 96, "n_kv_heads": 6, "top_k": 1, "vocab_size": 97},
    {"arch": "llama", "d_model": 80, "n_heads": 5, "n_kv_heads": 1, "head_dim": 22, "n_experts": 3, "top_k": 3},
    {"arch": "llama", "rope_factor": 4.0, "rms_eps": 1e-3},
    {"arch": "qwen3moe"},
    {"arch": "qwen3moe", "n_kv_heads": 3, "head_dim": 10, "n_experts": 7, "top_k": 3, "tied": True},
    {"arch": "qwen3moe", "n_layers": 3, "d_model": 192, "d_ff": 56, "n_experts": 4, "top_k": 4, "rope_base": 1e6},
    {"arch": "qwen3moe", "d_model": 72, "n_heads": 2, "n_kv_heads": 1, "top_k": 1, "rope_factor": 2.5, "rms_eps": 1e-6},
]


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "single"])
@pytest.mark.parametrize("kwargs", SHAPES, ids=lambda kwargs: " ".join(map(str, kwargs.values())) or "default")
def test_logits_equal_hugging_face(tmp_path: Path, kwargs: dict[str, Any], merged: bool) -> None:
    model = tiny_model(tmp_path / "m.gguf", merged=merged, seed=len(kwargs), **kwargs)
    tokens = some_tokens(model)
    want = model.hf_logits(tokens)
    assert want.std() > 1  # spread enough to tell models apart
    assert relative_error(ReferenceModel(model.path).logits(tokens), want) < 1e-5


QUANTIZED = [Type(int(kind)) for kind in TYPES if kind.block_size > 1]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3", "qwen3moe"])
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, *QUANTIZED], ids=lambda kind: kind.name)
def test_logits_of_quantized_files_equal_hugging_face_on_the_rounded_weights(
    tmp_path: Path, arch: Any, kind: Type
) -> None:
    wide = GGMLType(int(kind)).block_size > 32
    shape: dict[str, Any] = {"d_model": 256, "d_ff": 256, "n_heads": 4} if wide else {}
    model = tiny_model(tmp_path / "m.gguf", arch, weight_type=kind, **shape)
    assert any(tensor.tensor_type == kind for tensor in gguf.GGUFReader(model.path).tensors)
    tokens = some_tokens(model)
    assert relative_error(ReferenceModel(model.path).logits(tokens), model.hf_logits(tokens)) < 1e-5


def test_llama_files_without_the_permutation_are_told_from_good_ones(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m.gguf", permute=False)
    tokens = some_tokens(model)
    assert relative_error(ReferenceModel(model.path).logits(tokens), model.hf_logits(tokens)) > 0.01


@pytest.mark.parametrize(
    ("arch", "mistaken"),
    [
        pytest.param("llama", lambda spec: with_rope(spec, style=RopeStyle.NEOX), id="llama-style"),
        pytest.param("llama", lambda spec: with_rope(spec, base=10100.0), id="llama-base"),
        pytest.param("llama", lambda spec: with_rope(spec, scale=0.5), id="llama-scale"),
        pytest.param("llama", lambda spec: attrs.evolve(spec, norm=attrs.evolve(spec.norm, eps=1e-2)), id="llama-eps"),
        pytest.param("llama", lambda spec: with_router(spec, top_k=1), id="llama-top_k"),
        pytest.param("llama", lambda spec: with_router(spec, routing=OVER_ALL), id="llama-shares"),
        pytest.param("qwen3moe", lambda spec: with_rope(spec, style=RopeStyle.INTERLEAVED), id="qwen3moe-style"),
        pytest.param("qwen3moe", lambda spec: with_attention(spec, q_norm=None, k_norm=None), id="qwen3moe-qk_norm"),
        pytest.param("qwen3moe", lambda spec: with_router(spec, top_k=3), id="qwen3moe-top_k"),
    ],
)
def test_seeded_mistakes_show_in_the_logits(
    tmp_path: Path, arch: Any, mistaken: Callable[[ModelSpec], ModelSpec]
) -> None:
    model = tiny_model(tmp_path / "m.gguf", arch)
    tokens = some_tokens(model)
    reference = ReferenceModel(model.path)
    reference.spec = mistaken(reference.spec)
    assert relative_error(reference.logits(tokens), model.hf_logits(tokens)) > 1e-4


def test_merged_and_single_experts_give_the_same_logits(tmp_path: Path) -> None:
    merged = tiny_model(tmp_path / "merged.gguf", weight_type=Type.Q4_0)
    single = tiny_model(tmp_path / "single.gguf", weight_type=Type.Q4_0, merged=False)
    tokens = some_tokens(merged)
    for int8 in (False, True):
        a, b = (ReferenceModel(m.path, int8_activations=int8).logits(tokens) for m in (merged, single))
        assert np.array_equal(a, b)


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m.gguf")
    tokens = some_tokens(model)
    reference = ReferenceModel(model.path)
    assert np.allclose(reference.logits(tokens)[:5], reference.logits(tokens[:5]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_int8_activations_change_an_expert_by_their_rounding_only(tmp_path: Path, kind: Type) -> None:
    model = tiny_model(tmp_path / "m.gguf", weight_type=kind, d_model=256, d_ff=256, n_heads=4)
    h = np.random.default_rng(0).normal(size=(4, 256))
    exact = ReferenceModel(model.path).expert(1, 2, h)
    rounded = ReferenceModel(model.path, int8_activations=True).expert(1, 2, h)
    assert 1e-5 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def test_trace_holds_the_routing_that_was_used(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m.gguf", n_experts=5, top_k=2)
    reference = ReferenceModel(model.path)
    trace = reference.trace(some_tokens(model))
    assert trace.hidden.shape == (3, 12, 96)
    assert trace.expert_ids.shape == trace.expert_weights.shape == (2, 12, 2)
    assert np.array_equal(trace.expert_ids, np.argsort(-trace.router_logits, axis=-1)[..., :2])
    assert np.array_equal(reference.head(trace.hidden[-1]), trace.logits)
    assert len(np.unique(trace.expert_ids)) == 5


TALE = (
    "The old man went down to the river, and there he saw a little boy who was sitting upon a stone. "
    '"What are you doing here, my child?" said he. "I am waiting for my mother," said the boy, "and she has '
    'not come home since the morning." Then the old man took him by the hand and led him to the house.'
)


def greedy_tokens(text: str, pieces: list[str]) -> list[int]:
    """Return a start token and the text as its longest pieces from the left: near enough to the real tokenizer."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    rest, tokens = "\u2581" + text.replace(" ", "\u2581"), [1]
    while rest:
        length = next(n for n in range(min(16, len(rest)), 0, -1) if rest[:n] in ids)
        tokens.append(ids[rest[:length]])
        rest = rest[length:]
    return tokens


@pytest.mark.slow
def test_the_trained_model_knows_its_language_only_as_it_was_made() -> None:
    """The embedded model was trained and converted elsewhere, so that it also proves our fixtures' own conversion."""
    reference = ReferenceModel(embedded_model_path())
    tokens = greedy_tokens(TALE, reference.gguf.get_strings("tokenizer.ggml.tokens"))

    def nats_per_token() -> float:
        logits = reference.logits(tokens)[:-1]
        chosen = np.take_along_axis(logits, np.array(tokens[1:])[:, None], -1)[:, 0]
        return float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))

    good = nats_per_token()
    assert good < 3.5  # log(4096) = 8.3 would be knowing nothing
    spec = reference.spec
    for mistake in ({"style": RopeStyle.NEOX}, {"base": 100.0}):
        reference.spec = with_rope(spec, **mistake)
        assert nats_per_token() > good + 1
