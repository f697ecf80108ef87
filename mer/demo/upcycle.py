"""Sparse upcycling without training: a dense GGUF becomes a Mixture of Experts that computes the same function.

Every expert is the dense layer's FFN with its neurons in another order, moved in blocks of 32 so that quantized blocks
stay whole. A SwiGLU FFN does not depend on the order of its neurons, and the weights of the chosen experts sum to one,
so that the sum over experts is the dense FFN, whatever the router chooses. The idea of starting a Mixture of Experts
from copies of a trained FFN is that of Komatsuzaki et al., "Sparse Upcycling" (2022, arXiv:2212.05055).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from mer.demo.files import DemoError, check_disk_space, written_whole
from mer.errors import ConfigError, UnsupportedModel
from mer.io.ggml import GGMLType, tensor_bytes
from mer.io.gguf import GGUFFile, TensorInfo, read_gguf
from mer.quoting import echo, quoted

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy.typing import NDArray

BLOCK_NEURONS = 32  # neurons that move together
ROUTER_GAIN = 4.0  # length of a router row: large enough that the choice of experts differs from token to token
MAX_EXPERTS = 256
TOP_K = 2  # experts used per token, as in Mixtral
MODIFIED_NOTICE = (
    "Modified by mer: a Mixture of Experts made from the dense model by sparse upcycling. Every expert is the dense "
    "FFN with its neurons in another order, and the routers are random, so that it computes what the dense model does. "
    "The original is SmolLM2-135M-Instruct by Hugging Face, licensed under the Apache License 2.0, "
    "https://www.apache.org/licenses/LICENSE-2.0, as is this file."
)

_REPLACED_KEYS = frozenset(
    "general." + name for name in ("architecture", "alignment", "name", "description", "size_label")
)
_FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", re.ASCII)


@attrs.frozen
class _Output:
    """One tensor of the new file and how to make its bytes."""

    name: str
    shape: tuple[int, ...]  # slowest axis first
    type: GGMLType
    n_bytes: int
    make: Callable[[], NDArray[np.generic]]


def convert_smollm2(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    n_experts: int = 8,
    top_k: int = TOP_K,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Mixture of Experts that equals a dense `llama` GGUF, tensor by tensor; `target` appears whole or
    not at all.

    Args:
        source: a dense GGUF of one file, architecture `llama`, whose FFN width is a multiple of 32.
        target: the file to make or to replace.
        n_experts: experts per layer, E.
        top_k: experts used per token, K.
        seed: of the orders of neurons and of the router rows.
        on_progress: called with the bytes written and the bytes in total, after every tensor.

    Raises:
        ConfigError: `n_experts` or `top_k` is out of range.
        ModelFileError: the source is not such a file.
        DemoError: the disk is too small, or the source was cut short while it was read.
    """
    check_experts(n_experts, top_k)
    dense = read_gguf(source)
    _check_dense(dense)
    target = Path(target)
    with open(dense.paths[0], "rb", buffering=0) as stream:
        outputs = list(_outputs(dense, stream.fileno(), n_experts, seed))
        total_bytes = sum(output.n_bytes for output in outputs)
        check_disk_space(target.parent, total_bytes + os.path.getsize(dense.paths[0]) // 8)
        with written_whole(target) as part:
            _write(part, dense, outputs, n_experts, top_k, on_progress or (lambda done, total: None))


def check_experts(n_experts: int, top_k: int) -> None:
    """Check numbers of experts.

    Raises:
        ConfigError: they are out of range.
    """
    if not 1 <= top_k <= n_experts <= MAX_EXPERTS:
        raise ConfigError(
            f"{n_experts} experts of which {top_k} are used: needed are 1 <= used <= experts <= {MAX_EXPERTS}"
        )


def _check_dense(dense: GGUFFile) -> None:
    """Refuse what this conversion would get wrong."""
    path = dense.paths[0]
    if len(dense.paths) != 1:
        raise UnsupportedModel(f"only a model in one file can be converted, this one has {len(dense.paths)}", path)
    architecture = dense.metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(f"only architecture 'llama' can be converted, this is {echo(architecture)}", path)
    if "llama.expert_count" in dense.metadata:
        raise UnsupportedModel("already a Mixture of Experts; a dense model is needed", path)
    if not any(_FFN.fullmatch(name) for name in dense.tensors):
        raise UnsupportedModel("has no FFN tensors named like blk.0.ffn_gate.weight", path)


def _outputs(dense: GGUFFile, fd: int, n_experts: int, seed: int) -> Iterator[_Output]:
    """Yield the tensors of the new file in the order of the old one."""
    for tensor in dense.tensors.values():
        match = _FFN.fullmatch(tensor.name)
        if match is None:
            yield _Output(tensor.name, tensor.shape, tensor.type, tensor.n_bytes, partial(_read, fd, tensor))
            continue
        layer, projection = int(match[1]), match[2]
        axis = 1 if projection == "down" else 0  # of the neurons
        _check_blocks(dense, tensor, axis)
        orders = _orders(seed, layer, n_experts, tensor.shape[axis] // BLOCK_NEURONS)
        yield _Output(
            f"blk.{layer}.ffn_{projection}_exps.weight",
            (n_experts, *tensor.shape),
            tensor.type,
            n_experts * tensor.n_bytes,
            partial(_experts, fd, tensor, axis, orders),
        )
        if projection == "gate":
            shape = (n_experts, tensor.shape[1])
            yield _Output(
                f"blk.{layer}.ffn_gate_inp.weight",
                shape,
                GGMLType.F32,
                tensor_bytes(GGMLType.F32, shape),
                partial(_router, seed, layer, shape),
            )


def _check_blocks(dense: GGUFFile, tensor: TensorInfo, axis: int) -> None:
    """Check that blocks of 32 neurons can be moved without opening a quantized block."""
    where, path = f"tensor {quoted(tensor.name)}", dense.paths[0]
    if len(tensor.shape) != 2 or tensor.shape[axis] % BLOCK_NEURONS:
        raise UnsupportedModel(
            f"{where} has shape {tensor.shape}; a matrix with a multiple of {BLOCK_NEURONS} neurons is needed", path
        )
    if BLOCK_NEURONS % tensor.type.block_size:
        raise UnsupportedModel(
            f"{where} has type {tensor.type.name} in blocks of {tensor.type.block_size} weights, which cannot be moved "
            f"in blocks of {BLOCK_NEURONS}",
            path,
        )


def _read(fd: int, tensor: TensorInfo) -> NDArray[np.uint8]:
    """Return the bytes of a tensor."""
    data = bytearray(tensor.n_bytes)
    view = memoryview(data)
    done = 0
    while done < tensor.n_bytes:
        n_read = os.preadv(fd, [view[done:]], tensor.offset + done)
        if n_read == 0:
            early = tensor.n_bytes - done
            raise DemoError(f"tensor {quoted(tensor.name)} ended {early} bytes early; was the file changed?")
        done += n_read
    return np.frombuffer(data, np.uint8)


def _orders(seed: int, layer: int, n_experts: int, n_blocks: int) -> NDArray[np.int64]:
    """Return the order of neuron blocks of every expert of a layer: (E, n_blocks)."""
    rng = np.random.default_rng([seed, layer, 0])
    return np.stack([rng.permutation(n_blocks) for _ in range(n_experts)])


def _experts(fd: int, tensor: TensorInfo, axis: int, orders: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the matrices of all experts one after the other: blocks of rows (axis 0) or columns (axis 1) reordered."""
    n_blocks = orders.shape[1]
    blocks = _read(fd, tensor).reshape(*tensor.shape[:axis], n_blocks, -1)
    out = np.empty((len(orders), *blocks.shape), np.uint8)
    for expert, order in enumerate(orders):
        np.take(blocks, order, axis=axis, out=out[expert])
    return out


def _router(seed: int, layer: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a layer's router, (E, D): random directions of equal length."""
    rows = np.random.default_rng([seed, layer, 1]).standard_normal(shape)
    rows *= ROUTER_GAIN / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def _write(
    path: Path, dense: GGUFFile, outputs: list[_Output], n_experts: int, top_k: int, report: Callable[[int, int], None]
) -> None:
    """Write header and tensors; one tensor's bytes are in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    try:
        _copy_metadata(writer, dense)
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(top_k)
        writer.add_name(f"{dense.get_str('general.name', 'dense model')}, upcycled to {n_experts} experts")
        writer.add_description(MODIFIED_NOTICE)
        for output in outputs:
            writer.add_tensor_info(
                output.name, output.shape, np.dtype(np.float32), output.n_bytes, gguf.GGMLQuantizationType(output.type)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total_bytes = sum(output.n_bytes for output in outputs)
        done_bytes = 0
        for output in outputs:
            writer.write_tensor_data(output.make())
            done_bytes += output.n_bytes
            report(done_bytes, total_bytes)
    finally:
        writer.close()


def _copy_metadata(writer: GGUFWriter, dense: GGUFFile) -> None:
    """Copy every key with its type, but those that the conversion replaces or makes untrue."""
    from gguf import GGUFValueType

    for key, value in dense.metadata.items():
        if key in _REPLACED_KEYS:
            continue
        container, _, element = dense.value_types[key].rpartition(" of ")
        element_type = GGUFValueType[element.removesuffix("s").upper()]
        if not container:
            writer.add_key_value(key, _raw(value), element_type)
        elif len(value := list(value)):  # type: ignore[arg-type]
            writer.add_key_value(key, [_raw(item) for item in value], GGUFValueType.ARRAY, element_type)


def _raw(value: Any) -> Any:
    """Return a value as `GGUFWriter` packs it: text as its own bytes, which need not be UTF-8."""
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
