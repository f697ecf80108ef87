"""The tensors that every token uses: all but the routed experts, with their shapes and types proven."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from mer.errors import GGUFError, UnsupportedModel
from mer.io.extents import unsupported_type, without_leading_ones
from mer.model.experts import is_expert_tensor
from mer.model.operators import Tensor
from mer.model.spec import ModelSpec
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile, TensorInfo


def dense_tensors(spec: ModelSpec, gguf: GGUFFile) -> Mapping[str, TensorInfo]:
    """Return every dense tensor of the model by name, all of them checked.

    Shapes in the result have all their axes, even where the file leaves out a slowest axis of length one. Of a tensor
    that the file stores for several uses, each use is one in the result, at its own offset.

    Raises:
        GGUFError: a tensor is missing or has a shape that contradicts the hyperparameters.
        UnsupportedModel: a tensor has a type that cannot be used here, or the model does not know it.
    """
    known = spec.tensors()
    stored = {tensor.stored for tensor in known.values()}
    stored |= {matrix.merged for it in spec.routed.values() for matrix in it.weights.matrices}
    for name in gguf.tensors:
        if name not in stored and not is_expert_tensor(name) and not spec.skips(name):
            raise UnsupportedModel(_why_unexpected(name, spec), gguf.paths[gguf.tensors[name].file])
    return {name: _checked(gguf, tensor) for name, tensor in known.items()}


def _checked(gguf: GGUFFile, needed: Tensor) -> TensorInfo:
    within = needed.within
    if within is None:
        return _whole(gguf, needed)
    whole = _whole(gguf, Tensor(within.name, (within.of, *needed.shape[1:]), needed.types))
    row_bytes = whole.n_bytes // within.of
    offset, n_bytes = whole.offset + within.first * row_bytes, needed.shape[0] * row_bytes
    return attrs.evolve(whole, name=needed.name, shape=needed.shape, offset=offset, n_bytes=n_bytes)


def _whole(gguf: GGUFFile, needed: Tensor) -> TensorInfo:
    name, shape = needed.name, needed.shape
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise GGUFError(gguf.paths[0], None, f"tensor {quoted(name)} is missing; its shape would be {shape}")
    path = gguf.paths[tensor.file]
    if without_leading_ones(tensor.shape) != without_leading_ones(shape):
        reason = f"tensor {quoted(name)} has shape {tensor.shape}, the hyperparameters need {shape}"
        raise GGUFError(path, tensor.offset, reason)
    if tensor.type not in needed.types:
        raise unsupported_type(gguf, tensor, needed.types)
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
    if name.endswith("_norm.bias"):
        return f"{what} is of a LayerNorm, which is not implemented; models with RMSNorm work"
    if name.endswith(".bias"):
        return f"{what} is a bias, which is not implemented; '{spec.architecture}' models without biases work"
    if name.endswith((".scale", ".input_scale")):
        return f"{what} scales a matrix, which is not implemented; files without such tensors work, also in NVFP4"
    if "_shexp." in name:
        return f"{what} is of a shared expert, which is not implemented; models with routed experts only work"
    return f"{what} has no place in a '{spec.architecture}' model of {len(spec.layers)} layers"
