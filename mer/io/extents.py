"""Where every expert's three matrices lie in a model's files, and where they go in a slot of the buffer pool."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from mer.errors import GGUFError, UnsupportedModel
from mer.io.ggml import GGMLType

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile, TensorInfo

Projection: TypeAlias = Literal["gate", "up", "down"]

PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")

MATRIX_TYPES: Final = frozenset(
    {
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q8_0,
        GGMLType.Q6_K,
    }
)
"""The element types that weight matrices may have."""

ROW_GROUP: Final = 16
"""Rows that kernels may interleave with each other."""

MERGED_NAME: Final = "blk.{layer}.ffn_{projection}_exps.weight"
PER_EXPERT_NAME: Final = "blk.{layer}.ffn_{projection}.{expert}.weight"
_EXPERT_NAME: Final = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(?:_exps|\.(\d+))\.weight", re.ASCII)


@attrs.frozen
class ExpertPart:
    """One matrix of one expert: `n_bytes` at `offset` of file number `file`, holding `rows` x `cols` weights."""

    projection: Projection
    type: GGMLType
    rows: int
    cols: int
    file: int  # index into GGUFFile.paths
    offset: int  # bytes from the start of that file
    n_bytes: int

    @property
    def padded_bytes(self) -> int:
        """Bytes of the matrix with its rows rounded up to a multiple of `ROW_GROUP`."""
        return self.n_bytes // self.rows * round_up(self.rows, ROW_GROUP)


@attrs.frozen
class ExpertExtents:
    """The gate, up and down matrices of one expert, in this order."""

    layer: int
    expert: int
    parts: tuple[ExpertPart, ExpertPart, ExpertPart]

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, without any alignment padding."""
        return sum(part.n_bytes for part in self.parts)


@attrs.frozen
class SlotLayout:
    """Where the three parts of any expert go in a slot: each into its own area, as its aligned hull.

    A part whose hull has `lead` bytes before its first byte starts at `part_offsets[i] + lead` of the slot. An area
    holds the hull for every lead, so experts at odd file offsets fit every slot, and has room for the matrix with its
    rows rounded up to `ROW_GROUP`, so that kernels may re-arrange it in place.
    """

    alignment: int
    slot_bytes: int  # a multiple of the alignment
    part_offsets: tuple[int, int, int]  # gate, up, down: multiples of the alignment


@attrs.frozen
class ExpertMap:
    """The extents of every routed expert of a model."""

    experts: tuple[tuple[ExpertExtents, ...], ...]  # [layer][expert]

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts' weights together."""
        return sum(extents.n_bytes for layer in self.experts for extents in layer)

    def slot_layout(self, alignment: int) -> SlotLayout:
        """Return the layout of slots that hold any expert of the model; each area fits the projection's largest matrix.

        Args:
            alignment: of file offsets, lengths and memory addresses of the reads, in bytes; a power of two.
        """
        largest = [max(extents.parts[i].n_bytes for layer in self.experts for extents in layer) for i in range(3)]
        areas = [round_up(n_bytes + alignment - 1, alignment) for n_bytes in largest]
        return SlotLayout(alignment, sum(areas), (0, areas[0], areas[0] + areas[1]))


def round_up(n_bytes: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `n_bytes`."""
    return -(-n_bytes // alignment) * alignment


def aligned_hull(offset: int, n_bytes: int, alignment: int) -> tuple[int, int, int]:
    """Return `(start, length, lead)` of the smallest aligned byte range that covers `n_bytes` at `offset`.

    `start` and `length` are multiples of `alignment`, and the wanted bytes begin `lead` bytes into the range. The range
    may end behind the end of the file: a reader needs only its first `lead + n_bytes` bytes.
    """
    lead = offset % alignment
    return offset - lead, round_up(lead + n_bytes, alignment), lead


def is_expert_tensor(name: str) -> bool:
    """Return whether a tensor of this name holds weights of routed experts, in the merged or the per-expert naming."""
    return _EXPERT_NAME.fullmatch(name) is not None


def map_experts(gguf: GGUFFile, *, n_layers: int, n_experts: int, d_model: int, d_ff: int) -> ExpertMap:
    """Return where every expert's matrices lie, with all shapes, types and sizes proven.

    A layer names them either merged, `blk.N.ffn_gate_exps.weight` with expert e as the e-th of E equal slices, or one
    by one, `blk.N.ffn_gate.E.weight`; both give the same map.

    Raises:
        GGUFError: an expert tensor is missing, in excess or of another shape than (E, F, D) or (E, D, F), or a layer
            mixes both namings.
        UnsupportedModel: an expert tensor has a type that is not in MATRIX_TYPES.
    """
    merged_layers = _merged_layers(gguf, n_layers, n_experts)
    layers = []
    for layer in range(n_layers):
        columns: list[list[ExpertPart]] = []  # [projection][expert]
        for projection in PROJECTIONS:
            rows, cols = (d_model, d_ff) if projection == "down" else (d_ff, d_model)
            if layer in merged_layers:
                name = MERGED_NAME.format(layer=layer, projection=projection)
                columns.append(_parts(gguf, name, projection, n_experts, rows, cols))
            else:
                names = (PER_EXPERT_NAME.format(layer=layer, projection=projection, expert=e) for e in range(n_experts))
                columns.append([part for name in names for part in _parts(gguf, name, projection, 1, rows, cols)])
        layers.append(
            tuple(ExpertExtents(layer, expert, parts) for expert, parts in enumerate(zip(*columns, strict=True)))
        )
    return ExpertMap(tuple(layers))


def _merged_layers(gguf: GGUFFile, n_layers: int, n_experts: int) -> frozenset[int]:
    """Return the layers with merged tensors; refuse tensors of experts that the model has not, and mixed layers."""
    merged: dict[int, str] = {}
    single: dict[int, str] = {}
    for name, tensor in gguf.tensors.items():
        match = _EXPERT_NAME.fullmatch(name)
        if match is None:
            continue
        layer, expert = match[1], match[3]
        if _exceeds(layer, n_layers) or (expert is not None and _exceeds(expert, n_experts)):
            raise GGUFError(
                gguf.paths[tensor.file],
                tensor.offset,
                f"unexpected expert tensor {name!r}: "
                f"the model has layers 0 to {n_layers - 1} with experts 0 to {n_experts - 1}",
            )
        (merged if expert is None else single)[int(layer)] = name
    for layer_id in sorted(merged.keys() & single.keys()):
        tensor = gguf.tensors[single[layer_id]]
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"layer {layer_id} has both merged and per-expert tensors ({merged[layer_id]!r} and {single[layer_id]!r}); "
            "a layer must name all of its experts one way",
        )
    return frozenset(merged)


def _exceeds(digits: str, limit: int) -> bool:
    """Return whether a number in a tensor's name is not the plain decimal form of one in 0..limit-1."""
    return len(digits) > 9 or str(int(digits)) != digits or int(digits) >= limit


def _parts(gguf: GGUFFile, name: str, projection: Projection, n_slices: int, rows: int, cols: int) -> list[ExpertPart]:
    """Return the `n_slices` equal slices of the tensor `name`, each `rows` x `cols`."""
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise GGUFError(gguf.paths[0], None, f"expert tensor {name!r} is missing")
    expected = (rows, cols) if n_slices == 1 else (n_slices, rows, cols)
    if without_leading_ones(tensor.shape) != without_leading_ones(expected):
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"expert tensor {name!r} has shape {tensor.shape}, the hyperparameters need {expected}",
        )
    if tensor.type not in MATRIX_TYPES:
        raise UnsupportedModel(unsupported_type(gguf, tensor, MATRIX_TYPES))
    part_bytes = rows * (cols // tensor.type.block_size) * tensor.type.block_bytes
    if cols % tensor.type.block_size or tensor.n_bytes != n_slices * part_bytes:
        raise GGUFError(
            gguf.paths[tensor.file],
            tensor.offset,
            f"expert tensor {name!r} has {tensor.n_bytes} bytes, shape {expected} of type {tensor.type.name} "
            f"needs {n_slices * part_bytes} in rows of whole blocks of {tensor.type.block_size}",
        )
    return [
        ExpertPart(projection, tensor.type, rows, cols, tensor.file, tensor.offset + i * part_bytes, part_bytes)
        for i in range(n_slices)
    ]


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its slowest axes of length one: GGUF writers may leave these out."""
    first = next((i for i, length in enumerate(shape) if length != 1), len(shape) - 1)
    return shape[first:]


def unsupported_type(gguf: GGUFFile, tensor: TensorInfo, types: frozenset[GGMLType]) -> str:
    """Return the text for a tensor whose type is not among those that can be computed with."""
    known = ", ".join(type_.name for type_ in sorted(types))
    return (
        f"{gguf.paths[tensor.file]}: tensor {tensor.name!r} has type {tensor.type.name}, which is not implemented "
        f"for it; these are: {known} (for example, a file quantized as Q4_0 or Q8_0 works)"
    )
