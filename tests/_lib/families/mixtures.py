"""Families with routed experts whose routers, norms or layers differ from one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests._lib.families.experts import ROUTED, expert_keys
from tests._lib.families.family import Array, Family, Rename, common, common_keys, rope_keys, usual_names

SIGMOID = 2
FINE = {
    "intermediate_size": 144,
    "moe_intermediate_size": 80,
    "n_routed_experts": 9,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.75,
    "tie_word_embeddings": False,
}
GROUPED = {"n_group": 3, "topk_group": 2}


def names_as(arch: str, renamed: Mapping[str, str] | None = None) -> Any:
    """Return the renaming of an architecture, as `gguf` knows it or with parts of its names replaced.

    Biases that choose experts, and gates of attention, get GGUF's names for them.
    """

    def of(config: Any) -> Rename:
        usual = usual_names(arch, config.num_hidden_layers)

        def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
            if name.endswith("e_score_correction_bias"):
                return [(f"blk.{name.split('.')[2]}.exp_probs_b.bias", array.reshape(-1))]
            if name.endswith("self_attn.g_proj.weight"):
                return [(f"blk.{name.split('.')[2]}.attn_gate.weight", array)]
            out = []
            for target, value in usual(name, array):
                for old, new in (renamed or {}).items():
                    target = target.replace(old, new)
                out.append((target, value))
            return out

        return rename

    return of


def partial_keys(config: Any) -> dict[str, Any]:
    """Return how many elements of a head RoPE rotates, where that is a part."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"rope.dimension_count": int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))}


def fine_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a family of many small experts, some dense layers, and groups."""
    return common_keys(config) | partial_keys(config) | {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "feed_forward_length": config.intermediate_size,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "leading_dense_block_count": config.first_k_dense_replace,
    }  # fmt: skip


def bailing_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Ling file."""
    shared = config.n_shared_experts * config.moe_intermediate_size
    return fine_keys(config) | {"expert_gating_func": SIGMOID, "expert_shared_feed_forward_length": shared}


def minimax_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a MiniMax-M2 file."""
    return common_keys(config) | partial_keys(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
        "feed_forward_length": config.intermediate_size,
        "expert_gating_func": SIGMOID,
    }  # fmt: skip


def olmoe_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of an OLMoE file."""
    return common_keys(config) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "feed_forward_length": config.intermediate_size,
    }


def ernie_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of an ERNIE file."""
    keys = common_keys(config) | {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "feed_forward_length": config.intermediate_size,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
    }
    shared = config.moe_num_shared_experts
    return keys | ({"expert_shared_count": shared} if shared else {})


def hunyuan_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Hunyuan file."""
    return olmoe_keys(config) | {
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.intermediate_size,
        "expert_shared_count": 1,
    }


def mellum_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Mellum file, whose two kinds of layers have a base each."""
    full, near = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    keys = expert_keys(_with_rope(config, full))
    default = [(i + 1) % 4 != 0 for i in range(config.num_hidden_layers)]
    return keys | rope_keys(full) | {
        "rope.freq_base_swa": near["rope_theta"],
        **({} if windowed == default else {"attention.sliding_window_pattern": windowed}),
    }  # fmt: skip


class _with_rope:
    """A configuration whose RoPE is that of one kind of layers."""

    def __init__(self, config: Any, rope: Mapping[str, Any]) -> None:
        self._config, self.rope_parameters = config, rope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def laguna_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Laguna file."""
    full, near = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    return mellum_keys(config) | rope_keys(full) | {
        "attention.head_count": config.num_attention_heads_per_layer,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_weights_scale": config.moe_routed_scaling_factor,
        "expert_gating_func": SIGMOID,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.mlp_layer_types.count("dense"),
        "rope.dimension_count": int(config.head_dim * full.get("partial_rotary_factor", 1.0)),
        "rope.dimension_count_swa": int(config.head_dim * near.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip


def vision_free_names(config: Any) -> Rename:
    """Return the renaming of the language model of one that sees images."""
    usual = usual_names("qwen3vlmoe", config.num_hidden_layers)
    return lambda name, array: usual(name.replace("model.language_model.", "model."), array)


def vision_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a file of Qwen3-VL's language model."""
    return expert_keys(config) | {"rope.dimension_sections": [5, 4, 3, 0], "n_deepstack_layers": 3}


GLM4_MOE = Family(
    arch="glm4moe",
    model="Glm4MoeForCausalLM",
    config="Glm4MoeConfig",
    settings=common(**FINE, attention_bias=True, use_qk_norm=False),
    keys=fine_keys,
    rename=names_as("glm4moe"),
    variants={
        "norms": {"use_qk_norm": True, "first_k_dense_replace": 2},
        "groups": {**GROUPED, "attention_bias": False, "n_shared_experts": 1},
        "shares": {"norm_topk_prob": False},
    },
)
DOTS1 = Family(
    arch="dots1",
    model="Dots1ForCausalLM",
    config="Dots1Config",
    settings=common(**FINE, sliding_window=None),
    keys=fine_keys,
    rename=names_as("dots1"),
    variants={"groups": GROUPED},
)
# transformers has no class of its name: GLM-4.5's with norms and without biases computes the same
BAILING_MOE2 = Family(
    arch="bailingmoe2",
    model="Glm4MoeForCausalLM",
    config="Glm4MoeConfig",
    settings=common(**FINE, **GROUPED, attention_bias=False, use_qk_norm=True),
    keys=bailing_keys,
    rename=names_as("glm4moe", {"post_attention_norm": "ffn_norm"}),
    fused=True,
    variants={"biases": {"attention_bias": True}},
)
MINIMAX_M2 = Family(
    arch="minimax-m2",
    model="MiniMaxM2ForCausalLM",
    config="MiniMaxM2Config",
    settings=common(
        intermediate_size=80,
        num_local_experts=7,
        num_experts_per_tok=3,
        head_dim=24,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
    keys=minimax_keys,
    rename=names_as("minimax-m2"),
    variants={
        "whole": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}}
    },
)
OLMOE = Family(
    arch="olmoe",
    model="OlmoeForCausalLM",
    config="OlmoeConfig",
    settings=common(
        num_experts=7, num_experts_per_tok=3, intermediate_size=80, norm_topk_prob=False, tie_word_embeddings=False
    ),
    keys=olmoe_keys,
    variants={"one-to-one": {"num_key_value_heads": 6}},
)
ERNIE4_5_MOE = Family(
    arch="ernie4_5-moe",
    model="Ernie4_5_MoeForCausalLM",
    config="Ernie4_5_MoeConfig",
    settings=common(
        num_hidden_layers=5,
        intermediate_size=144,
        moe_intermediate_size=80,
        moe_num_experts=7,
        moe_k=3,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_interval=2,
        tie_word_embeddings=True,
    ),
    keys=ernie_keys,
    rename=names_as("ernie4_5-moe"),
    variants={
        "every": {"num_hidden_layers": 3, "moe_layer_interval": 1, "moe_num_shared_experts": 0},
    },
)
HUNYUAN_MOE = Family(
    arch="hunyuan-moe",
    model="HunYuanMoEV1ForCausalLM",
    config="HunYuanMoEV1Config",
    settings=common(num_experts=7, moe_topk=3, intermediate_size=80, head_dim=24, tie_word_embeddings=True),
    keys=hunyuan_keys,
    rename=names_as("hunyuan-moe"),
)
MELLUM_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
MELLUM = Family(
    arch="mellum",
    model="MellumForCausalLM",
    config="MellumConfig",
    settings=common(
        **ROUTED,
        num_hidden_layers=4,
        head_dim=24,
        norm_topk_prob=True,
        sliding_window=13,
        layer_types=[*["sliding_attention"] * 3, "full_attention"],
        rope_parameters=MELLUM_ROPE,
    ),
    keys=mellum_keys,
    rename=names_as("qwen3moe"),
    variants={
        "pattern": {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    },
)
QWEN3_VL_MOE = Family(
    arch="qwen3vlmoe",
    model="Qwen3VLMoeForConditionalGeneration",
    config="Qwen3VLMoeConfig",
    settings=common(
        **ROUTED,
        head_dim=24,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [5, 4, 3]},
    ),
    keys=vision_keys,
    rename=vision_free_names,
    absent=("model.visual.",),
    beside={
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 96,
            "deepstack_visual_indexes": [0],
        }
    },
)
LAGUNA_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
}
LAGUNA = Family(
    arch="laguna",
    model="LagunaForCausalLM",
    config="LagunaConfig",
    settings=common(
        **ROUTED,
        intermediate_size=144,
        shared_expert_intermediate_size=112,
        head_dim=24,
        num_attention_heads_per_layer=[6, 2, 4],
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        moe_routed_scaling_factor=1.75,
        sliding_window=13,
        rope_parameters=LAGUNA_ROPE,
    ),
    keys=laguna_keys,
    rename=names_as("glm4moe", {"post_attention_norm": "ffn_norm"}),
    variants={"elements": {"gating": "per-element", "rope_parameters": MELLUM_ROPE}},
)
