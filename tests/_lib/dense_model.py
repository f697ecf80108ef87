"""A dense `llama` model computed plainly in NumPy: what the demo model, which is made of one, must equal."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mer.compute.reference.blocks.attention import attention, pair_turns, rotated
from mer.compute.reference.blocks.feed_forward import silu
from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.products import dequantize
from mer.io.gguf import read_gguf
from mer.model.operators import Rope, RopeStyle

F64 = npt.NDArray[np.float64]


class DenseModel:
    """A dense model of `general.architecture = llama`, in float64 on the dequantized weights."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._gguf = read_gguf(path)
        count = self._gguf.get_int
        self.n_layers = count("llama.block_count")
        self.n_heads = count("llama.attention.head_count")
        self.n_kv_heads = count("llama.attention.head_count_kv")
        self.head_dim = count("llama.embedding_length") // self.n_heads
        self.eps = self._gguf.get_float("llama.attention.layer_norm_rms_epsilon")
        self.rope_base = self._gguf.get_float("llama.rope.freq_base", 10000.0)

    def logits(self, tokens: Sequence[int]) -> F64:
        """Return the logits [T, V] after each token of one sequence."""
        embedding = self._weights("token_embd.weight")
        x = embedding[np.asarray(tokens)]
        positions = np.arange(len(tokens))
        turns = pair_turns(Rope(self.head_dim, self.rope_base, 1.0, RopeStyle.INTERLEAVED))
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            h = rms_norm(x, self._weights(block + "attn_norm.weight"), self.eps)
            heads = [(h @ self._weights(f"{block}attn_{n}.weight").T).reshape(len(x), -1, self.head_dim) for n in "qkv"]
            q, k = (rotated(a, positions, turns, RopeStyle.INTERLEAVED) for a in heads[:2])
            x = x + attention(q, k, heads[2]).reshape(len(x), -1) @ self._weights(block + "attn_output.weight").T
            h = rms_norm(x, self._weights(block + "ffn_norm.weight"), self.eps)
            inner = silu(h @ self._weights(block + "ffn_gate.weight").T) * (
                h @ self._weights(block + "ffn_up.weight").T
            )
            x = x + inner @ self._weights(block + "ffn_down.weight").T
        head = self._weights("output.weight") if "output.weight" in self._gguf.tensors else embedding
        return rms_norm(x, self._weights("output_norm.weight"), self.eps) @ head.T

    def _weights(self, name: str) -> F64:
        tensor = self._gguf.tensors[name]
        with open(self._gguf.paths[tensor.file], "rb") as stream:
            stream.seek(tensor.offset)
            return dequantize(tensor.type, stream.read(tensor.n_bytes), tensor.shape).astype(np.float64)
