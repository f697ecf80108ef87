"""The places of every routed expert's matrices in a model's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from mer.errors import GGUFError
from mer.io.extents import (
    MATRIX_TYPES,
    PROJECTIONS,
    ExpertExtents,
    ExpertMap,
    ExpertPart,
    Projection,
    unsupported_type,
    without_leading_ones,
)
from mer.model.operators import ExpertWeights, Rows
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile

_EXPERT_NAME: Final = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)(?:_exps|\.(\d+))\.weight", re.ASCII)


def is_expert_tensor(name: str) -> bool:
    """Return whether a tensor of this name holds weights of routed experts, in the merged or the per-expert naming."""
    return _EXPERT_NAME.fullmatch(name) is not None


def map_experts(
    gguf: GGUFFile, routed: Mapping[int, ExpertWeights], skips: Callable[[str], bool] = lambda name: False
) -> ExpertMap:
    """Return where every expert's matrices lie, with all shapes, types and sizes proven.

    A layer names them either merged, `blk.N.ffn_gate_exps.weight` with expert e as the e-th of E equal slices, or one
    by one, `blk.N.ffn_gate.E.weight`; both give the same map. Where gate and up are one tensor, each expert's slice
    of it has the rows of both.

    Args:
        gguf: the file.
        routed: the experts of each layer that has any, by the layer's number; in the map these are numbered from 0.
        skips: tells whether a tensor is of a block that the model does not run.

    Raises:
        GGUFError: an expert tensor is missing, in excess or of another shape than (E, F, D) or (E, D, F), or a layer
            mixes both namings.
        UnsupportedModel: an expert tensor has a type that is not in MATRIX_TYPES.
    """
    merged_layers = _merged_layers(gguf, routed, skips)
    layers = []
    for number, (layer, weights) in enumerate(routed.items()):
        columns: list[list[ExpertPart]] = []  # [projection][expert]
        for projection, matrix in zip(PROJECTIONS, weights.matrices, strict=True):
            rows, cols = matrix.rows, matrix.cols
            if weights.named or layer in merged_layers:
                within = matrix.within or Rows(matrix.merged, 0, rows)
                columns.append(_parts(gguf, within, projection, weights.n, rows, cols))
            else:
                every = (Rows(matrix.single(expert), 0, rows) for expert in range(weights.n))
                columns.append([part for it in every for part in _parts(gguf, it, projection, 1, rows, cols)])
        layers.append(
            tuple(ExpertExtents(number, expert, parts) for expert, parts in enumerate(zip(*columns, strict=True)))
        )
    return ExpertMap(tuple(layers))


def _merged_layers(gguf: GGUFFile, routed: Mapping[int, ExpertWeights], skips: Callable[[str], bool]) -> frozenset[int]:
    """Return the layers with merged tensors; refuse tensors of experts that the model has not, and mixed layers."""
    merged: dict[int, str] = {}
    single: dict[int, str] = {}
    for name, tensor in gguf.tensors.items():
        match = _EXPERT_NAME.fullmatch(name)
        if match is None or skips(name):
            continue
        layer, expert = _number(match[1]), match[3]
        weights = routed.get(layer)
        if weights is None or (expert is not None and not 0 <= _number(expert) < weights.n):
            known = "no routed experts" if weights is None else f"experts 0 to {weights.n - 1}"
            reason = f"unexpected expert tensor {quoted(name)}: the model's layer {match[1][:9]} has {known}"
            raise GGUFError(gguf.paths[tensor.file], tensor.offset, reason)
        if expert is None and name not in {matrix.merged for matrix in weights.matrices}:
            reason = f"layer {layer} has {quoted(name, 40)} beside a tensor with gate and up; one of the two must go"
            raise GGUFError(gguf.paths[tensor.file], tensor.offset, reason)
        (merged if expert is None else single)[layer] = name
    for layer_id in sorted(merged.keys() & single.keys()):
        tensor = gguf.tensors[single[layer_id]]
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"layer {layer_id} has both merged and per-expert tensors ({quoted(merged[layer_id], 40)} and "
            f"{quoted(single[layer_id], 40)}); a layer must name all of its experts one way",
        )
    return frozenset(merged)


def _number(digits: str) -> int:
    """Return the number in a tensor's name, or -1 if it is not the plain decimal form of one that a model may have."""
    return int(digits) if len(digits) <= 9 and str(int(digits)) == digits else -1


def _parts(
    gguf: GGUFFile, within: Rows, projection: Projection, n_slices: int, rows: int, cols: int
) -> list[ExpertPart]:
    """Return `rows` x `cols` of each of the `n_slices` equal slices of a tensor."""
    name = within.name
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise GGUFError(gguf.paths[0], None, f"expert tensor {quoted(name)} is missing")
    expected = (within.of, cols) if n_slices == 1 else (n_slices, within.of, cols)
    if without_leading_ones(tensor.shape) != without_leading_ones(expected):
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"expert tensor {quoted(name)} has shape {tensor.shape}, the hyperparameters need {expected}",
        )
    if tensor.type not in MATRIX_TYPES:
        raise unsupported_type(gguf, tensor, MATRIX_TYPES)
    row_bytes = cols // tensor.type.block_size * tensor.type.block_bytes
    slice_bytes = within.of * row_bytes
    if cols % tensor.type.block_size or tensor.n_bytes != n_slices * slice_bytes:
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"expert tensor {quoted(name)} has {tensor.n_bytes} bytes, shape {expected} of type {tensor.type.name} "
            f"needs {n_slices * slice_bytes} in rows of whole blocks of {tensor.type.block_size}",
        )
    first = tensor.offset + within.first * row_bytes
    return [
        ExpertPart(projection, tensor.type, rows, cols, tensor.file, first + i * slice_bytes, rows * row_bytes)
        for i in range(n_slices)
    ]
