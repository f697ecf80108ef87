"""Write a GGUF file of a known model's shape with random weights, for benchmarks.

Usage: python benchmarks/make_model.py FILE [--shape mixtral|qwen3] [--layers N] [--type q4_0|q4_k_m|q8_0] [--seed N]

Shapes are those of Mixtral-8x7B and of Qwen3-30B-A3B, with fewer layers where so asked; each of --d-model, --d-ff,
--experts, --vocab changes one of them. Every block is valid, weights have mean 0 and the spread that keeps a residual
stream as it is, so that routers choose as freely as in a trained model. `q4_k_m` is Q4_K with Q6_K for the output and
for the down matrices of every other layer, as llama.cpp mixes them. Experts are merged into one tensor per projection.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import numpy.typing as npt

Kind = gguf.GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]
Random = np.random.Generator


@attrs.frozen
class Shape:
    """What a model's tensors are made of."""

    arch: str
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    vocab: int = 32000
    context: int = 32768
    head_norms: bool = False


SHAPES = {
    "mixtral": Shape("llama", 32, 4096, 14336, 32, 8, 128, 8, 2),
    "qwen3": Shape("qwen3moe", 48, 2048, 768, 32, 4, 128, 128, 8, head_norms=True),
}


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


BLOCKS: dict[Kind, Callable[[Random, int, float], Bytes]] = {
    Kind.Q4_0: q4_0,
    Kind.Q8_0: q8_0,
    Kind.Q4_K: q4_k,
    Kind.Q6_K: q6_k,
}
MIXES = {  # type: (most matrices, keys and values, output, down matrices of every other layer)
    "q4_0": (Kind.Q4_0, Kind.Q8_0, Kind.Q8_0, Kind.Q4_0),
    "q4_k_m": (Kind.Q4_K, Kind.Q4_K, Kind.Q6_K, Kind.Q6_K),
    "q8_0": (Kind.Q8_0, Kind.Q8_0, Kind.Q8_0, Kind.Q8_0),
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


def tensors(shape: Shape, mix: str) -> list[Tensor]:
    """Return all tensors of a model, in the order of a file."""
    most, kv, output, half = MIXES[mix]
    d, f, e, h = shape.d_model, shape.d_ff, shape.experts, shape.head_dim
    q_rows, kv_rows = h * shape.heads, h * shape.kv_heads
    found = [Tensor("token_embd.weight", (shape.vocab, d), most, 1.0)]
    for layer in range(shape.layers):
        name = f"blk.{layer}."
        down = half if layer % 2 == 0 else most
        found += [
            Tensor(f"{name}attn_norm.weight", (d,)),
            Tensor(f"{name}attn_q.weight", (q_rows, d), most, d**-0.5),
            Tensor(f"{name}attn_k.weight", (kv_rows, d), kv, d**-0.5),
            Tensor(f"{name}attn_v.weight", (kv_rows, d), kv, d**-0.5),
            Tensor(f"{name}attn_output.weight", (d, q_rows), most, q_rows**-0.5),
            Tensor(f"{name}ffn_norm.weight", (d,)),
            Tensor(f"{name}ffn_gate_inp.weight", (e, d), std=d**-0.5),
            Tensor(f"{name}ffn_gate_exps.weight", (e, f, d), most, d**-0.5),
            Tensor(f"{name}ffn_up_exps.weight", (e, f, d), most, d**-0.5),
            Tensor(f"{name}ffn_down_exps.weight", (e, d, f), down, f**-0.5),
        ]
        if shape.head_norms:
            found += [Tensor(f"{name}attn_{which}_norm.weight", (h,)) for which in "qk"]
    return [*found, Tensor("output_norm.weight", (d,)), Tensor("output.weight", (shape.vocab, d), output, d**-0.5)]


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


def write(path: Path, shape: Shape, mix: str, seed: int = 0, template: str | None = None) -> None:
    """Write a model, with a chat template if there is one."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"random {shape.arch}, {shape.layers} layers")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_expert_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
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
    for name in ("layers", "d-model", "d-ff", "experts", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("layers", "d_model", "d_ff", "experts", "vocab")}
    shape = attrs.evolve(SHAPES[arguments.shape], **{name: n for name, n in changes.items() if n is not None})
    write(arguments.file, shape, arguments.type, arguments.seed)


if __name__ == "__main__":
    main()
