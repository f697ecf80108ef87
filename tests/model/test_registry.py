"""Specifications out of files: what good files give, and which typed error bad ones end in."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mer.embedded import embedded_model_path
from mer.errors import GGUFError, ModelFileError, UnsupportedModel
from mer.io.gguf import read_gguf
from mer.limits import MAX_EXPERTS, MAX_EXPERTS_PER_LAYER, MAX_LAYERS, MAX_TOP_K
from mer.model.operators import Routing, Scoring
from mer.model.registry import ARCHITECTURES, model_spec
from mer.model.spec import ModelSpec
from mer.model.summary import summary
from tests._lib.tiny_models import TINY_ARCHITECTURES, random_gguf


def spec_of(path: Path) -> ModelSpec:
    return model_spec(read_gguf(path))


def test_a_mixtral_file_gives_its_specification(tmp_path: Path) -> None:
    path = random_gguf(tmp_path / "m.gguf", n_experts=7, top_k=3, rope_base=5e5, rms_eps=0.25, tied=True)
    assert summary(spec_of(path)) == {
        "n_layers": 2,
        "n_routed_layers": 2,
        "n_skipped_layers": 0,
        "d_model": 96,
        "d_ff": 160,
        "dense_d_ff": None,
        "shared_d_ff": None,
        "n_experts": 7,
        "top_k": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "context_length": 256,
        "rms_eps": 0.25,
        "rope_base": 5e5,
        "rope_dim": 16,
        "rope_scale": 1.0,
        "rope_style": "interleaved",
        "activation": "swiglu",
        "expert_bias": False,
        "routing": "softmax over the chosen",
        "qk_norm": False,
        "qkv_bias": False,
        "rope_yarn": None,
        "sinks": False,
        "sliding_window": None,
        "tied_head": True,
    }


def test_a_qwen3moe_file_gives_its_specification(tmp_path: Path) -> None:
    path = random_gguf(tmp_path / "m.gguf", "qwen3moe", rope_factor=4.0, head_dim=20, metadata={"general.name": ""})
    assert summary(spec_of(path)) == {
        "n_layers": 2,
        "n_routed_layers": 2,
        "n_skipped_layers": 0,
        "d_model": 96,
        "d_ff": 160,  # the experts', not feed_forward_length
        "dense_d_ff": None,
        "shared_d_ff": None,
        "n_experts": 5,
        "top_k": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 20,
        "vocab_size": 300,
        "context_length": 256,
        "rms_eps": float(np.float32(1e-5)),
        "rope_base": 10000.0,
        "rope_dim": 20,
        "rope_scale": 0.25,
        "rope_style": "neox",
        "activation": "swiglu",
        "expert_bias": False,
        "routing": "softmax over the chosen",
        "qk_norm": True,
        "qkv_bias": False,
        "rope_yarn": None,
        "sinks": False,
        "sliding_window": None,
        "tied_head": False,
    }


def test_the_embedded_model_is_understood() -> None:
    spec = spec_of(embedded_model_path())
    assert (spec.n_routed, spec.n_experts, spec.top_k, spec.tied_head) == (6, 8, 2, True)
    assert spec.layers[0].mixer.head_dim == 32


def test_absent_keys_have_the_defaults_of_the_format(tmp_path: Path) -> None:
    optional = [
        "llama.attention.head_count_kv",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "llama.vocab_size",
    ]
    found = summary(spec_of(random_gguf(tmp_path / "m.gguf", n_kv_heads=6, drop=optional, tokenizer=False)))
    names = ("n_kv_heads", "rope_base", "rope_dim", "vocab_size")
    assert tuple(found[name] for name in names) == (6, 10000.0, 16, 300)


BAD_VALUES: list[tuple[str, Any]] = [
    *((key, value) for key in ("block_count", "embedding_length", "context_length") for value in (0, -1, 2**32 - 1)),
    *((key, value) for key in ("feed_forward_length", "vocab_size") for value in (0, -5, 2**32 - 1)),
    *(("attention.head_count", value) for value in (0, -6, 5, 7, 2**31, 6.0, "6", [6], [0, 0], [True, True])),
    *(("attention.head_count_kv", value) for value in (0, -1, 4, 12, [2, 2, 2], [4, 4])),
    *(("attention.key_length", value) for value in (0, -16, 15, 2**30)),
    *(("rope.dimension_count", value) for value in (0, 15, 18, -2)),
    *(("attention.layer_norm_rms_epsilon", value) for value in (0.0, -1e-5, 2.0, math.nan, math.inf, 1)),
    *(("rope.freq_base", value) for value in (0.0, -1.0, math.nan, math.inf, 1e30)),
    *(("rope.scaling.factor", value) for value in (-2.0, math.nan, 1e9)),
    *(("expert_count", value) for value in (-1, 2**32 - 1, 8.0)),
    *(("expert_used_count", value) for value in (0, -1, 6, 2**31)),
    *(("attention.sliding_window", value) for value in (-1, True)),
    ("block_count", [2, 2]),
    ("attention.layer_norm_rms_epsilon", [0.0, 0.0]),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=[f"{key}={value}" for key, value in BAD_VALUES])
def test_bad_hyperparameters_are_malformed_and_named(tmp_path: Path, key: str, value: Any) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    with pytest.raises(GGUFError, match=f"llama.{key}|head dimension") as caught:
        spec_of(path)
    assert caught.value.path == path


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.expert_used_count",
        "token_embd.weight",
    ],
)
def test_missing_hyperparameters_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(GGUFError, match=key):
        spec_of(random_gguf(tmp_path / "m.gguf", drop=[key]))


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.tokens.* 2 entries.*300 rows"):
        spec_of(path)


UNSUPPORTED: list[tuple[str, Any]] = [
    ("rope.scaling.type", "longrope"),
    ("rope.scaling.attn_factor", 0.5),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("attention.head_count_kv", [2, 1]),
    ("feed_forward_length", [160, 128]),
    ("expert_used_count", [2, 0]),
    ("expert_shared_count", [0, 1]),
    ("swiglu_clamp_exp", [0.0, 7.0]),
    ("attention.sliding_window_pattern", [True, False]),
    ("attention.value_length", 32),
    ("attention.clamp_kqv", 8.0),
    ("attention.causal", False),
    ("attention.scale", 0.1),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("final_logit_softcapping", math.nan),
    ("expert_shared_count", 1),
    ("expert_weights_scale", 2.5),
    ("expert_weights_norm", False),
    ("expert_gating_func", 2),
    ("leading_dense_block_count", 1),
    ("logit_scale", 0.5),
    ("a_key_of_tomorrow", 1),
    ("a_key_of_tomorrow", [1, 2]),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED, ids=[f"{key}={value}" for key, value in UNSUPPORTED])
def test_features_that_are_not_implemented_are_named(tmp_path: Path, key: str, value: Any) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    with pytest.raises(UnsupportedModel, match=f"{path}.*llama.{key}"):
        spec_of(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 256),
        ("attention.sliding_window", 0),
        ("rope.scaling.type", "none"),
        ("rope.scaling.type", ""),
        ("rope.scaling.type", "linear"),
        ("rope.scale_linear", 0.0),
        ("rope.scale_linear", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.yarn_ext_factor", 0.0),
        ("rope.scaling.original_context_length", 0),
        ("rope.dimension_sections", [0, 0, 0, 0]),
        ("attention.scale", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("attention.q_lora_rank", 0),
        ("attention.layer_norm_epsilon", 0.0),
        ("attn_logit_softcapping", 0.0),
        ("final_logit_softcapping", 0),
        ("logit_scale", 0.0),
        ("logit_scale", 1.0),
        ("residual_scale", 0.0),
        ("embedding_scale", 0.0),
        ("expert_feed_forward_length", 0),
        ("expert_gating_func", 0),
        ("expert_group_count", 0),
        ("expert_group_count", 1),
        ("expert_group_used_count", 0),
        ("expert_shared_count", 0),
        ("expert_shared_count", [0, 0]),
        ("expert_shared_feed_forward_length", 0),
        ("expert_weights_scale", 0.0),
        ("expert_weights_scale", 1.0),
        ("expert_weights_norm", True),
        ("interleave_moe_layer_step", 0),
        ("leading_dense_block_count", 0),
        ("nextn_predict_layers", 0),
        ("pooling_type", 0),
        ("ssm.conv_kernel", 0),
        ("swiglu_clamp_exp", [0.0, 0.0]),
        ("use_parallel_residual", False),
        ("tensor_data_layout", "Meta AI original pth"),
        ("vocab_size", 299),  # of the model before a token was added; llama.cpp counts the tokens, too
        ("attention.head_count", [6, 6]),
        ("attention.head_count_kv", [2, 2]),
        ("attention.key_length", [16, 16]),
        ("attention.value_length", [16, 16]),
        ("attention.layer_norm_rms_epsilon", [1e-5, 1e-5]),
        ("attention.sliding_window", [0, 0]),
        ("embedding_length", [96, 96]),
        ("expert_count", [5, 5]),
        ("expert_used_count", [2, 2]),
        ("feed_forward_length", [160, 160]),
        ("rope.dimension_count", [16, 16]),
        ("rope.freq_base", [10000.0, 10000.0]),
    ],
)
def test_features_that_are_switched_off_change_nothing(tmp_path: Path, key: str, value: Any) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value, "general.file_type": 0})
    assert spec_of(path) == spec_of(random_gguf(tmp_path / "plain.gguf"))


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@pytest.mark.parametrize("window", [1, 255])
def test_a_window_below_the_context_is_read(tmp_path: Path, arch: Any, window: int) -> None:
    path = random_gguf(tmp_path / "m.gguf", arch=arch, metadata={f"{arch}.attention.sliding_window": window})
    assert summary(spec_of(path))["sliding_window"] == window


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 8.0}, 0.25),
        ({"rope.scale_linear": 8.0}, 0.125),
    ],
)
def test_rope_is_scaled_as_llama_cpp_reads_the_keys(tmp_path: Path, metadata: dict[str, Any], scale: float) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value for key, value in metadata.items()})
    assert summary(spec_of(path))["rope_scale"] == scale


def test_what_a_model_reads_is_a_fact_of_that_model(tmp_path: Path) -> None:
    """A value that one architecture computes with is refused in another, which computes without it."""
    key, values = "expert_weights_norm", {"llama": True, "qwen3moe": True, "qwen2moe": False}
    for arch, value in values.items():
        spec_of(random_gguf(tmp_path / "good.gguf", arch, metadata={f"{arch}.{key}": value}))  # type: ignore[arg-type]
        path = random_gguf(tmp_path / "bad.gguf", arch, metadata={f"{arch}.{key}": not value})  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModel, match=f"{arch}.{key}"):
            spec_of(path)
    for arch in ("llama", "qwen3moe", "qwen3"):
        path = random_gguf(tmp_path / "bad.gguf", arch, metadata={f"{arch}.expert_shared_feed_forward_length": 64})  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModel, match="expert_shared_feed_forward_length"):
            spec_of(path)


@pytest.mark.parametrize(("width", "good"), [(0, True), (160, True), (80, False)])
def test_a_second_width_of_mixtrals_experts_must_say_the_same(tmp_path: Path, width: int, good: bool) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={"llama.expert_feed_forward_length": width})
    if good:
        assert spec_of(path).d_ff == 160
    else:
        with pytest.raises(UnsupportedModel, match="expert_feed_forward_length"):
            spec_of(path)


def test_a_qwen2moe_file_gives_its_operators(tmp_path: Path) -> None:
    spec = spec_of(random_gguf(tmp_path / "m.gguf", "qwen2moe"))
    experts = spec.routed[1]
    assert experts.router.routing == Routing(scoring=Scoring.SOFTMAX)
    assert experts.shared is not None
    assert experts.shared.gate_by is not None
    assert (experts.shared.gate.rows, experts.shared.gate_by.weight.shape) == (112, (1, 96))
    assert [linear.bias is not None for linear in (spec.attention.q, spec.attention.k, spec.attention.v)] == [True] * 3
    assert spec.attention.out.bias is None


def test_a_dense_file_has_no_routed_layers(tmp_path: Path) -> None:
    spec = spec_of(random_gguf(tmp_path / "m.gguf", "qwen3"))
    found = summary(spec)
    assert (spec.n_routed, spec.n_experts, spec.top_k, found["dense_d_ff"], found["d_ff"]) == (0, 0, 0, 160, None)


@pytest.mark.parametrize("kwargs", [{"drop": ["qwen3moe.expert_feed_forward_length"]}, {"metadata": {}}])
def test_experts_share_the_width_that_is_given_for_a_tokens_experts_together(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    metadata = {"qwen3moe.expert_feed_forward_length": 0, "qwen3moe.feed_forward_length": 321}
    kwargs["metadata"] = metadata if "metadata" in kwargs else {"qwen3moe.feed_forward_length": 321}
    assert spec_of(random_gguf(tmp_path / "m.gguf", "qwen3moe", **kwargs)).d_ff == 160


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"block_count": 1025}, "'llama.block_count' is 1025; it must be at most 1024"),
        ({"expert_count": 4097}, "'llama.expert_count' is 4097; it must be at most 4096"),
        ({"expert_count": 4096, "block_count": 17}, "is 4096 in 17 layers; all layers together may have 65536"),
        ({"expert_count": 129, "expert_used_count": 129}, "'llama.expert_used_count' is 129; it must be at most 128"),
        ({"attention.head_count": 1025}, "it must be at most 1024"),
        ({"attention.key_length": 2050}, "it must be at most 2048"),
        ({"embedding_length": 2**18 + 1}, "it must be at most 262144"),
        ({"feed_forward_length": 2**18 + 1}, "it must be at most 262144"),
        ({"vocab_size": 2**20 + 1}, "it must be at most 1048576"),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(
    tmp_path: Path, metadata: dict[str, int], reason: str
) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value for key, value in metadata.items()})
    with pytest.raises(GGUFError, match=re.escape(reason)) as caught:
        spec_of(path)
    assert caught.value.offset is not None


# Layers, experts of a layer, experts that a token uses; of the largest models that are known.
REAL = [(61, 256, 8), (61, 384, 8), (48, 512, 10), (28, 768, 12), (60, 512, 10), (94, 128, 8), (40, 512, 22)]


@pytest.mark.parametrize(("n_layers", "n_experts", "top_k"), REAL)
def test_real_models_are_far_below_the_limits(n_layers: int, n_experts: int, top_k: int) -> None:
    assert 2 * n_layers * n_experts <= MAX_EXPERTS
    assert 5 * n_experts <= MAX_EXPERTS_PER_LAYER
    assert 5 * top_k <= MAX_TOP_K
    assert 8 * n_layers <= MAX_LAYERS


@pytest.mark.parametrize(
    "kwargs",
    [
        {"drop": ["qwen3moe.expert_count", "qwen3moe.expert_used_count"]},
        {"metadata": {"qwen3moe.expert_count": 0, "qwen3moe.expert_used_count": 0}},
    ],
)
def test_a_dense_qwen3moe_is_told_what_it_is_and_what_works(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"dense 'qwen3moe' model.*Mixtral"):
        spec_of(random_gguf(tmp_path / "m.gguf", "qwen3moe", **kwargs))


def test_a_dense_model_names_no_experts_of_a_token(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"llama.expert_used_count' = 2 .*only 0"):
        spec_of(random_gguf(tmp_path / "m.gguf", drop=["llama.expert_count"]))


def test_an_unknown_architecture_is_told_the_known_ones(tmp_path: Path) -> None:
    path = random_gguf(tmp_path / "m.gguf", metadata={"general.architecture": "llama\u2028!" * 50})
    known = ", ".join(sorted(ARCHITECTURES))
    with pytest.raises(UnsupportedModel, match=known) as caught:
        spec_of(path)
    assert len(str(caught.value)) < len(str(path)) + len(known) + 150


KEYS = sorted({key for key, _ in BAD_VALUES} | {key for key, _ in UNSUPPORTED} - {"a_key_of_tomorrow"})
VALUES = (
    st.integers(-(2**31), 2**32 - 1)
    | st.integers(-2, 300)
    | st.floats(width=32)
    | st.booleans()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 9), min_size=1, max_size=3)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(TINY_ARCHITECTURES), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_metadata_gives_a_consistent_specification_or_a_typed_error(
    tmp_path: Path, arch: Any, metadata: dict[str, Any]
) -> None:
    shape = {"n_layers": 1, "d_model": 12, "d_ff": 8, "vocab_size": 10, "head_dim": 4, "tokenizer": False}
    path = random_gguf(tmp_path / "m.gguf", arch, metadata={f"{arch}.{k}": v for k, v in metadata.items()}, **shape)
    try:
        spec = spec_of(path)
    except ModelFileError:
        return
    assert spec.n_routed in (0, len(spec.layers))
    assert spec.top_k <= spec.n_experts
    assert (spec.top_k > 0) == (spec.n_routed > 0)
    assert min(len(spec.layers), spec.d_model, spec.vocab_size, spec.context_length) > 0
    for layer in spec.layers:
        mixer, rope = layer.mixer, layer.mixer.rope
        assert mixer.n_heads % mixer.n_kv_heads == 0
        assert rope.dim % 2 == 0
        assert 0 < rope.dim <= mixer.head_dim
        assert all(math.isfinite(x) and x > 0 for x in (layer.ffn_norm.eps, rope.base, rope.scale))
