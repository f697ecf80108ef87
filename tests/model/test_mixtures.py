"""What files of mixtures say of routers and of layers, and what is refused."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from mer.errors import GGUFError, UnsupportedModel
from mer.io.gguf import GGUFFile, read_gguf
from mer.model.loading import check_model
from mer.model.operators import FeedForward, Groups, HeadNorms, Routing, Scoring
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec
from mer.model.summary import summary
from tests._lib.families import mixtures
from tests._lib.families.family import Family, write

FAMILIES = {
    it.arch: it
    for it in (
        mixtures.BAILING_MOE2,
        mixtures.ERNIE4_5_MOE,
        mixtures.GLM4_MOE,
        mixtures.LAGUNA,
        mixtures.MELLUM,
        mixtures.MINIMAX_M2,
    )
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    """The header of each family's file."""
    folder = tmp_path_factory.mktemp("mixtures")
    return {arch: read_gguf(write(folder / f"{arch}.gguf", family).path) for arch, family in FAMILIES.items()}


def with_keys(gguf: GGUFFile, **keys: Any) -> GGUFFile:
    """Return the header with these values; None takes a key away. `__` stands for a dot."""
    arch = gguf.get_str("general.architecture")
    metadata, types = dict(gguf.metadata), dict(gguf.value_types)
    for key, value in keys.items():
        name = f"{arch}.{key.replace('__', '.')}"
        metadata.pop(name, None)
        if value is not None:
            metadata[name] = value
            types[name] = "array of bool" if isinstance(value, np.ndarray) else type(value).__name__
    return attrs.evolve(gguf, metadata=metadata, value_types=types)


def routing(spec: ModelSpec) -> Routing:
    """Return how the first routed layer routes."""
    return next(iter(spec.routed.values())).router.routing


def test_a_file_decides_on_scoring_groups_and_scale(files: dict[str, GGUFFile]) -> None:
    gguf = files["bailingmoe2"]
    groups = Groups(count=3, used=2)
    plain = Routing(scoring=Scoring.SIGMOID, groups=groups, normalize=True, scale=1.75)
    assert routing(model_spec(gguf)) == plain
    every: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"expert_weights_scale": 0.0}, {"scale": 1.0}),
        ({"expert_weights_norm": False}, {"normalize": False}),
        ({"expert_weights_norm": None}, {"normalize": False}),
        ({"expert_gating_func": None}, {}),
        ({"expert_gating_func": 0}, {}),
        ({"expert_group_used_count": 3}, {"groups": None}),
        ({"expert_group_count": 1, "expert_group_used_count": 1}, {"groups": None}),
        ({"expert_gating_func": 1, "expert_group_count": 0}, {"scoring": Scoring.SOFTMAX, "groups": None}),
    ]
    for keys, changed in every:
        if keys.get("expert_group_count") == 0:
            keys["expert_group_used_count"] = 0
        assert routing(model_spec(with_keys(gguf, **keys))) == attrs.evolve(plain, **changed), keys


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        ({"expert_gating_func": 3}, UnsupportedModel, "bailingmoe2.expert_gating_func = 3"),
        ({"expert_gating_func": 4}, UnsupportedModel, "bailingmoe2.expert_gating_func = 4"),
        ({"expert_gating_func": 1}, UnsupportedModel, "bailingmoe2.expert_group_count = 3 with a softmax"),
        ({"expert_group_count": 4}, GGUFError, "expert_group_count' is 4; it must divide 9"),
        ({"expert_group_count": 9}, GGUFError, "expert_group_count' is 9; it must divide 9"),
        ({"expert_used_count": 7}, GGUFError, "expert_group_used_count' is 2, with fewer experts than the 7"),
        ({"expert_group_used_count": 0}, GGUFError, "expert_group_used_count' is 0, with fewer"),
        ({"expert_group_used_count": 4}, GGUFError, "expert_group_used_count' is 4; it must be at most 3"),
        ({"expert_group_count": 33}, GGUFError, "expert_group_count' is 33; it must be at most 32"),
        ({"expert_weights_scale": -1.0}, GGUFError, "expert_weights_scale"),
        ({"leading_dense_block_count": 3}, GGUFError, "none is left that has experts"),
        ({"leading_dense_block_count": 4}, GGUFError, "it must be at most 3"),
        ({"interleave_moe_layer_step": 4}, GGUFError, "none is left that has experts"),
        ({"feed_forward_length": None}, GGUFError, "bailingmoe2.feed_forward_length"),
        ({"expert_feed_forward_length": None}, GGUFError, "bailingmoe2.expert_feed_forward_length"),
        ({"expert_shared_count": None}, GGUFError, "bailingmoe2.expert_shared_count"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    files: dict[str, GGUFFile], keys: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        model_spec(with_keys(files["bailingmoe2"], **keys))


@pytest.mark.parametrize("arch", ["ernie4_5-moe", "minimax-m2"])
def test_weights_that_are_not_normalized_are_refused_where_they_always_are(
    files: dict[str, GGUFFile], arch: str
) -> None:
    assert routing(model_spec(with_keys(files[arch], expert_weights_norm=True))).normalize
    with pytest.raises(UnsupportedModel, match="expert_weights_norm"):
        model_spec(with_keys(files[arch], expert_weights_norm=False))


def test_the_summary_says_how_experts_are_chosen(files: dict[str, GGUFFile]) -> None:
    def words(arch: str) -> object:
        return summary(model_spec(files[arch]))["routing"]

    assert words("bailingmoe2") == "sigmoid, chosen with a bias, within 2 of 3 groups, normalized, times 1.75"
    assert words("ernie4_5-moe") == "softmax over all, chosen with a bias, normalized"
    assert words("mellum") == "softmax over the chosen"


def test_layers_are_dense_up_to_the_first_and_between_those_with_experts(files: dict[str, GGUFFile]) -> None:
    spec = model_spec(files["ernie4_5-moe"])
    assert [isinstance(layer.ffn, FeedForward) for layer in spec.layers] == [True, False, True, False, True]
    assert list(spec.routed) == [1, 3]
    dense = spec.layers[0].ffn
    assert isinstance(dense, FeedForward)
    assert dense.gate.rows == 144


def test_a_bias_that_a_file_of_the_family_must_have_is_missed(files: dict[str, GGUFFile]) -> None:
    name = "blk.1.exp_probs_b.bias"
    for arch in ("glm4moe", "minimax-m2"):
        gguf = files[arch]
        without = attrs.evolve(gguf, tensors={key: it for key, it in gguf.tensors.items() if key != name})
        with pytest.raises(GGUFError, match=f"{name}.*missing"):
            check_model(without)


def test_every_fourth_layer_has_no_window_unless_the_file_says_which(files: dict[str, GGUFFile]) -> None:
    gguf = files["mellum"]

    def windows(gguf: GGUFFile) -> list[int | None]:
        return [layer.mixer.window for layer in model_spec(gguf).layers]

    assert windows(gguf) == [13, 13, 13, None]
    assert windows(with_keys(gguf, attention__sliding_window_pattern=2)) == [13, None, 13, None]
    named = np.array([False, True, True, False])
    spec = model_spec(with_keys(gguf, attention__sliding_window_pattern=named))
    assert [layer.mixer.window for layer in spec.layers] == [None, 13, 13, None]
    assert [layer.mixer.rope.base for layer in spec.layers] == [50000, 700, 700, 50000]
    for bad in (np.array([True, False]), np.array([2, 0, 0, 1])):
        with pytest.raises(GGUFError, match="sliding_window_pattern"):
            windows(with_keys(gguf, attention__sliding_window_pattern=bad))
    with pytest.raises(UnsupportedModel, match="scaled RoPE"):
        windows(with_keys(gguf, rope__scaling__type="linear", rope__scaling__factor=4.0))


def test_layers_have_their_own_heads_gates_and_rotation(files: dict[str, GGUFFile]) -> None:
    gguf = files["laguna"]
    mixers = [layer.mixer for layer in model_spec(gguf).layers]
    assert [it.n_heads for it in mixers] == [6, 2, 4]
    assert [it.gate.rows for it in mixers if it.gate is not None] == [6, 2, 4]
    assert [it.window for it in mixers] == [None, 13, None]
    assert [(it.rope.dim, it.rope.base, it.rope.yarn is not None) for it in mixers] == [
        (12, 50000, True),
        (24, 700, False),
        (12, 50000, True),
    ]


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        ({"attention__head_count": np.array([6, 3, 4])}, GGUFError, "head_count' is 3 in layer 1, of 2 kv heads"),
        ({"attention__sliding_window_pattern": None}, GGUFError, "laguna.attention.sliding_window_pattern"),
        ({"rope__dimension_count_swa": 26}, GGUFError, "rope.dimension_count_swa' is 26"),
        ({"rope__dimension_count_swa": 7}, GGUFError, "rope.dimension_count_swa' is 7"),
        ({"router_logit_softcapping": 30.0}, UnsupportedModel, "laguna.router_logit_softcapping"),
        ({"expert_weights_norm": False}, UnsupportedModel, "laguna.expert_weights_norm"),
    ],
)
def test_what_does_not_fit_a_laguna_file_is_refused_by_name(
    files: dict[str, GGUFFile], keys: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        model_spec(with_keys(files["laguna"], **keys))


def test_a_gate_of_neither_heads_nor_elements_is_refused(files: dict[str, GGUFFile]) -> None:
    gguf, name = files["laguna"], "blk.1.attn_gate.weight"
    odd = attrs.evolve(gguf.tensors[name], shape=(5, 96))
    with pytest.raises(GGUFError, match=rf"{name}.*\(5, 96\).*\(48, 96\)"):
        check_model(attrs.evolve(gguf, tensors={**gguf.tensors, name: odd}))


def test_norms_of_the_wrong_width_are_refused(files: dict[str, GGUFFile]) -> None:
    """Per head and over all heads are told apart by the architecture, never by the shape alone."""
    gguf = files["minimax-m2"]
    assert model_spec(gguf).attention.norms is HeadNorms.WHOLE
    name = "blk.0.attn_q_norm.weight"
    per_head = attrs.evolve(gguf.tensors[name], shape=(24,), n_bytes=96)
    with pytest.raises(GGUFError, match=rf"{name}.*\(24,\).*\(144,\)"):
        check_model(attrs.evolve(gguf, tensors={**gguf.tensors, name: per_head}))


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        (mixtures.GLM4_MOE, "blk.1.post_attention_norm.bias", "LayerNorm"),
        (mixtures.GLM4_MOE, "blk.1.attn_sinks.weight", "no place"),
        (mixtures.MINIMAX_M2, "blk.0.ffn_gate_shexp.weight", "shared expert"),
    ],
    ids=lambda it: it if isinstance(it, str) else it.arch,
)
def test_unknown_tensors_of_a_layer_are_refused_by_name(
    files: dict[str, GGUFFile], family: Family, name: str, why: str
) -> None:
    gguf = files[family.arch]
    tensor = attrs.evolve(gguf.tensors["output_norm.weight"], name=name)
    with pytest.raises(UnsupportedModel, match=f"{name}.*{why}"):
        check_model(attrs.evolve(gguf, tensors={**gguf.tensors, name: tensor}))


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("clip", "images or sound"),
        ("mmproj", "images or sound"),
        ("dflash", "drafts"),
        ("gptoss", "Ollama"),
        ("phimoe", "not implemented; these are"),
    ],
)
def test_files_that_are_no_model_of_their_own_are_refused_by_name(
    files: dict[str, GGUFFile], arch: str, why: str
) -> None:
    gguf = files["glm4moe"]
    other = attrs.evolve(gguf, metadata={**gguf.metadata, "general.architecture": arch})
    with pytest.raises(UnsupportedModel, match=f"architecture '{arch}'.*{why}"):
        model_spec(other)
