"""Dense families: `llama`, `qwen2`, `qwen3`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests._lib.families.family import Array, Family, Rename, common, common_keys, usual_names


def permuted(array: Array, n_heads: int) -> Array:
    """Return the rows of Q or K, or their bias, as llama files order them: each head's two halves interleaved."""
    halves = array.reshape(n_heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def llama_names(config: Any) -> Rename:
    """Return the renaming of a `llama` file, which permutes Q and K."""
    usual = usual_names("llama", config.num_hidden_layers)

    def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
        for target, value in usual(name, array):
            if ".attn_q." in target:
                yield target, permuted(value, config.num_attention_heads)
            elif ".attn_k." in target:
                yield target, permuted(value, config.num_key_value_heads)
            else:
                yield target, value

    return rename


def dense_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a dense family."""
    return common_keys(config) | {"feed_forward_length": config.intermediate_size}


def windowed_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a dense family whose layers may have a window."""
    window = {} if config.sliding_window is None else {"attention.sliding_window": config.sliding_window}
    return dense_keys(config) | window


def llama_factors(model: Any) -> dict[str, Array]:
    """Return the factors that Llama 3.1's scaling comes to."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    got = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    plain = rope["rope_theta"] ** (-np.arange(len(got)) / len(got))
    return {"rope_freqs.weight": (plain / got).astype(np.float32)}


LLAMA = Family(
    arch="llama",
    model="LlamaForCausalLM",
    config="LlamaConfig",
    settings=common(intermediate_size=160, tie_word_embeddings=False),
    keys=dense_keys,
    rename=llama_names,
    extra=llama_factors,
    variants={
        "factors": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    },
)
QWEN2 = Family(
    arch="qwen2",
    model="Qwen2ForCausalLM",
    config="Qwen2Config",
    settings=common(intermediate_size=160, tie_word_embeddings=True, sliding_window=None),
    keys=windowed_keys,
)
QWEN3 = Family(
    arch="qwen3",
    model="Qwen3ForCausalLM",
    config="Qwen3Config",
    settings=common(intermediate_size=160, head_dim=24, tie_word_embeddings=False, sliding_window=None),
    keys=windowed_keys,
    variants={
        "window": {"sliding_window": 13, "use_sliding_window": True, "max_window_layers": 0},
    },
)
