"""Map of a model's experts: the extents of their matrices in the files, and their places in a slot."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import attrs

from mer.errors import UnsupportedModel
from mer.io.ggml import GGMLType
from mer.limits import MAX_MATRICES
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile, TensorInfo

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert), layers with experts being numbered from 0"""

Projection: TypeAlias = Literal["gate", "up", "down"]

PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")
"""The matrices of a gated expert, in the order in which they are needed."""

MATRIX_TYPES: Final = frozenset(
    {
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q8_0,
        GGMLType.Q2_K,
        GGMLType.Q3_K,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
        GGMLType.IQ1_S,
        GGMLType.IQ1_M,
        GGMLType.IQ2_XXS,
        GGMLType.IQ2_XS,
        GGMLType.IQ2_S,
        GGMLType.IQ3_XXS,
        GGMLType.IQ3_S,
        GGMLType.IQ4_NL,
        GGMLType.IQ4_XS,
        GGMLType.MXFP4,
        GGMLType.NVFP4,
    }
)
"""The element types that weight matrices may have."""

ROW_GROUP: Final = 16
"""Rows that kernels may interleave with each other."""

WASTE_DIVISOR: Final = 20
"""Slots of one size for experts of several may waste 1 / 20 of what these need."""


class ExpertPart(NamedTuple):  # a tuple, as there are up to three for each of up to 65,536 experts
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
        return self.n_bytes + self.n_bytes // self.rows * (-self.rows % ROW_GROUP)


@attrs.frozen
class SlotLayout:
    """Places of the parts of one expert in a slot: side by side, each in its own area of whole pages.

    A part whose aligned hull has `lead` bytes before its first byte starts at `part_offsets[i] + lead` of the slot. Its
    area holds the hull, and has room for the matrix with its rows rounded up to `ROW_GROUP`, so that kernels may
    re-arrange it in place.
    """

    n_bytes: int  # of the slot that are needed: a multiple of the alignment
    part_offsets: tuple[int, ...]  # multiples of the alignment


class ExpertExtents(NamedTuple):
    """The matrices of one expert, in the order in which they are needed.

    The last one is the outer stage's, which multiplies what the others have given; these are the inner stage's. There
    are two to `MAX_MATRICES` of them, as many in all experts of a model.
    """

    layer: int
    expert: int
    parts: tuple[ExpertPart, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, without any alignment padding."""
        return sum(part.n_bytes for part in self.parts)

    def layout(self, alignment: int) -> SlotLayout:
        """Return where the parts go in a slot, for reads at multiples of `alignment` bytes, a power of two."""
        *begins, n_bytes = itertools.accumulate(self._areas(alignment), initial=0)
        return SlotLayout(n_bytes, tuple(begins))

    def slot_bytes(self, alignment: int) -> int:
        """Return how much of a slot the layout needs, in bytes."""
        return sum(self._areas(alignment))

    def _areas(self, alignment: int) -> list[int]:
        """Return the bytes of each part's area of a slot."""
        return [-(-(part.offset % alignment + part.padded_bytes) // alignment) * alignment for part in self.parts]


@attrs.frozen(kw_only=True)
class SlotClasses:
    """The sizes of slots that a model's experts need, largest first; every expert goes into slots of one of them.

    Per class: the bytes of a slot, how many experts go there, and how many bytes of slots they need together.
    """

    alignment: int
    slot_bytes: tuple[int, ...]  # multiples of the alignment
    n_experts: tuple[int, ...]
    needed_bytes: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]  # [layer][expert]: the number of its class

    def kind_of(self, layer: int, expert: int) -> int:
        """Return the number of the class whose slots an expert goes into."""
        return self.kinds[layer][expert]

    def waste(self, slot_counts: Sequence[int]) -> float:
        """Return the share of the memory of so many slots per class that their experts, on average, do not need."""
        if not slot_counts:
            return 0.0
        have = sum(n * size for n, size in zip(slot_counts, self.slot_bytes, strict=True))
        needed = sum(n * b / e for n, b, e in zip(slot_counts, self.needed_bytes, self.n_experts, strict=True))
        return 1 - needed / have


@attrs.frozen
class ExpertMap:
    """The extents of every routed expert of a model."""

    experts: tuple[tuple[ExpertExtents, ...], ...]  # [layer][expert]
    total_bytes: int = attrs.field(init=False, eq=False)  # of all experts' weights together
    formats: frozenset[tuple[GGMLType, int]] = attrs.field(init=False, eq=False)  # type and columns of all matrices

    @property
    def shape(self) -> tuple[int, int]:
        """Layers with experts, and experts of each: L, E."""
        return len(self.experts), max(map(len, self.experts), default=0)

    @property
    def n_matrices(self) -> int:
        """Matrices of an expert; 0 without experts."""
        return len(self.experts[0][0].parts) if self.experts else 0

    def __attrs_post_init__(self) -> None:
        counts = {len(extents.parts) for layer in self.experts for extents in layer}
        if len(counts) > 1 or not counts <= set(range(2, MAX_MATRICES + 1)):
            raise ValueError(f"experts have {sorted(counts)} matrices; all must have as many, 2 to {MAX_MATRICES}")

    @total_bytes.default
    def _sum(self) -> int:
        return sum(extents.n_bytes for layer in self.experts for extents in layer)

    @formats.default
    def _distinct(self) -> frozenset[tuple[GGMLType, int]]:
        return frozenset((part.type, part.cols) for layer in self.experts for e in layer for part in e.parts)

    def slot_classes(self, alignment: int) -> SlotClasses:
        """Return the fewest sizes of slots with which all experts together waste little, and the least for so many.

        What an expert wastes is the size of its slot less what it needs of it (`SlotLayout.n_bytes`: its matrices and
        up to two units of alignment for each). On average that is at most 1 / 20 of what the experts need, or three
        units of alignment where that is more: then alignment costs small experts as much.

        Args:
            alignment: of file offsets, lengths and memory addresses of the reads, in bytes; a power of two.
        """
        if not self.experts:
            return SlotClasses(alignment=alignment, slot_bytes=(), n_experts=(), needed_bytes=(), kinds=())
        needs = [[extents.slot_bytes(alignment) for extents in layer] for layer in self.experts]
        counts = Counter(itertools.chain.from_iterable(needs))
        sizes = sorted(counts, reverse=True)
        starts = _partition(sizes, [counts[size] for size in sizes], WASTE_DIVISOR, 3 * alignment)
        members = [sizes[a:b] for a, b in itertools.pairwise([*starts, len(sizes)])]
        kind_of = {size: kind for kind, group in enumerate(members) for size in group}
        return SlotClasses(
            alignment=alignment,
            slot_bytes=tuple(group[0] for group in members),
            n_experts=tuple(sum(counts[size] for size in group) for group in members),
            needed_bytes=tuple(sum(counts[size] * size for size in group) for group in members),
            kinds=tuple(tuple(kind_of[need] for need in layer) for layer in needs),
        )


def _partition(sizes: Sequence[int], counts: Sequence[int], divisor: int, least: int) -> list[int]:
    """Return where each group begins when sizes are cut into the fewest groups that waste little, at least cost.

    An item of a group costs as much as the group's first and largest one, and wastes the difference. The waste in all
    is at most 1 / divisor of the items' sum, or `least` per item where that is more.

    Args:
        sizes: falling.
        counts: items of each size.
        divisor: of the sum of all items.
        least: waste per item that is small in any case.
    """
    before = [0, *itertools.accumulate(counts)]  # items of the sizes in front
    total = sum(size * count for size, count in zip(sizes, counts, strict=True))
    limit = total + max(total // divisor, least * before[-1])
    costs = [sizes[0] * n for n in before]  # [j]: of the first j sizes, here as one group
    steps = [[0] * (len(sizes) + 1)]  # [groups - 1][j]: where the last group of the first j sizes begins
    while costs[-1] > limit:
        costs, begins = _one_more_group(costs, sizes, before)
        steps.append(begins)
    starts = [steps.pop()[-1]]
    while starts[0]:
        starts.insert(0, steps.pop()[starts[0]])
    return starts


def _one_more_group(costs: list[int], sizes: Sequence[int], before: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the least costs of the first j sizes in one more group than `costs` has, and where the last one begins.

    As sizes fall, the best beginning of the last group never moves back when j grows, which leaves few to look at: the
    middle j first, then either side with what its beginning leaves (divide and conquer).
    """
    best, begins = [0] * len(before), [0] * len(before)
    ranges = [(1, len(sizes), 0, len(sizes) - 1)]
    while ranges:
        low, high, first, last = ranges.pop()
        j = (low + high) // 2
        best[j], begins[j] = min(
            (costs[i] + sizes[i] * (before[j] - before[i]), i) for i in range(first, min(last, j - 1) + 1)
        )
        if low < j:
            ranges.append((low, j - 1, first, begins[j]))
        if j < high:
            ranges.append((j + 1, high, begins[j], last))
    return best, begins


def round_up(n_bytes: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `n_bytes`."""
    return -(-n_bytes // alignment) * alignment


def aligned_hull(offset: int, n_bytes: int, alignment: int) -> tuple[int, int, int]:
    """Return `(start, length, lead)` of the smallest aligned byte range that covers `n_bytes` at `offset`.

    `start` and `length` are multiples of `alignment`, and the wanted bytes begin `lead` bytes into the range. The range
    may reach beyond the end of the file: a reader needs only its first `lead + n_bytes` bytes.
    """
    lead = offset % alignment
    return offset - lead, round_up(lead + n_bytes, alignment), lead


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its slowest axes of length one: GGUF writers may leave these out."""
    first = next((i for i, length in enumerate(shape) if length != 1), len(shape) - 1)
    return shape[first:]


def unsupported_type(gguf: GGUFFile, tensor: TensorInfo, types: frozenset[GGMLType]) -> UnsupportedModel:
    """Return the error for a tensor whose type is not among those that can be computed with; the caller raises it."""
    known = ", ".join(type_.name for type_ in sorted(types))
    return UnsupportedModel(
        f"tensor {quoted(tensor.name)} has type {tensor.type.name}, which is not implemented "
        f"for it; these are: {known} (for example, a file quantized as Q4_0 or Q8_0 works)",
        gguf.paths[tensor.file],
    )
