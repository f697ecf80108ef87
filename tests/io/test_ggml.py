from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.errors import ModelFileError
from mer.io.ggml import REMOVED_TYPES, GGMLType, tensor_bytes


def test_types_have_the_ids_and_block_sizes_of_the_gguf_package() -> None:
    theirs = {int(type_): (type_.name, *sizes) for type_, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {int(type_): (type_.name, type_.block_size, type_.block_bytes) for type_ in GGMLType} == theirs


def test_a_type_is_found_by_its_id() -> None:
    assert GGMLType(8) is GGMLType.Q8_0
    assert GGMLType.Q8_0.value == 8


def test_removed_types_are_no_types() -> None:
    assert not REMOVED_TYPES.keys() & {int(type_) for type_ in GGMLType}
    assert REMOVED_TYPES.keys() | {int(type_) for type_ in GGMLType} == set(range(42))


@given(
    type_=st.sampled_from(GGMLType),
    blocks=st.integers(1, 9),
    outer=st.lists(st.integers(1, 7), max_size=3),
)
def test_tensor_bytes_agree_with_the_gguf_package(type_: GGMLType, blocks: int, outer: list[int]) -> None:
    shape = (*outer, blocks * type_.block_size)
    byte_shape = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType(type_))
    expected = 1
    for size in byte_shape:
        expected *= size
    assert tensor_bytes(type_, shape) == expected


def test_tensor_bytes_do_not_overflow() -> None:
    assert tensor_bytes(GGMLType.F64, (2**40, 2**40)) == 2**83


def test_a_scalar_is_one_element() -> None:
    assert tensor_bytes(GGMLType.F32, ()) == 4


@pytest.mark.parametrize("shape", [(0,), (4, 0), (-1, 32), (3, 33), (31,)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelFileError, match="shape"):
        tensor_bytes(GGMLType.Q4_0, shape)


def test_rows_must_be_whole_blocks_even_where_the_product_is() -> None:
    with pytest.raises(ModelFileError, match="multiple of 32"):
        tensor_bytes(GGMLType.Q4_0, (32, 4))
