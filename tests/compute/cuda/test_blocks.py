"""Quantized bytes to weights in torch, against the `gguf` package; and tiles back to the file's order."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from mer.compute.cpu.program import Memory, Program
from mer.compute.cuda.activation import activated
from mer.compute.cuda.dequantize import dequantize, file_order, stored_bytes
from mer.compute.kernels.interleave import FIELDS, ROWS
from mer.compute.kernels.matmul import INTERLEAVE_STEPS
from mer.compute.kernels.runtime import run_alone
from mer.compute.reference.blocks.feed_forward import activated as reference_activated
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from mer.model.operators import GEGLU, SWIGLU, Activation
from tests._lib.quantize import HALVES, Type, put_half
from tests._lib.steps import row_of

KINDS = sorted(MATRIX_TYPES)


def random_bytes(kind: GGMLType, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Return random bytes [rows, row bytes] whose half floats are finite and whose exponents are no extremes."""
    rng = np.random.default_rng(seed)
    if kind.block_size == 1:
        values = rng.normal(0.1, 1, (rows, blocks)).astype(np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(values, Type(int(kind)))).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows, blocks, kind.block_bytes), np.uint8)
    for first in HALVES.get(Type(int(kind)), ()):
        put_half(raw, Type(int(kind)), first, rng.normal(0.02, 0.1, (rows, blocks)))
    if kind is GGMLType.MXFP4:
        raw[:, :, 0] = rng.integers(0, 255, (rows, blocks), np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_ggmls_to_the_bit(kind: GGMLType) -> None:
    raw = random_bytes(kind, 7, 96 if kind.block_size == 1 else 3, seed=int(kind))
    want = np.asarray(gguf.quants.dequantize(raw, Type(int(kind))), np.float32)
    got = dequantize(kind, torch.from_numpy(raw))
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), want.reshape(7, -1))
    assert len(np.unique(want)) > 50


@pytest.mark.parametrize("rows", [16, 37])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if int(kind) in FIELDS], ids=lambda kind: kind.name)
def test_tiles_go_back_to_the_order_of_the_file(kind: GGMLType, rows: int) -> None:
    """The tiles are made by the CPU worker's own step."""
    raw = random_bytes(kind, rows, 3, seed=1)
    n_bytes = stored_bytes(kind, rows, raw.size, tiled=True)
    assert n_bytes == -(-rows // ROWS) * ROWS * raw.shape[1]
    tiles, scratch = Memory(n_bytes), Memory(ROWS * raw.shape[1])
    step = INTERLEAVE_STEPS[int(kind)]
    step.compile()
    program = Program()
    program.add(row_of(step, int(raw.ctypes.data), tiles.address, rows, 3, kind.block_bytes, scratch.address))
    run_alone(program.address, program.length)
    stored = tiles.view(tiles.address, n_bytes)
    assert not np.array_equal(stored[: raw.size], raw.ravel())
    assert np.array_equal(file_order(kind, torch.from_numpy(stored.copy()), rows).numpy(), raw)


@pytest.mark.parametrize(
    "record", [SWIGLU, GEGLU, Activation(limit=1.5), Activation(alpha=1.702, beta=0.03, limit=7.0, shift=1.0)]
)
def test_activations_by_their_numbers(record: Activation) -> None:
    gate, up = np.random.default_rng(1).normal(size=(2, 5, 40)).astype(np.float32) * 5
    gate[2, 3], up[3, 1] = np.nan, np.nan
    got = activated(record, torch.from_numpy(gate), torch.from_numpy(up)).numpy()
    want = reference_activated(record, gate.astype(np.float64), up.astype(np.float64))
    assert np.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert np.isnan(got).sum() == 2


def test_types_without_tiles_stay() -> None:
    raw = torch.arange(24, dtype=torch.uint8)
    assert torch.equal(file_order(GGMLType.F32, raw, 3), raw.reshape(3, 8))
    assert stored_bytes(GGMLType.F32, 3, 24, tiled=True) == 24
