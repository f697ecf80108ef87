"""The `qwen3moe` architecture: the Mixture-of-Experts models of Qwen3 (Qwen Team 2025, "Qwen3 Technical Report")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mer.model.hparams import read_spec
from mer.model.spec import ModelSpec, RopeStyle, Routing

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile


def spec(gguf: GGUFFile) -> ModelSpec:
    """Return the specification of a `qwen3moe` file.

    Q and K are normalized per head before RoPE, which pairs the two halves of a head; their rows are stored unpermuted.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the model uses a feature that is not implemented.
    """
    return read_spec(
        gguf,
        d_ff_key="expert_feed_forward_length",
        rope_style=RopeStyle.NEOX,
        routing=Routing.SOFTMAX_THEN_TOP_K,
        qk_norm=True,
    )
