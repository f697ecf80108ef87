"""The tensors that every token uses: all but the routed experts, with their shapes and types proven."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import attrs

from mer.errors import GGUFError, UnsupportedModel
from mer.io.extents import MATRIX_TYPES, is_expert_tensor, unsupported_type, without_leading_ones
from mer.io.ggml import GGMLType
from mer.model.spec import DENSE_LAYER_TENSORS, QK_NORM_TENSORS, ModelSpec
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile, TensorInfo

NORM_TYPES: Final = frozenset({GGMLType.F32})
ROUTER_TYPES: Final = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})


def dense_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape (slowest axis first) of every dense tensor, in the order in which a token meets them."""
    d_model, q_dim, kv_dim = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    layer_shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d_model,),
        "attn_q": (q_dim, d_model),
        "attn_k": (kv_dim, d_model),
        "attn_v": (kv_dim, d_model),
        "attn_q_norm": (spec.head_dim,),
        "attn_k_norm": (spec.head_dim,),
        "attn_output": (d_model, q_dim),
        "ffn_norm": (d_model,),
        "ffn_gate_inp": (spec.n_experts, d_model),
    }
    used = {*DENSE_LAYER_TENSORS, *(QK_NORM_TENSORS if spec.qk_norm else ())}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocab_size, d_model)}
    for layer in range(spec.n_layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in layer_shapes.items() if name in used}
    shapes["output_norm.weight"] = (d_model,)
    if not spec.tied_head:
        shapes["output.weight"] = (spec.vocab_size, d_model)
    return shapes


def dense_tensors(spec: ModelSpec, gguf: GGUFFile) -> Mapping[str, TensorInfo]:
    """Return every tensor of the file but the routed experts' by name, all of them checked.

    Norms are F32, the router is F32, F16 or BF16, and every other matrix has one of MATRIX_TYPES. Shapes in the result
    have all their axes, even where the file leaves out a slowest axis of length one.

    Raises:
        GGUFError: a tensor is missing or has a shape that contradicts the hyperparameters.
        UnsupportedModel: a tensor has a type that cannot be used here, or the model does not know it.
    """
    shapes = dense_shapes(spec)
    for name in gguf.tensors:
        if name not in shapes and not is_expert_tensor(name):
            raise UnsupportedModel(_why_unexpected(name, spec), gguf.paths[gguf.tensors[name].file])
    return {name: _checked(gguf, name, shape) for name, shape in shapes.items()}


def _checked(gguf: GGUFFile, name: str, shape: tuple[int, ...]) -> TensorInfo:
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise GGUFError(gguf.paths[0], None, f"tensor {quoted(name)} is missing; its shape would be {shape}")
    path = gguf.paths[tensor.file]
    if without_leading_ones(tensor.shape) != without_leading_ones(shape):
        reason = f"tensor {quoted(name)} has shape {tensor.shape}, the hyperparameters need {shape}"
        raise GGUFError(path, tensor.offset, reason)
    types = NORM_TYPES if len(shape) == 1 else ROUTER_TYPES if name.endswith("ffn_gate_inp.weight") else MATRIX_TYPES
    if tensor.type not in types:
        raise unsupported_type(gguf, tensor, types)
    n_rows = shape[0] if len(shape) == 2 else 1
    n_bytes = n_rows * (shape[-1] // tensor.type.block_size) * tensor.type.block_bytes
    if shape[-1] % tensor.type.block_size or tensor.n_bytes != n_bytes:
        needs = f"shape {shape} of type {tensor.type.name} needs {n_bytes}"
        reason = f"tensor {quoted(name)} has {tensor.n_bytes} bytes, {needs}"
        raise GGUFError(path, tensor.offset, reason)
    return attrs.evolve(tensor, shape=shape)


def _why_unexpected(name: str, spec: ModelSpec) -> str:
    """Return the text for a tensor that the model has no place for."""
    what = f"tensor {quoted(name)}"
    if name == "rope_freqs.weight":
        return f"{what} rescales RoPE's frequencies, which is not implemented; models with plain RoPE work"
    if name.endswith(".bias"):
        return f"{what} is a bias, which is not implemented; '{spec.architecture}' models without biases work"
    if "_shexp." in name:
        return f"{what} is of a shared expert, which is not implemented; models with routed experts only work"
    return f"{what} has no place in a '{spec.architecture}' model of {spec.n_layers} layers"
