"""What the engine needs to know of a model: sizes, the layer plan's variations, and the names of its dense tensors."""

from __future__ import annotations

import enum

import attrs


class RopeStyle(enum.Enum):
    """Which pairs of a head's elements RoPE rotates together."""

    INTERLEAVED = "interleaved"  # (2i, 2i + 1): llama-arch files, whose Q and K rows are stored permuted for it
    NEOX = "neox"  # (i, i + rope_dim/2): qwen3moe


class Routing(enum.Enum):
    """How router logits become expert weights; both are renormalized to sum to one over the chosen experts."""

    SOFTMAX_OVER_TOP_K = "softmax-over-top-k"  # Mixtral: top-k of the logits, softmax over those k
    SOFTMAX_THEN_TOP_K = "softmax-then-top-k"  # Qwen3: softmax over all, top-k, divided by their sum


@attrs.frozen(kw_only=True)
class ModelSpec:
    """Hyperparameters of one model, checked against each other and against the file's tensors.

    Shape letters: L layers, D d_model, F d_ff per expert, E experts, K experts used, H heads, G kv heads, C head dim,
    V vocab.
    """

    architecture: str
    name: str  # general.name, or the file's name without its suffix
    n_layers: int  # L
    d_model: int  # D
    d_ff: int  # F, per expert
    n_experts: int  # E
    top_k: int  # K
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # C
    vocab_size: int  # V
    context_length: int  # positions the model was trained for
    rms_eps: float
    rope_base: float
    rope_dim: int  # leading elements of each head that are rotated, even, <= C
    rope_scale: float  # positions are multiplied by it (1 / linear scaling factor)
    rope_style: RopeStyle
    routing: Routing
    qk_norm: bool  # RMSNorm per head on Q and K before RoPE
    sliding_window: int | None  # positions a token attends to in every layer, its own included; None: all before it
    tied_head: bool  # the output head is the token embedding


DENSE_LAYER_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate_inp")

QK_NORM_TENSORS = ("attn_q_norm", "attn_k_norm")
"""More tensors of every layer of a model with `qk_norm`."""
