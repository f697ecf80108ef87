"""The `llama` architecture with experts: Mixtral (Jiang et al. 2024, "Mixtral of Experts") and its finetunes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mer.model.hparams import read_spec
from mer.model.spec import ModelSpec, RopeStyle, Routing

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile


def spec(gguf: GGUFFile) -> ModelSpec:
    """Return the specification of a `llama` file with experts.

    Files of this architecture store the rows of Q and K permuted, so that RoPE on neighbouring elements of them equals
    RoPE on the two halves of each head of the original weights.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the model is dense, or uses a feature that is not implemented.
    """
    return read_spec(
        gguf,
        d_ff_key="feed_forward_length",
        rope_style=RopeStyle.INTERLEAVED,
        routing=Routing.SOFTMAX_OVER_TOP_K,
        qk_norm=False,
    )
