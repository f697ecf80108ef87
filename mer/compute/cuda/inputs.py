"""A batch on the device: its tensors, and which of its rows attend together."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
import torch

from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.messages import Batch

Tensor = torch.Tensor


@attrs.frozen(eq=False)
class Group:
    """Rows that attend together: one row of each of S sequences, or all rows of one sequence (S is 1)."""

    rows: Tensor | slice  # of the batch
    table: Tensor  # int64 [S, blocks]
    positions: Tensor  # int64 [S, rows of a sequence]

    def mask(self, window: int | None) -> Tensor:
        """Return [S, rows of a sequence, positions]: what each row may look at, within a window if there is one."""
        there = torch.arange(self.table.shape[1] * KV_TILE, device=self.table.device)
        own = self.positions[..., None]
        seen = there <= own
        return seen if window is None else seen & (there > own - window)


@attrs.frozen(eq=False)
class Inputs:
    """A batch on the device.

    Attributes:
        tokens: int64 [T].
        blocks, offsets: int64 [T], where each row's KV goes.
        outputs: int64 [N].
        angles: for each RoPE of the model float32 [2, T, dim / 2], cosines and sines.
        groups: who attends with whom.
    """

    tokens: Tensor
    blocks: Tensor
    offsets: Tensor
    outputs: Tensor
    angles: tuple[Tensor, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], groups: tuple[Group, ...]) -> Inputs:
        """Return the inputs of tensors by name, angles as `angles0` and so on."""
        angles = tuple(tensor for name, tensor in arrays.items() if name.startswith("angles"))
        tokens, blocks, offsets, outputs = (arrays[name] for name in ("tokens", "blocks", "offsets", "outputs"))
        return cls(tokens, blocks, offsets, outputs, angles, groups)


def blocks_needed(position: int) -> int:
    """Return the number of KV blocks that hold the positions up to this one."""
    return position // KV_TILE + 1


def padded_tables(batch: Batch, rows: list[int], width: int) -> np.ndarray:
    """Return the tables [len(rows), width] of the sequences of these rows, cut behind each row's own block.

    The rest names the sequence's first block: what lies there is finite if the sequence is, and masked anyway.
    """
    tables = np.empty((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        table = batch.tables[batch.sequences[row]]
        needed = blocks_needed(int(batch.positions[row]))
        tables[place] = table[0]
        tables[place, :needed] = table[:needed]
    return tables
