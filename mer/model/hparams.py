"""Hyperparameters out of GGUF metadata: ranges, agreement, and refusal of what would change the arithmetic.

Key names follow the GGUF specification (ggml-org/ggml, docs/gguf.md) and the constants of the `gguf` package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mer.errors import GGUFError, UnsupportedModel
from mer.limits import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_EXPERTS_PER_LAYER,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOP_K,
    MAX_VOCAB,
    MAX_WIDTH,
)
from mer.model.neutral import refuse_unknown_features
from mer.model.per_layer import with_uniform_layers
from mer.model.spec import ModelSpec, RopeStyle, Routing
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile


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
    count = gguf.metadata.get(f"{arch}.expert_count", 0)
    if type(count) is int and count == 0:
        raise UnsupportedModel(
            f"a dense '{arch}' model: {arch}.expert_count is absent or 0. Every weight takes part in every token, so "
            "there are no experts to stream; use a Mixture-of-Experts file, such as Mixtral or Qwen3-30B-A3B",
            gguf.paths[0],
        )
    n_layers = gguf.get_int(f"{arch}.block_count", minimum=1, maximum=MAX_LAYERS)
    gguf = with_uniform_layers(gguf, arch, n_layers)
    n_experts, top_k = _experts(gguf, arch, n_layers)
    refuse_unknown_features(gguf, arch)

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
    context_length = integer("context_length", MAX_CONTEXT)
    window = gguf.get_int(f"{arch}.attention.sliding_window", default=0, minimum=0, maximum=MAX_CONTEXT)
    rms_eps = _real(gguf, f"{arch}.attention.layer_norm_rms_epsilon", None, maximum=1.0)
    return ModelSpec(
        architecture=arch,
        name=gguf.get_str("general.name", default="").encode(errors="replace").decode() or gguf.paths[0].stem,
        n_layers=n_layers,
        d_model=d_model,
        d_ff=_d_ff(gguf, arch, d_ff_key, top_k),
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


def _experts(gguf: GGUFFile, arch: str, n_layers: int) -> tuple[int, int]:
    """Return E and K, which bound what is built for every expert, and for every expert that a token uses."""
    count_key, used_key = f"{arch}.expert_count", f"{arch}.expert_used_count"
    n_experts = gguf.get_int(count_key, minimum=1, maximum=MAX_EXPERTS_PER_LAYER)
    if n_layers * n_experts > MAX_EXPERTS:
        raise gguf.error(count_key, f"is {n_experts} in {n_layers} layers; all layers together may have {MAX_EXPERTS}")
    top_k = gguf.get_int(used_key, minimum=1, maximum=MAX_TOP_K)
    if top_k > n_experts:
        raise gguf.error(used_key, f"is {top_k}; {count_key} = {n_experts} is the most")
    return n_experts, top_k


def _d_ff(gguf: GGUFFile, arch: str, key: str, top_k: int) -> int:
    """Return the experts' hidden size; where only that of a token's K experts together is given, its K-th part."""
    together = f"{arch}.feed_forward_length"
    if key != "feed_forward_length" and gguf.metadata.get(f"{arch}.{key}", 0) == 0:
        d_ff = gguf.get_int(together, minimum=1, maximum=MAX_WIDTH) // top_k
        if not d_ff:
            raise gguf.error(together, f"is less than the {top_k} experts of a token, and {arch}.{key} is not given")
        return d_ff
    return gguf.get_int(f"{arch}.{key}", minimum=1, maximum=MAX_WIDTH)


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
            f"{value_key} = {value_length} differs from the key length {head_dim}; only heads with keys and values of "
            "one length are implemented",
            gguf.paths[0],
        )
    return head_dim


def _vocab_size(gguf: GGUFFile, arch: str) -> int:
    """Return the number of rows of the token embedding, one for each token if the file has any.

    `vocab_size` may differ from it, as llama.cpp has it: files say there how many tokens the model had before tokens
    were added or its embedding was padded.
    """
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(gguf.paths[0], None, "tensor 'token_embd.weight' is missing")
    vocab_size = embedding.shape[0]
    if len(embedding.shape) != 2 or vocab_size > MAX_VOCAB:
        reason = f"tensor 'token_embd.weight' has shape {embedding.shape}, not (V, D) with V at most {MAX_VOCAB}"
        raise GGUFError(gguf.paths[embedding.file], embedding.offset, reason)
    gguf.get_int(f"{arch}.vocab_size", default=vocab_size, minimum=1, maximum=MAX_VOCAB)  # of the model before padding
    tokens = gguf.get_strings("tokenizer.ggml.tokens", default=None)
    if tokens is not None and len(tokens) != vocab_size:
        reason = f"has {len(tokens)} entries, but 'token_embd.weight' has {vocab_size} rows"
        raise gguf.error("tokenizer.ggml.tokens", reason)
    return vocab_size


def _rope_scale(gguf: GGUFFile, arch: str) -> float:
    """Return what positions are multiplied by; a factor without a scaling type means linear, as in llama.cpp.

    A factor of 0 is none, as there.
    """
    type_key = f"{arch}.rope.scaling.type"
    keys = (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear")  # the second is the older name
    factor_key = next((key for key in keys if key in gguf.metadata), keys[0])
    kind = gguf.get_str(type_key, default="")
    if kind == "none":
        return 1.0
    if kind not in ("", "linear"):
        raise UnsupportedModel(
            f"{type_key} = {quoted(kind)} is not implemented; 'none' and 'linear' work", gguf.paths[0]
        )
    if gguf.get_float(factor_key, default=0.0) == 0:
        return 1.0
    return 1.0 / _real(gguf, factor_key, None, maximum=1e6)


def _real(gguf: GGUFFile, key: str, default: float | None, *, maximum: float) -> float:
    """Return a float that is finite, above zero and at most `maximum`."""
    value = gguf.get_float(key) if default is None else gguf.get_float(key, default=default)
    if not 0 < value <= maximum:
        raise gguf.error(key, f"is {value}; it must be above 0 and at most {maximum:g}")
    return value
