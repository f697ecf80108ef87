"""The KV cache on the device, in every type, against the reference's rounding and the CPU worker's bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mer.compute.cuda.device import TORCH_CPU, Device
from mer.compute.cuda.inputs import Inputs, padded_tables
from mer.compute.cuda.kv import KVCache
from mer.compute.cuda.sizes import kv_layout
from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.messages import Batch
from mer.compute.reference.blocks.attention import round_kv
from mer.compute.reference.model import ReferenceModel
from mer.config import KVType
from mer.model.spec import ModelSpec
from tests._lib.specs import with_attention
from tests._lib.tiny_models import tiny_model

TYPES: list[KVType] = ["f32", "f16", "q8_0"]
SLOTS = [(2, 0), (2, 63), (0, 5), (3, 17)]  # (block, offset) of four rows


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    path = tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", n_layers=2).path
    return with_attention(ReferenceModel(path).spec, n_kv_heads=3, head_dim=64)


def inputs() -> Inputs:
    blocks, offsets = (torch.tensor(numbers) for numbers in zip(*SLOTS, strict=True))
    nothing = torch.zeros(0)
    return Inputs(tokens=nothing, blocks=blocks, offsets=offsets, outputs=nothing, angles=(), groups=())


def stored(cache: KVCache, spec: ModelSpec, kv: list[np.ndarray]) -> None:
    cache.layers[1].store(inputs(), *(torch.from_numpy(values) for values in kv))


def random_kv(spec: ModelSpec, seed: int = 0) -> list[np.ndarray]:
    attention = spec.attention
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-6, 4, (2, len(SLOTS), attention.n_kv_heads, 1))
    values = (rng.normal(size=(2, len(SLOTS), attention.n_kv_heads, attention.head_dim)) * scale).astype(np.float32)
    values[0, 0, 0, :32] = 0
    values[0, 1, 0, :32] = np.resize(np.arange(-31, 32) / 2, 32)  # ties, once the scale is 1
    values[0, 1, 0, 0] = 127
    return [*values]


@pytest.mark.parametrize("kv_type", TYPES)
def test_what_is_kept_is_rounded_as_the_processor_does(spec: ModelSpec, kv_type: KVType) -> None:
    attention = spec.attention
    cache = KVCache(kv_layout(spec, kv_type), 4, kv_type, Device(TORCH_CPU))
    kv = random_kv(spec)
    stored(cache, spec, kv)
    table = torch.tensor([[3, 2], [0, 0]])
    for number, values in enumerate(kv):
        want = np.zeros((4, KV_TILE, attention.n_kv_heads, attention.head_dim))
        for (block, offset), row in zip(SLOTS, values, strict=True):
            want[block, offset] = round_kv(row.astype(np.float64), kv_type)
        got = cache.layers[1].gathered(number, table)
        assert got.dtype == torch.float32
        expected = want[table.numpy()].reshape(2, -1, attention.n_kv_heads, attention.head_dim).transpose(0, 2, 1, 3)
        assert np.array_equal(got.numpy(), expected)
        assert not cache.layers[0].gathered(number, table).any()  # the other layer


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_block_of_bytes_is_as_large_as_planned_and_comes_back(spec: ModelSpec, kv_type: KVType) -> None:
    device = Device(TORCH_CPU)
    cache, other = (KVCache(kv_layout(spec, kv_type), 4, kv_type, device) for _ in range(2))
    stored(cache, spec, random_kv(spec))
    kv = cache.read_block(2)
    assert (kv.nbytes, kv.flags.writeable) == (kv_layout(spec, kv_type).block_bytes, False)
    other.write_block(1, kv)
    for number in range(2):
        got, want = (c.layers[1].gathered(number, torch.tensor([[b]])) for c, b in ((other, 1), (cache, 2)))
        assert torch.equal(got, want)
        assert got.any()


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_stay_none(spec: ModelSpec, kv_type: KVType, bad: float) -> None:
    cache = KVCache(kv_layout(spec, kv_type), 4, kv_type, Device(TORCH_CPU))
    kv = random_kv(spec)
    kv[1][2, 1, 40] = bad
    stored(cache, spec, kv)
    got = cache.layers[1].gathered(1, torch.tensor([[0]]))[0, :, 5].numpy()
    where = np.zeros(got.shape, bool)
    where[1, 32:] = kv_type == "q8_0"  # the whole block of 32
    where[1, 40] = True
    assert np.array_equal(~np.isfinite(got), where)


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_block_that_begins_is_zero(spec: ModelSpec, kv_type: KVType) -> None:
    cache = KVCache(kv_layout(spec, kv_type), 4, kv_type, Device(TORCH_CPU))
    stored(cache, spec, [np.full_like(values, np.nan) for values in random_kv(spec)])
    one = np.zeros(1, np.int32)
    batch = Batch(
        tokens=one, positions=np.array([KV_TILE], np.int32), sequences=one, outputs=one, tables=np.array([[0, 2]])
    )
    cache.begin_blocks(batch)
    assert not cache.layers[1].gathered(0, torch.tensor([[2]])).any()
    assert cache.layers[1].gathered(0, torch.tensor([[0]])).isnan().any()


def test_a_table_is_padded_with_the_sequences_own_blocks() -> None:
    """What lies in anybody else's may be NaN, and 0 * NaN is."""
    batch = Batch(
        tokens=np.zeros(4, np.int32),
        positions=np.array([0, 70, 5, 130], np.int32),
        sequences=np.array([0, 1, 2, 2], np.int32),
        tables=np.array([[7, 0, 0], [4, 9, 0], [3, 1, 8]], np.int32),
        outputs=np.arange(3, dtype=np.int32),
    )
    assert padded_tables(batch, [0, 1, 2, 3], 4).tolist() == [[7, 7, 7, 7], [4, 9, 4, 4], [3, 3, 3, 3], [3, 1, 8, 3]]
