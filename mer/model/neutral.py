"""Values of metadata keys that say that a feature is not used.

Key names follow the GGUF specification (ggml-org/ggml, docs/gguf.md) and the constants of the `gguf` package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from mer.io.gguf import MetadataValue

_ABSENT: Final = (0,)  # as a number, a bool or an array of them
_NO_SCALE: Final = (0.0, 1.0)
_EVERY: Final = (0, 1)

# By key below the architecture's name. A model that reads a key decides by itself what its values mean.
NEUTRAL_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "activation_sparsity_scale": _ABSENT,
    "altup.active_idx": _ABSENT,
    "altup.num_inputs": _ABSENT,
    "attention.causal": (True,),
    "attention.clamp_kqv": _ABSENT,
    "attention.decay_lora_rank": _ABSENT,
    "attention.gate_lora_rank": _ABSENT,
    "attention.group_norm_epsilon": _ABSENT,
    "attention.group_norm_groups": _ABSENT,
    "attention.iclr_lora_rank": _ABSENT,
    "attention.indexer.head_count": _ABSENT,
    "attention.indexer.key_length": _ABSENT,
    "attention.indexer.top_k": _ABSENT,
    "attention.key_length_mla": _ABSENT,
    "attention.key_length_swa": _ABSENT,
    "attention.kv_lora_rank": _ABSENT,
    "attention.layer_norm_epsilon": _ABSENT,
    "attention.max_alibi_bias": _ABSENT,
    "attention.output_scale": _NO_SCALE,
    "attention.q_lora_rank": _ABSENT,
    "attention.relative_buckets_count": _ABSENT,
    "attention.scale": _ABSENT,
    "attention.shared_kv_layers": _ABSENT,
    "attention.sliding_window_pattern": _ABSENT,
    "attention.temperature_length": _ABSENT,
    "attention.temperature_scale": _ABSENT,
    "attention.value_length_mla": _ABSENT,
    "attention.value_length_swa": _ABSENT,
    "attention.value_residual_mix_lora_rank": _ABSENT,
    "attn_logit_softcapping": _ABSENT,
    "decoder_block_count": _ABSENT,
    "embedding_length_out": _ABSENT,
    "embedding_length_per_layer_input": _ABSENT,
    "embedding_scale": _NO_SCALE,
    "expert_chunk_feed_forward_length": _ABSENT,
    "expert_gating_func": (0, 1),
    "expert_feed_forward_length": _ABSENT,
    "expert_group_count": _EVERY,
    "expert_group_scale": _NO_SCALE,
    "expert_group_used_count": _EVERY,
    "expert_shared_count": _ABSENT,
    "expert_shared_feed_forward_length": _ABSENT,
    "expert_weights_norm": (True,),
    "expert_weights_scale": _NO_SCALE,
    "experts_per_group": _ABSENT,
    "features_length": _ABSENT,
    "final_logit_softcapping": _ABSENT,
    "full_attention_interval": _EVERY,
    "interleave_moe_layer_step": _EVERY,
    "leading_dense_block_count": _ABSENT,
    "logit_scale": _NO_SCALE,
    "moe_every_n_layers": _EVERY,
    "moe_latent_size": _ABSENT,
    "n_deepstack_layers": _ABSENT,
    "nextn_predict_layers": _ABSENT,
    "pooling_type": _ABSENT,
    "rescale_every_n_layers": _ABSENT,
    "residual_scale": _NO_SCALE,
    "rope.dimension_count_swa": _ABSENT,
    "rope.dimension_sections": _ABSENT,
    "rope.freq_base_swa": _ABSENT,
    "rope.scaling.alpha": _NO_SCALE,
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": _ABSENT,
    "rope.scaling.yarn_log_multiplier": _ABSENT,
    "router_logit_softcapping": _ABSENT,
    "ssm.conv_kernel": _ABSENT,
    "ssm.dt_b_c_rms": _ABSENT,
    "ssm.group_count": _ABSENT,
    "ssm.inner_size": _ABSENT,
    "ssm.state_size": _ABSENT,
    "ssm.time_step_rank": _ABSENT,
    "swiglu_clamp_exp": _ABSENT,
    "swiglu_clamp_shexp": _ABSENT,
    "swin_norm": _ABSENT,
    "time_decay_extra_dim": _ABSENT,
    "time_mix_extra_dim": _ABSENT,
    "token_shift_count": _ABSENT,
    "use_parallel_residual": _ABSENT,
}


def is_neutral(value: MetadataValue, neutral: tuple[object, ...]) -> bool:
    """Return whether a number, or every number of an array, is one of the neutral values."""
    if isinstance(value, np.ndarray):
        return bool(neutral) and all(item in neutral for item in value.tolist())
    return isinstance(value, int | float) and value in neutral
