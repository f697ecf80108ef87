"""The slow NumPy twin of the whole model: the oracle that tests compare everything else with.

Weights are dequantized as GGML does, in float32; all other arithmetic is float64. Activations can be rounded to int8
blocks as the integer kernels do it, so that what remains of the difference is only the kernels' float32 summation.

`reference_types` takes the quantized types apart. Shape letters as in ModelSpec.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.reference.types import F32, UNPACK, Raw, unpack
from mer.config import KVType
from mer.io.extents import ExpertPart, map_experts
from mer.io.ggml import GGMLType
from mer.io.gguf import GGUFFile, read_gguf
from mer.model.dense import dense_tensors
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec, RopeStyle, Routing

F64: TypeAlias = npt.NDArray[np.float64]
I8: TypeAlias = npt.NDArray[np.int8]


# --- weights --------------------------------------------------------------------------------------


def dequantize(type: GGMLType, raw: Raw, shape: tuple[int, ...]) -> F32:
    """Return the weights that raw bytes of a GGML type stand for, in float32 and to the bit as GGML has them."""
    data = np.frombuffer(raw, np.uint8)
    if type is GGMLType.F32:
        return data.view(np.float32).reshape(shape).copy()
    if type is GGMLType.F16:
        return data.view(np.float16).astype(np.float32).reshape(shape)
    if type is GGMLType.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    parts = unpack(type, raw)
    run = type.block_size // parts.factor.shape[1]
    scales = parts.scale * parts.factor.astype(np.float32)  # [blocks, runs], in float32
    weights = np.repeat(scales, run, axis=1) * parts.q.astype(np.float32)
    if parts.minimum is not None:  # adding zero elsewhere would lose the sign of negative zeros
        weights = weights + np.repeat(parts.minimum * parts.lift.astype(np.float32), run, axis=1)
    return weights.reshape(shape)


# --- activations as int8 --------------------------------------------------------------------------


def quantize_q8_0(x: npt.ArrayLike) -> tuple[I8, F32]:
    """Return `(q, scales)` of activations in blocks of 32 along the last axis: q [..., n], scales [..., n / 32].

    With x in float32, scale = max|x| / 127 in float32 and q = rint(x / scale), the quotient in float32, ties to even;
    a block whose scale is zero has q = 0.

    Raises:
        ValueError: the last axis is not a multiple of 32, or a value is not finite.
    """
    return _quantize_int8(x, 32)


def quantize_q8_k(x: npt.ArrayLike) -> tuple[I8, F32]:
    """Return `(q, scales)` as `quantize_q8_0` does, in blocks of 256: the partner of the K types."""
    return _quantize_int8(x, 256)


def _quantize_int8(x: npt.ArrayLike, block: int) -> tuple[I8, F32]:
    values = np.asarray(x, np.float32)
    if values.shape[-1] % block or not np.isfinite(values).all():
        raise ValueError(f"activations of shape {values.shape} must be finite, in rows of whole blocks of {block}")
    blocks = values.reshape(*values.shape[:-1], -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    quotients = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    q = np.rint(quotients).clip(-127, 127).astype(np.int8)
    return q.reshape(values.shape), scales[..., 0]


def matmul_quantized(type: GGMLType, raw: Raw, x: npt.ArrayLike) -> F64:
    """Return `x @ W.T` [T, rows] as an exact integer kernel computes it, from W's raw bytes and x [T, cols].

    x is rounded to int8 in blocks as long as those of the weights, each block's dot product with the integer weights is
    exact, and the scaled block results are summed in float64. Types with minima add these times sums of the rounded x.
    With F32, F16 and BF16 weights x is only rounded to float32.
    """
    values = np.asarray(x, np.float32)
    n_tokens, cols = values.shape
    if type not in UNPACK:
        rows = len(np.frombuffer(raw, np.uint8)) // (cols * type.block_bytes)
        return values.astype(np.float64) @ dequantize(type, raw, (rows, cols)).astype(np.float64).T
    parts = unpack(type, raw)
    q, scales = _quantize_int8(values, type.block_size)
    n_blocks, n_runs = cols // type.block_size, parts.factor.shape[1]
    factors = np.repeat(parts.factor, type.block_size // n_runs, axis=1)
    weights = (parts.q * factors).astype(np.float64).reshape(-1, n_blocks, type.block_size)  # integers, exact
    columns = q.astype(np.float64).reshape(n_tokens, n_blocks, type.block_size)
    x_scales = scales.astype(np.float64)  # [T, blocks]

    def scaled(left: F64, right: F64, scale: F32) -> F64:
        """Return the sum over blocks of (left [T, B, n] @ right [R, B, n]) * scale [R, B] * x_scales."""
        dots = left.transpose(1, 0, 2) @ right.transpose(1, 2, 0)  # [blocks, T, rows], exact
        out: F64 = np.einsum("btr,rb,tb->tr", dots, scale.astype(np.float64).reshape(-1, n_blocks), x_scales)
        return out

    out = scaled(columns, weights, parts.scale)
    if parts.minimum is not None:
        sums = columns.reshape(n_tokens, n_blocks, n_runs, -1).sum(-1)
        out += scaled(sums, parts.lift.astype(np.float64).reshape(-1, n_blocks, n_runs), parts.minimum)
    return out


# --- one layer's parts ----------------------------------------------------------------------------


def rms_norm(x: F64, weight: npt.ArrayLike, eps: float) -> F64:
    """Return x scaled to a root mean square of one along the last axis, times the weight (Zhang & Sennrich 2019)."""
    out: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return out


def rope(x: F64, positions: npt.ArrayLike, *, dim: int, base: float, scale: float, style: RopeStyle) -> F64:
    """Return heads x [T, H, C] with their first `dim` elements rotated by their position (Su et al. 2021).

    Pair i of dim / 2 turns by position * scale * base ** (-2 i / dim).
    """
    angles = np.asarray(positions, np.float64)[:, None] * scale * base ** (-2.0 * np.arange(dim // 2) / dim)
    turns = np.exp(1j * angles)[:, None, :]  # [T, 1, dim / 2]
    first = np.arange(dim // 2)
    if style is RopeStyle.INTERLEAVED:
        left, right = 2 * first, 2 * first + 1
    else:
        left, right = first, first + dim // 2
    turned = (x[..., left] + 1j * x[..., right]) * turns
    out = x.copy()
    out[..., left], out[..., right] = turned.real, turned.imag
    return out


def round_kv(x: F64, kv_type: KVType) -> F64:
    """Return keys or values x [..., C] as the KV cache keeps them.

    f32 and f16 round to nearest even. q8_0 rounds blocks of 32 as ggml's reference does: in float32
    scale = max|x| / 127 and q = x * (1 / scale), to the nearest integer with ties away from zero; then
    the scale becomes a half float.
    """
    values = np.asarray(x, np.float32)
    if kv_type == "f32":
        return values.astype(np.float64)
    if kv_type == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float64)
    blocks = values.reshape(*values.shape[:-1], -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    scaled = blocks * inverse
    q = np.copysign(np.floor(np.abs(scaled.astype(np.float64)) + 0.5), scaled)  # exact: float64 holds the sum
    out: F64 = (q * scales.astype(np.float16)).reshape(values.shape)
    return out


def attention(q: F64, k: F64, v: F64, window: int | None = None) -> F64:
    """Return causal grouped-query attention [T, H, C] of the last T of S positions.

    Queries q [T, H, C] meet keys and values k, v [S, G, C]. Query head h attends
    with kv head h // (H / G); scores are divided by sqrt(C). With a window, each attends
    to that many positions, its own included.
    """
    n_tokens, n_heads, head_dim = q.shape
    n_positions, n_kv_heads, _ = k.shape
    keys = np.repeat(k, n_heads // n_kv_heads, axis=1)
    values = np.repeat(v, n_heads // n_kv_heads, axis=1)
    scores = np.einsum("thc,shc->hts", q, keys) / np.sqrt(head_dim)
    positions = np.arange(n_positions)
    ahead = positions[None, :] - positions[n_positions - n_tokens :, None]  # [T, S]
    unseen = (ahead > 0) | (ahead <= -(window or n_positions))
    out: F64 = np.einsum("hts,shc->thc", softmax(np.where(unseen, -np.inf, scores)), values)
    return out


def softmax(x: F64) -> F64:
    """Return the softmax along the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    out: F64 = powers / powers.sum(-1, keepdims=True)
    return out


def route(logits: F64, top_k: int, routing: Routing) -> tuple[npt.NDArray[np.int64], F64]:
    """Return `(ids, weights)`, both [T, K], of the experts chosen by logits [T, E].

    They come in falling order of their logits; of equal ones the lower id is first.
    """
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    if routing is Routing.SOFTMAX_OVER_TOP_K:
        return ids, softmax(np.take_along_axis(logits, ids, -1))
    chosen = np.take_along_axis(softmax(logits), ids, -1)
    return ids, chosen / chosen.sum(-1, keepdims=True)


def silu(x: F64) -> F64:
    """Return x times its logistic sigmoid."""
    out: F64 = x * 0.5 * (1 + np.tanh(x / 2))
    return out


# --- the whole model ------------------------------------------------------------------------------


@attrs.frozen
class Matrix:
    """A weight matrix [rows, cols] as the file has it."""

    type: GGMLType
    raw: bytes
    shape: tuple[int, int]

    @functools.cached_property
    def weights(self) -> F64:
        """The weights as numbers."""
        return dequantize(self.type, self.raw, self.shape).astype(np.float64)

    def matmul(self, x: F64, *, int8_activations: bool) -> F64:
        """Return `x @ W.T` [T, rows] of x [T, cols]."""
        if int8_activations:
            return matmul_quantized(self.type, self.raw, x)
        return x @ self.weights.T


@attrs.frozen
class Trace:
    """What a forward pass computed for T tokens."""

    logits: F64  # [T, V]
    hidden: F64  # [L + 1, T, D]: the residual stream before each layer and after the last
    router_logits: F64  # [L, T, E]
    expert_ids: npt.NDArray[np.int64]  # [L, T, K], in router order
    expert_weights: F64  # [L, T, K]


class ReferenceModel:
    """A model computed slowly and plainly from its GGUF file.

    Args:
        path: the file.
        int8_activations: round what meets quantized matrices to int8, as the integer kernels do; the router
            and norms never are.
        kv_type: how keys and values are kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, int8_activations: bool = False, kv_type: KVType = "f32"
    ) -> None:
        self.gguf: GGUFFile = read_gguf(path)
        self.spec: ModelSpec = model_spec(self.gguf)
        self.int8_activations = int8_activations
        self.kv_type: KVType = kv_type
        self._cache: dict[tuple[int, int], Matrix] = {}  # {(file, offset): matrix}
        self._tensors = dense_tensors(self.spec, self.gguf)
        spec = self.spec
        self.experts = map_experts(
            self.gguf, n_layers=spec.n_layers, n_experts=spec.n_experts, d_model=spec.d_model, d_ff=spec.d_ff
        )

    def logits(self, tokens: Sequence[int]) -> F64:
        """Return the logits [T, V] after each of the tokens of one sequence."""
        return self.trace(tokens).logits

    def trace(self, tokens: Sequence[int]) -> Trace:
        """Return logits, residual stream and routing of one sequence."""
        ids = np.asarray(tokens, np.int64)
        x = self.matrix("token_embd.weight").weights[ids]
        hidden, routers, experts, weights = [x], [], [], []
        for layer in range(self.spec.n_layers):
            x = x + self.attend(layer, x)
            h = rms_norm(x, self.vector(f"blk.{layer}.ffn_norm.weight"), self.spec.rms_eps)
            router_logits = h @ self.matrix(f"blk.{layer}.ffn_gate_inp.weight").weights.T
            chosen, shares = route(router_logits, self.spec.top_k, self.spec.routing)
            x = x + self.mixture(layer, h, chosen, shares)
            hidden.append(x)
            routers.append(router_logits)
            experts.append(chosen)
            weights.append(shares)
        return Trace(self.head(x), np.stack(hidden), np.stack(routers), np.stack(experts), np.stack(weights))

    def attend(self, layer: int, x: F64) -> F64:
        """Return what a layer's attention adds to the residual stream x [T, D] of a whole sequence."""
        spec, block = self.spec, f"blk.{layer}."
        h = rms_norm(x, self.vector(block + "attn_norm.weight"), spec.rms_eps)
        q = self._matmul(block + "attn_q.weight", h).reshape(-1, spec.n_heads, spec.head_dim)
        k = self._matmul(block + "attn_k.weight", h).reshape(-1, spec.n_kv_heads, spec.head_dim)
        v = self._matmul(block + "attn_v.weight", h).reshape(-1, spec.n_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q = rms_norm(q, self.vector(block + "attn_q_norm.weight"), spec.rms_eps)
            k = rms_norm(k, self.vector(block + "attn_k_norm.weight"), spec.rms_eps)
        positions = np.arange(len(x))
        q, k = (
            rope(a, positions, dim=spec.rope_dim, base=spec.rope_base, scale=spec.rope_scale, style=spec.rope_style)
            for a in (q, k)
        )
        k, v = (round_kv(a, self.kv_type) for a in (k, v))
        attended = attention(q, k, v, spec.sliding_window)
        return self._matmul(block + "attn_output.weight", attended.reshape(len(x), -1))

    def mixture(self, layer: int, h: F64, expert_ids: npt.NDArray[np.int64], expert_weights: F64) -> F64:
        """Return the weighted sum, in router order, of the experts' outputs for normalized h [T, D]."""
        outputs = np.zeros((*expert_ids.shape, h.shape[1]))  # [T, K, D]
        for expert in np.unique(expert_ids):
            t, k = np.nonzero(expert_ids == expert)
            outputs[t, k] = self.expert(layer, int(expert), h[t])
        out = np.zeros_like(h)
        for rank in range(expert_ids.shape[1]):
            out += expert_weights[:, rank, None] * outputs[:, rank]
        return out

    def expert(self, layer: int, expert: int, h: F64) -> F64:
        """Return one expert's output for normalized h [T, D]: down(silu(gate(h)) * up(h)) (Shazeer 2020)."""
        gate, up, down = (self._part(part) for part in self.experts.experts[layer][expert].parts)
        inner = silu(gate.matmul(h, int8_activations=self.int8_activations)) * up.matmul(
            h, int8_activations=self.int8_activations
        )
        return down.matmul(inner, int8_activations=self.int8_activations)

    def head(self, x: F64) -> F64:
        """Return the logits [T, V] of the last layer's residual stream x [T, D]."""
        h = rms_norm(x, self.vector("output_norm.weight"), self.spec.rms_eps)
        return self._matmul("token_embd.weight" if self.spec.tied_head else "output.weight", h)

    def matrix(self, name: str) -> Matrix:
        """Return a dense matrix by its tensor's name."""
        tensor = self._tensors[name]
        rows, cols = tensor.shape
        return self._matrix(tensor.type, tensor.file, tensor.offset, tensor.n_bytes, (rows, cols))

    def vector(self, name: str) -> F32:
        """Return a norm's weight by its tensor's name."""
        tensor = self._tensors[name]
        return dequantize(tensor.type, self._bytes(tensor.file, tensor.offset, tensor.n_bytes), tensor.shape)

    def _matmul(self, name: str, x: F64) -> F64:
        return self.matrix(name).matmul(x, int8_activations=self.int8_activations)

    def _part(self, part: ExpertPart) -> Matrix:
        return self._matrix(part.type, part.file, part.offset, part.n_bytes, (part.rows, part.cols))

    def _matrix(self, type: GGMLType, file: int, offset: int, n_bytes: int, shape: tuple[int, int]) -> Matrix:
        if (file, offset) not in self._cache:
            self._cache[file, offset] = Matrix(type, self._bytes(file, offset, n_bytes), shape)
        return self._cache[file, offset]

    def _bytes(self, file: int, offset: int, n_bytes: int) -> bytes:
        with open(self.gguf.paths[file], "rb") as stream:
            stream.seek(offset)
            data = stream.read(n_bytes)
        assert len(data) == n_bytes, f"{self.gguf.paths[file]} ends inside a tensor"
        return data
