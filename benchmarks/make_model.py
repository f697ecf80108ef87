"""Write a GGUF file of a known model's shape with random weights, for benchmarks.

Usage: python benchmarks/make_model.py FILE [--shape NAME] [--layers N] [--type TYPE] [--seed N] [--empty]

Shapes are those of `shapes.py`, with fewer layers where so asked; each of --d-model, --d-ff, --experts, --vocab changes
one of them. Every block is valid, weights have mean 0 and the spread that keeps a residual stream as it is, so that
routers choose as freely as in a trained model. `q4_k_m` is Q4_K with Q6_K for the output and for the down matrices of
every other layer, as llama.cpp mixes them; rows that are no whole blocks fall back to Q5_0, Q8_0 and F32, as there.
Experts are merged into one tensor per projection. With --empty the file has its header and a hole: enough for
`mer plan` and `mer inspect`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import numpy.typing as npt
from shapes import SHAPES, Shape

from mer.io.extents import round_up

Kind = gguf.GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]
Random = np.random.Generator


def halves(values: npt.ArrayLike, n: int) -> Bytes:
    """Return n half floats as bytes, [n, 2]."""
    return np.broadcast_to(np.asarray(values, np.float16), (n,)).copy().view(np.uint8).reshape(n, 2)


def q4_0(rng: Random, n: int, std: float) -> Bytes:
    """Return random blocks of Q4_0: half scale, 32 nibbles of which none is 0, so that their mean is."""
    scale = halves(std / 4.32 * rng.uniform(0.8, 1.2, n), n)
    low, high = rng.integers(1, 16, (2, n, 16), dtype=np.uint8)
    return np.concatenate([scale, low | high << 4], axis=1)


def q8_0(rng: Random, n: int, std: float) -> Bytes:
    """Return random blocks of Q8_0: half scale, 32 int8."""
    weights = rng.integers(-127, 128, (n, 32), dtype=np.int8)
    return np.concatenate([halves(std / 73.3, n), weights.view(np.uint8)], axis=1)


def q4_k(rng: Random, n: int, std: float) -> Bytes:
    """Return random blocks of Q4_K: scale, minimum, 8 packed pairs of a sub-scale and a sub-minimum, 256 nibbles.

    The sub-minima are the sub-scales and the minimum is 7.5 scales: weight = scale * sub-scale * (nibble - 7.5).
    """
    sub = rng.integers(40, 64, (n, 8), dtype=np.uint8)
    first, last = sub[:, :4] | (sub[:, 4:] >> 4) << 6, sub[:, 4:] & 15
    scale = std / (4.61 * 52.0)
    nibbles = rng.integers(0, 256, (n, 128), dtype=np.uint8)
    return np.concatenate([halves(scale, n), halves(7.5 * scale, n), first, first, last | last << 4, nibbles], axis=1)


def q6_k(rng: Random, n: int, std: float) -> Bytes:
    """Return random blocks of Q6_K: 256 six-bit weights in two parts, 16 int8 sub-scales, scale."""
    bits = rng.integers(0, 256, (n, 192), dtype=np.uint8)
    sub = rng.integers(80, 128, (n, 16), dtype=np.int8)
    return np.concatenate([bits, sub.view(np.uint8), halves(std / (18.5 * 104.0), n)], axis=1)


def mxfp4(rng: Random, n: int, std: float) -> Bytes:
    """Return random blocks of MXFP4: the exponent of a scale, 32 four-bit floats; all of one scale, a power of two."""
    exponent = np.full((n, 1), 127 + round(float(np.log2(std / 2.78))), np.uint8)  # 2.78: the values' spread
    return np.concatenate([exponent, rng.integers(0, 256, (n, 16), dtype=np.uint8)], axis=1)


BLOCKS: dict[Kind, Callable[[Random, int, float], Bytes]] = {
    Kind.Q4_0: q4_0,
    Kind.Q8_0: q8_0,
    Kind.Q4_K: q4_k,
    Kind.Q6_K: q6_k,
    Kind.MXFP4: mxfp4,
}
MIXES = {  # type: (most matrices, keys and values, output, experts, experts' down matrices of every other layer)
    "q4_0": (Kind.Q4_0, Kind.Q8_0, Kind.Q8_0, Kind.Q4_0, Kind.Q4_0),
    "q4_k_m": (Kind.Q4_K, Kind.Q4_K, Kind.Q6_K, Kind.Q4_K, Kind.Q6_K),
    "q8_0": (Kind.Q8_0, Kind.Q8_0, Kind.Q8_0, Kind.Q8_0, Kind.Q8_0),
    "mxfp4": (Kind.Q8_0, Kind.Q8_0, Kind.Q8_0, Kind.MXFP4, Kind.MXFP4),
}
FILE_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M}


@attrs.frozen
class Tensor:
    """A tensor to be written: of float32, ones or normal, or of quantized rows."""

    name: str
    shape: tuple[int, ...]
    kind: Kind = Kind.F32
    std: float = 0.0  # 0: ones

    @property
    def row_bytes(self) -> int:
        """Bytes of the last axis."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    def parts(self, rng: Random) -> Any:
        """Yield its data, a matrix at a time."""
        if self.kind is Kind.F32:
            values = rng.normal(0.0, self.std, self.shape) if self.std else np.ones(self.shape)
            yield values.astype(np.float32)
            return
        rows, columns = self.shape[-2:]
        n = rows * columns // gguf.GGML_QUANT_SIZES[self.kind][0]
        for _ in range(int(np.prod(self.shape[:-2]))):
            yield BLOCKS[self.kind](rng, n, self.std)


FALLBACKS = {Kind.Q4_K: Kind.Q4_0, Kind.Q6_K: Kind.Q8_0}  # for rows that are no whole blocks of 256


def kind_of(name: str, columns: int, mix: str) -> Kind:
    """Return the type of a matrix by its place in the model."""
    most, kv, output, experts, half = MIXES[mix]
    if "gate_inp" in name:
        return Kind.F32
    kind = most
    if ".attn_k." in name or ".attn_v." in name:
        kind = kv
    elif name == "output.weight":
        kind = output
    elif "_exps" in name:
        kind = half if "down" in name and int(name.split(".")[1]) % 2 == 0 else experts
    for candidate in (kind, FALLBACKS.get(kind, kind), Kind.Q8_0):
        if columns % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Kind.F32


def tensors(shape: Shape, mix: str) -> list[Tensor]:
    """Return all tensors of a model, in the order of a file."""
    found = []
    for tensor in shape.tensors():
        if len(tensor.shape) == 1 or tensor.name.endswith(".bias"):
            found.append(Tensor(tensor.name, tensor.shape, std=0.0 if tensor.name.endswith("weight") else 0.1))
            continue
        columns = tensor.shape[-1]
        std = 1.0 if tensor.name == "token_embd.weight" else columns**-0.5
        found.append(Tensor(tensor.name, tensor.shape, kind_of(tensor.name, columns, mix), std))
    return found


def write_vocabulary(writer: Any, n: int) -> None:
    """Write a SentencePiece vocabulary: three control tokens, 256 bytes, then made-up words."""
    words = [f"▁w{number}" if number % 2 else f"w{number}" for number in range(n - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([-float(number) for number in range(n)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * (n - 259)]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(
    path: Path, shape: Shape, mix: str, seed: int = 0, template: str | None = None, *, empty: bool = False
) -> None:
    """Write a model, with a chat template if there is one; its weights are a hole if it is to be empty."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"random {shape.arch}, {shape.n_layers} layers")
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in shape.metadata.items():
        add[type(value)](key, value)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(FILE_TYPES.get(mix, gguf.LlamaFileType.MOSTLY_Q8_0))
    write_vocabulary(writer, shape.vocab)
    if template is not None:
        writer.add_chat_template(template)
    found = tensors(shape, mix)
    for tensor in found:
        n_bytes = int(np.prod(tensor.shape[:-1], dtype=np.int64)) * tensor.row_bytes
        if tensor.kind is Kind.F32:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes)
        else:
            stored = (*tensor.shape[:-1], tensor.row_bytes)
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if empty:
        n_bytes = sum(round_up(int(np.prod(it.shape[:-1], dtype=np.int64)) * it.row_bytes, 32) for it in found)
        writer.close()
        os.truncate(path, round_up(path.stat().st_size, 32) + n_bytes)
        return
    rng = np.random.default_rng(seed)
    for tensor in found:
        # a tensor is written in one piece, as the writer pads after each
        writer.write_tensor_data(np.concatenate([part.reshape(-1) for part in tensor.parts(rng)]))
    writer.close()


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral")
    parser.add_argument("--type", choices=MIXES, default="q4_0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--empty", action="store_true")
    for name in ("layers", "d-model", "d-ff", "experts", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("d_model", "d_ff", "experts", "vocab")}
    shape = SHAPES[arguments.shape].changed(arguments.layers, **changes)
    write(arguments.file, shape, arguments.type, arguments.seed, empty=arguments.empty)


if __name__ == "__main__":
    main()
