"""Shapes of known models: the metadata of their files, and which tensors they have where files differ in that.

Numbers are those of the models' published configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np

from mer.io.ggml import GGMLType
from mer.io.gguf import GGUFFile, TensorInfo
from mer.model.operators import Tensor
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec

GGUF_TYPES = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array of int32"}


@attrs.frozen
class Shape:
    """A model's metadata below its architecture's name, without `vocab_size`, and the tensors that it may have or not.

    Attributes:
        arch: `general.architecture`.
        vocab: rows of the embedding.
        keys: metadata; lists have one number for each layer.
        has: optional tensors, of every layer where the name does not say which.
    """

    arch: str
    vocab: int
    keys: Mapping[str, Any]
    has: tuple[str, ...] = ()

    @property
    def n_layers(self) -> int:
        """Layers."""
        return int(self.keys["block_count"])

    def changed(self, n_layers: int | None = None, vocab: int | None = None, **keys: int | None) -> Shape:
        """Return the shape with other numbers: with fewer layers, they are the first ones."""
        given = {_KEYS[name]: number for name, number in keys.items() if number is not None}
        own, together = "expert_feed_forward_length", "feed_forward_length"
        if own in given and self.keys.get(own, self.keys[together]) == self.keys[together]:
            given[together] = given[own]  # of experts, or of a dense model
            if own not in self.keys:
                del given[own]
        kept = {**self.keys, **given}
        if n_layers is not None:
            kept = {key: it[:n_layers] if isinstance(it, list) else it for key, it in kept.items()}
            kept["block_count"] = n_layers
        return attrs.evolve(self, keys=kept, vocab=self.vocab if vocab is None else vocab)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata under its full names."""
        return {f"{self.arch}.{key}": value for key, value in self.keys.items()}

    def spec(self) -> ModelSpec:
        """Return the model that a file of this shape describes."""
        d_model = int(self.keys["embedding_length"])
        tensors = {"token_embd.weight": _info("token_embd.weight", (self.vocab, d_model))}
        for name in self.has:
            for full in [name] if name.startswith(("blk.", "output", "rope")) else self._of_layers(name):
                tensors[full] = _info(full, (1,))
        metadata = {"general.architecture": self.arch, "general.name": self.arch} | {
            key: np.array(value) if isinstance(value, list) else value for key, value in self.metadata.items()
        }
        header = GGUFFile(
            paths=(Path(f"{self.arch}.gguf"),),
            version=3,
            alignment=32,
            metadata=MappingProxyType(metadata),
            tensors=MappingProxyType(tensors),
            header_bytes_read=0,
            header_bytes=0,
            file_bytes=(0,),
            identities=(),
            value_types={key: GGUF_TYPES.get(type(value), "array of int32") for key, value in metadata.items()},
            value_offsets={},
        )
        return model_spec(header)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of a file of this shape, those of experts merged, in the order of the layers."""
        spec = self.spec()
        experts: dict[str, list[Tensor]] = {}
        for number, record in spec.routed.items():
            n = record.n
            experts[f"blk.{number}."] = [Tensor(it.merged, (n, it.rows, it.cols)) for it in record.weights.matrices]
        before = ""
        for name, tensor in spec.tensors().items():
            block = name[: name.index(".", 4) + 1] if name.startswith("blk.") else ""
            if block != before:
                yield from experts.pop(before, [])
                before = block
            yield tensor
        yield from (tensor for rest in experts.values() for tensor in rest)

    def _of_layers(self, name: str) -> list[str]:
        return [f"blk.{layer}.{name}" for layer in range(self.n_layers)]


_KEYS = {"d_model": "embedding_length", "d_ff": "expert_feed_forward_length", "experts": "expert_count"}


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, shape, GGMLType.F32, 0, 0, 0)


def _common(layers: int, d_model: int, heads: int, kv_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "block_count": layers,
        "context_length": 32768,
        "embedding_length": d_model,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 1e6,
    } | {key.replace("__", "."): value for key, value in more.items()}


def _experts(n: int, top_k: int, d_ff: int) -> dict[str, Any]:
    return {"expert_count": n, "expert_used_count": top_k, "expert_feed_forward_length": d_ff}


def _qwen3(layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int) -> Shape:
    keys = (
        _common(layers, d_model, heads, kv_heads, 128) | _experts(128, 8, d_ff) | {"feed_forward_length": 3 * d_model}
    )
    return Shape("qwen3moe", 151936, keys, ("output.weight",))


def _gpt_oss(layers: int, experts: int) -> Shape:
    keys = (
        _common(layers, 2880, 64, 8, 64, feed_forward_length=2880)
        | _experts(experts, 4, 2880)
        | {
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 128,
        }
    )
    return Shape("gpt-oss", 201088, keys, ("output.weight",))


def _llama(layers: int, d_model: int, heads: int, d_ff: int) -> Shape:
    keys = _common(layers, d_model, heads, 8, 128, feed_forward_length=d_ff)
    return Shape("llama", 128256, keys, ("output.weight", "rope_freqs.weight"))


SHAPES = {
    "mixtral": Shape(
        "llama",
        32000,
        _common(32, 4096, 32, 8, 128, feed_forward_length=14336) | _experts(8, 2, 14336),
        ("output.weight",),
    ),
    "qwen3": _qwen3(48, 2048, 32, 4, 768),
    "qwen3-235b": _qwen3(94, 4096, 64, 4, 1536),
    "gemma4-26b": Shape(
        "gemma4",
        262144,
        _common(30, 2816, 16, 8, 512, feed_forward_length=2112)
        | _experts(128, 8, 704)
        | {
            "attention.head_count_kv": [2 if layer % 6 == 5 else 8 for layer in range(30)],
            "attention.key_length_swa": 256,
            "attention.value_length_swa": 256,
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": [int(layer % 6 != 5) for layer in range(30)],
            "rope.dimension_count_swa": 256,
            "rope.freq_base_swa": 10000.0,
            "final_logit_softcapping": 30.0,
        },
        ("rope_freqs.weight", *(f"blk.{layer}.attn_v.weight" for layer in range(30) if layer % 6 != 5)),
    ),
    "glm-4.5-air": Shape(
        "glm4moe",
        151552,
        _common(46, 4096, 96, 8, 128, feed_forward_length=10944)
        | _experts(128, 8, 1408)
        | {
            "rope.dimension_count": 64,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
        ("output.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    ),
    "minimax-m2": Shape(
        "minimax-m2",
        200064,
        _common(62, 3072, 48, 8, 128, feed_forward_length=1536)
        | _experts(256, 8, 1536)
        | {"rope.dimension_count": 64, "rope.freq_base": 5e6, "expert_gating_func": 2},
        ("output.weight",),
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "olmoe": Shape(
        "olmoe",
        50304,
        _common(16, 2048, 16, 16, 128, feed_forward_length=1024)
        | {"expert_count": 64, "expert_used_count": 8, "rope.freq_base": 10000.0},
        ("output.weight",),
    ),
    "llama-8b": Shape(
        "llama",
        128256,
        _common(32, 4096, 32, 8, 128, feed_forward_length=14336),
        ("output.weight", "rope_freqs.weight"),
    ),
    "llama-70b": Shape(
        "llama",
        128256,
        _common(80, 8192, 64, 8, 128, feed_forward_length=28672),
        ("output.weight", "rope_freqs.weight"),
    ),
}
"""Shapes by name; the first two are what most benchmarks run on."""
