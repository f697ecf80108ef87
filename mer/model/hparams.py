"""Hyperparameters out of GGUF metadata: ranges, agreement, and refusal of what would change the arithmetic.

Key names follow the GGUF specification (ggml-org/ggml, docs/gguf.md) and the constants of the `gguf` package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mer.errors import GGUFError, UnsupportedModel
from mer.model.spec import ModelSpec, RopeStyle, Routing

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile

MAX_LAYERS: Final = 4096
MAX_WIDTH: Final = 1 << 20  # d_model, d_ff
MAX_HEADS: Final = 4096
MAX_HEAD_DIM: Final = 8192
MAX_EXPERTS: Final = 65536
MAX_VOCAB: Final = 1 << 24
MAX_CONTEXT: Final = 1 << 31

# Keys below the architecture's name that the specification is made from, or that do not touch the arithmetic.
_READ_KEYS: Final = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    }
)

# Keys of features that are not implemented, with the values that mean "not used".
_NEUTRAL_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (1,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "router_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}


def read_spec(gguf: GGUFFile, *, d_ff_key: str, rope_style: RopeStyle, routing: Routing, qk_norm: bool) -> ModelSpec:
    """Return the specification of a transformer with GQA, RoPE, RMSNorm and, in every layer, routed SwiGLU experts.

    Args:
        gguf: the file; its `general.architecture` is the prefix of every other key.
        d_ff_key: the key, without that prefix, of the experts' hidden size F.
        rope_style: which elements of a head RoPE pairs.
        routing: how the router's logits become weights.
        qk_norm: whether Q and K are normalized per head.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the model is dense, or uses a feature that is not implemented.
    """
    arch = gguf.get_str("general.architecture")
    if gguf.get_int(f"{arch}.expert_count", default=0, minimum=0, maximum=MAX_EXPERTS) == 0:
        raise UnsupportedModel(
            f"{gguf.paths[0]}: a dense {arch!r} model: {arch}.expert_count is absent or 0. Every weight takes part in "
            "every token, so there are no experts to stream; use a Mixture-of-Experts file, such as Mixtral or "
            "Qwen3-30B-A3B"
        )
    _refuse_unknown_features(gguf, arch)

    def integer(key: str, maximum: int, default: int | None = None) -> int:
        if default is None:
            return gguf.get_int(f"{arch}.{key}", minimum=1, maximum=maximum)
        return gguf.get_int(f"{arch}.{key}", default=default, minimum=1, maximum=maximum)

    d_model = integer("embedding_length", MAX_WIDTH)
    n_heads = integer("attention.head_count", MAX_HEADS)
    n_kv_heads = integer("attention.head_count_kv", MAX_HEADS, default=n_heads)
    if n_heads % n_kv_heads:
        key = f"{arch}.attention.head_count_kv"
        raise gguf.error(key, f"is {n_kv_heads}; it must divide {arch}.attention.head_count = {n_heads}")
    head_dim = _head_dim(gguf, arch, d_model, n_heads)
    rope_dim = integer("rope.dimension_count", MAX_HEAD_DIM, default=head_dim)
    if rope_dim % 2 or rope_dim > head_dim:
        key = f"{arch}.rope.dimension_count"
        raise gguf.error(key, f"is {rope_dim}; it must be even and at most the head dimension {head_dim}")
    n_experts = integer("expert_count", MAX_EXPERTS)
    top_k = integer("expert_used_count", MAX_EXPERTS)
    if top_k > n_experts:
        raise gguf.error(f"{arch}.expert_used_count", f"is {top_k}; {arch}.expert_count = {n_experts} is the most")
    context_length = integer("context_length", MAX_CONTEXT)
    window = gguf.get_int(f"{arch}.attention.sliding_window", default=0, minimum=0, maximum=MAX_CONTEXT)
    rms_eps = _real(gguf, f"{arch}.attention.layer_norm_rms_epsilon", None, maximum=1.0)
    return ModelSpec(
        architecture=arch,
        name=gguf.get_str("general.name", default="").encode(errors="replace").decode() or gguf.paths[0].stem,
        n_layers=integer("block_count", MAX_LAYERS),
        d_model=d_model,
        d_ff=integer(d_ff_key, MAX_WIDTH),
        n_experts=n_experts,
        top_k=top_k,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(gguf, arch),
        context_length=context_length,
        rms_eps=rms_eps,
        rope_base=_real(gguf, f"{arch}.rope.freq_base", 10000.0, maximum=1e15),
        rope_dim=rope_dim,
        rope_scale=_rope_scale(gguf, arch),
        rope_style=rope_style,
        routing=routing,
        qk_norm=qk_norm,
        sliding_window=window if 0 < window < context_length else None,
        tied_head="output.weight" not in gguf.tensors,
    )


def _refuse_unknown_features(gguf: GGUFFile, arch: str) -> None:
    """Refuse every key of the architecture that is neither read nor switched off: it may change the arithmetic."""
    prefix = arch + "."
    for key, value in gguf.metadata.items():
        name = key.removeprefix(prefix)
        neutral = _NEUTRAL_VALUES.get(name, ())
        if name == key or name in _READ_KEYS or (isinstance(value, int | float) and value in neutral):
            continue
        works = " or ".join(map(repr, neutral))
        known = f"only {works} (not used) works" if works else "whether it changes the model's arithmetic is not known"
        raise UnsupportedModel(f"{gguf.paths[0]}: {key} = {repr(value)[:80]} is not implemented; {known}")


def _head_dim(gguf: GGUFFile, arch: str, d_model: int, n_heads: int) -> int:
    key, value_key = f"{arch}.attention.key_length", f"{arch}.attention.value_length"
    if key in gguf.metadata:
        head_dim = gguf.get_int(key, minimum=1, maximum=MAX_HEAD_DIM)
    elif d_model % n_heads:
        reason = f"is {n_heads}; it must divide {arch}.embedding_length = {d_model}, or {key} be given"
        raise gguf.error(f"{arch}.attention.head_count", reason)
    else:
        head_dim = d_model // n_heads
    if head_dim % 2:
        raise GGUFError(
            gguf.paths[0], None, f"the head dimension is {head_dim}; it must be even, RoPE rotates pairs of elements"
        )
    value_length = gguf.get_int(value_key, default=head_dim, minimum=1, maximum=MAX_HEAD_DIM)
    if value_length != head_dim:
        raise UnsupportedModel(
            f"{gguf.paths[0]}: {value_key} = {value_length} differs from the key length {head_dim}; "
            "only heads with keys and values of one length are implemented"
        )
    return head_dim


def _vocab_size(gguf: GGUFFile, arch: str) -> int:
    """Return the number of rows of the token embedding, which every other statement of V must agree with."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(gguf.paths[0], None, "tensor 'token_embd.weight' is missing")
    vocab_size = embedding.shape[0]
    if len(embedding.shape) != 2 or vocab_size > MAX_VOCAB:
        reason = f"tensor 'token_embd.weight' has shape {embedding.shape}, not (V, D) with V at most {MAX_VOCAB}"
        raise GGUFError(gguf.paths[embedding.file], embedding.offset, reason)
    stated = gguf.get_int(f"{arch}.vocab_size", default=vocab_size, minimum=1, maximum=MAX_VOCAB)
    if stated != vocab_size:
        raise gguf.error(f"{arch}.vocab_size", f"is {stated}, but 'token_embd.weight' has {vocab_size} rows")
    tokens = gguf.get_strings("tokenizer.ggml.tokens", default=None)
    if tokens is not None and len(tokens) != vocab_size:
        reason = f"has {len(tokens)} entries, but 'token_embd.weight' has {vocab_size} rows"
        raise gguf.error("tokenizer.ggml.tokens", reason)
    return vocab_size


def _rope_scale(gguf: GGUFFile, arch: str) -> float:
    """Return what positions are multiplied by; a factor without a scaling type means linear, as in llama.cpp."""
    type_key, factor_key = f"{arch}.rope.scaling.type", f"{arch}.rope.scaling.factor"
    kind = gguf.get_str(type_key, default="linear" if factor_key in gguf.metadata else "none")
    if kind == "none":
        return 1.0
    if kind == "linear":
        return 1.0 / _real(gguf, factor_key, None, maximum=1e6)
    raise UnsupportedModel(f"{gguf.paths[0]}: {type_key} = {kind!r} is not implemented; 'none' and 'linear' work")


def _real(gguf: GGUFFile, key: str, default: float | None, *, maximum: float) -> float:
    """Return a float that is finite, above zero and at most `maximum`."""
    value = gguf.get_float(key) if default is None else gguf.get_float(key, default=default)
    if not 0 < value <= maximum:
        raise gguf.error(key, f"is {value}; it must be above 0 and at most {maximum:g}")
    return value
